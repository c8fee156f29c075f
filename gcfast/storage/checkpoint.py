"""Checkpoints of long computations: one file with small values and large tensors, whole or not there at all.

Layout: magic, format version, length of the header, header (JSON, padded with blanks), its digest, then the
raw tensors in the order of the header's table, each padded to 64 bytes. Digests are BLAKE2b; that of a tensor
is taken over the digests of its blocks, so that several cores share the work.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gcfast._version import __version__
from gcfast.storage.digest import (
    DIGEST,
    check_tensor,
    hash_pieces,
    pieces_of,
    pool,
)
from gcfast.storage.file_format import (
    ALIGN,
    SavedState,
    axis_order,
    check_values,
    header_bytes,
    read_header,
    refuse,
)
from gcfast.storage.lock import FileLock, LockHeld


class StateFile:
    """The file ``path`` of one computation, for one process and one of its threads at a time.

    ``kind`` names the computation and ``fingerprint`` its data, weights and settings: a file of another is
    refused. The first ``load`` or ``save`` takes ``path + ".lock"``; ``close``, ``remove`` and the end of
    the process, however it ends, release it. A ``with`` block closes.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, fingerprint: str, every: float = 120.0
    ) -> None:
        """Raises ValueError where ``every`` is not a number of seconds, zero or more."""
        if math.isnan(every) or every < 0:
            raise ValueError(f"every: expected seconds, zero or more; got {every!r}")
        self.path, self.kind, self.fingerprint, self.every = Path(path), kind, fingerprint, float(every)
        # A symbolic link keeps pointing where it did: its target is replaced, not the link.
        self._target = Path(os.path.realpath(path))
        self._last = time.monotonic()
        self._checked = False
        self._lock: FileLock | None = None

    def due(self) -> bool:
        """Whether ``every`` seconds have passed since the last save, or since the start."""
        return time.monotonic() - self._last >= self.every

    def load(self) -> SavedState | None:
        """The last state saved, None where there is no file.

        Raises CheckpointError if another process uses the file, or if it is foreign, truncated, corrupt, of
        another format version, kind or fingerprint; OSError if it cannot be read or locked.
        """
        self._acquire()
        self._clean()
        try:
            mode = os.stat(self._target).st_mode
        except FileNotFoundError:
            self._checked = True
            return None
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            refuse(self.path, "it is not a regular file", "Give another path")
        stream = open(self._target, "rb")  # noqa: SIM115  (the SavedState owns it)
        try:
            start, header = read_header(self.path, stream)
            if header["kind"] != self.kind:
                refuse(self.path, f"it is a checkpoint of {header['kind']!r}, not of {self.kind!r}")
            if header["fingerprint"] != self.fingerprint:
                theirs, ours = header["fingerprint"][:12], self.fingerprint[:12]
                what = f"it was made from other data, weights or settings (fingerprint {theirs}, here {ours})"
                refuse(self.path, what)
        except BaseException:
            stream.close()
            raise
        self._checked = True
        return SavedState(self.path, stream, start, header)

    def save(
        self, values: dict[str, Any], tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
    ) -> None:
        """Replace the checkpoint; until the new one is complete and on the disk the old one stays.

        ``values`` are those of JSON and come back exact, infinities and large integers included; tuples
        come back as lists. Tensors come back on the CPU, each with its own storage, in the order of memory
        they had (transposed, say) if they were without gaps or repetitions, else contiguous.

        Raises TypeError and ValueError for values or tensors that cannot be written, OSError where the disk
        is full or the folder missing or not writable, and, where a file is there that this object has
        neither loaded nor saved, whatever ``load`` raises, rather than replace it.
        """
        pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        header, size = self._header(values, pairs)
        start = len(header_bytes(header))
        self._own()
        needed = start + size
        temporary = self._temporary(os.getpid())
        try:
            if self._free(needed) < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with open(temporary, "xb") as stream, pool() as workers:
                with contextlib.suppress(OSError):
                    os.chmod(temporary, self._target.stat().st_mode & 0o777)
                stream.seek(start)
                for entry, (_, tensor) in zip(header["tensors"], pairs):
                    root = hash_pieces(pieces_of(tensor.permute(entry["order"])), workers, stream.write)
                    padding = bytes(-entry["bytes"] % ALIGN)
                    stream.write(padding)
                    root.update(padding)
                    entry["digest"] = root.hexdigest()
                stream.seek(0)
                stream.write(header_bytes(header))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError):
                raise self._failure(error, needed) from error
            raise
        with contextlib.suppress(OSError):  # not every file system syncs a folder; the file is safe by then
            folder = os.open(self._target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Delete the file, where there is one, and release it: the work is done.

        Raises what ``load`` raises for a file that this object has neither loaded nor saved.
        """
        self._own()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._target)
        self.close()

    def close(self) -> None:
        """Release the file to other processes; the checkpoint stays."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._checked = None, False

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _header(self, values: dict[str, Any], pairs: list[tuple[str, Tensor]]) -> tuple[dict[str, Any], int]:
        """The header, with zeros for the digests, and the bytes of the tensors behind it."""
        check_values(values, "values")
        table: list[dict[str, Any]] = []
        offset = 0
        for name, tensor in pairs:
            check_tensor(tensor, f"tensors[{name!r}]")
            size = tensor.numel() * tensor.element_size()
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = {"name": name, "dtype": dtype, "shape": list(tensor.shape), "order": axis_order(tensor)}
            table.append({**entry, "offset": offset, "bytes": size, "digest": "0" * 2 * DIGEST})
            offset += size + -size % ALIGN
        names = [name for name, _ in pairs]
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"tensors: expected distinct strings as names; got {names}")
        origin = {"kind": self.kind, "fingerprint": self.fingerprint, "gcfast": __version__}
        return {**origin, "values": values, "tensors": table}, offset

    def _own(self) -> None:
        """Lock the path, and look at a file that is there before it is replaced or removed."""
        if not self._checked:
            state = self.load()
            if state is not None:
                state.close()
        self._acquire()
        self._clean()

    def _acquire(self) -> None:
        """Take the lock, unless this process has it already."""
        if self._lock is not None and self._lock.held:
            return
        path = f"{self._target}.lock"
        try:
            self._lock = FileLock(path)
        except LockHeld as held:
            mine = held.holder == str(os.getpid())
            who = "this process itself" if mine else f"another process (pid {held.holder})"
            way_out = "Close its first Checkpoint" if mine else "Wait for it, stop it"
            refuse(self.path, f"{who} is using it", f"{way_out} or give another path")
        except OSError as error:
            what = f"checkpoint {self.path}: its lock file {path} cannot be opened ({error.strerror})"
            raise OSError(error.errno, what) from error

    def _temporary(self, pid: int | str) -> Path:
        return self._target.with_name(f".{self._target.name}.{pid}.tmp")

    def _clean(self) -> None:
        """Remove what killed processes left; under the lock nothing of this process is being written."""
        pattern = re.compile(re.escape(f".{self._target.name}.") + r"(\d+)\.tmp")
        with contextlib.suppress(OSError):
            for name in os.listdir(self._target.parent):
                match = pattern.fullmatch(name)
                if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
                    with contextlib.suppress(OSError):
                        os.unlink(self._target.parent / name)

    def _free(self, unknown: int) -> int:
        try:
            usage = shutil.disk_usage(self._target.parent)
        except OSError:
            return unknown
        return usage.free if usage.total else unknown  # some network file systems report zeros

    def _failure(self, error: OSError, needed: int) -> OSError:
        free = self._free(-1)
        room = f"{free:,} are free in {self._target.parent}" if free >= 0 else "free bytes unknown"
        last = (
            "the last checkpoint is intact"
            if os.path.exists(self._target)
            else "no checkpoint was there before"
        )
        what = (
            f"checkpoint {self.path}: could not write the state of {self.kind!r} ({error.strerror or error})"
        )
        return OSError(error.errno, f"{what}; it needs {needed:,} bytes, {room}; {last}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
