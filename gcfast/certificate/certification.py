"""The certificate: does the expressivity condition hold for this model and these data, and why.

Condition (Kawaguchi and Sun, AAAI 2021, Assumption on expressivity): for some hidden weights H1 = [h_X, 1] (n
x (m+1)) has rank n. Two routes establish it. *Direct*: rank(H1) = n at the frozen weights, proved in floating
point with every rounding error accounted for (:mod:`gcfast.proofs.full_rank`); needs no analyticity and no
probability. *Theorem*: the wide layer's activation is analytic and not a polynomial, m >= n, and the stored
rows that enter it are pairwise distinct (Pinkus 1999, Theorem 5.1); then almost every choice of hidden
weights gives rank n.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gcfast.certificate.certificate import Assumption, Certificate, Offender, Status, _shorten
from gcfast.features import (
    Features,
    FeaturesWithOnes,
    TrainingSet,
    WideFeatures,
    checked,
    collect,
    equal_rows,
)
from gcfast.losses import ConvexLoss, check_convex, infimum_with_copies, output_count, resolve_loss
from gcfast.model import Head, WideLayerFound, activation_verdict, analyticity
from gcfast.proofs import near_dependency, proof_bytes, prove_full_rank, prove_rank_of_basis
from gcfast.storage import StateFile, allowed_bytes, check_memory, fingerprint

SHARP = 4096  # samples up to which the bound of sigma_min is sharpened without being asked


def certify(
    model_or_features: nn.Module | Tensor | Features | Any,
    data: Any = None,
    *,
    loss: str | nn.Module | ConvexLoss | None = None,
    head: Head | nn.Module | str | None = None,
    route: Literal["direct", "theorem"] | None = None,
    sharp: bool | None = None,
    max_bytes: int | None = None,
    callback: Callable[[str, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 120.0,
) -> Certificate:
    """Prove, or refute, that phase two reaches the global minimum for this model and training set.

    Args:
        model_or_features: the model with its frozen weights, or its features (n, m) without the ones column:
            a tensor, a numpy array (memory-mapped too), blocks of rows, or :class:`gcfast.WideFeatures`,
            which are never stored.
        data: (inputs, targets), inputs alone, a Dataset, or a DataLoader in a fixed order; with features,
            the targets or None.
        loss: as for ``solve_head``; needed for L, L*, the gap and ``steps_to``.
        head: module or name, where it is not the last Linear applied.
        route: only this one; by default the direct route, and the theorem where that does not decide.
        sharp: spend about a third more time, and half as much memory, for a sigma_min bound within a few per
            cent of the truth. Default: where n <= 4,096, which takes seconds.
        max_bytes: memory the direct route may use beyond the features (default: what is free). n x n matrices
            that do not fit go to files without names in TMPDIR, checksummed.
        callback: called with (step, fraction done), the fraction by operations counted.
        checkpoint: a file in which the direct route keeps its state every ``checkpoint_seconds``; a run that
            was killed takes up from it, and it is removed when the work is done.

    Raises:
        ValueError, TypeError: naming the argument; MemoryError: the direct route does not fit and the theorem
        route does not decide, with the bytes and the way out; OSError: the disk has no room for tiles or for
        the checkpoint; CheckpointError: the checkpoint is torn, or of something else.
    """
    if route not in (None, "direct", "theorem"):
        raise ValueError(f"route: expected 'direct', 'theorem' or None; got {route!r}")
    seen: TrainingSet | None = None
    if isinstance(model_or_features, nn.Module):
        if data is None:
            raise ValueError("data: a model needs its training set")
        seen = collect(model_or_features, data, head, max_bytes=max_bytes)
        features, targets, ones = seen.features, seen.targets, seen.head.bias is not None
    else:
        features = checked(model_or_features)
        if route == "theorem" and not isinstance(features, WideFeatures):
            raise ValueError(
                "route: the theorem needs the model, or gcfast.WideFeatures; features alone admit the direct "
                "route only"
            )
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(np.array(data))
        if data is not None and not isinstance(data, Tensor):
            raise TypeError(
                f"data: with features, expected the targets as a tensor; got {type(data).__name__}"
            )
        targets, ones = data, True
        if targets is not None and targets.device != features.device:
            raise ValueError(f"data: expected targets on {features.device}, got {targets.device}")
    if loss is not None and targets is None:
        raise ValueError("data: a loss needs targets")
    return _Examiner(
        model_or_features, seen, features, targets, ones, loss, route, sharp, max_bytes, callback
    ).run(checkpoint, checkpoint_seconds)


class _Examiner:
    """One run of certify: gathers assumptions and offenders, then the verdict."""

    def __init__(
        self,
        model: Any,
        seen: TrainingSet | None,
        features: Features,
        targets: Tensor | None,
        ones: bool,
        loss: str | nn.Module | ConvexLoss | None,
        route: str | None,
        sharp: bool | None,
        max_bytes: int | None,
        callback: Callable[[str, float], None] | None,
    ):
        self.model, self.seen, self.features, self.targets, self.ones = model, seen, features, targets, ones
        self.n, self.m = features.n, features.m
        self.route, self.max_bytes, self.callback = route, max_bytes, callback
        self.sharp = self.n <= SHARP if sharp is None else sharp
        self.assumptions: list[Assumption] = []
        self.offenders: list[Offender] = []
        self.rank_lower, self.sigma_min, self.sigma_max = 0, 0.0, math.inf
        self.convex = None if loss is None else resolve_loss(loss)
        self.y: Tensor | None = None
        if self.convex is not None and targets is not None:
            c = seen.outputs.shape[1] if seen is not None else output_count(targets)
            self.y = self.convex.prepare(targets, self.n, c)
            if seen is not None:
                check_convex(self.convex, seen.outputs[:256].to(torch.float64), self.y[:256])
        self.duplicate_groups = seen.duplicate_groups if seen is not None else equal_rows(features.keys())

    def run(self, checkpoint: str | os.PathLike[str] | None, seconds: float) -> Certificate:
        if checkpoint is None or self.route == "theorem":
            return self._run(None)
        parts = (*self.features.identity(), self.ones, bool(self.sharp))
        with StateFile(checkpoint, "certify", fingerprint(*parts), seconds) as keeper:
            certificate = self._run(keeper)
            keeper.remove()
        return certificate

    def _run(self, checkpoint: StateFile | None) -> Certificate:
        kind = "equal inputs" if self.seen is not None else "equal features"
        for group in self.duplicate_groups:
            self.offenders.append(self._offender(kind, group))
        enough = self.n <= self.m + int(self.ones)
        self._note(
            "width",
            "holds" if enough else "fails",
            f"n = {self.n} samples, m = {self.m} features: "
            f"rank(H1) = n needs n <= m{' + 1' if self.ones else ''}"
            + ("" if enough else "; gcfast.widen(model, n_samples) puts a wide enough layer before the head"),
        )
        distinct = self.n - sum(len(g) - 1 for g in self.duplicate_groups)
        self._note(
            "distinct inputs" if self.seen is not None else "distinct features",
            "fails" if self.duplicate_groups else "holds",
            f"{self.n - distinct} samples are copies of others, number for number: "
            "no model can tell them apart"
            if self.duplicate_groups
            else f"all {self.n} rows are pairwise distinct as stored",
        )
        if not enough:
            reason = (
                f"n = {self.n} exceeds m{' + 1' if self.ones else ''} = {self.m + int(self.ones)}: "
                "rank(H1) = n is impossible; gcfast.widen the model"
            )
            return self._verdict("fails", None, reason)
        direct = self._direct(checkpoint) if self.route != "theorem" else None
        if self.duplicate_groups:
            conflicts = sum(bool(o.conflicting) for o in self.offenders)
            reason = f"{len(self.duplicate_groups)} groups of equal samples make rank(H1) < n" + (
                f"; {conflicts} of them have conflicting targets, which L* accounts for"
                if conflicts
                else "; their targets agree"
            )
            return self._verdict("fails", "direct" if self.seen is None else None, reason)
        if direct is True:
            return self._verdict(
                "holds",
                "direct",
                f"rank(H1) = n = {self.n} is proved at the frozen weights, rounding errors included",
            )
        wide = self.seen is not None or isinstance(self.features, WideFeatures)
        theorem = self._theorem() if wide and self.route != "direct" else False
        if theorem:
            reason = (
                "the theorem's assumptions hold: almost every choice of hidden weights gives rank(H1) = n"
            )
            return self._verdict("holds", "theorem", reason)
        if isinstance(direct, MemoryError):
            raise direct
        if direct is False:
            return self._verdict(
                "fails",
                "direct",
                "rank(H1) < n at the frozen weights, with the witness below; perturb them anew (TwoPhase) "
                "or drop the samples",
            )
        reason = "neither route decides: " + "; ".join(
            f"{a.name}: {a.reason}" for a in self.assumptions if a.status in ("fails", "unknown")
        )
        return self._verdict("unknown", None, reason)

    def _note(self, name: str, status: Status, reason: str) -> None:
        self.assumptions.append(Assumption(name, status, reason))

    def _offender(
        self,
        kind: str,
        samples: list[int],
        coefficients: list[float] | None = None,
        residual: float | None = None,
    ) -> Offender:
        targets: list[Any] = []
        conflicting: bool | None = None
        if self.targets is not None:
            targets = [self.targets[i].tolist() for i in samples]
            if coefficients is None:
                conflicting = any(t != targets[0] for t in targets)
        return Offender(kind, list(samples), targets, conflicting, coefficients or [], residual)

    def _direct(self, checkpoint: StateFile | None) -> bool | MemoryError | None:
        """True: proved; False: refuted; None: undecided; MemoryError: does not fit."""
        name = "rank at the frozen weights"
        features = self.features
        groups = self.duplicate_groups or equal_rows(features.keys())
        if groups and not self.duplicate_groups:
            self.offenders += [self._offender("equal features", group) for group in groups]
        n = self.n - sum(len(group) - 1 for group in groups)
        # n x n matrices may go to disk, panels may not
        on_disk = features.device.type == "cpu"
        try:
            check_memory(
                f"certify's direct route for n = {n}",
                proof_bytes(n, self.m, disk=on_disk, sharp=self.sharp),
                self.max_bytes,
                features.device,
                "fewer samples, a larger max_bytes, or the theorem route (a gcfast.WideLayer "
                "of m >= n units before the head)",
            )
        except MemoryError as refused:
            self._note(name, "unknown", str(refused))
            return False if groups else refused
        if groups:
            kept = torch.ones(self.n, dtype=torch.bool, device=features.device)
            for group in groups:
                kept[group[1:]] = False
            features = features.select(kept.nonzero()[:, 0])
        proof = prove_full_rank(
            FeaturesWithOnes(features, self.ones),
            sharp=self.sharp,
            progress=self.callback,
            max_bytes=self.max_bytes,
            checkpoint=checkpoint,
        )
        self.sigma_max = proof.sigma_max_upper if not groups else math.inf
        if proof.proved:
            self.rank_lower = n
            if groups:
                self._note(
                    name,
                    "fails",
                    f"samples repeat: one row of each has proved rank {n}, the others add none",
                )
                return False
            self.sigma_min = proof.sigma_min_lower
            what = f"proved in floating point: {proof.reason}"
            if isinstance(features, WideFeatures):
                rounded = ", rounded to float32" if features.dtype == torch.float32 else ""
                what += f"; of the wide layer evaluated in float64{rounded}, its features never stored"
            self._note(name, "holds", what)
            return True
        if groups:
            self._note(
                name,
                "fails",
                f"samples repeat: only {n} of {self.n} rows can be independent" + self._independent(features),
            )
            return False
        room = allowed_bytes(self.max_bytes, features.device)
        found = None
        if room is None or 24 * n * n < room:
            found = near_dependency(features, ones=self.ones)
        independent = self._independent(features)
        if found is not None:
            kind = "dependency" if found.exact else "near-dependency"
            self.offenders.append(self._offender(kind, found.samples, found.coefficients, found.residual))
            if found.exact:
                self._note(
                    name,
                    "fails",
                    f"rows {_shorten(found.samples)} are linearly dependent, verified in exact arithmetic"
                    + independent,
                )
                return False
        self._note(
            name,
            "unknown",
            f"{proof.reason}{independent}; features in float64, a fresh perturbation or a wider layer would "
            "decide",
        )
        return None

    def _independent(self, features: Features) -> str:
        """Sets ``rank_lower`` from rows that are proved independent; a clause that says so, or nothing."""
        copy = features.nbytes
        try:
            needed = max(proof_bytes(features.n, self.m), 24 * features.n**2) + copy
            check_memory("a lower bound of the rank", needed, self.max_bytes, features.device, "more memory")
        except MemoryError:
            return ""
        self.rank_lower, proof = prove_rank_of_basis(features, ones=self.ones, progress=self.callback)
        if proof is None:
            return ""
        return f"; {self.rank_lower} rows are proved independent ({proof.route})"

    def _theorem(self) -> bool:
        seen, forced = self.seen, self.route == "theorem"
        wide, below = self._wide()
        if wide is None or below is None:
            self._note(
                "wide layer",
                "fails",
                "what enters the head is not act(Q z + c) of a recognised layer; gcfast.widen inserts one",
            )
            if forced:
                raise ValueError(
                    "route: the theorem needs a wide layer act(Q z + c) before the head, and the model has "
                    "none; use gcfast.widen"
                )
            return False
        ok = not wide.polynomial
        self._note(
            "wide layer",
            "holds" if ok else "fails",
            f"{wide.name!r} is {wide.activation_name}(Q z + c), {wide.d} to {wide.m}, "
            + ("not a polynomial" if ok else "a polynomial"),
        )
        if wide.m < self.n:
            self._note(
                "width of the wide layer",
                "fails",
                f"m = {wide.m} < n = {self.n}; the theorem needs m >= n (gcfast.widen)",
            )
            ok = False
        if seen is None:
            bad = [] if wide.analytic else [f"{wide.activation_name} is not analytic"]
            certain = True
        else:
            assert isinstance(self.model, nn.Module)
            found = analyticity(self.model, seen.head, seen.first_batch)
            bad = [str(f) for f in found if f.verdict != "analytic"]
            certain = any(f.verdict == "not analytic" for f in found)
        if bad:
            worst: Status = "fails" if certain else "unknown"
            self._note(
                "analytic in the hidden weights",
                worst,
                "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else ""),
            )
            if forced:
                raise ValueError(
                    "route: the theorem needs features that are real analytic in the hidden weights; "
                    f"{'; '.join(bad[:5])}. Use route='direct'"
                )
            ok = False
        else:
            what = "every operator before the head" if seen is not None else "the wide layer, in its weights,"
            self._note("analytic in the hidden weights", "holds", f"{what} is real analytic")
        equal = self.duplicate_groups if seen is None else equal_rows(below)
        if equal:
            for group in equal:
                self.offenders.append(self._offender("equal rows below the wide layer", group))
            self._note(
                "distinct rows below the wide layer",
                "unknown",
                f"{len(equal)} groups of equal rows at these weights; other hidden weights may separate them",
            )
            ok = False
        else:
            self._note(
                "distinct rows below the wide layer",
                "holds",
                f"all {self.n} stored rows of width {wide.d} are pairwise distinct, exactly",
            )
        return ok

    def _wide(self) -> tuple[WideLayerFound | None, Tensor | None]:
        """The wide layer and what enters it."""
        if self.seen is not None:
            return self.seen.wide, self.seen.below
        h = self.features
        assert isinstance(h, WideFeatures)
        name = h.settings["activation"]
        analytic = activation_verdict(name)[0] == "analytic"
        return WideLayerFound("wide", "wide", h.d, h.m, name, analytic, False, nn.Identity()), h.z

    def _verdict(
        self,
        status: Literal["holds", "fails", "unknown"],
        route: Literal["direct", "theorem"] | None,
        reason: str,
    ) -> Certificate:
        value = infimum = gap = None
        outputs = None
        if self.convex is not None and self.y is not None:
            infimum = self._infimum()
            if self.seen is not None:
                outputs = self.seen.outputs.to(torch.float64)
                value = float(self.convex.value(outputs, self.y).mean())
                gap = value - infimum
        return Certificate(
            status=status,
            route=route,
            reason=reason,
            n=self.n,
            width=self.m,
            rank_lower=self.rank_lower,
            sigma_min_lower=self.sigma_min,
            sigma_max_upper=self.sigma_max,
            offenders=self.offenders,
            assumptions=self.assumptions,
            loss_name=None if self.convex is None else self.convex.name,
            loss=value,
            infimum=infimum,
            gap=gap,
            _convex=self.convex,
            _outputs=outputs,
            _targets=self.y,
        )

    def _infimum(self) -> float:
        assert self.convex is not None and self.y is not None
        return infimum_with_copies(self.convex, self.y, self.duplicate_groups)
