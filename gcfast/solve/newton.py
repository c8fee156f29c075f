"""Newton's method on the regularisation path, in the variable A of U = H1^T A.

Minimises P(A) = (1/n) sum_i loss_i(z0_i + (K A)_i) + (lambda/2) tr(A^T K A), K = H1 H1^T (n x n), A (n, C).
Steps solve (S K / n + lambda I) B = -g, g = residual/n + lambda A, by conjugate gradients in the inner
product of K, which is the ordinary one of U: every iterate is a step down, at one product with K each.

What makes it short is the preconditioner. Small lambda makes the problem harder but the curvature S sparser:
only pairs (sample, class) with d_ic K_ii > tau n lambda matter, hundreds to thousands of the n C. With E the
rows e_c - e_reference of those pairs, Woodbury's identity gives the exact inverse of the curvature restricted
to them,

    (lambda I + H~^T S~ H~ / n)^-1 = (1/lambda) (I - H~^T (n lambda S~^-1 + K~)^-1 H~),

with K~ = (E E^T) o K over the active pairs and S~^-1 = diag(1/p) + 1 1^T/(1 - sum p) sample by sample. One
Cholesky factorisation of that size a step; conjugate gradients then need a few products. Losses that are a
mean over outputs have a block of samples an output instead, or, where more samples carry curvature than can
be factored, a subspace of directions (:class:`gcfast.solve.grams.Nystrom`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from gcfast.losses import ConvexLoss, CrossEntropy
from gcfast.solve.grams import Gram
from gcfast.solve.nystrom import Nystrom
from gcfast.solve.problem import HeadProblem

TAU = 0.05  # pairs below this share of n lambda stay out of the preconditioner
# pairs coupled by one softmax factorisation, a share of n: more save products, fewer save the factor
PAIRS, SHARE, MOST_PAIRS = 500, 5, 4096
BLOCK = 4096  # most samples in one separable block
CLASSES = 16  # beyond, one Nystrom factor serves all outputs
LONG = 12  # steps of conjugate gradients that say the preconditioner falls short
CG_STEPS = 40
CG_TOLERANCE = 0.4  # of the preconditioned residual: more exact steps cost more products than they save
NEWTON_STEPS = 30
SHORT = 0.5  # of a Newton step


@dataclass
class NewtonState:
    """A point of the path: A, f = K A and what follows from them."""

    a: Tensor
    f: Tensor
    loss: float = math.nan
    value: float = math.nan
    gap: float = math.inf  # P - D by the gradient: |g|^2 / (2 lambda)
    quadratic: float = 0.0  # (lambda/2) |U|^2
    step: tuple[Tensor, Tensor | None] | None = None  # U, where summed up with more digits than A's


Preconditioner = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Problem(ABC):
    """Everything fixed along the path, in the coordinates A that a form of the features gives to U.

    The rows may be a part of the training set: ``n`` is the number of samples that losses are averaged over.
    """

    offset: Tensor  # outputs (n, C) at A = 0
    loss: ConvexLoss
    targets: Tensor
    n: int
    scale: float  # mean squared length of a sample about the common mean
    repeatable = True  # whether made anew the coordinates mean the same
    products: int = 0
    steps: int = 0
    slow: bool = False  # conjugate gradients took long

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Outputs f (n, C) of the coordinates x, counted."""

    @abstractmethod
    def pull(self, r: Tensor) -> Tensor:
        """The gradient in U of sum_i <r_i, f_i>, in these coordinates, for r (n, C)."""

    @abstractmethod
    def metric(self, x: Tensor, f: Tensor) -> Tensor:
        """What y is multiplied with, element by element, for <y, x> in U; f: the outputs of x."""

    @abstractmethod
    def preconditioner(self, z: Tensor, residual: Tensor, lam: float, d: Tensor | None) -> Preconditioner:
        """An approximate inverse of the Hessian at the outputs z; with d (n, C) in place of the curvature."""

    @abstractmethod
    def noise(self, a: Tensor) -> float:
        """Of what size rounding makes the outputs of a wrong."""

    @abstractmethod
    def zero(self) -> Tensor:
        """The coordinates of U = 0."""

    @abstractmethod
    def direction(self, head_problem: HeadProblem, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """U as a step of the weight (C, m) and of the bias (C,)."""

    def coordinates(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Those of a step of the weight (C, m) and of the bias (C,); None where they cannot be told."""
        return None

    def square(self, a: Tensor, f: Tensor) -> float:
        """|U|^2."""
        return float((a * self.metric(a, f)).sum())

    def evaluate(self, a: Tensor, f: Tensor, lam: float) -> float:
        """P."""
        loss = float(self.loss.value(self.offset + f, self.targets).sum()) / self.n
        return loss + 0.5 * lam * self.square(a, f)


class GramProblem(Problem):
    """U = H1^T A, with K = H1 H1^T. ``gram`` may be float32: products are, all else is float64.

    ``rank`` is that of the Nystrom preconditioner of separable losses; with 0 there is none.
    """

    def __init__(
        self, gram: Gram, offset: Tensor, loss: ConvexLoss, targets: Tensor, n: int = 0, rank: int = 0
    ):
        self.gram, self.offset, self.loss, self.targets = gram, offset, loss, targets
        self.n, self.rank = n or gram.n, rank
        mean = gram.mean()
        self.squares = gram.diagonal().clamp(min=0.0)
        # of the centred K: the common mean of all features is one direction and misleads about the rest
        centred = self.squares - 2 * mean + mean.mean()
        self.diagonal = torch.maximum(centred, self.squares / gram.n).clamp(min=1e-300)
        self.scale = float(self.diagonal.mean())

    def product(self, x: Tensor) -> Tensor:
        self.products += 1
        scale = float(x.abs().amax())
        if scale == 0.0 or not math.isfinite(scale):
            return x * 0.0
        # to size one, and without what is 1e-30 of it: subnormals would slow the product tenfold
        y = x / scale
        y[y.abs() < 1e-30] = 0.0
        return self.gram.product(y.to(self.gram.dtype)).to(torch.float64) * scale

    def pull(self, r: Tensor) -> Tensor:
        return r

    def metric(self, x: Tensor, f: Tensor) -> Tensor:
        return f

    def preconditioner(self, z: Tensor, residual: Tensor, lam: float, d: Tensor | None) -> Preconditioner:
        if isinstance(self.loss, CrossEntropy) and d is None:
            return _softmax_preconditioner(self, self.loss.probabilities(residual, self.targets), lam)
        d = self.loss.curvature_diagonal(z, self.targets) if d is None else d
        return _separable_preconditioner(self, d, lam)

    def noise(self, a: Tensor) -> float:
        return gram_noise(self.squares, a, self.gram.dtype)

    def zero(self) -> Tensor:
        return torch.zeros_like(self.offset)

    def direction(self, head_problem: HeadProblem, a: Tensor) -> tuple[Tensor, Tensor | None]:
        return head_problem.transpose(a)

    @cached_property
    def nystrom(self) -> Nystrom:
        found = Nystrom(self.gram, self.rank, torch.Generator("cpu").manual_seed(0))
        self.products += found.products
        return found


def gram_noise(squares: Tensor, a: Tensor, dtype: torch.dtype) -> float:
    """By how much rounding changes K a, with K_ii = squares: |K_ij| <= |h_i| |h_j|, summed as by chance."""
    lengths = squares.clamp(min=0.0).sqrt()
    size = torch.linalg.vector_norm(a * lengths[:, None], dim=0).amax()
    return torch.finfo(dtype).eps * float(lengths.amax() * size)


def _softmax_pairs(problem: GramProblem, p: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Active pairs: sample, class, and each sample's reference class (its most probable one)."""
    reference = p.argmax(1)
    q = p.scatter(1, reference[:, None], 0.0)
    weight = q * (1 - q) * problem.diagonal[:, None]
    threshold = TAU * problem.n * lam
    gram = problem.gram
    most = max(PAIRS, min(gram.n // SHARE, MOST_PAIRS, gram.most_rows))
    if int((weight > threshold).sum()) > most:
        threshold = max(threshold, float(weight.flatten().topk(most + 1).values[-1]))
    sample, cls = (weight > threshold).nonzero(as_tuple=True)
    return sample, cls, reference


def _softmax_preconditioner(problem: GramProblem, p: Tensor, lam: float) -> Preconditioner:
    n, c = p.shape
    sample, cls, reference = _softmax_pairs(problem, p, lam)
    if len(sample) == 0:
        return lambda r, kr: (r / lam, kr / lam)
    ref = reference[sample]
    rows, inverse = torch.unique_consecutive(sample, return_inverse=True)
    k_rows = problem.gram.rows(rows)  # (active samples, n)
    pairs = torch.arange(len(sample), device=p.device)
    e = torch.zeros((len(sample), c), dtype=problem.gram.dtype, device=p.device)
    e[pairs, cls] += 1
    e[pairs, ref] -= 1
    # exact small integers times K: no rounding but the product's own
    pairs_of_k = k_rows.index_select(1, sample).index_select(0, inverse)
    system = pairs_of_k.mul_(e @ e.mT).to(torch.float64)
    p_active = p[sample, cls]
    rest = torch.ones(len(rows), dtype=torch.float64, device=p.device).index_add_(0, inverse, -p_active)
    shared = n * lam / rest.clamp(min=1e-12)
    system.diagonal().add_(n * lam / p_active + shared[inverse])
    for k in range(1, c):  # other active classes of the same sample
        same = (sample[k:] == sample[:-k]).nonzero()[:, 0]
        if len(same) == 0:
            break
        system[same + k, same] += shared[inverse[same]]
    factor = shifted_cholesky(system)

    def apply(r: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        t = kr[sample, cls] - kr[sample, ref]
        x = torch.cholesky_solve(t[:, None], factor)[:, 0]
        correction = torch.zeros((len(rows), c), dtype=torch.float64, device=p.device)
        correction.index_put_((inverse, cls), x, accumulate=True)
        correction.index_put_((inverse, ref), -x, accumulate=True)
        k_correction = (correction.to(k_rows.dtype).mT @ k_rows).mT.to(torch.float64)
        return r.index_add(0, rows, -correction) / lam, (kr - k_correction) / lam

    return apply


def _nystrom_preconditioner(problem: GramProblem, d: Tensor, lam: float) -> Preconditioner:
    """On the subspace of :class:`Nystrom` the Hessian's inverse a class, for curvatures d (n, C)."""
    space, n, c = problem.nystrom, problem.n, d.shape[1]
    if c > CLASSES:
        d, c = d.mean(1, keepdim=True), 1  # one factor for all
    same = c == 1 or all(torch.equal(d[:, 0], d[:, k]) for k in range(1, c))
    factors = [space.inverse(d[:, k], n, lam) for k in range(1 if same else c)]

    def apply(r: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        t = space.w.mT @ kr
        if same:
            x = torch.cholesky_solve(t, factors[0])
        else:
            x = torch.cat([torch.cholesky_solve(t[:, k : k + 1], factors[k]) for k in range(c)], 1)
        x -= t / lam
        return r / lam + space.w @ x, kr / lam + space.f @ x

    return apply


def _separable_preconditioner(problem: GramProblem, d: Tensor, lam: float) -> Preconditioner:
    """One block a class, over the samples whose curvature d_ic counts; equal blocks are factored once."""
    n = problem.n
    block = min(BLOCK, problem.gram.most_rows)
    if problem.rank and int(((d * problem.diagonal[:, None]).amax(1) > TAU * n * lam).sum()) > block:
        return _nystrom_preconditioner(problem, d, lam)
    blocks: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, factor, K[rows]
    previous: tuple[Tensor, Tensor] | None = None
    for c in range(d.shape[1]):
        weight = d[:, c] * problem.diagonal
        rows = (weight > TAU * n * lam).nonzero()[:, 0]
        if len(rows) > block:
            rows = weight.topk(block).indices.sort().values
        values = d[rows, c]
        if previous is not None and torch.equal(previous[0], rows) and torch.equal(previous[1], values):
            blocks.append(blocks[-1])
            continue
        previous = (rows, values)
        k_rows = problem.gram.rows(rows)
        system = k_rows.index_select(1, rows).to(torch.float64)
        system.diagonal().add_(n * lam / values)
        blocks.append((rows, shifted_cholesky(system), k_rows))

    def apply(r: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
        z, kz = r.clone(), kr.clone()
        for c, (rows, factor, k_rows) in enumerate(blocks):
            if len(rows):
                x = torch.cholesky_solve(kr[rows, c][:, None], factor)[:, 0]
                z[rows, c] -= x
                kz[:, c] -= (x.to(k_rows.dtype) @ k_rows).to(torch.float64)
        return z / lam, kz / lam

    return apply


def shifted_cholesky(system: Tensor) -> Tensor:
    """Cholesky factor, with the least relative shift that lets it through (K may be float32)."""
    shift = 0.0
    for _ in range(20):
        low, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0:
            return low
        grow = 1e-14 if shift == 0.0 else 9.0 * shift
        system.diagonal().mul_(1.0 + grow)  # of each diagonal its share: rows may be of any length
        shift += grow
    raise FloatingPointError("the Gram of the features is too far from positive semidefinite, or overflows")


def minimise(problem: Problem, state: NewtonState, lam: float, tolerance: float) -> NewtonState:
    """Newton steps from ``state``, NEWTON_STEPS at most, until P - D <= tolerance * (lambda/2)|U|^2.

    Far from its targets a loss is nearly linear, and Newton's step, by what little curvature is there, leads
    far beyond them. Where it had to be cut short, the next one minimises a quadratic above the loss.
    """
    a, f = state.a, state.f
    n, loss, targets = problem.n, problem.loss, problem.targets
    cut = False
    for step in range(NEWTON_STEPS + 1):
        z = problem.offset + f
        value, residual, _ = loss.terms(z, targets)
        mean = float(value.sum()) / n
        quadratic = 0.5 * lam * problem.square(a, f)
        total = mean + quadratic
        g = problem.pull(residual / n) + lam * a
        kg = problem.product(g)
        gap = problem.square(g, kg) / (2 * lam)
        state = NewtonState(a, f, mean, total, max(gap, 0.0), quadratic)
        if gap <= tolerance * quadratic or step == NEWTON_STEPS or not math.isfinite(total):
            break
        d = loss.majorant(z, targets) if cut else None
        if d is not None:
            curvature = partial(torch.mul, d)
        elif isinstance(loss, CrossEntropy):
            curvature = partial(_softmax_curvature, loss.probabilities(residual, targets))
        else:
            curvature = partial(loss.curvature_product, z, targets)
        apply = problem.preconditioner(z, residual, lam, d)
        b, kb = _conjugate_gradients(problem, curvature, apply, g, kg, lam)
        # Armijo along b; the first trial is Newton's own step
        slope, t = float((g * problem.metric(b, kb)).sum()), 1.0
        while t > 1e-12:
            new = problem.evaluate(a + t * b, f + t * kb, lam)
            if new <= total + 1e-4 * t * slope:
                break
            t *= 0.5
        else:
            break  # down to rounding
        problem.steps += 1
        cut = d is None and t < SHORT
        a, f = a + t * b, f + t * kb
    return state


def _softmax_curvature(p: Tensor, v: Tensor) -> Tensor:
    """(diag(p) - p p^T) v, row by row."""
    pv = p * v
    return pv - p * pv.sum(1, keepdim=True)


def _conjugate_gradients(
    problem: Problem,
    curvature: Callable[[Tensor], Tensor],
    apply: Preconditioner,
    g: Tensor,
    kg: Tensor,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """B with (S K/n + lambda) B ~ -g, and its outputs K B."""
    r, kr = -g, -kg
    z, kz = apply(r, kr)
    p, kp = z, kz
    rz = start = float((r * problem.metric(z, kz)).sum())
    b, kb = torch.zeros_like(g), torch.zeros_like(kg)
    for step in range(CG_STEPS):
        q = problem.pull(curvature(kp) / problem.n) + lam * p
        denominator = float((problem.metric(p, kp) * q).sum())
        if not (denominator > 0 and rz > 0):
            break  # rounding has the upper hand
        problem.slow |= step >= LONG
        alpha = rz / denominator
        b, kb = b + alpha * p, kb + alpha * kp
        if step == CG_STEPS - 1:
            break
        r = r - alpha * q
        kr = problem.product(r)
        z, kz = apply(r, kr)
        new = float((r * problem.metric(z, kz)).sum())
        if new <= CG_TOLERANCE**2 * start:
            break
        p, kp = z + (new / rz) * p, kz + (new / rz) * kp
        rz = new
    return b, kb
