"""Files of ``torch.save`` that hold plain values and dense tensors, read without trusting them.

Not by ``torch.load``: even with ``weights_only`` it makes a ``bytearray`` of any size on request, and undoes
compression without a limit (torch 2.14).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcfast.errors import UserError
from gcfast.storage.plain_pickle import Named, read_pickle
from gcfast.storage.untrusted import Archive

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


def load_torch(path: Path) -> Any:
    """The values, with the tensors on the CPU, each with its own memory.

    Raises UserError, naming the file, for a file that is damaged or holds anything else; MemoryError where
    it does not fit.
    """
    with Archive(path) as archive:
        try:
            return _Reader(archive).content()
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # damage shows as nearly anything
            raise UserError(
                f"{path}: expected plain values and dense tensors as torch.save writes them; it is corrupt,"
                f" cut short or holds more ({str(error)[:200] or type(error).__name__})"
            ) from error


class _Reader:
    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._folder = archive.names[0].partition("/")[0]
        self._flat: dict[str, Tensor] = {}
        # Views may overlap, copies of them may not grow: that much is in the file, and as much again.
        self._left = 2 * sum(map(archive.size, archive.names))

    def content(self) -> Any:
        order = f"{self._folder}/byteorder"
        if order in self._archive.names and self._archive.read(order) != b"little":
            raise ValueError("its numbers are not in little-endian order")
        make = {**dict.fromkeys(_STORAGES), "collections OrderedDict": _new_dict}
        make["torch._utils _rebuild_tensor_v2"] = self._tensor
        return read_pickle(self._archive.read(f"{self._folder}/data.pkl"), make, self._storage)

    def _storage(self, identity: Any) -> Tensor:
        tag, kind, key, _, count = identity
        if tag != "storage" or type(kind) is not Named or type(key) is not str or type(count) is not int:
            raise ValueError("a storage is not described as torch does")
        dtype = _STORAGES[kind]
        if key not in self._flat:
            raw = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
            none = torch.empty(0, dtype=dtype, device="cpu")
            self._flat[key] = torch.frombuffer(raw, dtype=dtype) if raw else none
        flat = self._flat[key]
        if flat.dtype != dtype or len(flat) != count:
            raise ValueError(
                f"storage {key} promises {count} values of {dtype}, it has {len(flat)} of {flat.dtype}"
            )
        return flat

    def _tensor(
        self,
        flat: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        metadata: Any = None,
    ) -> Tensor:
        if not isinstance(flat, Tensor) or not (_counts((offset,)) and _counts(shape) and _counts(strides)):
            raise ValueError("a tensor is not described as torch does")
        count = math.prod(shape)
        end = offset + 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        if count and end > len(flat):
            raise ValueError(f"a tensor ends at value {end} of a storage of {len(flat)}")
        self._left -= count * flat.element_size()
        if self._left < 0:
            raise ValueError("its tensors take more than twice the bytes of the file")
        return flat.as_strided(shape, strides, offset).clone() if count else flat.new_empty(shape)


def _new_dict() -> dict[str, Any]:
    return {}


def _counts(values: Sequence[Any]) -> bool:
    return type(values) is tuple and len(values) <= 64 and all(type(v) is int and v >= 0 for v in values)
