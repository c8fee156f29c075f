"""Read features from tensors, NumPy arrays, memory-mapped files and blocks of rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast import errors
from gcfast.storage import available, reserve_file


def as_matrix(data: Any, name: str, shape: str = "(n, m)") -> tuple[Tensor, bool]:
    """The matrix as a tensor, and whether its pages are a file's; blocks of rows are put together.

    Raises TypeError and ValueError naming the argument.
    """
    if isinstance(data, Tensor):
        matrix, mapped = data.detach(), False
    elif isinstance(data, np.ndarray):
        matrix, mapped = from_array(data, name), isinstance(data, np.memmap)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        matrix, mapped = _gather(data, name)
    else:
        raise TypeError(
            f"{name}: expected a tensor {shape}, an array or blocks of rows; got {type(data).__name__}"
        )
    errors.is_dense(name, matrix)
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name}: expected a real floating point dtype; got {matrix.dtype}")
    if matrix.element_size() == 1:  # torch cannot compute with those
        raise TypeError(f"{name}: expected at least sixteen bits a number; got {matrix.dtype}: use .half()")
    return matrix, mapped


def as_targets(data: Any, name: str) -> Tensor:
    """Targets as a dense tensor, from one or from an array of numbers; TypeError naming the argument."""
    if isinstance(data, np.ndarray):
        data = from_array(data, name).clone()
    errors.is_a(name, data, Tensor, "the targets as a tensor or an array of numbers")
    errors.is_dense(name, data)
    return data


def from_array(data: np.ndarray, name: str) -> Tensor:
    """The numbers of an array: where they lie if torch can read them there, else copied."""
    if isinstance(data, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected numbers; got a masked array, whose mask would be lost: .filled(...)"
        )
    if data.dtype.kind not in "fiub" or data.dtype.itemsize > 8:
        raise TypeError(f"{name}: expected numbers of at most 64 bits; got an array of {data.dtype}")
    size = data.dtype.itemsize
    if not data.dtype.isnative or any(step < 0 or step % size for step in data.strides):
        data = data.astype(data.dtype.newbyteorder("="), order="C")
    # a read-only map is only ever read
    return torch.from_numpy(data if data.flags.writeable else _writable_view(data))


def _writable_view(data: np.ndarray) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only arrays; nothing here writes to features
        return torch.from_numpy(data).numpy()


def _gather(blocks: Iterable[Any], name: str) -> tuple[Tensor, bool]:
    """Blocks of rows one after the other: in memory while half of what is free holds them, then in a file."""
    parts: list[Tensor] = []
    spill: BlockFile | None = None
    free = available(torch.device("cpu"))
    held = 0
    for i, block in enumerate(blocks):
        if not isinstance(block, (Tensor, np.ndarray)):
            raise TypeError(
                f"{name}: expected blocks of rows as tensors or arrays; block {i} of this "
                f"{type(blocks).__name__} is a {type(block).__name__}"
            )
        part = block if isinstance(block, Tensor) else from_array(block, f"{name}: block {i}")
        if part.dim() != 2 or (parts and part.shape[1] != parts[0].shape[1]) or not part.is_floating_point():
            first = f", {parts[0].shape[1]}" if parts else ", k"
            raise ValueError(
                f"{name}: expected blocks of rows (rows{first}) of real numbers; block {i} is "
                f"{tuple(part.shape)} {part.dtype}"
            )
        if parts and part.dtype != parts[0].dtype:
            raise TypeError(f"{name}: block {i} is {part.dtype}, the first one {parts[0].dtype}")
        held += part.numel() * part.element_size()
        if spill is None and free is not None and held > free // 2 and part.device.type == "cpu":
            spill = BlockFile(part.dtype, part.shape[1])
            for earlier in parts:
                spill.append(earlier)
            parts = parts[:1]
        if spill is None:
            parts.append(part.detach().clone())  # a loader may use its buffer again
        else:
            spill.append(part)
    if not parts:
        raise ValueError(f"{name}: the training set is empty: no blocks came")
    return (spill.matrix(), True) if spill is not None else (torch.cat(parts), False)


class BlockFile:
    """Rows in a temporary file without a name, which goes when nobody looks at them any more."""

    def __init__(self, dtype: torch.dtype, width: int):
        self.file = tempfile.TemporaryFile(prefix="gcfast-")  # noqa: SIM115  (the map outlives this object)
        self.dtype, self.width, self.rows = dtype, width, 0

    def append(self, block: Tensor) -> None:
        raw = block.detach().cpu().contiguous().view(torch.uint8).numpy()
        reserve_file(self.file, self.file.tell() + raw.nbytes, "features")
        self.file.write(raw.data)
        self.rows += len(block)

    def matrix(self) -> Tensor:
        self.file.flush()
        raw = np.memmap(self.file, dtype=np.uint8, mode="r+")
        return torch.from_numpy(raw).view(self.dtype).view(self.rows, self.width)
