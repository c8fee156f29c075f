"""A buffer of rows, filled batch by batch, without a second copy at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.storage import check_memory


class RowBuffer:
    """Rows and targets, filled batch by batch; allocated at once where their number is known beforehand."""

    def __init__(self, total: int | None, device: torch.device, max_bytes: int | None, way_out: str) -> None:
        self.size, self.device = total or 0, device
        self.max_bytes, self.way_out = max_bytes, way_out
        self.held: list[Tensor] = []
        self.used = 0

    def add(self, *new: Tensor) -> None:
        end = self.used + len(new[0])
        if not self.held or end > len(self.held[0]):
            size = max(end, 2 * self.used, self.size)
            needed = size * sum(t[:1].nbytes for t in new)
            check_memory(f"a cache of {size:,} samples", needed, self.max_bytes, self.device, self.way_out)
            grown = [t.new_empty((size, *t.shape[1:]), device=self.device) for t in new]
            for old, larger in zip(self.held, grown):
                larger[: self.used] = old[: self.used]
            self.held = grown
        for t, part in zip(self.held, new, strict=True):
            t[self.used : end] = part
        self.used = end

    def taken(self) -> list[Tensor]:
        exact = self.used == len(self.held[0])
        return self.held if exact else [t[: self.used].clone() for t in self.held]
