"""H1 = [H, 1]: features with the column of ones that stands for the head's bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gcfast import ops
from gcfast.features.matrix import Features, StoredFeatures

PANEL = 1024  # columns of H1 in flight


class FeaturesWithOnes:
    """H1 = [H, 1] by column panels in float64; H any `Features`, or a tensor."""

    def __init__(self, features: Tensor | Features, ones: bool = True):
        self.features = StoredFeatures(features) if isinstance(features, Tensor) else features
        self.ones = ones
        self.n, self.columns = self.features.n, self.features.m + int(ones)
        self.device = self.features.device

    def panels(self, start: int = 0, width: int = PANEL) -> Iterator[Tensor]:
        """(n, at most ``width``) from column ``start`` on, each in memory of its own or read only."""
        m = self.columns - int(self.ones)
        for j in range(start, self.columns, width):
            end = min(j + width, self.columns)
            panel = self.features.panel(j, min(end, m)) if j < m else None
            if end > m:
                ones = torch.ones((self.n, 1), dtype=torch.float64, device=self.device)
                panel = ones if panel is None else torch.cat([panel, ones], 1)
            assert panel is not None
            yield panel

    def abs_products(self, left: Tensor | None = None) -> tuple[Tensor, float]:
        """|H1| 1 (n,) and the largest entry of left |H1|, float64; ``left`` ones by default."""
        rows = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        largest = rows.new_zeros(())
        for panel in self.panels():
            panel_rows, columns = ops.abs_products(panel, left)
            rows += panel_rows
            largest = torch.maximum(largest, columns.amax())  # unlike max(), it keeps a NaN
        return rows, float(largest)
