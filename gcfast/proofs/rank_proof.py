"""What a proof of full row rank says, and the memory and operations that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gcfast.features import PANEL
from gcfast.proofs.tiles import Tiles


@dataclass(frozen=True)
class RankProof:
    """Outcome of :func:`prove_full_rank`.

    ``proved``: rank(H1) = n is proved. ``sigma_min_lower`` / ``sigma_max_upper``: proved bounds on the
    extreme singular values (0 and inf where not proved). ``margin``: what the errors leave of 1, which is
    perfect: a proved lower bound of sigma_min(X H1) for the witness X of whitening, (s - errors) / s for a
    shift s. ``passes``: of whitening. ``reason``: one sentence. ``route``: what proved it, None where nothing
    did; both routes rest on the error bound of matrix products and on nothing else.
    """

    proved: bool
    sigma_min_lower: float
    sigma_max_upper: float
    margin: float
    passes: int
    reason: str
    route: Literal["shift", "whitening"] | None = None


def panel_bytes(n: int, m: int) -> int:
    # a panel, its product with the witness, and in a doubled product their parts; tiles and sums
    return 8 * n * 6 * min(PANEL, m + 1) + (1 << 25)


def proof_bytes(n: int, m: int, *, disk: bool = False, sharp: bool = False) -> int:
    """Peak bytes of :func:`prove_full_rank` beyond the features; ``disk``: where its tiles are in files."""
    # Gram or witness, the next factor, where whitening is repeated the witness so far; a sharp bound keeps
    # the best witness besides
    return panel_bytes(n, m) + (0 if disk else (4 if sharp else 3) * 8 * Tiles.count(n))


def proof_flops(n: int, m: int) -> float:
    """Operations of a proof by two passes of whitening, without the making of features."""
    triangle = 1.0 * n * n * m
    cube = n**3 / 3.0
    return 7.0 * triangle + 6.0 * cube  # Gram; Q and its Gram twice, the second Q doubled; factors, inverses


class ProofProgress:
    """The fraction of the whole that is done, from what each step costs in products of n^2 m operations."""

    def __init__(self, on_progress: Callable[[str, float], None] | None, n: int, m: int):
        self.on_progress, self.cube = on_progress, n / (3 * max(m, 1))
        self.done, self.shown = 0.0, 0.0
        self.rest: list[tuple[str, float]] = []
        self.passes = 2 if n > 2000 else 1  # of whitening, where it comes to that: large ones mostly do
        self.expect(["Gram", "Cholesky"] + (self.whitening(2) if self.passes > 1 else []))

    def whitening(self, passes: int) -> list[str]:
        return ["factor", "whitening"] + (passes - 1) * ["factor", "compose", "whitening"] + ["norm"]

    def expect(self, steps: list[str]) -> None:
        costs = {"Gram": 1.0, "whitening": 2.5, "factor": 2 * self.cube, "norm": 0.02}
        self.rest = [(step, costs.get(step, self.cube)) for step in steps]

    def __call__(self, step: str, fraction: float) -> None:
        """``fraction`` of a step that is the first of the rest, or not expected."""
        if not self.rest or self.rest[0][0] != step:
            self.rest = [(step, self.cube), *self.rest]
        cost = self.rest[0][1]
        now = self.done + fraction * cost
        if fraction >= 1.0:
            self.done = now
            self.rest.pop(0)
        if self.on_progress is not None:
            whole = self.done + sum(c for _, c in self.rest)
            self.shown = max(self.shown, min(now / whole, 0.999) if whole else 0.999)
            self.on_progress(step, self.shown)

    def end(self) -> None:
        if self.on_progress is not None:
            self.on_progress("done", 1.0)
