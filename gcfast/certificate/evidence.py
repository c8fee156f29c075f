"""What certify gathers on its way: assumptions that hold or fail, samples that spoil the rank, bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gcfast.certificate.certificate import Assumption, Offender, Status


@dataclass
class Evidence:
    """What is known so far of n samples with these targets; each route adds to it.

    ``rank_lower``: proved lower bound of rank(H1). ``sigma_min_lower``, ``sigma_max_upper``: proved bounds of
    the singular values of H1, 0 and inf where nothing is proved.
    """

    n: int
    targets: Tensor | None
    assumptions: list[Assumption] = field(default_factory=list)
    offenders: list[Offender] = field(default_factory=list)
    rank_lower: int = 0
    sigma_min_lower: float = 0.0
    sigma_max_upper: float = math.inf

    def note(self, name: str, status: Status, reason: str) -> None:
        """Add what was found of one assumption."""
        self.assumptions.append(Assumption(name, status, reason))

    def add_offender(
        self,
        kind: str,
        samples: list[int],
        coefficients: list[float] | None = None,
        residual: float | None = None,
    ) -> None:
        """Add samples that spoil the rank, with their targets.

        Equal samples conflict where their targets differ; a dependency, which has coefficients, conflicts
        with nothing.
        """
        targets: list[Any] = []
        conflicting: bool | None = None
        if self.targets is not None:
            targets = [self.targets[i].tolist() for i in samples]
            if coefficients is None:
                conflicting = any(t != targets[0] for t in targets)
        self.offenders.append(
            Offender(kind, list(samples), targets, conflicting, coefficients or [], residual)
        )
