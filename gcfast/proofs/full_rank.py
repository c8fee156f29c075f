"""Proof of full row rank in floating point, rounding errors included.

``prove_full_rank`` shows that H1 = [H, 1] (n x (m+1)) has rank n, as stored. Only matrix products are
trusted, by their error bound (:mod:`gcfast.proofs.rounding`). Factorisations only propose a witness; a bad
proposal makes the proof fail, never succeed wrongly. Two routes, the short one first:

- *Shift* (:mod:`gcfast.proofs.shift`): lambda_min(H1 H1^T) >= s - errors, up to condition numbers near 1e6.
- *Whitening* (:mod:`gcfast.proofs.whitening`): sigma_min(X H1) > 0 for a witness X, up to about 1e13.

Where the Gram nears the ends of float64's range both work on D H1, its rows scaled by powers of two
(:mod:`gcfast.proofs.scaling`): sigma_min(H1) >= sigma_min(X D H1) / ||X D||.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcfast import ops
from gcfast.features import FeaturesWithOnes
from gcfast.proofs.rank_proof import ProofProgress, RankProof, panel_bytes
from gcfast.proofs.rounding import UNIT, gamma, round_up
from gcfast.proofs.scaling import (
    GREATEST,
    LEAST,
    NORMAL,
    ScaledRows,
    lower_power,
    scale_columns_,
    scaled_rows,
    upper_power,
)
from gcfast.proofs.shift import GramSweep, ShiftProof, prove_by_shift
from gcfast.proofs.tiles import Tiles, compose_
from gcfast.proofs.whitening import (
    INNER32,
    Whitened,
    WhiteningSweep,
    cholesky_inverse,
    norm_sharp,
    norm_upper,
)
from gcfast.storage import SavedState, Scratch, StateFile, available

MAX_PASSES = 6  # of whitening; each gains about six digits of the condition number


def prove_full_rank(
    features: Tensor | FeaturesWithOnes,
    *,
    ones: bool = True,
    sharp: bool = True,
    progress: Callable[[str, float], None] | None = None,
    max_bytes: int | None = None,
    checkpoint: StateFile | None = None,
) -> RankProof:
    """Prove that [features, 1] has full row rank n; see the module's docstring for the method.

    Args:
        features: (n, m) float32 or float64, finite, n <= m + 1; float32 is taken exactly, as float64. Or
            panels of features that are not stored (``FeaturesWithOnes`` of ``WideFeatures``), which say
            themselves whether a column of ones is appended.
        ones: append the column of ones (the head's bias).
        sharp: spend about a third more time on a bound of sigma_min within some per cent of the truth.
        progress: called with a step's name and the fraction done.
        max_bytes: memory for n x n matrices; what is beyond goes to files without names in TMPDIR.
        checkpoint: where the state is kept between panels of H1, and taken up again.

    Raises:
        OSError: the disk has no room for a file. CheckpointError: the checkpoint is of something else.
    """
    h1 = features if isinstance(features, FeaturesWithOnes) else FeaturesWithOnes(features, ones)
    if h1.n == 0:
        return RankProof(True, math.inf, 0.0, 1.0, 0, "no rows")
    with ops.exact_products(h1.device):
        return _Proof(h1, sharp, progress, max_bytes, checkpoint).run()


class _Proof:
    """One run: the stage and what it works on are attributes, so that they can be kept and taken up again."""

    def __init__(
        self,
        h1: FeaturesWithOnes,
        sharp: bool,
        on_progress: Callable[[str, float], None] | None,
        max_bytes: int | None,
        checkpoint: StateFile | None,
    ):
        self.h1, self.sharp, self.checkpoint = h1, sharp, checkpoint
        self.low = self.high = 0  # of the exponents of D, a diagonal of powers of two
        self.scaled: ScaledRows | None = None  # h1 is this one then, D H1, and everything but bounds is of it
        self.progress = ProofProgress(on_progress, h1.n, h1.columns)
        free = max_bytes if max_bytes is not None else available(h1.device)
        self.room = math.inf if free is None else free - panel_bytes(h1.n, h1.columns)
        if h1.device.type != "cpu":
            self.room = math.inf
        self.least = 11.0 * (h1.n + h1.columns) * UNIT[torch.float64]
        self.short: ShiftProof | None = None
        self.sigma_max = math.inf
        self.passes = 0
        self.strict = sharp
        self.last = "rows dependent, or nearly so: the witness is too large for any error bound"

    def scratch(self, triangles: int) -> Scratch | None:
        """None, for memory, while ``triangles`` of them fit; else a place on disk."""
        return None if 8 * Tiles.count(self.h1.n) * triangles <= self.room else Scratch()

    def run(self) -> RankProof:
        state = self.checkpoint.load() if self.checkpoint is not None else None
        stage = "gram" if state is None else state.values["stage"]
        if state is not None and state.values.get("scaled"):
            self._scale(ScaledRows(self.h1, state.tensors("exponents").to(self.h1.device)))
        x: Tiles | None = None
        if stage == "gram":
            ended = self._by_gram(state)
            if isinstance(ended, RankProof):
                self.progress.end()
                return ended
            g: Tiles | None = ended
            self._keep("factor", [("g", ended)])
        else:
            assert state is not None
            self._recall(state)
            self.progress.expect(self.progress.whitening(2 - self.passes))
            g = None
            if stage == "factor":
                g = self._tiles(state, "g", 1)
                if "x" in state.values["tiles"]:
                    x = self._tiles(state, "x", 2)
        proof = self._by_whitening(g, x, state if stage == "whitening" else None)
        if self.short is not None:
            shifted = self._shifted(self.short)
            proof = proof if proof.sigma_min_lower > shifted.sigma_min_lower else shifted
        self.progress.end()
        return proof

    def _by_gram(self, state: SavedState | None) -> RankProof | Tiles:
        """What the Gram alone decides, or the Gram."""
        h1, n = self.h1, self.h1.n
        sweep = GramSweep.begin(h1, scratch=self.scratch(1))
        if state is not None:
            sweep.rows = state.tensors("rows").to(h1.device)
            sweep.row_sums = state.tensors("row_sums").to(h1.device)
            sweep.column = state.values["column"]
            self._read(state, "g", sweep.lower)

        def after(fraction: float) -> None:
            self.progress("Gram", fraction)
            values = {"column": sweep.column}
            self._keep("gram", [("g", sweep.lower)], values, rows=sweep.rows, row_sums=sweep.row_sums)

        g = sweep.run(h1, after)
        diagonal = g.lower.diagonal()
        inside = float(diagonal.amin()) >= LEAST**2 and float(diagonal.amax()) <= GREATEST**2
        if self.scaled is None and n <= h1.columns and not (inside and math.isfinite(g.error)):
            del g, sweep
            rows = scaled_rows(h1)
            if rows is None:
                return self._refused(
                    "a row has numbers farther apart than float64's range; rescale the features"
                )
            self._scale(rows)
            return self._by_gram(None)
        self.sigma_max = upper_power(round_up(math.sqrt(round_up(g.norm + g.error))), -self.low)
        if n > h1.columns:
            return self._refused(f"{n} rows of {h1.columns} numbers are dependent")
        g.lower.seal()
        short = None
        if self.low == self.high or not self.sharp:  # else its bound is as far off as the rows are apart
            short = prove_by_shift(g, self.sharp, self.progress, self.scratch(2))
        g.lower.check()
        if short is not None and (not self.sharp or short.lower >= 0.75 * short.estimate):
            return self._shifted(short)
        self.short = short
        self.progress.expect(self.progress.whitening(self.progress.passes))
        return g.lower

    def _by_whitening(self, g: Tiles | None, x: Tiles | None, state: SavedState | None) -> RankProof:
        """From the Gram of H1 (g alone), of X H1 (both), or from the middle of a sweep."""
        best: tuple[Tiles | None, Whitened] | None = None
        while True:
            if state is None:
                assert g is not None
                found = cholesky_inverse(
                    g, self.least, self.scratch(2 if x is None else 3), lambda f: self.progress("factor", f)
                )
                g.release()
                if found is None:
                    if x is None:
                        return self._refused("no Cholesky factor, even of the shifted Gram")
                    break
                shift = found[1]
                if x is None:
                    x = found[0]
                else:
                    compose_(found[0], x, lambda f: self.progress("compose", f))
                del found
                x.seal()
                self.passes += 1
            else:
                x, shift = self._tiles(state, "x", 1), state.values["shift"]
            white = self._sweep(x, shift, state)
            state = None
            if white is None:
                break
            self.last = (
                f"||G2 - I|| <= {white.distance:.1e}, product error {white.product_error:.1e}, witness error "
                f"{white.witness_error:.1e} (their sum must stay below 1)"
            )
            better = white.margin > (best[1].margin if best else 0.0)
            self.strict |= shift == 0.0 and not better
            if better:
                best = (None, white)
            # a small margin makes a poor bound of sigma_min, which another pass would mend
            if self.passes >= MAX_PASSES or (best and (not self.sharp or not better or white.margin > 0.9)):
                break
            if better:
                best = (x.clone(), white)  # the next pass works in place
            g = white.gram
            if g.dtype != torch.float64:
                g = g.clone(torch.float64)
            x.check()
            self._keep("factor", [("g", g), ("x", x)])
        if best is None:
            return self._refused(f"whitening proves nothing here: {self.last}")
        kept, white = best
        x = kept if kept is not None else x
        assert x is not None
        x.check()
        white.gram.release()
        self.progress("norm", 0.0)
        if self.scaled is not None:
            scale_columns_(x, self.scaled.exponents - self.high)  # X D 2^-high
        norm = norm_sharp(x) if self.sharp else norm_upper(x)
        lower = lower_power(white.margin / (norm + self.h1.n * NORMAL) * (1 - 1e-14), -self.high)
        doubled = " in doubled precision" if white.doubled else ""
        reason = f"whitening{doubled}: sigma_min(X H1) >= {white.margin:.6f}, ||X|| <= {norm:.3e}"
        return RankProof(True, lower, self.sigma_max, white.margin, self.passes, reason, "whitening")

    def _sweep(self, x: Tiles, shift: float, state: SavedState | None) -> Whitened | None:
        h1, n = self.h1, self.h1.n
        if state is None:
            # float32 for the second Gram: it is near the identity, and halves the time where its bound
            # allows. The rank alone may lose more of the margin to it, and to plain products, than a sharp
            # sigma_min.
            slices = INNER32 + h1.columns // INNER32
            lost = 0.8 * n * gamma(slices, torch.float32)
            single = shift == 0.0 and lost < (0.2 if self.strict else 0.45)
            dtype = torch.float32 if single else torch.float64
            plain = 1e-2 if self.strict else 0.3
            sweep = WhiteningSweep.begin(h1, x, dtype, plain, scratch=self.scratch(2))
            if sweep is None:
                return None
        else:
            known = state.values
            dtype = torch.float32 if known["single"] else torch.float64
            gram = Tiles(n, dtype, h1.device, self.scratch(2))
            self._read(state, "g", gram)
            errors = (known["witness_error"], known["tiny"], known["doubled"], known["column"])
            sweep = WhiteningSweep(gram, state.tensors("rows").to(h1.device), *errors)

        def after(fraction: float) -> None:
            self.progress("whitening", fraction)
            values = {
                "column": sweep.column,
                "shift": shift,
                "single": sweep.gram.dtype == torch.float32,
                "witness_error": sweep.witness_error,
                "tiny": sweep.tiny,
                "doubled": sweep.doubled,
            }
            self._keep("whitening", [("g", sweep.gram), ("x", x)], values, rows=sweep.rows)

        return sweep.run(h1, x, after)

    def _scale(self, rows: ScaledRows) -> None:
        self.h1 = self.scaled = rows
        self.low, self.high = rows.low, rows.high

    def _shifted(self, short: ShiftProof) -> RankProof:
        low = lower_power(math.sqrt(short.lower) * (1 - 1e-15), -self.high)
        of = "H1" if self.scaled is None else "D H1"
        left = f"{short.margin:.0%} of the shift left by the errors"
        reason = f"shift: sigma_min({of})^2 >= {short.lower:.3e}, {left}"
        return RankProof(True, low, self.sigma_max, short.margin, 0, reason, "shift")

    def _refused(self, reason: str) -> RankProof:
        return RankProof(False, 0.0, self.sigma_max, 0.0, self.passes, reason)

    def _keep(
        self,
        stage: str,
        tiles: list[tuple[str, Tiles]],
        values: dict[str, Any] | None = None,
        **tensors: Tensor,
    ) -> None:
        """Save, if it is time."""
        keeper = self.checkpoint
        if keeper is None or not keeper.due():
            return
        short = self.short
        state = {
            "stage": stage,
            "passes": self.passes,
            "strict": self.strict,
            "sigma_max": self.sigma_max,
            "short": None if short is None else [short.lower, short.estimate, short.margin],
            "last": self.last,
            "scaled": self.scaled is not None,
            "tiles": [name for name, _ in tiles],
            **(values or {}),
        }
        parts = [(f"{name}/{i}/{j}", tile[i, j]) for name, tile in tiles for i, j in tile.pairs()]
        if self.scaled is not None:
            tensors["exponents"] = self.scaled.exponents
        keeper.save(state, [*tensors.items(), *parts])

    def _recall(self, state: SavedState) -> None:
        self.passes, self.sigma_max = state.values["passes"], state.values["sigma_max"]
        self.last, self.strict = state.values["last"], state.values["strict"]
        self.short = None if state.values["short"] is None else ShiftProof(*state.values["short"])

    def _tiles(self, state: SavedState, name: str, triangles: int) -> Tiles:
        tiles = Tiles(self.h1.n, torch.float64, self.h1.device, self.scratch(triangles))
        self._read(state, name, tiles)
        return tiles

    def _read(self, state: SavedState, name: str, tiles: Tiles) -> None:
        for i, j in tiles.pairs():
            tiles[i, j].copy_(state.tensors(f"{name}/{i}/{j}"))
        tiles.seal()
