"""What trainability says of each layer: rank, smallest eigenvalue, and the bound on L - L*."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


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
    ``loss``, ``infimum``, ``gap``: bounds of L from above, of L* from below and of L - L* from above, at the
    outputs as computed, rounding included. ``residual_norm``: |r|_F. ``copies``: groups of equal
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


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
