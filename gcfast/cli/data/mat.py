"""A reader for MATLAB .mat files of version 5: arrays of numbers only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcfast.errors import UserError
from gcfast.storage import check_growth, read_whole

# Element types of a MATLAB 5 file, and the class of an array of uint8 values.
_MI_INT8, _MI_UINT8, _MI_INT32, _MI_UINT32, _MI_MATRIX, _MI_COMPRESSED = 1, 2, 5, 6, 14, 15
_MX_UINT8 = 9


def read_mat(path: Path, keys: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """The named uint8 arrays of a MATLAB 5 file (MathWorks, "MAT-File Format").

    Not by scipy.io.loadmat: a wrong byte in an element's type can end the process there (scipy 1.17).
    """
    raw = memoryview(read_whole(path))
    if len(raw) < 128 or raw[124:128] != b"\0\1IM":
        raise UserError(f"{path}: not a little-endian MATLAB 5 file (.mat)")
    arrays = {}
    names = []
    grown = 0
    rest = raw[128:]
    try:
        while rest:
            kind, content, rest = _mat_element(rest)
            if kind == _MI_COMPRESSED:
                size, body = _inflated(path, content, grown, len(raw))
                grown += size
                kind, content, _ = _mat_element(body)
            if kind != _MI_MATRIX:
                raise ValueError(f"expected an array, found an element of type {kind}")
            flags, content = _mat_part(content, _MI_UINT32)
            shape, content = _mat_part(content, _MI_INT32)
            name, content = _mat_part(content, _MI_INT8)
            names.append(bytes(name).decode("latin1"))
            if names[-1] in arrays:
                raise ValueError(f"{names[-1]!r} is there twice")
            if names[-1] not in keys:
                continue
            if len(flags) != 8 or flags[0] != _MX_UINT8:
                raise ValueError(f"{names[-1]!r} is not an array of uint8 values")
            values, _ = _mat_part(content, _MI_UINT8)
            # Unsigned: reshape would work out an extent of -1 by itself.
            extents = [int(extent) for extent in np.frombuffer(shape, dtype="<u4")]
            arrays[names[-1]] = np.frombuffer(values, dtype=np.uint8).reshape(extents, order="F")
    except UserError:
        raise
    except (ValueError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: not a readable .mat file, corrupt or cut short ({error})") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(
            f"{path}: no array named {', '.join(missing)}; it holds {', '.join(names[:10]) or 'none'}"
        )
    return arrays


def _inflated(path: Path, content: memoryview, grown: int, stored: int) -> tuple[int, memoryview]:
    """The compressed element, and the size that its first bytes promise: of a file of ``stored`` bytes, whose
    elements before it have ``grown`` to so many.
    """
    stream = zlib.decompressobj()
    tag = stream.decompress(content, 8)
    size = struct.unpack("<II", tag)[1]
    check_growth(str(path), stored, grown + size)
    # One byte more than there may be, so that the stream has to come to its end and its checksum.
    body = stream.decompress(stream.unconsumed_tail, size + 1)
    if len(body) != size or not stream.eof:
        raise ValueError(f"a compressed element promises {size} bytes of data, it has {len(body)} or more")
    return size, memoryview(tag + body)


def _mat_element(data: memoryview) -> tuple[int, memoryview, memoryview]:
    """The type and the content of the first element, and what follows it."""
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes where an element was to begin")
    kind, size = struct.unpack("<II", data[:8])
    if kind >> 16:  # a small element: size, type and up to four bytes of content in eight bytes
        kind, size = kind & 0xFFFF, kind >> 16
        start, end = 4, 8
    else:
        start = 8
        end = start + size + (0 if kind == _MI_COMPRESSED else -size % 8)
    if size > len(data[start:end]):
        raise ValueError(f"an element promises {size} bytes of data, it has {len(data[start:end])}")
    return kind, data[start : start + size], data[end:]


def _mat_part(data: memoryview, expected: int) -> tuple[memoryview, memoryview]:
    kind, content, rest = _mat_element(data)
    if kind != expected:
        raise ValueError(f"expected an element of type {expected}, found {kind}")
    return content, rest
