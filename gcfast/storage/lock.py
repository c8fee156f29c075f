"""A lock file for one process, which the kernel releases when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
import weakref

_ALL: weakref.WeakSet[FileLock] = weakref.WeakSet()


class LockHeld(Exception):
    """Another holds the lock; ``holder`` is its process id, as text, or ``unknown``."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class FileLock:
    """The lock on ``path``, taken at once and held until ``release`` or the end of the process.

    Forked children do not share it. The file is there only while the lock is held, or left by a killed
    process, which does no harm. Where a file system has no locks, a warning says so and nothing is locked.

    Raises LockHeld if this or another process holds it, OSError where the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        descriptor = _locked(path)
        with contextlib.suppress(OSError):  # the number only serves messages
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode("ascii"), 0)
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, _unlock, path, descriptor)
        _ALL.add(self)

    @property
    def held(self) -> bool:
        return self._finalizer.alive

    def release(self) -> None:
        self._finalizer()

    def forget(self) -> None:
        """In a forked child: without a descriptor of it the lock does not outlive the parent."""
        if self._finalizer.detach() is not None:
            os.close(self._descriptor)


def _locked(path: str) -> int:
    while True:
        # No link is followed: what it leads to would be overwritten with a process id.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace") or "unknown"
            os.close(descriptor)
            raise LockHeld(holder) from None
        except OSError as error:
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); see that one process at a time"
                " uses it",
                stacklevel=4,
            )
        # Whoever held it may have deleted it between our opening and locking: then try anew.
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _unlock(path: str, descriptor: int) -> None:
    # Deleted while still locked: whoever opened it meanwhile sees that it is gone.
    if _is_at(descriptor, path):
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _forget_all() -> None:
    for lock in list(_ALL):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
