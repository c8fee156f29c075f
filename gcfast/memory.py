"""Ask for memory beforehand: a size that cannot fit is refused with its bytes and the way out."""

from __future__ import annotations

import torch


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


def require(what: str, needed: int, max_bytes: int | None, device: torch.device, way_out: str) -> None:
    """Raise MemoryError if ``needed`` exceeds ``max_bytes``, or what is free where that is None."""
    if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes <= 0):
        raise ValueError(f"max_bytes: expected a positive number of bytes; got {max_bytes!r}")
    limit = max_bytes if max_bytes is not None else available(device)
    if limit is not None and needed > limit:
        source = "max_bytes allows" if max_bytes is not None else f"{device} has free"
        raise MemoryError(
            f"{what} needs {needed:,} bytes ({needed / 2**30:.1f} GiB); {source} {limit:,}. "
            f"Way out: {way_out}."
        )
