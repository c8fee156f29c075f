"""The direct route of certify: prove rank(H1) = n at the frozen weights, or find the linear dependency.

The proof holds in floating point, with every rounding error accounted for, and needs neither analyticity nor
probability. H1 = [h_X, 1] is (n, m + 1), or (n, m) for a head without bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gcfast.certificate.certificate import abbreviated
from gcfast.certificate.evidence import Evidence
from gcfast.features import Features, FeaturesWithOnes, WideFeatures, equal_rows
from gcfast.proofs import near_dependency, proof_bytes, prove_full_rank, prove_rank_of_basis
from gcfast.storage import StateFile, allowed_bytes, check_memory

SHARP = 4096  # samples up to which the bound of sigma_min is sharpened without being asked
_NAME = "rank at the frozen weights"


def prove_directly(
    evidence: Evidence,
    features: Features,
    duplicate_groups: list[list[int]],
    *,
    ones: bool,
    sharp: bool,
    max_bytes: int | None,
    on_progress: Callable[[str, float], None] | None,
    checkpoint: StateFile | None,
) -> bool | MemoryError | None:
    """Whether rank(H1) = n; what is found on the way is added to ``evidence``.

    ``duplicate_groups``: equal samples known already; one row of each group is kept. True: proved. False:
    refuted. None: undecided. MemoryError: the proof does not fit.
    """
    groups = duplicate_groups or equal_rows(features.keys())
    if groups and not duplicate_groups:
        for group in groups:
            evidence.add_offender("equal features", group)
    n = evidence.n - sum(len(group) - 1 for group in groups)
    # n x n matrices may go to disk, panels may not
    on_disk = features.device.type == "cpu"
    try:
        check_memory(
            f"certify's direct route for n = {n}",
            proof_bytes(n, features.m, disk=on_disk, sharp=sharp),
            max_bytes,
            features.device,
            "fewer samples, a larger max_bytes, or the theorem route (a gcfast.WideLayer "
            "of m >= n units before the head)",
        )
    except MemoryError as refused:
        evidence.note(_NAME, "unknown", str(refused))
        return False if groups else refused
    if groups:
        kept = torch.ones(evidence.n, dtype=torch.bool, device=features.device)
        for group in groups:
            kept[group[1:]] = False
        features = features.select(kept.nonzero()[:, 0])
    proof = prove_full_rank(
        FeaturesWithOnes(features, ones),
        sharp=sharp,
        progress=on_progress,
        max_bytes=max_bytes,
        checkpoint=checkpoint,
    )
    evidence.sigma_max_upper = proof.sigma_max_upper if not groups else math.inf
    if proof.proved:
        evidence.rank_lower = features.n
        if groups:
            evidence.note(
                _NAME,
                "fails",
                f"samples repeat: one row of each has proved rank {n}, the others add none",
            )
            return False
        evidence.sigma_min_lower = proof.sigma_min_lower
        what = f"proved in floating point: {proof.reason}"
        if isinstance(features, WideFeatures):
            rounded = ", rounded to float32" if features.dtype == torch.float32 else ""
            what += f"; of the wide layer evaluated in float64{rounded}, its features never stored"
        evidence.note(_NAME, "holds", what)
        return True
    if groups:
        independent = _independent_rows(evidence, features, ones, max_bytes, on_progress)
        evidence.note(
            _NAME,
            "fails",
            f"samples repeat: only {n} of {evidence.n} rows can be independent{independent}",
        )
        return False
    found = None
    if _fits(_basis_bytes(n), max_bytes, features):
        found = near_dependency(features, ones=ones)
    independent = _independent_rows(evidence, features, ones, max_bytes, on_progress)
    if found is not None:
        kind = "dependency" if found.exact else "near-dependency"
        evidence.add_offender(kind, found.samples, found.coefficients, found.residual)
        if found.exact:
            evidence.note(
                _NAME,
                "fails",
                f"rows {abbreviated(found.samples)} are linearly dependent, verified in exact arithmetic"
                + independent,
            )
            return False
    evidence.note(
        _NAME,
        "unknown",
        f"{proof.reason}{independent}; features in float64, a fresh perturbation or a wider layer would "
        "decide",
    )
    return None


def _independent_rows(
    evidence: Evidence,
    features: Features,
    ones: bool,
    max_bytes: int | None,
    on_progress: Callable[[str, float], None] | None,
) -> str:
    """Set ``rank_lower`` from rows that are proved independent; a clause that says so, or nothing."""
    most = max(proof_bytes(features.n, features.m), _basis_bytes(features.n))
    if not _fits(most + features.nbytes, max_bytes, features):  # a copy of the rows that are kept
        return ""
    evidence.rank_lower, proof = prove_rank_of_basis(features, ones=ones, progress=on_progress)
    if proof is None:
        return ""
    return f"; {evidence.rank_lower} rows are proved independent ({proof.route})"


def _basis_bytes(n: int) -> int:
    """Of the rows that are a basis: the Gram, its factor and a copy."""
    return 3 * 8 * n * n


def _fits(needed: int, max_bytes: int | None, features: Features) -> bool:
    room = allowed_bytes(max_bytes, features.device)
    return room is None or needed <= room
