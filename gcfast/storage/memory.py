"""Ask for memory beforehand: a size that cannot fit is refused with its bytes and the way out."""

from __future__ import annotations

import errno
import mmap
import numbers
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

from gcfast import errors


def available(device: torch.device) -> int | None:
    """Bytes free on the device, None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def allowed_bytes(max_bytes: Any, device: torch.device) -> int | None:
    """``max_bytes``, or what is free on the device, or None where nobody knows. ValueError for nonsense."""
    if max_bytes is None:
        return available(device)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, numbers.Integral) or max_bytes <= 0:
        raise ValueError(f"max_bytes: expected a positive number of bytes; got {errors.came(max_bytes)}")
    return int(max_bytes)


def check_memory(what: str, needed: int, max_bytes: int | None, device: torch.device, way_out: str) -> None:
    """Raise MemoryError if ``needed`` exceeds ``max_bytes``, or what is free where that is None."""
    most = allowed_bytes(max_bytes, device)
    if most is not None and needed > most:
        source = "max_bytes allows" if max_bytes is not None else f"{device} has free"
        raise MemoryError(
            f"{what} needs {needed:,} bytes ({needed / 2**30:.1f} GiB); {source} {most:,}. "
            f"Way out: {way_out}."
        )


def reserve_file(file: Any, size: int, what: str) -> None:
    """Give ``file`` at least ``size`` bytes of disk; OSError that says what for where there is no room."""
    try:
        if os.fstat(file.fileno()).st_size < size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"{what}: {size:,} bytes do not fit on the disk of {folder}, which has {free:,} free; "
            "set TMPDIR to a folder with more room",
        ) from error


class Scratch:
    """Memory that is a file without a name: it goes when nobody looks at it any more, or with the process."""

    def __init__(self, folder: str | None = None):
        self.folder = folder

    def map(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` zeros on disk, as a tensor. Raises OSError where the disk has no room for them."""
        if count == 0:
            return torch.zeros(0, dtype=dtype, device="cpu")
        with tempfile.TemporaryFile(dir=self.folder, prefix="gcfast-") as file:
            size = count * dtype.itemsize
            reserve_file(file, size, "scratch tiles")
            buffer = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(buffer, dtype=dtype, count=count)
