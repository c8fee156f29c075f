"""Image folders: one folder a class, read as tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from gcfast.cli.data.formats import Images
from gcfast.errors import UserError, import_optional

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
        image_module = import_optional("PIL.Image", "reading image files")
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
