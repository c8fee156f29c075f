"""The Gram matrix K = H1 H1^T (n, n) in several forms: dense, in tiles, or never stored.

Stored whole, stored as the tiles of its lower triangle, or not stored at all; in float64, or in float32
where what is computed with it is checked in float64 afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gcfast import ops
from gcfast.features import Features
from gcfast.proofs import Tiles, add_gram_

PANEL = 1024  # columns of H1 in flight while K is formed
MANY = 64  # right-hand sides from which a library's product beats the skinny kernel


class Gram(ABC):
    """``dtype`` is that of its numbers; products are asked for and given in it."""

    n: int
    dtype: torch.dtype
    device: torch.device
    most_rows: int  # that ``rows`` may be asked for at once

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """K x (n, C)."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """K[index] (k, n)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """(n,) float64."""

    def mean(self) -> Tensor:
        """Row means (n,) float64."""
        ones = torch.full((self.n, 1), 1.0 / self.n, dtype=self.dtype, device=self.device)
        return self.product(ones)[:, 0].to(torch.float64)


class DenseGram(Gram):
    """All of K."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        self.n, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device
        self.most_rows = self.n

    def product(self, x: Tensor) -> Tensor:
        if x.shape[1] >= MANY:
            return self.matrix @ x
        return ops.gram_product(self.matrix, x)

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix if len(index) == self.n else self.matrix.index_select(0, index)

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().to(torch.float64)

    def mean(self) -> Tensor:
        return self.matrix.mean(1).to(torch.float64)


class TiledGram(Gram):
    """The lower triangle of K in tiles: half the memory."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles
        self.n, self.dtype, self.device = tiles.n, tiles.dtype, tiles.device
        self.most_rows = max(1024, self.n // 8)

    def product(self, x: Tensor) -> Tensor:
        out, spans = torch.zeros_like(x), self.tiles.spans
        for i, j in self.tiles.pairs():
            tile = self.tiles[i, j]
            if i == j:
                tile = tile + tile.tril(-1).mT
            out[spans[i]] += tile @ x[spans[j]]
            if i != j:
                out[spans[j]] += tile.mT @ x[spans[i]]  # while the tile is in cache
        return out

    def rows(self, index: Tensor) -> Tensor:
        out = torch.empty((len(index), self.n), dtype=self.dtype, device=self.device)
        spans, block = self.tiles.spans, self.tiles.spans[0].stop
        owner = index // block
        for k in owner.unique().tolist():
            mine = (owner == k).nonzero()[:, 0]
            local = index[mine] - k * block
            for j in range(len(spans)):
                if j < k:
                    part = self.tiles[k, j][local]
                elif j > k:
                    part = self.tiles[j, k][:, local].mT
                else:
                    tile = self.tiles[k, k]
                    part = (tile + tile.tril(-1).mT)[local]
                out[mine, spans[j]] = part
        return out

    def diagonal(self) -> Tensor:
        return self.tiles.diagonal().to(torch.float64)


class FreeGram(Gram):
    """K never stored: products by two passes over the features, and a cache of the rows asked for last."""

    def __init__(self, features: Features, ones: bool, dtype: torch.dtype, most_rows: int):
        self.features, self.ones = features, ones
        self.n, self.dtype, self.device = features.n, dtype, features.device
        self.most_rows = most_rows
        self._place = torch.full((self.n,), -1, dtype=torch.long, device=self.device)
        self._cache = torch.empty((0, self.n), dtype=dtype, device=self.device)
        self._held = 0

    def product(self, x: Tensor) -> Tensor:
        out = self.features.gram_times(x)
        return out + x.sum(0) if self.ones else out

    def rows(self, index: Tensor) -> Tensor:
        new = index[self._place[index] < 0]
        if len(new):
            if self._held + len(new) > len(self._cache):
                self._make_room(index, len(new))
                new = index[self._place[index] < 0]
            block = self.features.block(new, self.features, self.dtype)
            end = self._held + len(new)
            self._cache[self._held : end] = block + 1.0 if self.ones else block
            self._place[new] = torch.arange(self._held, end, device=self.device)
            self._held = end
        return self._cache[self._place[index]]

    def _make_room(self, index: Tensor, new: int) -> None:
        """A larger cache while that is allowed; else only what is asked for now stays."""
        if self._held + new <= self.most_rows:
            size = min(self.most_rows, max(2 * len(self._cache), self._held + new))
            cache = torch.empty((size, self.n), dtype=self.dtype, device=self.device)
            cache[: self._held] = self._cache[: self._held]
            self._cache = cache
            return
        kept = index[self._place[index] >= 0]
        rows = self._cache[self._place[kept]]
        self._place.fill_(-1)
        if len(index) > len(self._cache):
            self._cache = torch.empty((len(index), self.n), dtype=self.dtype, device=self.device)
        self._cache[: len(kept)] = rows
        self._place[kept] = torch.arange(len(kept), device=self.device)
        self._held = len(kept)

    def diagonal(self) -> Tensor:
        zero = torch.zeros(self.features.m, dtype=torch.float32, device=self.device)
        return self.features.square_norms(zero)[0] + float(self.ones)


def build_gram(features: Features, ones: bool, dtype: torch.dtype, dense: bool) -> DenseGram | TiledGram:
    """K of the features, in ``dtype``: whole, symmetric as stored, or in tiles."""
    device = features.device
    if dense:
        matrix = torch.zeros((features.n, features.n), dtype=dtype, device=device)
        tiles = Tiles.of(matrix)
    else:
        tiles = Tiles(features.n, dtype, device)
    for j in range(0, features.m, PANEL):
        add_gram_(tiles, features.columns(j, min(j + PANEL, features.m), dtype))
    if ones:
        for i, j in tiles.pairs():
            tiles[i, j].add_(torch.ones_like(tiles[i, j]).tril_() if i == j else 1.0)
    if not dense:
        return TiledGram(tiles)
    from gcfast.proofs import mirror_

    return DenseGram(mirror_(matrix))
