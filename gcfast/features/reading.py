"""Read features from tensors, NumPy arrays, memory-mapped files and blocks of rows."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcfast import errors
from gcfast.ops import arguments
from gcfast.storage import available, reserve_file


def as_matrix(data: Any, name: str, shape: str = "(n, m)") -> tuple[Tensor, bool]:
    """The matrix as a tensor, and whether its pages are a file's; blocks of rows are put together.

    Raises TypeError and ValueError naming the argument.
    """
    if isinstance(data, Tensor):
        errors.is_dense(name, data)
        matrix, mapped = data.detach().resolve_neg(), False
    elif isinstance(data, np.ndarray):
        matrix, mapped = _of_array(data, name), isinstance(data, np.memmap)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        matrix, mapped = _gather(data, name)
    else:
        raise TypeError(
            f"{name}: expected a tensor {shape}, an array or blocks of rows; got {type(data).__name__}"
        )
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(matrix.shape)}")
    if matrix.dtype not in arguments.FLOATS:
        raise TypeError(
            f"{name}: expected a real floating point dtype, of 16 bits or more; got {matrix.dtype}"
        )
    return matrix, mapped


def as_targets(data: Any, name: str) -> Tensor:
    """Targets as a dense tensor, from one or from an array of numbers; TypeError naming the argument."""
    if isinstance(data, np.ndarray):
        data = _of_array(data, name).clone()
    errors.is_a(name, data, Tensor, "the targets as a tensor or an array of numbers")
    errors.is_dense(name, data)
    return data


def _of_array(data: np.ndarray, name: str) -> Tensor:
    """An array of numbers as a tensor, copied only where its byte order or its steps are none of torch's."""
    if data.dtype.kind not in "fiub" or isinstance(data, np.ma.MaskedArray):
        masked = "a masked array, whose mask would be lost: .filled(...)"
        what = masked if isinstance(data, np.ma.MaskedArray) else f"an array of {data.dtype}"
        raise TypeError(f"{name}: expected numbers; got {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only arrays; nothing here writes to them
            try:
                return torch.from_numpy(data)
            except (TypeError, ValueError):
                return torch.from_numpy(np.array(data, data.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(f"{name}: expected numbers that torch knows; got an array of {data.dtype}") from None


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
        part = block if isinstance(block, Tensor) else _of_array(block, f"{name}: block {i}")
        errors.is_dense(f"{name}: block {i}", part)
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
        raw = block.detach().cpu().resolve_neg().contiguous().view(torch.uint8).numpy()
        reserve_file(self.file, self.file.tell() + raw.nbytes, "features")
        self.file.write(raw.data)
        self.rows += len(block)

    def matrix(self) -> Tensor:
        self.file.flush()
        raw = np.memmap(self.file, dtype=np.uint8, mode="r+")
        return torch.from_numpy(raw).view(self.dtype).view(self.rows, self.width)
