"""Files that a stranger may have made: sizes are looked at before anything is read, and growth is limited."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from gcfast.errors import UserError
from gcfast.storage.memory import check_memory

# Images and weights shrink to a fifth by deflate, drawings to a fiftieth; a bomb to a thousandth.
_GROWTH = 100
_SMALL = 1 << 26


def check_growth(what: str, stored: int, promised: int) -> None:
    """Refuse ``stored`` bytes that promise to become far more, or more than the machine has free.

    Raises UserError beyond 64 MiB and 100 times what is stored, MemoryError where memory does not suffice.
    """
    most = _SMALL + _GROWTH * stored
    if promised > most:
        raise UserError(
            f"{what}: its {stored:,} bytes promise to become {promised:,}, expected at most {most:,} (100"
            " times what is stored, and 64 MiB); if that is meant, store it uncompressed"
        )
    if promised > _SMALL:  # asking takes longer than reading a picture
        check_memory(what, promised, None, torch.device("cpu"), "take a smaller file or a larger machine")


def stored_bytes(stream: IO[bytes]) -> tuple[int, int]:
    """What a file takes on the disk, where the system says so, and its length: a file may have holes."""
    status = os.fstat(stream.fileno())
    return min(status.st_size, 512 * status.st_blocks or status.st_size), status.st_size


def read_whole(path: Path, most: int = 1 << 30) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes.

    Raises UserError for anything else, before it is read: what is read becomes several times as large.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path}: expected a regular file")
    with path.open("rb") as stream:
        stored, size = stored_bytes(stream)
        if size > most:
            raise UserError(f"{path}: {size:,} bytes, expected at most {most:,}")
        check_growth(str(path), stored, size)
        return stream.read(size)


class Archive:
    """The members of a zip file by name, read within limits.

    Raises UserError, naming the file, where it is no zip file or a member grows beyond :func:`check_growth`;
    reading a damaged member can raise nearly anything.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: expected a regular file")
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError:
            raise
        except Exception as error:  # a damaged directory raises nearly anything
            raise UserError(f"{path}: not a readable zip file, corrupt or cut short ({error})") from error
        self._members = {info.filename: info for info in self._zip.infolist()}
        if len(self._members) < len(self._zip.infolist()):
            self.close()
            raise UserError(f"{path}: not a readable zip file, two of its members have one name")

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].file_size

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A member as a stream that gives no more than the size that was checked; name one that is there."""
        info = self._members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Only deflate is undone piece by piece.
            raise ValueError(f"{name}: expected a stored or deflated member, got method {info.compress_type}")
        check_growth(f"{self.path}: {name}", info.compress_size, info.file_size)
        with self._zip.open(info) as stream:
            yield stream

    def read(self, name: str) -> bytes:
        with self.open(name) as stream:
            # Asked for a number, zipfile undoes no more than that, whatever the stream holds.
            content = stream.read(self.size(name))
        if len(content) != self.size(name):
            raise ValueError(f"{name} promises {self.size(name):,} bytes, it has {len(content):,}")
        return content

    def close(self) -> None:
        self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
