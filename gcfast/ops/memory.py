"""Whether an operand's memory is there, and what an operator writes to apart from what it reads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from gcfast import errors

_TRIES = 10**6  # of numpy's solver; two layouts that it cannot tell apart by then are taken to meet


def is_there(name: str, value: Tensor) -> None:
    """An error if the storage was cut under the tensor or freed, as sharding does with weights out of use."""
    if not errors.lies_in_memory(value):
        raise ValueError(
            f"{name} must have memory of its own; got a tensor of shape {tuple(value.shape)} whose storage "
            f"was resized to {value.untyped_storage().nbytes()} bytes"
        )


def is_once(name: str, value: Tensor) -> None:
    """No element of what is written to is in memory twice."""
    if value.is_contiguous() or value.numel() < 2:
        return
    if value.dim() == 2 and 0 <= value.stride(1) * (value.shape[1] - 1) < value.stride(0) and value.stride(1):
        return  # rows side by side, as most are
    sizes = [(stride, size) for size, stride in zip(value.shape, value.stride()) if size > 1]
    reach = 0  # from the first element to the last one along the axes of smaller strides
    for stride, size in sorted(sizes):
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return
    if len(sizes) == 2 and 0 not in (sizes[0][0], sizes[1][0]):
        (step, rows), (other, columns) = sizes
        common = math.gcd(step, other)
        if other // common >= rows or step // common >= columns:
            return
    if any(stride == 0 for stride, _ in sizes):
        raise ValueError(f"{name} must not be expanded: its strides are {tuple(value.stride())}")
    raise ValueError(
        f"{name} must have each element in a place of its own in memory; shape {tuple(value.shape)} with "
        f"strides {tuple(value.stride())} has not"
    )


def _places(value: Tensor) -> Any:
    """An array of where the elements lie. Nothing reads through it: it may be of a GPU's memory."""
    size = value.element_size()
    layout = {
        "version": 3,
        "data": (value.data_ptr(), False),
        "shape": tuple(value.shape),
        "strides": tuple(size * stride for stride in value.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=layout))


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element's memory in common."""
    start, astray = divmod(a.data_ptr() - b.data_ptr(), a.element_size())
    alike = a.dim() == b.dim() == 2 and a.stride() == b.stride() and a.dtype == b.dtype
    if alike and not astray and all(a.stride()):
        # Blocks of one matrix: b's element (i, j) less a's is at i rows + j columns from b's origin to a's.
        (height, width), (below, behind), (rows, columns) = a.shape, b.shape, a.stride()
        if rows < columns:
            height, width, below, behind, rows, columns = width, height, behind, below, columns, rows
        first = max(1 - height, -(((behind - 1) * columns - start) // rows))
        last = min(below - 1, (start + (width - 1) * columns) // rows)
        return any((start - i * rows) % columns == 0 for i in range(first, last + 1))
    try:
        return bool(np.shares_memory(_places(a), _places(b), max_work=_TRIES))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def shares_nothing(written: str, out: Tensor, name: str, value: Tensor, may_be_it: bool = False) -> None:
    """`out` shares no element with `value`, unless it may be that very tensor and is."""
    here, there = out.untyped_storage(), value.untyped_storage()
    first, other = here.data_ptr(), there.data_ptr()
    if first + here.nbytes() <= other or other + there.nbytes() <= first:
        return  # one array of numpy may be behind several storages
    same = out.data_ptr() == value.data_ptr() and out.shape == value.shape and out.dtype == value.dtype
    if may_be_it and same and out.stride() == value.stride():
        return
    if out.numel() and value.numel() and _meet(out, value):
        which = (
            f"be {name} itself or share no memory with it" if may_be_it else f"share no memory with {name}"
        )
        raise ValueError(f"{written} must {which}; got tensors that overlap: pass {name}.clone()")
