"""Files that are either the old version or the whole new one, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path``.

    The data reaches the disk before the name changes and the folder's entry after it. If anything
    fails (a full disk, an interruption) the old file is untouched and the temporary one is removed.
    """
    # A symbolic link keeps pointing where it did: its target is replaced, not the link.
    target = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            # mkstemp makes files private; a report should be as readable as any other new file.
            os.chmod(temporary, _mode_for(target))
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)
    return Path(path)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    return atomic_write(path, lambda stream: stream.write(content))


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    return write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Strict JSON: a NaN or infinity is refused rather than written as something no parser reads."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def save_torch(path: str | os.PathLike[str], content: object) -> Path:
    return atomic_write(path, lambda stream: torch.save(content, stream))


def _mode_for(target: Path) -> int:
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be opened or synced; the file itself is safe by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
