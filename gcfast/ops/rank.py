"""The ranks of many small matrices with proved bounds: the kernels behind ``gcfast.matrix_rank``."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gcfast import errors, reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.arithmetic import exact_products, plain_thread
from gcfast.ops.registration import operator

# The shorter side of the largest matrix that the CPU kernel takes; a larger one fills the machine by itself.
CPU_LIMIT = 256
IN_ONE_THREAD = 4096  # numbers of a batch that is too small for a library to share out

RankBounds = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def rank_outputs(a: Tensor) -> RankBounds:
    counts = tuple(a.new_empty(a.shape[0], dtype=torch.int64) for _ in range(3))
    values = tuple(a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2))
    return (*counts, *values)  # type: ignore[return-value]


def _check_tolerance(name: str, value: Tensor) -> None:
    bad = ~(value >= 0)  # true for NaN, too
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be >= 0; got {float(value[index])} for matrix {index}")


def _refuse_non_finite(bad: Tensor) -> None:
    if bool(bad.any()):
        raise ValueError(
            f"A must be finite; matrix {int(bad.nonzero()[0])} of {len(bad)} has a NaN or an infinity"
        )


def _cpu(a: Tensor, atol: Tensor, rtol: Tensor) -> tuple[RankBounds, bool]:
    """What the kernel says, and whether it has left something (ranks of -1 and -2)."""
    assert native.cpu is not None
    out = rank_outputs(a)
    kernel = native.cpu.batched_rank_f64 if a.dtype == torch.float64 else native.cpu.batched_rank_f32
    pointers = [t.data_ptr() for t in (atol, rtol, *out)]
    return out, kernel(a.data_ptr(), *a.shape, *a.stride(), *pointers, torch.get_num_threads()) > 0


def _device_and_stream(a: Tensor) -> tuple[int, int]:
    return a.get_device(), torch.cuda.current_stream(a.device).cuda_stream


def _cuda(a: Tensor, atol: Tensor, rtol: Tensor) -> tuple[RankBounds, bool]:
    """The same on the device of `a`, whichever is current, and on that device's current stream."""
    assert native.cuda is not None
    out = rank_outputs(a)
    kernel = native.cuda.batched_rank_f64 if a.dtype == torch.float64 else native.cuda.batched_rank_f32
    scratch = a.new_empty(a.shape[0] + 1, dtype=torch.int64)
    pointers = [t.data_ptr() for t in (atol, rtol, *out, scratch)]
    kernel(a.data_ptr(), *a.shape, *a.stride(), *pointers, *_device_and_stream(a))
    return out, bool((out[0] < 0).any())


@functools.cache
def _cuda_limit(device: int) -> int:
    """What `CPU_LIMIT` is for the CPU: the size that fits the shared memory of a block there."""
    assert native.cuda is not None
    return int(native.cuda.batched_rank_limit(device))


def _plain_arithmetic(a: Tensor) -> AbstractContextManager[None]:
    """For the reference, whose products are a library's; those of little matrices are made in this thread."""
    small = a.device.type == "cpu" and a.numel() <= IN_ONE_THREAD
    return plain_thread() if small else exact_products(a.device)


def _merge(out: RankBounds, where: Tensor, better: RankBounds) -> None:
    """What another method says of the matrices `where`; of two proofs the stronger one stays."""
    lower, upper, least, largest = (t[where] for t in out[1:])
    lower, upper = torch.maximum(lower, better[1]), torch.minimum(upper, better[2])
    # where double-double has proved more than an SVD resolves, the SVD's own count may lie outside
    out[0][where] = better[0].clamp(lower, upper)
    out[1][where], out[2][where] = lower, upper
    out[3][where] = torch.maximum(least, better[3])
    out[4][where] = torch.minimum(largest, better[4])


def kernel_ranks(a: Tensor, atol: Tensor, rtol: Tensor, check_tolerance: bool) -> RankBounds | None:
    """What the backend in force says of the matrices; None where they are larger than its kernel takes."""
    if check_tolerance:
        _check_tolerance("atol", atol)
        _check_tolerance("rtol", rtol)
    backend = dispatch.choose("batched_rank", a)
    if a.numel() == 0:
        return reference.batched_rank(a, atol, rtol)
    limit = 0 if backend == "reference" else CPU_LIMIT if backend == "cpu" else _cuda_limit(a.get_device())
    if min(a.shape[1:]) > limit:
        _refuse_non_finite(~torch.isfinite(a).flatten(1).all(1))
        if backend != "reference":
            return None
        with _plain_arithmetic(a):
            return reference.batched_rank(a, atol, rtol)
    kernel = _cpu if backend == "cpu" else _cuda
    out, left = kernel(a, atol.contiguous(), rtol.contiguous())
    if left:  # a singular value lies where the tolerance is, or the pivots grew
        _refuse_non_finite(out[0] == -2)
        undecided = (out[0] < 0).nonzero()[:, 0]
        again = tuple(t[undecided] for t in (a, atol, rtol))
        with _plain_arithmetic(again[0]):
            _merge(out, undecided, reference.batched_rank(*again))
    return out


def _check(a: Tensor, atol: Tensor, rtol: Tensor, check_tolerance: bool = True) -> None:
    arguments.is_float("a", a)
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a must be float32 or float64; got {a.dtype}")
    if a.dim() != 3:
        raise ValueError(f"a must have shape (B, n, m); got {tuple(a.shape)}")
    for name, value in (("atol", atol), ("rtol", rtol)):
        arguments.is_float64(name, value, "a", a)
        arguments.has_shape(name, value, a.shape[:1], "B from a")
    errors.is_flag("check_tolerance", check_tolerance)


def rank_operator(name: str) -> Any:
    """Makes an operator of a kernel that takes a batch of matrices and the tolerances of each."""
    return operator(name, _check, lambda a, *rest: rank_outputs(a))


@rank_operator("batched_rank")
def batched_rank_op(a: Tensor, atol: Tensor, rtol: Tensor, check_tolerance: bool = True) -> RankBounds:
    found = kernel_ranks(a, atol, rtol, check_tolerance)
    if found is not None:
        return found
    with _plain_arithmetic(a):
        return reference.batched_rank(a, atol, rtol)


def batched_rank(
    a: Tensor, atol: Tensor, rtol: Tensor, *, check_tolerance: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The number of singular values above max(atol, rtol sigma_max), a matrix, with proved bounds.

    Args:
        a: (B, n, m) float32 or float64, any strides.
        atol, rtol: (B,) float64, >= 0.
        check_tolerance: whether that is checked, which reads them once more.

    Returns:
        rank, lower, upper (B,) int64 and sigma_min_lower, sigma_max_upper (B,) float64, as
        :class:`gcfast.RankEstimate` explains them. Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument; a matrix that is not finite with its index.
    """
    for name, value in (("a", a), ("atol", atol), ("rtol", rtol)):
        if isinstance(value, Tensor) and errors.transformed(value, batched=False):
            raise RuntimeError(f"batched_rank cannot be differentiated: detach {name}")
    a, atol, rtol = (t.detach() if isinstance(t, Tensor) else t for t in (a, atol, rtol))
    return batched_rank_op(a, atol, rtol, check_tolerance)  # type: ignore[no-any-return]
