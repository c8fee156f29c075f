"""Readers for the files image data sets come in: idx, npz, CIFAR pickles, mat, Semeion text, image folders.

Each takes a path and gives what the file holds, whole data sets as uint8 images (n, channels, height,
width) and int64 labels (n,), or raises :class:`~gcfast.errors.UserError` naming the file and what is
wrong with it.
"""

from __future__ import annotations

import codecs
import gzip
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcfast.cli.data.mat import read_mat
from gcfast.errors import UserError


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


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of an ``.npz``; pickled objects are refused, so reading runs no code."""
    with path.open("rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as archive:
                held = archive.files
                arrays = {key: archive[key] for key in keys if key in held}
        except Exception as error:  # a damaged archive can raise nearly anything
            raise UserError(f"{path}: not a readable .npz file, corrupt or cut short ({error})") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(f"{path}: no array named {', '.join(missing)}; it holds {', '.join(held)}")
    return arrays


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> NDArray[Any]:
    """One idx file, as MNIST is distributed, gzipped or not."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                raw = stream.read()
        else:
            raw = path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip stream is corrupt or cut short ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or raw[3] == 0:
        raise UserError(f"{path}: not an idx file (it begins with {raw[:4].hex() or 'nothing'})")
    dtype, rank = np.dtype(_IDX_TYPES[raw[2]]), raw[3]
    start = 4 + 4 * rank
    if len(raw) < start:
        raise UserError(f"{path}: cut short inside its header")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank))
    expected = dtype.itemsize
    for extent in shape:
        expected *= extent
    if len(raw) - start != expected:
        raise UserError(f"{path}: its header promises {expected} bytes of data, it has {len(raw) - start}")
    return np.frombuffer(raw, dtype=dtype, offset=start).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries of arrays and strings and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return np.dtype
        if module == "_codecs" and name == "encode":
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch of images does not need")


def _empty_array(kind: object, shape: tuple[int, ...], dtype: object) -> NDArray[Any]:
    # What numpy's own _reconstruct is always called with; the contents come by __setstate__.
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it rebuilds something that is not a plain array")
    return np.empty(0, dtype=np.uint8)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the text encoding {encoding!r}")
    return codecs.latin_1_encode(text)[0]


def _unpickle(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything while it is rebuilt
        if isinstance(error, OSError):
            raise
        raise UserError(f"{path}: not a readable CIFAR pickle, corrupt or cut short ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a pickled dictionary, found {type(content).__name__}")
    return content


def read_cifar_batch(path: Path, key: str) -> Images:
    """A pickle of CIFAR images and, under ``key``, their labels.

    n rows of 3072 bytes: red, green, blue planes of 32x32. CIFAR-10 has ``labels``, CIFAR-100
    ``fine_labels`` and ``coarse_labels``.
    """
    content = _unpickle(path)
    data, labels = content.get("data"), content.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise UserError(f"{path}: expected an array 'data' of uint8 rows of 3072 values")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise UserError(f"{path}: expected a list '{key}' of integers")
    return Images(data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64))


def read_cifar_names(path: Path, key: str) -> tuple[str, ...]:
    """The list of class names that CIFAR's meta data has under ``key``, in the order of the labels."""
    names = _unpickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
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
    try:
        table = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
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
