"""certify: is the global minimum of the training loss reachable by training the last layer alone, and why.

Condition (Kawaguchi and Sun, AAAI 2021, Assumption on expressivity): for some hidden weights H1 = [h_X, 1] (n
x (m+1)) has rank n. Two routes establish it. *Direct*: rank(H1) = n at the frozen weights, proved in floating
point with every rounding error accounted for (:mod:`gcfast.certificate.direct`); needs no analyticity and no
probability. *Theorem*: the wide layer's activation is analytic and not a polynomial, its weights are free,
m >= n, and the stored rows that enter it are pairwise distinct (Pinkus 1999, Theorem 5.1); then almost every
choice of its weights gives rank n (:mod:`gcfast.certificate.theorem`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.certificate.certificate import Certificate
from gcfast.certificate.direct import SHARP, prove_directly
from gcfast.certificate.evidence import Evidence
from gcfast.certificate.theorem import theorem_applies
from gcfast.features import Features, TrainingSet, WideFeatures, as_targets, checked, collect, equal_rows
from gcfast.losses import (
    ConvexLoss,
    bounds_at,
    check_convex,
    check_matches_outputs,
    gap_above,
    infimum_with_copies,
    mean_above,
    resolve_loss,
)
from gcfast.model import Head
from gcfast.proofs import bounded_logits, exact_products
from gcfast.storage import StateFile, allowed_bytes, fingerprint


@ordinary()
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
    fixed: bool = False,
) -> Certificate:
    """Prove, or refute, that phase two reaches the global minimum for this model and training set.

    Args:
        model_or_features: the model with its frozen weights, or its features (n, m) without the ones column:
            a tensor, a numpy array (memory-mapped too), blocks of rows, or :class:`gcfast.WideFeatures`,
            which are never stored.
        data: (inputs, targets), inputs alone, a Dataset, a DataLoader, or batches (inputs, targets); with
            features, the targets or None. What is no tensor is read a second time without the model, and
            refused where it changes; a DataLoader that shuffles is read in its dataset's order.
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
        fixed: the data are the same at every reading, by your word: they are read once, and the certificate
            lists an assumption that was not checked. What is no Dataset and has no length needs it.

    Raises:
        ValueError, TypeError: naming the argument; MemoryError: the direct route does not fit and the theorem
        route does not decide, with the bytes and the way out; OSError: the disk has no room for tiles or for
        the checkpoint; CheckpointError: the checkpoint is torn, or of something else.
    """
    if route is not None:
        errors.is_choice("route", route, ("direct", "theorem"))
    if sharp is not None:
        errors.is_flag("sharp", sharp)
    errors.is_flag("fixed", fixed)
    errors.is_function("callback", callback)
    errors.is_checkpoint(checkpoint, checkpoint_seconds)
    allowed_bytes(max_bytes, torch.device("cpu"))  # its own check
    training_set: TrainingSet | None = None
    if isinstance(model_or_features, nn.Module):
        if data is None:
            raise ValueError("data: a model needs its training set")
        training_set = collect(model_or_features, data, head, max_bytes=max_bytes, fixed=fixed, told=callback)
        features, targets = training_set.features, training_set.targets
        ones = training_set.head.bias is not None
    else:
        features = checked(model_or_features)
        if route == "theorem" and not isinstance(features, WideFeatures):
            raise ValueError(
                "route: the theorem needs the model, or gcfast.WideFeatures; features alone admit the direct "
                "route only"
            )
        targets = None if data is None else as_targets(data, "data")
        ones = True
        if targets is not None and targets.device != features.device:
            raise ValueError(f"data: expected targets on {features.device}, got {targets.device}")
    if loss is not None and targets is None:
        raise ValueError("data: a loss needs targets")
    return Certification(
        model_or_features, training_set, features, targets, ones, loss, route, sharp, max_bytes, callback
    ).run(checkpoint, checkpoint_seconds)


class Certification:
    """One run of certify: each route adds to the evidence, and from that comes the verdict."""

    def __init__(
        self,
        model: Any,
        training_set: TrainingSet | None,
        features: Features,
        targets: Tensor | None,
        ones: bool,
        loss: str | nn.Module | ConvexLoss | None,
        route: str | None,
        sharp: bool | None,
        max_bytes: int | None,
        on_progress: Callable[[str, float], None] | None,
    ):
        self.model, self.training_set, self.features, self.ones = model, training_set, features, ones
        self.n, self.m = features.n, features.m
        self.route, self.max_bytes, self.on_progress = route, max_bytes, on_progress
        self.sharp = self.n <= SHARP if sharp is None else sharp
        self.evidence = Evidence(self.n, targets)
        self.convex = None if loss is None else resolve_loss(loss)
        self.y: Tensor | None = None
        if self.convex is not None and targets is not None:
            if training_set is None:
                outputs = torch.zeros((), device=targets.device).expand(
                    self.n, self.convex.output_count(targets)
                )
            else:
                check_matches_outputs(self.convex, targets, training_set.output_shape)
                outputs = training_set.outputs
            self.y = self.convex.prepare(targets, self.n, outputs.shape[1])
            check_convex(self.convex, outputs, self.y)
        self.duplicate_groups = (
            equal_rows(features.keys()) if training_set is None else training_set.duplicate_groups
        )

    def run(self, checkpoint: str | os.PathLike[str] | None, seconds: float) -> Certificate:
        if checkpoint is None or self.route == "theorem":
            return self._run(None)
        parts = (*self.features.identity(), self.ones, bool(self.sharp))
        with StateFile(checkpoint, "certify", fingerprint(*parts), seconds) as keeper:
            certificate = self._run(keeper)
            keeper.remove()
        return certificate

    def _run(self, checkpoint: StateFile | None) -> Certificate:
        evidence, groups = self.evidence, self.duplicate_groups
        kind = "equal inputs" if self.training_set is not None else "equal features"
        for group in groups:
            evidence.add_offender(kind, group)
        if self.training_set is not None and self.training_set.fixed is not None:
            evidence.note("fixed data", *self.training_set.fixed)
        enough = self.n <= self.m + int(self.ones)
        evidence.note(
            "width",
            "holds" if enough else "fails",
            f"n = {self.n} samples, m = {self.m} features: "
            f"rank(H1) = n needs n <= m{' + 1' if self.ones else ''}"
            + ("" if enough else "; gcfast.widen(model, n_samples) puts a wide enough layer before the head"),
        )
        copies = sum(len(group) - 1 for group in groups)
        name = "distinct inputs" if self.training_set is not None else "distinct features"
        if self.training_set is not None and not self.training_set.told_apart:
            evidence.note(
                name,
                "not checked",
                f"the inputs have not one row for each of {self.n} samples, so that copies are looked for "
                "among the features alone; L* takes no two samples for copies",
            )
        else:
            evidence.note(
                name,
                "fails" if groups else "holds",
                f"{copies} samples are copies of others, number for number: no model can tell them apart"
                if groups
                else f"all {self.n} rows are pairwise distinct as stored",
            )
        if not enough:
            reason = (
                f"n = {self.n} exceeds m{' + 1' if self.ones else ''} = {self.m + int(self.ones)}: "
                "rank(H1) = n is impossible; gcfast.widen the model"
            )
            return self._verdict("fails", None, reason)
        direct = self._direct(checkpoint) if self.route != "theorem" else None
        if groups:
            conflicts = sum(bool(o.conflicting) for o in evidence.offenders)
            reason = f"{len(groups)} groups of equal samples make rank(H1) < n" + (
                f"; {conflicts} of them have conflicting targets, which L* accounts for"
                if conflicts
                else "; their targets agree"
            )
            return self._verdict("fails", "direct" if self.training_set is None else None, reason)
        if direct is True:
            return self._verdict(
                "holds",
                "direct",
                f"rank(H1) = n = {self.n} is proved at the frozen weights, rounding errors included",
            )
        if direct is False:  # whatever almost every other choice of the weights would give
            return self._verdict(
                "fails",
                "direct",
                "rank(H1) < n at the frozen weights, with the witness below; perturb them anew (TwoPhase) "
                "or drop the samples",
            )
        wide = self.training_set is not None or isinstance(self.features, WideFeatures)
        found = self._theorem() if wide and self.route != "direct" else None
        if found is not None:
            return self._verdict("holds", "theorem", found)
        if isinstance(direct, MemoryError):
            raise direct
        reason = "neither route decides: " + "; ".join(
            f"{a.name}: {a.reason}" for a in evidence.assumptions if a.status in ("fails", "unknown")
        )
        return self._verdict("unknown", None, reason)

    def _direct(self, checkpoint: StateFile | None) -> bool | MemoryError | None:
        return prove_directly(
            self.evidence,
            self.features,
            self.duplicate_groups,
            ones=self.ones,
            sharp=self.sharp,
            max_bytes=self.max_bytes,
            on_progress=self.on_progress,
            checkpoint=checkpoint,
        )

    def _theorem(self) -> str | None:
        return theorem_applies(
            self.evidence,
            self.model,
            self.training_set,
            self.features,
            self.duplicate_groups,
            forced=self.route == "theorem",
        )

    def _verdict(
        self,
        status: Literal["holds", "fails", "unknown"],
        route: Literal["direct", "theorem"] | None,
        reason: str,
    ) -> Certificate:
        value = infimum = gap = None
        outputs = error = None
        if self.convex is not None and self.y is not None:
            infimum = infimum_with_copies(self.convex, self.y, self.duplicate_groups)
            if self.training_set is not None:
                value, outputs, error = self._loss(self.training_set)
                gap = gap_above(value, infimum)
            if self.convex.assumes_rounding:
                self.evidence.note(
                    "rounding of the loss",
                    "unknown",
                    f"assumed of {self.convex!r} as ConvexLoss.rounding says, for it states none of its own; "
                    "L and L* rest on it, the rank does not",
                )
        return Certificate(
            status=status,
            route=route,
            reason=reason,
            n=self.n,
            width=self.m,
            rank_lower=self.evidence.rank_lower,
            sigma_min_lower=self.evidence.sigma_min_lower,
            sigma_max_upper=self.evidence.sigma_max_upper,
            offenders=self.evidence.offenders,
            assumptions=self.evidence.assumptions,
            loss_name=None if self.convex is None else self.convex.name,
            loss=value,
            infimum=infimum,
            gap=gap,
            _convex=self.convex,
            _outputs=outputs,
            _error=error,
            _targets=self.y,
        )

    def _loss(self, training_set: TrainingSet) -> tuple[float, Tensor, Tensor]:
        """No less than L, and the outputs it was found at with a bound of their error.

        L is that of the outputs as the model computed them. Where the features were gone through to prove
        their rank, it is no less than that of H1 V either, without the rounding of the model, and that is
        where gradient descent on the head begins.
        """
        assert self.convex is not None and self.y is not None
        outputs = training_set.outputs.to(torch.float64)
        error = torch.zeros_like(outputs)
        value = mean_above(bounds_at(self.convex, outputs, self.y, error).value)
        if self.evidence.sigma_min_lower > 0:
            head = training_set.head.module
            weight, bias = head.weight.detach().double(), head.bias
            with exact_products(outputs.device):
                outputs, error, _ = bounded_logits(
                    training_set.features, weight, None if bias is None else bias.detach().double()
                )
            value = max(value, mean_above(bounds_at(self.convex, outputs, self.y, error).value))
        return value, outputs, error
