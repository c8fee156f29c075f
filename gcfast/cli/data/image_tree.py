"""Image folders: one folder a class, read as tensors."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gcfast.cli.data.formats import Images
from gcfast.errors import UserError, import_optional
from gcfast.storage import Archive, available, read_whole

_IMAGE_SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".bmp",
        ".gif",
        ".webp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tif",
        ".tiff",
    ]
)
# What lies beside pictures and is none.
_NOTES = frozenset([".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".pdf"])
_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
_WORKER = Path(__file__).with_name("picture_worker.py")
_MOST = 1 << 28  # bytes of a picture's file
_MEMORY, _SECONDS = 3 << 29, 2  # of the process that decodes, the latter for a small picture


class ImageTree:
    """Images sorted into ``train/<class>/`` and ``test/<class>/``, in a folder or a zip of one.

    A single folder around the two inside a zip is allowed for, since many archives have one. Hidden files
    and notes (.txt, .csv ...) are passed over. Anything else that is no image in a class folder is refused,
    and so is a class folder without images: labels are the places of the classes in the alphabet, and one
    that went missing would shift them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: Archive | None = None
        around: tuple[str, ...] = ()
        if path.is_dir():
            names = _names_in(path)
        else:
            self._archive = Archive(path)
            names = self._archive.names
            around = self._folder_around(names)
        # {"train": {"cat": ["train/cat/1.png", ...]}}, sorted so that every machine sees the same data.
        self.entries: dict[str, dict[str, list[str]]] = {}
        strange = []
        for name in sorted(names):
            parts = PurePosixPath(name).parts
            if parts[: len(around)] != around:
                continue
            part, *inside = parts[len(around) :] or ("",)
            if part not in ("train", "test") or not inside or _is_litter(inside[0]):
                continue
            folder, suffix = name.endswith("/"), PurePosixPath(name).suffix.lower()
            if folder or len(inside) > 1:
                held = self.entries.setdefault(part, {}).setdefault(inside[0], [])
                if (
                    len(inside) == 2
                    and suffix in _IMAGE_SUFFIXES
                    and not folder
                    and not _is_litter(inside[1])
                ):
                    held.append(name)
                    continue
            passed_over = len(inside) == 1 if folder else suffix in _NOTES
            if not passed_over and not any(map(_is_litter, inside)):
                strange.append(name)
        try:
            self._check(strange)
        except BaseException:
            self.close()
            raise
        self.classes = sorted(self.entries["train"])

    def _folder_around(self, names: Sequence[str]) -> tuple[str, ...]:
        paths = [PurePosixPath(name).parts for name in names]
        if any(parts[:1] in (("train",), ("test",)) for parts in paths):
            return ()
        tops = sorted({parts[0] for parts in paths if parts[1:2] in (("train",), ("test",))})
        tops = [top for top in tops if not _is_litter(top)]
        if len(tops) > 1:
            self.close()
            raise UserError(f"{self.path}: expected one folder with train/ and test/, got {_listed(tops)}")
        return tuple(tops)

    def _check(self, strange: Sequence[str]) -> None:
        expected = "expected images as <part>/<class>/<name>.png or .jpg"
        if strange:
            raise UserError(
                f"{self.path}: {expected} and nothing else in train/ and test/, got {_listed(strange)}:"
                " move them into a class folder, rename or remove them"
            )
        for part in ("train", "test"):
            if not any(self.entries.get(part, {}).values()):
                raise UserError(f"{self.path}: no images found as {part}/<class>/<name>.png or .jpg")
        empty = [
            f"{part}/{name}" for part in self.entries for name, held in self.entries[part].items() if not held
        ]
        if empty:
            raise UserError(f"{self.path}: {expected}, got none in {_listed(empty)}: fill or remove it")
        lacking = sorted(set(self.entries["test"]) - set(self.entries["train"]))
        if lacking:
            raise UserError(f"{self.path}: test/ has classes that train/ has not: {_listed(lacking)}")

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

    def decode(self, chosen: Sequence[tuple[str, int]], size: int | None = None) -> Images:
        """All images as one array: grey if every one of them is, otherwise RGB.

        Raises UserError for an image that is damaged, has more than eight bits a channel or another size
        than the first, MemoryError where they do not fit.
        """
        import_optional("PIL.Image", "reading image files")
        names = [name for name, _ in chosen]
        # Pixels become float32, of four times their bytes.
        free = (available(torch.device("cpu")) or 1 << 62) // 5
        task = {"count": len(names), "size": size, "free": free, "memory": _MEMORY, "seconds": _SECONDS}
        with tempfile.TemporaryFile(prefix="gcfast-") as pixels:
            pixels.truncate(8)
            answer = self._answer(names, task, pixels)
            if "error" in answer:
                self._refuse(names, answer)
            (width, height), modes = answer["size"], answer["modes"]
            raw = np.fromfile(pixels, dtype=np.uint8, offset=8)
        return Images(_arranged(raw, modes, width, height), np.array([label for _, label in chosen]))

    def _answer(self, names: Sequence[str], task: dict[str, Any], pixels: IO[bytes]) -> dict[str, Any]:
        command = [sys.executable, str(_WORKER), str(pixels.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        worker = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            pass_fds=[pixels.fileno()],
            env=environment,
        )
        assert worker.stdin is not None and worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended early, and says why
                self._send(names, task, worker.stdin)
            line = worker.stdout.read()
            code = worker.wait()
        finally:
            worker.kill()
            worker.wait()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        if code == 0 and line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        index = struct.unpack("<Q", os.pread(pixels.fileno(), 8, 0))[0]
        return {
            "error": f"its decoder was stopped for time or memory, or crashed: exit code {code}",
            "index": index,
        }

    def _send(self, names: Iterable[str], task: dict[str, Any], worker: IO[bytes]) -> None:
        worker.write(json.dumps(task).encode() + b"\n")
        for name in names:
            try:
                if self._archive is None:
                    raw = read_whole(self.path / name, _MOST)
                elif self._archive.size(name) > _MOST:
                    raise ValueError(f"{self._archive.size(name):,} bytes, expected at most {_MOST:,}")
                else:
                    raw = self._archive.read(name)
            except (UserError, OSError):
                raise
            except Exception as error:  # a damaged member raises nearly anything
                raise UserError(
                    f"{self.path}: {name} is not readable, corrupt or cut short ({error})"
                ) from error
            worker.write(struct.pack("<Q", len(raw)) + raw)
        worker.close()

    def _refuse(self, names: Sequence[str], answer: dict[str, Any]) -> None:
        name, kind = names[answer["index"]], answer["error"]
        if kind == "size":
            (wide, high), (width, height) = answer["other"], answer["size"]
            raise UserError(
                f"{self.path}: images differ in size ({names[0]} is {width}x{height}, {name} is"
                f" {wide}x{high}); give --image-size to bring them all to one"
            )
        if kind == "memory":
            width, height = answer["other"]
            raise MemoryError(
                f"{self.path}: {len(names)} images of {width}x{height} do not fit into memory; give"
                " --image-size or --limit"
            )
        if kind == "disk":
            raise OSError(f"{self.path}: no room for pixels in {tempfile.gettempdir()}: {answer['other']}")
        raise UserError(f"{self.path}: {name} is not a readable image ({kind})")


def _names_in(path: Path) -> list[str]:
    """What is in the classes' folders and beside them; folders, and what is neither, end in a slash."""
    names = []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            continue
        for group in os.scandir(path / part):
            names.append(f"{part}/{_marked(group)}")
            if group.is_dir() and not _is_litter(group.name):
                names += [f"{part}/{group.name}/{_marked(entry)}" for entry in os.scandir(group)]
    return names


def _marked(entry: os.DirEntry[str]) -> str:
    with contextlib.suppress(OSError):  # a link that leads to itself
        if entry.is_file():
            return entry.name
    return f"{entry.name}/"


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _arranged(raw: NDArray[np.uint8], modes: str, width: int, height: int) -> NDArray[np.uint8]:
    """Pixels one picture after the other, grey (L) or coloured (C), as (n, channels, height, width)."""
    if "C" not in modes:
        return raw.reshape(-1, 1, height, width)
    if "L" not in modes:
        return np.ascontiguousarray(raw.reshape(-1, height, width, 3).transpose(0, 3, 1, 2))
    out = np.empty((len(modes), 3, height, width), dtype=np.uint8)
    start = 0
    for picture, mode in zip(out, modes, strict=True):
        count = width * height * (1 if mode == "L" else 3)
        picture[:] = raw[start : start + count].reshape(height, width, -1).transpose(2, 0, 1)
        start += count
    return out
