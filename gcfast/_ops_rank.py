"""The torch.library op behind ``gcfast.matrix_rank``: kernels for small matrices, proofs for large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import _dispatch, _native, reference

# The shorter side of the largest matrix that the kernels take; a larger one fills the machine by itself.
CPU_LIMIT = 256

Bounds = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(a: Tensor) -> Bounds:
    counts = tuple(a.new_empty(a.shape[0], dtype=torch.int64) for _ in range(3))
    values = tuple(a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2))
    return (*counts, *values)  # type: ignore[return-value]


def _check_tolerance(name: str, value: Tensor) -> None:
    if not bool((value >= 0).all()):  # true for NaN, too
        index = int((~(value >= 0)).nonzero()[0])
        raise ValueError(f"{name} must be >= 0; got {float(value[index])} for matrix {index}")


def _refuse_non_finite(bad: Tensor) -> None:
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(f"A must be finite; matrix {index} of {len(bad)} has a NaN or an infinity")


def _cpu(a: Tensor, atol: Tensor, rtol: Tensor) -> Bounds:
    assert _native.cpu is not None
    out = _outputs(a)
    kernel = _native.cpu.batched_rank_f64 if a.dtype == torch.float64 else _native.cpu.batched_rank_f32
    pointers = [t.data_ptr() for t in (atol, rtol, *out)]
    kernel(a.data_ptr(), *a.shape, *a.stride(), *pointers, torch.get_num_threads())
    return out


def _merge(out: Bounds, where: Tensor, better: Bounds) -> None:
    """What another method says of the matrices `where`; of two proofs the stronger one stays."""
    lower, upper, least, largest = (t[where] for t in out[1:])
    lower, upper = torch.maximum(lower, better[1]), torch.minimum(upper, better[2])
    # where double-double has proved more than an SVD resolves, the SVD's own count may lie outside
    out[0][where] = better[0].clamp(lower, upper)
    out[1][where], out[2][where] = lower, upper
    out[3][where] = torch.maximum(least, better[3])
    out[4][where] = torch.minimum(largest, better[4])


def _large(a: Tensor, atol: Tensor, rtol: Tensor) -> Bounds:
    """Beyond the kernels, one matrix after the other: full rank by proof, all else by a verified SVD."""
    from gcfast._rank_proof import prove_full_rank  # imports this module by way of gcfast.ops

    parts = []
    for x, at, rt in zip(a, atol, rtol):
        n = min(x.shape)
        proof = prove_full_rank(x if x.shape[0] == n else x.mT, ones=False)
        tolerance = max(float(at), float(rt) * proof.sigma_max_upper * (1 + 1e-15))
        if proof.proved and proof.sigma_min_lower > tolerance:
            counts = [at.new_full((1,), n, dtype=torch.int64)] * 3
            values = [at.new_full((1,), v) for v in (proof.sigma_min_lower, proof.sigma_max_upper)]
            parts.append((*counts, *values))
        else:
            parts.append(reference.batched_rank(x[None], at[None], rt[None]))
    return tuple(torch.cat(column) for column in zip(*parts))  # type: ignore[return-value]


@torch.library.custom_op("gcfast::batched_rank", mutates_args=())
def batched_rank_op(a: Tensor, atol: Tensor, rtol: Tensor) -> Bounds:
    _check_tolerance("atol", atol)
    _check_tolerance("rtol", rtol)
    backend = _dispatch.choose("batched_rank", a)
    large = min(a.shape[1:]) > CPU_LIMIT
    if a.numel() == 0:
        return reference.batched_rank(a, atol, rtol)
    if backend == "reference" or large:
        _refuse_non_finite(~torch.isfinite(a).flatten(1).all(1))
        return (reference.batched_rank if backend == "reference" else _large)(a, atol, rtol)
    out = _cpu(a, atol.contiguous(), rtol.contiguous())
    _refuse_non_finite(out[0] == -2)
    undecided = (out[0] < 0).nonzero()[:, 0]
    if len(undecided):  # a singular value lies where the tolerance is, or the pivots grew
        again = (t[undecided] for t in (a, atol, rtol))
        _merge(out, undecided, reference.batched_rank(*again))
    return out


@batched_rank_op.register_fake
def _(a: Tensor, atol: Tensor, rtol: Tensor) -> Bounds:
    return _outputs(a)
