"""Which layers could carry a guarantee at these weights: rank and least eigenvalue of K_l = J_l J_l^T.

J_l = d vec f(x) / d w_l is (n C) x p_l. With L = (1/n) sum_i loss_i(f_i) and r (n, C) the residuals
d loss_i / d f_i, the gradient in w_l is J_l^T vec(r) / n, so

    |grad_l L|^2 = vec(r)^T K_l vec(r) / n^2 >= lambda_min(K_l) |r|_F^2 / n^2:

where lambda_min(K_l) > 0, a small gradient means small residuals, hence for a convex loss a small L - L*, and
no stationary point is anything but a global minimum. This needs no wide layer and holds at any weights.

What is proved is said of the Gram *as stored*. It is a rounded product of factors that backpropagation has
rounded; that step is estimated (``rounding``), not proved, and lambda_min counts only as far as it exceeds
the estimate.

Source: Kawaguchi and Sun (AAAI 2021); the inequality: Polyak, *Gradient methods for the minimisation of
functionals*, 1963; Karimi, Nutini and Schmidt, ECML 2016.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.features import equal_samples
from gcfast.jacobian.layer_jacobians import LayerJacobians
from gcfast.jacobian.layers import Layers, checked_inputs
from gcfast.jacobian.trainability_report import LayerTrainability, Trainability
from gcfast.losses import (
    UNIT,
    ConvexLoss,
    bounds_at,
    check_convex,
    check_matches_outputs,
    gap_above,
    infimum_with_copies,
    mean_above,
    resolve_loss,
)
from gcfast.model import call_arguments, without_gradients
from gcfast.proofs import count_above, exact_products, matrix_rank, prove_least_eigenvalue
from gcfast.storage import allowed_bytes, check_memory

WORK = 9  # nC x nC float64 matrices that eigenvalues, rank and proof of one Gram take beside it, measured
SMALL = (
    256  # rows up to which matrix_rank closes what counts of eigenvalues leave open; beyond it takes an SVD
)


@ordinary()
def trainability(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: str | nn.Module | ConvexLoss = "cross_entropy",
    *,
    layers: Layers | None = None,
    dtype: torch.dtype = torch.float64,
    max_bytes: int | None = None,
) -> Trainability:
    """Which layers could carry a guarantee at these weights, and what the gradient says of L - L* there.

    The Jacobians are made in ``dtype``, in a copy of the model where it has another; narrower weights are
    exact in it. A layer with p_l < n C cannot have rank n C and is not looked at further.

    Args:
        model: in evaluation mode, or without anything that depends on the mode; outputs (n, C).
        x: the training samples, n >= 1: (n, ...), or a tuple or dict of such tensors; floating ones are taken
            in ``dtype``.
        y: targets, as ``loss`` takes them.
        loss: as for ``solve_head``.
        layers: as ``LayerJacobians`` takes them: names, patterns or classes; default: what is not frozen.
        dtype: float64 or float32; the latter is cheaper and resolves less.
        max_bytes: memory to use (default: what is free): all for n C x n C matrices, half of it while
            ``LayerJacobians`` works with the other half.

    Raises:
        TypeError, ValueError: naming the argument, and what :class:`LayerJacobians` refuses; MemoryError: the
        n C x n C matrices do not fit, with their bytes and the way out.
    """
    errors.is_module("model", model)
    errors.is_a("y", y, Tensor, "a tensor")
    errors.is_dense("y", y)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32; got {errors.came(dtype)}")
    convex = resolve_loss(loss)
    checked_inputs("x", x)
    model = _in_dtype(model, dtype)
    inputs = tree_map(
        lambda v: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, x
    )
    allowed_bytes(max_bytes, torch.device("cpu"))  # before it is halved
    half = None if max_bytes is None else max(1, max_bytes // 2)
    jacobians = LayerJacobians(model, inputs, layers=layers, max_bytes=half)
    return TrainabilityRun(jacobians, convex, inputs, max_bytes).run(x, y)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where a parameter or buffer has another floating dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.dtype == dtype for t in tensors if t.is_floating_point()):
        return model
    try:
        return copy.deepcopy(model).to(dtype)
    except RuntimeError as error:
        raise ValueError(f"model: cannot be copied to {dtype}: {error}; convert it yourself") from error


class TrainabilityRun:
    """One run: Grams in groups as memory allows, each judged and added to the total."""

    def __init__(self, jacobians: LayerJacobians, convex: ConvexLoss, x: Any, max_bytes: int | None):
        self.jacobians, self.convex, self.x, self.max_bytes = jacobians, convex, x, max_bytes
        self.n, self.c = jacobians.n, jacobians.c
        self.size = self.n * self.c

    def run(self, training_set: Any, y: Tensor) -> Trainability:
        """``training_set``: x as it was given, by which equal samples are told."""
        args, kwargs = call_arguments(self.x)
        with without_gradients():
            z = self.jacobians.model(*args, **kwargs)
        self.device = z.device
        check_matches_outputs(self.convex, y, z.shape[1:])
        self.y = self.convex.prepare(y.detach().to(z.device), self.n, self.c)
        check_convex(self.convex, z, self.y)
        self.duplicate_groups = equal_samples([v for v in tree_leaves(training_set) if isinstance(v, Tensor)])
        inputs = sum(v[0].numel() for v in tree_leaves(self.x) if isinstance(v, Tensor))
        # an entry of J and a product of two of its rows are sums of about so many rounded terms at most
        terms = sum(p.numel() for p in self.jacobians.model.parameters()) + inputs
        self.relative = torch.finfo(z.dtype).eps * math.sqrt(terms)
        outputs = z.to(torch.float64)
        at = bounds_at(self.convex, outputs, self.y, torch.zeros_like(outputs))
        residual = at.residual
        self.residual_norm = float(torch.linalg.vector_norm(residual.abs() + at.residual_error))
        slopes = self.jacobians.vjp((residual / self.n).to(z.dtype))
        norms = {name: float(torch.linalg.vector_norm(g.to(torch.float64))) for name, g in slopes.items()}
        gradients = {
            layer: math.hypot(*(norms[name] for name in names))
            for layer, names in self.jacobians.layers.items()
        }
        rows, total = self._judged(gradients)
        value = mean_above(at.value)
        infimum = infimum_with_copies(self.convex, self.y, self.duplicate_groups)
        return Trainability(
            n=self.n,
            c=self.c,
            rows=[rows[name] for name in self.jacobians.layers],
            total=total,
            loss_name=self.convex.name,
            loss=value,
            infimum=infimum,
            gap=gap_above(value, infimum),
            residual_norm=self.residual_norm,
            dtype=str(z.dtype).removeprefix("torch."),
            copies=self.duplicate_groups,
        )

    def _judged(self, gradients: dict[str, float]) -> tuple[dict[str, LayerTrainability], LayerTrainability]:
        """Rows by layer, and that of all together."""
        numel = self.jacobians.numel
        rows = {name: self._narrow(name, p, gradients[name]) for name, p in numel.items() if p < self.size}
        parameters, norm = sum(numel.values()), math.hypot(*gradients.values())
        if parameters < self.size:
            return rows, self._narrow("total", parameters, norm)
        whole: Tensor | None = None
        for name, gram in self._grams(list(rows)):
            whole = gram.clone() if whole is None else whole.add_(gram)
            if name is not None:
                rows[name] = self._judge(name, numel[name], gram, gradients[name])
            del gram
        assert whole is not None
        return rows, self._judge("total", parameters, whole, norm)

    def _grams(self, narrow: list[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(layer, K_l) in float64; first, without a name, the sum over narrow layers."""
        wide = [name for name in self.jacobians.layers if name not in narrow]
        matrix = 8 * self.size**2
        check_memory(
            f"trainability of n C = {self.size} outputs",
            (WORK + 2) * matrix,
            self.max_bytes,
            self.device,
            "fewer samples, or more max_bytes",
        )
        allowed = allowed_bytes(self.max_bytes, self.device)
        if allowed is None:
            at_once = len(wide)
        else:  # the other half is LayerJacobians'
            at_once = max(1, min(allowed // matrix - WORK, allowed // 2 // matrix) - 1)
        if narrow:
            yield None, self._stored("total", self.jacobians.gram(narrow))
        for start in range(0, len(wide), at_once):
            grams = self.jacobians.gram(wide[start : start + at_once], per_layer=True)
            for name in list(grams):
                yield name, self._stored(name, grams.pop(name))

    def _stored(self, name: str, gram: Tensor) -> Tensor:
        gram = gram.to(torch.float64)
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(f"model: the Jacobian Gram of {name!r} is not finite")
        return gram

    def _narrow(self, name: str, parameters: int, gradient: float) -> LayerTrainability:
        reason = f"never: p_l = {parameters:,} < n C = {self.size:,}"
        return LayerTrainability(
            name, parameters, None, 0, parameters, 0.0, None, None, 0.0, 0.0, gradient, math.inf, reason
        )

    def _judge(self, name: str, parameters: int, k: Tensor, gradient: float) -> LayerTrainability:
        # |E|_2 <= |E|_F, E_ab about eps sqrt(terms) sqrt(K_aa K_bb) where rounding errors are independent
        rounding = self.relative * float(k.trace())
        eigenvalues = torch.linalg.eigvalsh(k)
        least, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        rank = int((eigenvalues > rounding).sum())
        # equal samples make J J^T singular, whatever rounding made of K
        lower = 0.0 if self.duplicate_groups or rank < self.size else prove_least_eigenvalue(k)
        if lower > rounding:
            bounds = (self.size, self.size)
        else:
            bounds = rank_bounds(k, rounding)
            rank = min(max(rank, bounds[0]), bounds[1])
        margin = max(lower - rounding, 0.0)
        gap = math.inf
        if margin > 0:
            # the gradient J^T r / n is rounded as K is: |J|_F^2 is the trace
            lost = self.relative * math.sqrt(float(k.trace())) * self.residual_norm
            residual = (self.n * gradient + lost) / math.sqrt(margin) * (1 + 16 * UNIT)
            gap = self.convex.gap_bound(self.y, self.c, residual)
        return LayerTrainability(
            name=name,
            parameters=parameters,
            rank=rank,
            rank_lower=bounds[0],
            rank_upper=bounds[1],
            lambda_min_lower=lower,
            lambda_min=least,
            lambda_max=largest,
            rounding=rounding,
            pl=self.convex.dominance(self.c) * margin / self.n,
            gradient_norm=gradient,
            gap_bound=gap,
            reason=self._reason(margin, rank),
        )

    def _reason(self, margin: float, rank: int) -> str:
        if margin > 0:
            return "could carry a guarantee"
        if self.duplicate_groups:
            return "no: equal samples"
        if rank < self.size:
            return f"no: rank {rank:,} < n C = {self.size:,} above rounding"
        return "not resolved: lambda_min has no proved bound above rounding"


def rank_bounds(k: Tensor, tolerance: float) -> tuple[int, int]:
    """Proved bounds of the number of singular values above ``tolerance`` of symmetric k."""
    n, lower, upper, low = len(k), 0, len(k), k.tril()
    with exact_products(k.device):
        if not bool(k.any()):
            return 0, 0
        # (p, e) of a shift: p eigenvalues above shift - e, at most p above shift + e
        lost = 1.1 * count_above(low, tolerance)[1]
        if math.isfinite(lost):
            p, e = count_above(low, tolerance + lost)
            lower = p if e <= 0.999 * lost else 0
        if lost < tolerance:
            (p, e), (q, f) = count_above(low, tolerance - lost), count_above(low, lost - tolerance)
            if max(e, f) <= 0.999 * lost and q == n:  # none is below -tolerance
                upper = p
    if lower < upper and n <= SMALL:
        found = matrix_rank(k, atol=tolerance, rtol=0.0)
        lower, upper = max(lower, int(found.lower)), min(upper, int(found.upper))
    return lower, upper
