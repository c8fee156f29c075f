"""Readers for the files image data sets come in: idx, npz, CIFAR pickles, mat, Semeion text, image folders.

Each takes a path and gives what the file holds, whole data sets as uint8 images (n, channels, height,
width) and int64 labels (n,), or raises :class:`~gcfast.errors.UserError` naming the file and what is
wrong with it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gcfast.errors import UserError, require


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
    arrays = _read_mat(path, ("X", "y"))
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


# Element types of a MATLAB 5 file, and the class of an array of uint8 values.
_MI_INT8, _MI_UINT8, _MI_INT32, _MI_UINT32, _MI_MATRIX, _MI_COMPRESSED = 1, 2, 5, 6, 14, 15
_MX_UINT8 = 9


def _read_mat(path: Path, keys: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """The named uint8 arrays of a MATLAB 5 file (MathWorks, "MAT-File Format").

    Not by scipy.io.loadmat: a wrong byte in an element's type can end the process there (scipy 1.17).
    """
    raw = memoryview(path.read_bytes())
    if len(raw) < 128 or raw[124:128] != b"\0\1IM":
        raise UserError(f"{path}: not a little-endian MATLAB 5 file (.mat)")
    arrays = {}
    names = []
    rest = raw[128:]
    try:
        while rest:
            kind, content, rest = _mat_element(rest)
            if kind == _MI_COMPRESSED:
                kind, content, _ = _mat_element(memoryview(zlib.decompress(content)))
            if kind != _MI_MATRIX:
                raise ValueError(f"expected an array, found an element of type {kind}")
            flags, content = _mat_part(content, _MI_UINT32)
            shape, content = _mat_part(content, _MI_INT32)
            name, content = _mat_part(content, _MI_INT8)
            names.append(bytes(name).decode("latin1"))
            if names[-1] not in keys:
                continue
            if len(flags) != 8 or flags[0] != _MX_UINT8:
                raise ValueError(f"{names[-1]!r} is not an array of uint8 values")
            values, _ = _mat_part(content, _MI_UINT8)
            # Unsigned: reshape would work out an extent of -1 by itself.
            extents = [int(extent) for extent in np.frombuffer(shape, dtype="<u4")]
            arrays[names[-1]] = np.frombuffer(values, dtype=np.uint8).reshape(extents, order="F")
    except (ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a readable .mat file, corrupt or cut short ({error})") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(f"{path}: no array named {', '.join(missing)}; it holds {', '.join(names) or 'none'}")
    return arrays


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


_IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)


class ImageTree:
    """Images sorted into ``train/<class>/`` and ``test/<class>/``, in a folder or a zip of one.

    A single folder around the two inside a zip is allowed for, since many archives have one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            names = [entry.relative_to(path).as_posix() for entry in path.glob("*/*/*")]
        else:
            try:
                self._archive = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, EOFError) as error:
                raise UserError(f"{path}: not a readable zip file, corrupt or cut short ({error})") from error
            names = [name for name in self._archive.namelist() if not name.endswith("/")]
        # {"train": {"cat": ["train/cat/1.png", ...]}}, sorted so that every machine sees the same data.
        self.entries: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names):
            parts = PurePosixPath(name).parts
            if self._archive is not None and len(parts) == 4:
                parts = parts[1:]
            if len(parts) != 3 or parts[0] not in ("train", "test") or parts[1].startswith("."):
                continue
            if PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES and not parts[2].startswith("."):
                self.entries.setdefault(parts[0], {}).setdefault(parts[1], []).append(name)
        for part in ("train", "test"):
            if part not in self.entries:
                raise UserError(f"{path}: no images found as {part}/<class>/<name>.png or .jpg")
        self.classes = sorted(self.entries["train"])
        strange = sorted(set(self.entries["test"]) - set(self.classes))
        if strange:
            raise UserError(f"{path}: test/ has classes that train/ has not: {', '.join(strange)}")

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def pick(self, part: str, limit: int | None, seed: int) -> list[tuple[str, int]]:
        """Names and labels; with a limit, an equal share of each class, drawn by ``seed``."""
        ranked: list[tuple[int, int, str]] = []
        for label, name in enumerate(self.classes):
            names = self.entries[part].get(name, [])
            order = np.random.default_rng((seed, label)).permutation(len(names))
            ranked += [(rank, label, names[index]) for rank, index in enumerate(order)]
        return [(name, label) for _, label, name in sorted(ranked)[:limit]]

    def decode(self, chosen: Iterable[tuple[str, int]], size: int | None = None) -> Images:
        """All images as one array: grey if every one of them is, otherwise RGB."""
        image_module = require("PIL.Image", "reading image files")
        pictures, labels = [], []
        for name, label in chosen:
            try:
                raw = (
                    self._archive.read(name) if self._archive is not None else (self.path / name).read_bytes()
                )
                with image_module.open(io.BytesIO(raw)) as picture:
                    picture.load()
                    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
                    pictures.append((name, picture.convert(mode)))
            except Exception as error:  # decoders raise nearly anything on damaged bytes
                raise UserError(
                    f"{self.path}: {name} is not a readable image, corrupt or cut short ({error})"
                ) from error
            labels.append(label)
        mode = "L" if all(picture.mode == "L" for _, picture in pictures) else "RGB"
        arrays: list[NDArray[np.uint8]] = []
        for name, picture in pictures:
            if size is not None and picture.size != (size, size):
                picture = picture.resize((size, size), image_module.Resampling.BILINEAR)
            array = np.asarray(picture.convert(mode), dtype=np.uint8)
            array = array[None] if mode == "L" else array.transpose(2, 0, 1)
            if arrays and array.shape != arrays[0].shape:
                (_, height, width), (_, other, wide) = arrays[0].shape, array.shape
                raise UserError(
                    f"{self.path}: images differ in size ({pictures[0][0]} is {width}x{height}, {name} is"
                    f" {wide}x{other});"
                    " give --image-size to bring them all to one"
                )
            arrays.append(array)
        return Images(np.stack(arrays), np.array(labels, dtype=np.int64))
