"""The features H (n, m) as the proofs and the solver see them, wherever they are stored.

Everything that phase two does with H goes through :class:`Features`: exact column panels for proofs,
products with H and its transpose in float64 for what is stated, and in float32 for what is only proposed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 4096  # of stored features at a time
CONVERTED = 1 << 22  # bytes of features of another dtype at a time, so that caches hold them until their use
STRIP = 1 << 26  # bytes of recomputed features at a time, where a kernel does not avoid them


class Features(ABC):
    """H (n, m) without the column of ones.

    ``dtype`` is that of its numbers: products are made in float64 whatever it is. ``select`` and ``rows``
    take indices of samples.
    """

    n: int
    m: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def panel(self, start: int, end: int) -> Tensor:
        """Columns [start, end) in float64, exactly; the same numbers every time."""

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and what is there, in float64, exactly as :meth:`panel`; a few MB at a time."""
        width = max(1, min(self.m, 1024))
        at_once = self._block_rows(width)
        for i in range(0, self.n, at_once):
            rows = slice(i, min(i + at_once, self.n))
            mine = self.select(torch.arange(rows.start, rows.stop, device=self.device))
            for j in range(0, self.m, width):
                columns = slice(j, min(j + width, self.m))
                yield rows, columns, mine.panel(columns.start, columns.stop)

    def _block_rows(self, width: int) -> int:
        """Rows of a block of float64 of ``width`` columns."""
        if self.device.type != "cpu":
            return ROWS
        return min(ROWS, max(16, CONVERTED // (8 * max(1, width))))

    @abstractmethod
    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Rows (k, m) in ``dtype``."""

    def exact_rows(self, index: Tensor) -> Tensor:
        """Rows (k, m) in float64, exactly those of :meth:`panel`."""
        return self.rows(index, torch.float64)

    @abstractmethod
    def select(self, index: Tensor) -> Features:
        """The features of some samples."""

    @abstractmethod
    def times(self, weight: Tensor) -> Tensor:
        """H weight^T (n, C) for weight (C, m), in weight's dtype."""

    @abstractmethod
    def transposed_times(self, a: Tensor) -> Tensor:
        """a^T H (C, m) for a (n, C), in a's dtype."""

    @abstractmethod
    def keys(self) -> Tensor:
        """(n, k) such that samples with equal rows have equal features."""

    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """What makes the features what they are: tensors and settings, for a fingerprint."""

    def gram_times(self, r: Tensor) -> Tensor:
        """H H^T r (n, C) for r (n, C), in r's dtype."""
        return self.times(self.transposed_times(r))

    def block(self, rows: Tensor, columns: Features, dtype: torch.dtype) -> Tensor:
        """H[rows] columns^T (k, columns.n): products of features with features, by panels."""
        out = torch.zeros((len(rows), columns.n), dtype=dtype, device=self.device)
        mine = self.select(rows)
        width = max(256, STRIP // (dtype.itemsize * max(1, len(rows) + columns.n)) // 256 * 256)
        for j in range(0, self.m, width):
            end = min(j + width, self.m)
            out.addmm_(mine.columns(j, end, dtype), columns.columns(j, end, dtype).mT)
        return out

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Columns [start, end) in ``dtype``, as exactly as that dtype computes them."""
        return self.panel(start, end).to(dtype)

    def square_norms(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """|h_i|^2 and <h_i, mean> (n,), in float32 but summed in float64; mean (m,)."""
        squares, cross = [], []
        step = max(64, STRIP // (4 * max(1, self.m)))
        for i in range(0, self.n, step):
            rows = self.rows(slice(i, min(i + step, self.n)), torch.float32)
            squares.append(torch.linalg.vector_norm(rows, dim=1).double() ** 2)
            cross.append((rows @ mean.float()).double())
        return torch.cat(squares), torch.cat(cross)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it keeps."""
        return 0


class StoredFeatures(Features):
    """A matrix in memory, or a memory-mapped one; float32 or float64, or half precision, any strides."""

    def __init__(self, matrix: Tensor, mapped: bool = False):
        self.matrix, self.mapped = matrix.detach(), mapped
        self.n, self.m = matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def panel(self, start: int, end: int) -> Tensor:
        panel = self.matrix[:, start:end].to(torch.float64)
        return panel if panel.stride(1) == 1 else panel.contiguous()

    def columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return self.matrix[:, start:end].to(dtype)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        at_once = self._block_rows(self.m)
        for i in range(0, self.n, at_once):
            rows = slice(i, min(i + at_once, self.n))
            yield rows, slice(0, self.m), self.matrix[rows].to(torch.float64)

    def rows(self, index: Tensor | slice, dtype: torch.dtype) -> Tensor:
        return self.matrix[index].to(dtype)

    def select(self, index: Tensor) -> Features:
        return StoredFeatures(self.matrix[index])

    def _at_once(self, dtype: torch.dtype) -> int:
        """Rows of a product in ``dtype``."""
        if dtype == self.dtype or self.device.type != "cpu":
            return ROWS
        return min(ROWS, max(16, CONVERTED // max(1, self.m * dtype.itemsize)))

    def times(self, weight: Tensor) -> Tensor:
        w = weight.mT.contiguous()
        return torch.cat([rows.to(w.dtype) @ w for rows in self.matrix.split(self._at_once(w.dtype))])

    def transposed_times(self, a: Tensor) -> Tensor:
        total = torch.zeros((a.shape[1], self.m), dtype=a.dtype, device=a.device)
        k = self._at_once(a.dtype)
        for rows, part in zip(self.matrix.split(k), a.split(k), strict=True):
            total.addmm_(part.mT, rows.to(a.dtype))
        return total

    def keys(self) -> Tensor:
        return self.matrix

    def identity(self) -> tuple[Any, ...]:
        return ("stored", self.matrix)

    @property
    def nbytes(self) -> int:
        return 0 if self.mapped else self.matrix.numel() * self.matrix.element_size()
