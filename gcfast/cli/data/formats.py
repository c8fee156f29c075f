"""Readers for the files image data sets come in: idx, npz, CIFAR pickles, mat, Semeion text.

Each takes a path and gives what the file holds, whole data sets as uint8 images (n, channels, height,
width) and int64 labels (n,), or raises :class:`~gcfast.errors.UserError` naming the file and what is
wrong with it. Kind and shape are those that were asked for, and are looked at before the data are read.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gcfast.cli.data.mat import read_mat
from gcfast.errors import UserError
from gcfast.storage import Archive, Made, check_growth, read_pickle, read_whole, stored_bytes


class Images(NamedTuple):
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def check(self, where: str, classes: int) -> Images:
        """The counts agree, there is something, and every label is a class."""
        if len(self.images) != len(self.labels):
            raise UserError(f"{where}: {len(self.images)} images but {len(self.labels)} labels")
        if not len(self.images):
            raise UserError(f"{where}: no images")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            raise UserError(f"{where}: labels run from {low} to {high}, expected 0 to {classes - 1}")
        return self


def check_kind(where: str, dtype: DTypeLike, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Images are n x ``size`` uint8 values; labels, for which ``size`` is (), n integers of any width."""
    dtype = np.dtype(dtype)
    if size and (dtype != np.uint8 or len(shape) != 1 + len(size) or shape[1:] != size):
        raise UserError(
            f"{where}: expected uint8 images of {'x'.join(map(str, size))}, got {dtype} of {shape[1:]}"
        )
    if not size and (len(shape) != 1 or dtype.kind not in "iu"):
        raise UserError(f"{where}: expected a list of integer labels, got {dtype} of shape {shape}")


def read_npz(path: Path, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """The named arrays of an ``.npz``, each of the size that :func:`check_kind` takes."""
    try:
        with Archive(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.names]
            missing = [key for key in sizes if key not in held]
            if missing:
                shown = ", ".join(held[:10])
                raise UserError(f"{path}: no array named {', '.join(missing)}; it holds {shown}")
            names = {key: f"{key}.npy" if f"{key}.npy" in archive.names else key for key in sizes}
            return {
                key: _read_npy(archive, names[key], f"{path}: {key}", size) for key, size in sizes.items()
            }
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise UserError(f"{path}: not a readable .npz file, corrupt or cut short ({error})") from error


def _read_npy(archive: Archive, name: str, where: str, size: tuple[int, ...]) -> NDArray[Any]:
    """One array, by what numpy says of its header; numpy itself would make room for whatever that says."""
    with archive.open(name) as stream:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        version = np.lib.format.read_magic(stream)
        if version not in read_header:
            raise ValueError(f"{name} has version {version} of numpy's format")
        shape, fortran, dtype = read_header[version](stream, max_header_size=1000)
        check_kind(where, dtype, shape, size)
        promised = dtype.itemsize * math.prod(shape)
        if min(shape) < 0 or promised != archive.size(name) - stream.tell():
            raise ValueError(
                f"{name} promises {promised} bytes of data, it has {archive.size(name) - stream.tell()}"
            )
        raw = stream.read(promised)
    return np.frombuffer(raw, dtype=dtype).reshape(shape, order="F" if fortran else "C")


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path, size: tuple[int, ...]) -> NDArray[Any]:
    """One idx file, as MNIST is distributed, gzipped or not, of the size that :func:`check_kind` takes."""
    with path.open("rb") as file:
        stored, _ = stored_bytes(file)
        try:
            if path.suffix == ".gz":
                with gzip.open(file) as stream:
                    return _read_idx(path, stream, stored, size)
            return _read_idx(path, file, stored, size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: the gzip stream is corrupt or cut short ({error})") from error


def _read_idx(
    path: Path, stream: IO[bytes] | gzip.GzipFile, stored: int, size: tuple[int, ...]
) -> NDArray[Any]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not 0 < magic[3] < 5:
        raise UserError(f"{path}: not an idx file (it begins with {magic.hex() or 'nothing'})")
    dtype, rank = np.dtype(_IDX_TYPES[magic[2]]), magic[3]
    extents = stream.read(4 * rank)
    if len(extents) < 4 * rank:
        raise UserError(f"{path}: cut short inside its header")
    shape = tuple(int(extent) for extent in np.frombuffer(extents, dtype=">u4"))
    check_kind(str(path), dtype, shape, size)
    promised = dtype.itemsize * math.prod(shape)
    check_growth(str(path), stored, promised)
    raw = stream.read(promised)
    more = len(raw) == promised and bool(stream.read(1))  # the end of a gzip stream is its checksum
    if len(raw) < promised or more:
        has = f"{len(raw)}{' and more' if more else ''}"
        raise UserError(f"{path}: its header promises {promised} bytes of data, it has {has}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it encodes something that is not latin1 text")
    return text.encode("latin1")


# What pickles of arrays of numpy 1 and 2 ask for.
_ARRAYS = {
    "numpy.core.multiarray _reconstruct": Made,
    "numpy._core.multiarray _reconstruct": Made,
    "numpy dtype": Made,
    "numpy ndarray": None,
    "_codecs encode": _encode,
}


def _uint8_rows(array: Any) -> NDArray[np.uint8]:
    """The array that numpy's pickle describes: version, shape, dtype, order and bytes."""
    _, shape, dtype, fortran, raw = array.state
    if (
        type(shape) is not tuple
        or len(shape) != 2
        or type(dtype) is not Made
        or dtype.arguments[0] not in ("u1", "|u1")
    ):
        raise ValueError("it is not one of rows of uint8 values")
    content = raw.encode("latin1") if type(raw) is str else raw  # Python 2 had one type for both
    rows, columns = shape
    if type(rows) is not int or rows < 0 or columns != 3072 or len(content) != rows * columns:
        raise ValueError(f"{len(content)} bytes are not rows of 3072 values")
    return np.frombuffer(content, dtype=np.uint8).reshape(rows, 3072, order="F" if fortran else "C")


def _read_dictionary(path: Path) -> dict[str, Any]:
    raw = read_whole(path)
    try:
        content = read_pickle(raw, _ARRAYS)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a readable CIFAR pickle, corrupt or cut short ({error})") from error
    if type(content) is not dict:
        raise UserError(f"{path}: expected a pickled dictionary, found {type(content).__name__}")
    return content


def read_cifar_batch(path: Path, key: str) -> Images:
    """A pickle of CIFAR images and, under ``key``, their labels.

    n rows of 3072 bytes: red, green, blue planes of 32x32. CIFAR-10 has ``labels``, CIFAR-100
    ``fine_labels`` and ``coarse_labels``.
    """
    content = _read_dictionary(path)
    labels = content.get(key)
    try:
        rows = _uint8_rows(content.get("data"))
    except Exception as error:
        raise UserError(f"{path}: expected an array 'data' of uint8 rows of 3072 values ({error})") from error
    if type(labels) is not list or not all(type(label) is int and abs(label) < 1 << 62 for label in labels):
        raise UserError(f"{path}: expected a list '{key}' of integers")
    return Images(rows.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64))


def read_cifar_names(path: Path, key: str) -> tuple[str, ...]:
    """The list of class names that CIFAR's meta data has under ``key``, in the order of the labels."""
    names = _read_dictionary(path).get(key)
    if type(names) is not list or not all(type(name) is str for name in names):
        raise UserError(f"{path}: expected a list '{key}' of names")
    return tuple(names)


def read_svhn(path: Path) -> Images:
    """``train_32x32.mat`` or its like: ``X`` of 32x32x3xn and ``y`` of nx1, where 10 is the digit 0."""
    arrays = read_mat(path, ("X", "y"))
    pixels, labels = arrays["X"], arrays["y"]
    if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise UserError(f"{path}: expected 'X' of 32x32x3xn, got {_times(pixels)}")
    if labels.ndim != 2 or labels.shape[1] != 1:
        raise UserError(f"{path}: expected 'y' of nx1, got {_times(labels)}")
    if labels.size and not 1 <= labels.min() <= labels.max() <= 10:
        raise UserError(f"{path}: labels run from {labels.min()} to {labels.max()}, expected 1 to 10")
    return Images(pixels.transpose(3, 2, 0, 1), labels[:, 0].astype(np.int64) % 10)


def _times(array: NDArray[Any]) -> str:
    return "x".join(str(extent) for extent in array.shape)


def read_semeion_text(path: Path) -> Images:
    """``semeion.data``: a line a digit, 256 pixels that are 0 or 1, then ten indicators of the class."""
    text = io.StringIO(read_whole(path, 1 << 24).decode("latin1"))  # by its path, numpy would unpack it
    try:
        table = np.loadtxt(text, dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise UserError(f"{path}: not a readable semeion.data table ({error})") from error
    if table.shape[1] != 266:
        raise UserError(
            f"{path}: expected 256 pixels and 10 class indicators a line, found {table.shape[1]} values"
        )
    pixels, indicators = table[:, :256], table[:, 256:]
    if not np.isin(table, (0.0, 1.0)).all() or not (indicators.sum(axis=1) == 1).all():
        raise UserError(f"{path}: expected pixels of 0 or 1 and exactly one class indicator set a line")
    return Images(
        (pixels * 255).astype(np.uint8).reshape(-1, 1, 16, 16), indicators.argmax(axis=1).astype(np.int64)
    )
