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
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gcfast._distinct import equal_samples
from gcfast._large_rank import count_above
from gcfast._products import check_products, exact_products
from gcfast._shift import prove_least_eigenvalue
from gcfast.jacobian import LayerJacobians, Layers
from gcfast.losses import ConvexLoss, check_convex, infimum_with_copies, resolve_loss
from gcfast.model.tracing import call_arguments
from gcfast.rank import matrix_rank
from gcfast.storage.memory import limit, require

WORK = 9  # nC x nC float64 matrices that eigenvalues, rank and proof of one Gram take beside it, measured
SMALL = (
    256  # rows up to which matrix_rank closes what counts of eigenvalues leave open; beyond it takes an SVD
)


@dataclass(frozen=True)
class LayerTrainability:
    """One layer, or all of them together.

    ``parameters``: p_l. ``rank_lower``, ``rank_upper``: proved bounds of the number of singular values of the
    Gram as stored that exceed ``rounding``; ``rank``: that number by estimate, None where p_l < n C, which
    decides without it. ``lambda_min_lower``: proved lower bound of lambda_min of the Gram as stored, 0 where
    none is positive. ``lambda_min``, ``lambda_max``: estimates, None with ``rank``. ``rounding``: an
    estimate, not a bound, of |K_stored - J J^T|. ``pl``: |grad L|^2 >= pl (L - L*), 0 where no such is known
    (all losses but MSE). ``gradient_norm``: of L in this layer's parameters. ``gap_bound``: L - L* is at most
    this, the gradient being no larger; inf where nothing follows. Both rest on ``margin`` and so on
    ``rounding``. ``reason``: the verdict in words.
    """

    name: str
    parameters: int
    rank: int | None
    rank_lower: int
    rank_upper: int
    lambda_min_lower: float
    lambda_min: float | None
    lambda_max: float | None
    rounding: float
    pl: float
    gradient_norm: float
    gap_bound: float
    reason: str

    @property
    def margin(self) -> float:
        """What is left of ``lambda_min_lower`` after ``rounding``, or 0: lambda_min that J J^T itself has."""
        return max(self.lambda_min_lower - self.rounding, 0.0)

    @property
    def carries(self) -> bool:
        """Whether this layer alone could carry a guarantee: a positive margin."""
        return self.margin > 0

    @property
    def condition(self) -> float | None:
        """lambda_max / lambda_min by estimate; inf where lambda_min is within ``rounding`` of zero."""
        if self.lambda_min is None or self.lambda_max is None:
            return None
        return self.lambda_max / self.lambda_min if self.lambda_min > self.rounding else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; infinities become None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"margin": self.margin, "carries": self.carries, "condition": self.condition}
        return {k: _plain(v) for k, v in values.items()}


@dataclass(frozen=True)
class Trainability:
    """What :func:`trainability` found, at the weights the model has.

    ``rows``: a :class:`LayerTrainability` a layer, in the order of the model; ``total``: K = sum_l K_l.
    ``loss``, ``infimum``, ``gap``: L, L* and L - L*. ``residual_norm``: |r|_F. ``copies``: groups of equal
    samples, whose equal rows make every K_l singular.
    """

    n: int
    c: int
    rows: list[LayerTrainability]
    total: LayerTrainability
    loss_name: str
    loss: float
    infimum: float
    gap: float
    residual_norm: float
    dtype: str
    copies: list[list[int]] = field(default_factory=list)

    @property
    def carriers(self) -> list[str]:
        """Names of the layers each of which alone could carry a guarantee."""
        return [row.name for row in self.rows if row.carries]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; infinities become None."""
        values: dict[str, Any] = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        values["rows"] = [row.to_dict() for row in self.rows]
        values["total"] = self.total.to_dict()
        values["carriers"] = self.carriers
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_svg(self) -> str:
        """Eigenvalue ranges layer by layer, a picture of its own. Needs matplotlib (``gcfast[cli]``)."""
        from gcfast.plots import eigenvalue_ranges

        return eigenvalue_ranges([*self.rows, self.total])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_svg` to a file."""
        Path(path).write_text(self.to_svg(), encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"trainability at these weights: n = {self.n}, C = {self.c}, K is {self.n * self.c} x "
            f"{self.n * self.c}, {self.dtype}",
            f"  {self.loss_name}: L = {self.loss:.6g}, L* = {self.infimum:.6g}, gap L - L* = {self.gap:.3g}, "
            f"|residual| = {self.residual_norm:.3g}",
        ]
        head = ("layer", "p_l", "rank", "lambda_min >=", "estimate", "lambda_max", "rounding", "|grad|")
        table = [(*head, "L - L* <=", "")]
        for row in [*self.rows, self.total]:
            found = row.rank if row.rank_lower == row.rank_upper else f"{row.rank_lower}..{row.rank_upper}"
            table.append(
                (
                    row.name,
                    f"{row.parameters:,}",
                    str(found) if row.rank is not None else f"<= {row.rank_upper}",
                    f"{row.lambda_min_lower:.3e}",
                    "-" if row.lambda_min is None else f"{row.lambda_min:.2e}",
                    "-" if row.lambda_max is None else f"{row.lambda_max:.2e}",
                    "-" if row.rank is None else f"{row.rounding:.0e}",
                    f"{row.gradient_norm:.2e}",
                    f"{row.gap_bound:.3g}",
                    row.reason,
                )
            )
        widths = [max(len(line[k]) for line in table) for k in range(len(head) + 1)]
        for name, *cells, reason in table:
            padded = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:]))
            lines.append(f"  {name.ljust(widths[0])}  {padded}  {reason}".rstrip())
        lines.append(f"  could carry a guarantee alone: {', '.join(self.carriers) or 'no layer'}")
        lines += [f"  equal samples: {group}" for group in self.copies[:5]]
        if len(self.copies) > 5:
            lines.append(f"  ... and {len(self.copies) - 5} more groups of equal samples")
        lines.append("  ranks and lambda_min >= are proved of the Gram as stored, the rest is estimated")
        return "\n".join(lines)


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor; got {type(y).__name__}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32; got {dtype}")
    convex = resolve_loss(loss)
    model = _in_dtype(model, dtype)
    inputs = tree_map(
        lambda v: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, x
    )
    limit(max_bytes, torch.device("cpu"))  # before it is halved
    half = None if max_bytes is None else max(1, max_bytes // 2)
    jacobians = LayerJacobians(model, inputs, layers=layers, max_bytes=half)
    return _Look(jacobians, convex, inputs, max_bytes).run(x, y)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, or a copy where a parameter or buffer has another floating dtype."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.dtype == dtype for t in tensors if t.is_floating_point()):
        return model
    try:
        return copy.deepcopy(model).to(dtype)
    except RuntimeError as error:
        raise ValueError(f"model: cannot be copied to {dtype}: {error}; convert it yourself") from error


class _Look:
    """One run: Grams in groups as memory allows, each judged and added to the total."""

    def __init__(self, jacobians: LayerJacobians, convex: ConvexLoss, x: Any, max_bytes: int | None):
        self.jacobians, self.convex, self.x, self.max_bytes = jacobians, convex, x, max_bytes
        self.n, self.c = jacobians.n, jacobians.c
        self.size = self.n * self.c

    def run(self, stored: Any, y: Tensor) -> Trainability:
        """``stored``: x as it was given, by which equal samples are told."""
        args, kwargs = call_arguments(self.x)
        with torch.no_grad():
            z = self.jacobians.model(*args, **kwargs)
        self.device = z.device
        self.y = self.convex.prepare(y.detach().to(z.device), self.n, self.c)
        check_convex(self.convex, z.to(torch.float64), self.y)
        self.copies = equal_samples([v for v in tree_leaves(stored) if isinstance(v, Tensor)])
        inputs = sum(v[0].numel() for v in tree_leaves(self.x) if isinstance(v, Tensor))
        # an entry of J and a product of two of its rows are sums of about so many rounded terms at most
        terms = sum(p.numel() for p in self.jacobians.model.parameters()) + inputs
        self.relative = torch.finfo(z.dtype).eps * math.sqrt(terms)
        residual = self.convex.residual(z, self.y)
        slopes = self.jacobians.vjp((residual / self.n).to(z.dtype))
        norms = {name: float(torch.linalg.vector_norm(g.to(torch.float64))) for name, g in slopes.items()}
        gradients = {
            layer: math.hypot(*(norms[name] for name in names))
            for layer, names in self.jacobians.layers.items()
        }
        rows, total = self._judged(gradients)
        value = float(self.convex.value(z, self.y).to(torch.float64).sum()) / self.n
        infimum = infimum_with_copies(self.convex, self.y, self.copies)
        return Trainability(
            n=self.n,
            c=self.c,
            rows=[rows[name] for name in self.jacobians.layers],
            total=total,
            loss_name=self.convex.name,
            loss=value,
            infimum=infimum,
            gap=value - infimum,
            residual_norm=float(torch.linalg.vector_norm(residual.to(torch.float64))),
            dtype=str(z.dtype).removeprefix("torch."),
            copies=self.copies,
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
        require(
            f"trainability of n C = {self.size} outputs",
            (WORK + 2) * matrix,
            self.max_bytes,
            self.device,
            "fewer samples, or more max_bytes",
        )
        allowed = limit(self.max_bytes, self.device)
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
        lower = 0.0 if self.copies or rank < self.size else prove_least_eigenvalue(k)
        if lower > rounding:
            bounds = (self.size, self.size)
        else:
            bounds = _rank_bounds(k, rounding)
            rank = min(max(rank, bounds[0]), bounds[1])
        margin = max(lower - rounding, 0.0)
        gap = math.inf
        if margin > 0:
            gap = self.convex.gap_bound(self.y, self.c, self.n * gradient / math.sqrt(margin))
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
        if self.copies:
            return "no: equal samples"
        if rank < self.size:
            return f"no: rank {rank:,} < n C = {self.size:,} above rounding"
        return "not resolved: lambda_min has no proved bound above rounding"


def _rank_bounds(k: Tensor, tolerance: float) -> tuple[int, int]:
    """Proved bounds of the number of singular values above ``tolerance`` of symmetric k."""
    if not bool(k.any()):
        return 0, 0
    n, lower, upper, low = len(k), 0, len(k), k.tril()
    with exact_products():
        check_products(k.device)
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


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
