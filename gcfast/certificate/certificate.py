"""The result of certify: is rank(H1) = n proved, by which assumptions, what spoils it, the gap L - L*."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gcfast import errors
from gcfast.losses import MSE, ConvexLoss, above, bounds_at, gap_above, mean_above
from gcfast.proofs import SMALLEST, round_up

Status = Literal["holds", "fails", "unknown", "not checked"]


@dataclass(frozen=True)
class Assumption:
    """One thing the guarantee rests on, and what was found."""

    name: str
    status: Status
    reason: str

    def __str__(self) -> str:
        return f"[{self.status}] {self.name}: {self.reason}"


@dataclass(frozen=True)
class Offender:
    """Samples that spoil the rank.

    ``kind``: equal inputs, equal features, or a (near-)dependency with coefficients.
    """

    kind: str
    samples: list[int]
    targets: list[Any] = field(default_factory=list)
    conflicting: bool | None = None
    coefficients: list[float] = field(default_factory=list)
    residual: float | None = None

    def __str__(self) -> str:
        text = f"{self.kind}: samples {abbreviated(self.samples)}"
        if self.targets:
            text += f", targets {abbreviated(self.targets)}" + (" (conflicting)" if self.conflicting else "")
        if self.residual is not None:
            text += f", relative residual {self.residual:.1e}"
        return text


@dataclass
class Certificate:
    """What is proved of a model and its training set.

    ``status``: "holds", "fails" (``offenders`` or the reason are the witness) or "unknown" (the reason says
    what would decide it). ``route``: "direct", "theorem" or None. ``rank_lower``: proved lower bound of
    rank(H1). ``sigma_min_lower``, ``sigma_max_upper``: proved bounds of its singular values, rounding
    included (0 and inf where nothing is proved). ``loss``, ``infimum``, ``gap``: no less than the current
    training loss, no more than L*, and no less than L - L*, the rounding of their own evaluation included
    (None without a loss). L is that of the outputs as the model computed them and, where
    ``sigma_min_lower`` is proved, of H1 V without the model's rounding too.
    """

    status: Literal["holds", "fails", "unknown"]
    route: Literal["direct", "theorem"] | None
    reason: str
    n: int
    width: int
    rank_lower: int
    sigma_min_lower: float
    sigma_max_upper: float
    offenders: list[Offender]
    assumptions: list[Assumption]
    loss_name: str | None = None
    loss: float | None = None
    infimum: float | None = None
    gap: float | None = None
    _convex: ConvexLoss | None = field(default=None, repr=False)
    _outputs: Tensor | None = field(default=None, repr=False)
    _error: Tensor | None = field(default=None, repr=False)  # of the outputs
    _targets: Tensor | None = field(default=None, repr=False)

    def steps_to(self, eps: float) -> float:
        """Steps of gradient descent on the head, of size 1/beta, after which L - L* <= eps for sure.

        From L(w_t) - L(V) <= beta |V - V_tau|^2 / (2 t), beta = smoothness * sigma_max(H1)^2 / n, for the V
        that reaches a loss near L* + eps/2, |V - V_tau| <= |Z - Z_tau| / sigma_min(H1); for the squared loss
        from L(w_t) - L* <= (1 - sigma_min^2/sigma_max^2)^(2t) (L(V_tau) - L*). The rounding of all this is in
        it, not that of the steps. Infinite where sigma_min has no proved bound; ValueError without a loss.
        """
        errors.is_number("eps", eps, above=0)
        if self._convex is None or self._outputs is None or self._error is None or self._targets is None:
            raise ValueError("steps_to needs a loss and targets: call certify(..., loss=...)")
        assert self.gap is not None and self.infimum is not None
        if self.gap <= eps:
            return 0.0
        if self.sigma_min_lower <= 0:
            return math.inf
        condition = above(self.sigma_max_upper / self.sigma_min_lower)
        square = above(condition * condition)
        if square == math.inf:
            return math.inf
        outputs, targets = self._outputs, self._targets
        if type(self._convex) is MSE:
            return _whole(0.5 * math.log(above(self.gap / eps)) / -math.log1p(-1 / square))
        goal = self._convex.reachable(outputs, targets, max(0.5 * eps, SMALLEST))
        smoothness = self._convex.smoothness(outputs.shape[1])
        if goal is None or smoothness == math.inf:
            return math.inf
        # what is left of eps at the goal as it is stored
        loss = mean_above(bounds_at(self._convex, goal, targets, torch.zeros_like(goal)).value)
        left = eps - gap_above(loss, self.infimum)
        if not left > 0:
            return math.inf
        away2 = ((goal - outputs).abs() + self._error) ** 2
        return _whole(smoothness * square * mean_above(away2.flatten(), self.n) / (2 * left))

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; infinities become None."""

        def plain(x: float | None) -> float | None:
            return x if x is None or math.isfinite(x) else None

        return {
            "status": self.status,
            "route": self.route,
            "reason": self.reason,
            "n": self.n,
            "width": self.width,
            "rank_lower": self.rank_lower,
            "sigma_min_lower": self.sigma_min_lower,
            "sigma_max_upper": plain(self.sigma_max_upper),
            "offenders": [asdict(o) for o in self.offenders],
            "assumptions": [asdict(a) for a in self.assumptions],
            "loss_name": self.loss_name,
            "loss": plain(self.loss),
            "infimum": plain(self.infimum),
            "gap": plain(self.gap),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        head = f"expressivity condition {self.status.upper()}" + (
            f" (route: {self.route})" if self.route else ""
        )
        lines = [
            head,
            f"  {self.reason}",
            f"  n = {self.n} samples, m = {self.width} features, rank(H1) >= {self.rank_lower} proved",
        ]
        if self.sigma_min_lower > 0:
            lines.append(
                f"  {self.sigma_min_lower:.3e} <= sigma_min(H1), "
                f"sigma_max(H1) <= {self.sigma_max_upper:.3e} (proved, rounding included)"
            )
        if self.loss is not None and self.infimum is not None and self.gap is not None:
            lines.append(
                f"  {self.loss_name}: L = {self.loss:.6g}, global minimum L* = {self.infimum:.6g}, "
                f"gap L - L* = {self.gap:.3g}"
            )
        lines += [f"  {a}" for a in self.assumptions] + [f"  offender: {o}" for o in self.offenders[:10]]
        if len(self.offenders) > 10:
            lines.append(f"  ... and {len(self.offenders) - 10} more offenders")
        return "\n".join(lines)


def _whole(steps: float) -> float:
    """The next whole number, some ten roundings of ``steps`` allowed for."""
    steps = round_up(steps)
    return float(math.ceil(steps)) if math.isfinite(steps) else math.inf


def abbreviated(items: list[Any]) -> str:
    """A list as text, its first eight items where it is longer."""
    return str(items) if len(items) <= 8 else str(items[:8])[:-1] + f", ... {len(items) - 8} more]"
