"""The bytes of a checkpoint file: header, digests, tensors; what is damaged is refused by name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from gcfast._version import __version__
from gcfast.storage.digest import (
    DIGEST,
    PIECE,
    digest_of,
    hash_pieces,
    pool,
    raw_bytes,
)
from gcfast.storage.memory import check_memory
from gcfast.storage.untrusted import check_growth, stored_bytes

_MAGIC = b"gcfast\x00state\r\n\x1a\n"
_VERSION = 1
_PREAMBLE = struct.Struct("<16sIQ")
ALIGN = 64
_WAY_OUT = "Delete the file or give another path"


class CheckpointError(ValueError):
    """A file that cannot be continued from; the message names it, what is wrong and the way out."""


class SavedState:
    """A loaded checkpoint: ``values``, ``names`` of the tensors, and the tensors themselves on demand.

    It stays readable while newer checkpoints are saved, but keeps its bytes on the disk until ``close``.
    """

    def __init__(self, path: Path, stream: BinaryIO, start: int, header: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = header["values"]
        self._path, self._stream, self._start = path, stream, start
        self._table = {entry["name"]: entry for entry in header["tensors"]}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._table)

    def tensors(self, name: str) -> Tensor:
        """Read one tensor, to the CPU.

        Raises KeyError for a name that is not in ``names``, CheckpointError for bytes that do not match
        their digest or a dtype that this torch does not have, ValueError once closed.
        """
        entry = self._table[name]
        dtype = getattr(torch, entry["dtype"], None)
        if not isinstance(dtype, torch.dtype) or _packed(dtype):
            what = f"its tensor {name!r} has dtype {entry['dtype']}, which torch {torch.__version__} lacks"
            refuse(self._path, what, "Update torch, or give another path")
        order = entry["order"]
        if dtype.itemsize * math.prod(entry["shape"]) != entry["bytes"]:
            refuse(self._path, f"it is corrupt: tensor {name!r} is not as long as its shape")
        what, way_out = f"checkpoint {self._path}: tensor {name!r}", "Free memory, or give another path"
        check_memory(what, entry["bytes"], None, torch.device("cpu"), way_out)
        result = torch.empty([entry["shape"][axis] for axis in order], dtype=dtype, device="cpu")
        raw = raw_bytes(result)
        self._stream.seek(self._start + entry["offset"])

        def pieces() -> Iterator[np.ndarray]:
            for begin in range(0, len(raw), PIECE):
                piece = raw[begin : begin + PIECE]
                if self._stream.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                    refuse(self._path, f"it is truncated within tensor {name!r}")
                yield piece

        with pool() as workers:
            root = hash_pieces(pieces(), workers)
        root.update(self._stream.read(-len(raw) % ALIGN))
        if root.hexdigest() != entry["digest"]:
            refuse(self._path, f"it is corrupt: tensor {name!r} does not match its digest")
        return result.permute([order.index(axis) for axis in range(len(order))])

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packed(dtype: torch.dtype) -> bool:
    """Whether an element has no bytes of its own: a tensor of such takes less room than its items say."""
    return str(dtype).removeprefix("torch.").startswith(("q", "bits")) or dtype.itemsize == 0


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Everything before the tensors, a multiple of ``ALIGN`` bytes."""
    text = json.dumps(header).encode("ascii")
    text += b" " * (-(_PREAMBLE.size + len(text) + DIGEST) % ALIGN)
    head = _PREAMBLE.pack(_MAGIC, _VERSION, len(text)) + text
    return head + digest_of(np.frombuffer(head, np.uint8))


def read_header(path: Path, stream: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the tensors start, and the header."""
    size = os.fstat(stream.fileno()).st_size
    head = stream.read(_PREAMBLE.size)
    if not head.startswith(_MAGIC[: len(head)]):
        refuse(path, "it is not a checkpoint of gcfast")
    if len(head) < _PREAMBLE.size:
        refuse(path, f"it is truncated after {size} bytes")
    _, version, length = _PREAMBLE.unpack(head)
    if version != _VERSION:
        age = "newer" if version > _VERSION else "older"
        what = (
            f"it has format version {version}, {age} than {_VERSION}, the one that gcfast {__version__} reads"
        )
        refuse(path, what, "Use the gcfast that wrote it, delete the file or give another path")
    start = _PREAMBLE.size + length + DIGEST
    if start > size:
        refuse(
            path,
            f"it is truncated, or its header corrupt: {size:,} bytes, its header alone ends at {start:,}",
        )
    check_growth(f"checkpoint {path}: its header", stored_bytes(stream)[0], length)
    text, digest = stream.read(length), stream.read(DIGEST)
    if digest_of(np.frombuffer(head + text, np.uint8)) != digest:
        refuse(path, "it is corrupt: its header does not match its digest")
    try:
        header: dict[str, Any] = json.loads(text)
        length = _check_header(header)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        refuse(path, f"it is corrupt: its header is none of gcfast's ({error!r:.200})")
    if start + length != size:
        state = "truncated" if size < start + length else "corrupt"
        refuse(path, f"it is {state}: {size:,} bytes of {start + length:,}")
    return start, header


def _check_header(header: Mapping[str, Any]) -> int:
    """The bytes of all tensors; ValueError, TypeError or KeyError where it says what no ``save`` does.

    Its digest has no key: whoever makes up a header can make up its digest as well.
    """
    for key, kind in (("kind", str), ("fingerprint", str), ("values", dict), ("tensors", list)):
        if type(header[key]) is not kind:
            raise TypeError(f"{key}: expected a {kind.__name__}")
    offset = 0
    for entry in header["tensors"]:
        counts = [entry["offset"], entry["bytes"], *entry["shape"], *entry["order"]]
        if not all(type(count) is int and 0 <= count < 1 << 62 for count in counts):
            raise TypeError("tensors: expected sizes that are whole numbers")
        if entry["offset"] != offset or sorted(entry["order"]) != list(range(len(entry["shape"]))):
            raise ValueError("tensors: expected one behind the other, their axes in some order")
        if not all(type(entry[key]) is str for key in ("name", "dtype", "digest")):
            raise TypeError("tensors: expected a name, a dtype and a digest")
        offset += entry["bytes"] + -entry["bytes"] % ALIGN
    return offset


def refuse(path: Path, what: str, way_out: str = _WAY_OUT) -> NoReturn:
    raise CheckpointError(f"checkpoint {path}: {what}. {way_out}.")


def axis_order(tensor: Tensor) -> list[int]:
    """Axes from the slowest in memory to the fastest: so a factor from LAPACK need not be transposed."""
    plain, strides = list(range(tensor.dim())), tensor.stride()
    order = sorted(plain, key=lambda axis: strides[axis], reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else plain


def check_values(value: object, where: str) -> None:
    """JSON would turn other keys into strings without a word, and its own error does not say where."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: expected strings as keys; got {key!r}")
            check_values(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_values(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where}: expected numbers, strings, lists, dicts or None; got {type(value)}")
