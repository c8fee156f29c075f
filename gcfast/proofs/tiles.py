"""A lower triangular or symmetric matrix in square tiles: half the memory of a square, or on disk.

Only tiles on and below the diagonal exist. Everything that the proofs do with n x n matrices is here:
products with written-out slices, whose errors are bounded, and factors and inverses, which are proposals.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gcfast import ops
from gcfast.proofs.rounding import add_product_, subtract_product_, tiling
from gcfast.storage import Scratch

Step = Callable[[float], None]  # told the fraction done


def _silent(fraction: float) -> None:
    pass


class Tiles:
    """n x n: ``tiles[i, j]`` (i >= j) is a view that may be written; diagonal tiles have zeros above."""

    def __init__(
        self,
        n: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        scratch: Scratch | None = None,
    ):
        self.n, self.dtype, self.device = n, dtype, torch.device(device)
        self.spans = tiling(self.device).spans(n)
        sizes = [s.stop - s.start for s in self.spans]
        self._tiles: dict[tuple[int, int], Tensor] = {}
        self._sums: dict[tuple[int, int], int] = {}
        self.mapped = scratch is not None
        flat = scratch.map(Tiles.count(n, self.device), dtype) if scratch is not None else None
        at = 0
        for i, j in self.pairs():
            shape = (sizes[i], sizes[j])
            if flat is None:
                self._tiles[i, j] = torch.zeros(shape, dtype=dtype, device=self.device)
            else:
                self._tiles[i, j] = flat[at : at + shape[0] * shape[1]].view(shape)
                at += shape[0] * shape[1]

    @staticmethod
    def count(n: int, device: torch.device | str = "cpu") -> int:
        """Numbers stored."""
        block = tiling(torch.device(device)).block
        whole, rest = divmod(n, block)
        return block * block * whole * (whole + 1) // 2 + rest * (whole * block + rest)

    @classmethod
    def of(cls, matrix: Tensor) -> Tiles:
        """Views of the lower triangle of a square matrix."""
        tiles = cls.__new__(cls)
        tiles.n, tiles.dtype, tiles.device = len(matrix), matrix.dtype, matrix.device
        tiles.spans = tiling(matrix.device).spans(len(matrix))
        tiles._tiles = {(i, j): matrix[tiles.spans[i], tiles.spans[j]] for i, j in tiles.pairs()}
        tiles._sums, tiles.mapped = {}, False
        return tiles

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Row by row."""
        for i in range(len(self.spans)):
            for j in range(i + 1):
                yield i, j

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self._tiles[key]

    def release(self) -> None:
        """Give the memory back."""
        self._tiles.clear()

    def dense(self) -> Tensor:
        """(n, n), zero above the diagonal."""
        out = torch.zeros((self.n, self.n), dtype=self.dtype, device=self.device)
        for i, j in self.pairs():
            out[self.spans[i], self.spans[j]] = self[i, j]
        return out

    def clone(self, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tiles:
        """A copy in memory, in ``dtype``, times ``scale``."""
        out = Tiles.__new__(Tiles)
        out.n, out.dtype, out.device, out.spans = self.n, dtype or self.dtype, self.device, self.spans
        out._sums, out.mapped = {}, False
        out._tiles = {key: (self[key] * scale).to(out.dtype) for key in self.pairs()}
        return out

    def diagonal(self) -> Tensor:
        return torch.cat([self[i, i].diagonal() for i in range(len(self.spans))])

    def set_diagonal_(self, values: Tensor) -> None:
        for i, span in enumerate(self.spans):
            self[i, i].diagonal().copy_(values[span])

    def seal(self) -> None:
        """Remember what the tiles on disk hold."""
        if self.mapped:
            self._sums = {key: _checksum(self[key]) for key in self.pairs()}

    def check(self) -> None:
        """Raise RuntimeError where a tile on disk is no longer what it was when sealed."""
        for key, value in self._sums.items():
            if _checksum(self[key]) != value:
                raise RuntimeError(
                    f"scratch file: tile {key} came back from the disk other than it was written"
                )
        self._sums = {}


def _checksum(tile: Tensor) -> int:
    return zlib.crc32(tile.numpy().view("u1").data)


def add_gram_(g: Tiles, q: Tensor, inner: int | None = None) -> None:
    """g += q q^T, in q's dtype."""
    inner = inner or tiling(g.device).slice_length
    for i, j in g.pairs():
        rows, columns = q[g.spans[i]], q[g.spans[j]]
        add_product_(g[i, j], rows, columns.mT, inner, lower=i == j)


def triangular_gram(x: Tiles, inner: int) -> Tiles:
    """x x^T for lower triangular x: within gamma(inner + slices + 2) |x||x|^T."""
    g = Tiles(x.n, x.dtype, x.device)
    for i, j in g.pairs():
        for k in range(j + 1):
            add_product_(g[i, j], x[i, k], x[j, k].mT, inner, lower=i == j)
    return g


def abs_products(x: Tiles, left: Tensor | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """|x| right and left |x| (n,), as :func:`gcfast.ops.abs_products`; ones by default."""
    rows = torch.zeros(x.n, dtype=torch.float64, device=x.device)
    columns = torch.zeros_like(rows)
    for i, j in x.pairs():
        r, c = x.spans[i], x.spans[j]
        part = ops.abs_products(
            x[i, j], None if left is None else left[r], None if right is None else right[c]
        )
        rows[r] += part[0]
        columns[c] += part[1]
    return rows, columns


def abs_gram_sums(x: Tiles) -> Tensor:
    """Row sums of |x||x|^T."""
    return abs_products(x, right=abs_products(x)[1])[0]


def symmetric_row_sums(g: Tiles) -> Tensor:
    """Row sums of |g| for symmetric g."""
    rows, columns = abs_products(g)
    return rows + columns - g.diagonal().abs().to(torch.float64)


def times(x: Tiles, b: Tensor) -> Tensor:
    """x b for lower triangular x: within tiling.gamma(n) |x||b|."""
    out, inner = torch.zeros_like(b), tiling(x.device).slice_length
    for i in range(len(x.spans)):
        for k in range(i + 1):
            add_product_(out[x.spans[i]], x[i, k], b[x.spans[k]], inner)
    return out


def _long_slice(device: torch.device) -> int:
    """Of the products of proposals, whose errors nobody bounds: half as many sums."""
    return 2 * tiling(device).slice_length


def row_maxima(x: Tiles) -> Tensor:
    """The largest |entry| of each row (n,)."""
    parts = [
        torch.stack([x[i, j].abs().amax(1) for j in range(i + 1)]).amax(0).to(torch.float64)
        for i in range(len(x.spans))
    ]
    return torch.cat(parts)


def cholesky(g: Tiles, shift: float, low: Tiles, on_progress: Step = _silent, least: float = 0.0) -> bool:
    """low low^T = g + shift I nearly, or False where a pivot is no larger than ``least``.

    By rows, so that a matrix whose leading rows are dependent already is found out early.
    """
    inner = _long_slice(g.device)
    for i, span in enumerate(g.spans):
        for j in range(i + 1):
            s = g[i, j].clone()
            for k in range(j):
                subtract_product_(s, low[i, k], low[j, k].mT, inner)
            if j < i:
                low[i, j].copy_(torch.linalg.solve_triangular(low[j, j].mT, s, upper=True, left=False))
                continue
            s.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(s)
            if int(info) != 0 or not float(factor.diagonal().amin()) ** 2 > least:  # a NaN fails as well
                return False
            low[i, i].copy_(factor.tril_())
        on_progress((span.stop / g.n) ** 3)
    return True


def invert_(low: Tiles, on_progress: Step = _silent) -> Tiles:
    """The inverse of a lower triangular matrix, in its place."""
    inner = _long_slice(low.device)
    for i, span in enumerate(low.spans):
        own = _invert_tile(low[i, i])
        for j in range(i):
            s = torch.zeros_like(low[i, j])
            for k in range(j, i):
                add_product_(s, low[i, k], low[k, j], inner)
            low[i, j].zero_()
            subtract_product_(low[i, j], own, s, inner)
        low[i, i].copy_(own)
        on_progress((span.stop / low.n) ** 3)
    return low


def _invert_tile(low: Tensor) -> Tensor:
    """Inverse of a lower triangular tile, by halves: almost all the work is matrix products."""
    n = len(low)
    if n <= 128:
        identity = torch.eye(n, dtype=low.dtype, device=low.device)
        return torch.linalg.solve_triangular(low.tril(), identity, upper=False)
    k = n // 2
    top, bottom = _invert_tile(low[:k, :k]), _invert_tile(low[k:, k:])
    out = torch.zeros_like(low)
    out[:k, :k], out[k:, k:] = top, bottom
    out[k:, :k] = -bottom @ (low[k:, :k] @ top)
    return out


def compose_(y: Tiles, x: Tiles, on_progress: Step = _silent) -> Tiles:
    """x becomes y x, both lower triangular: a proposal."""
    inner = _long_slice(x.device)
    for i in reversed(range(len(x.spans))):
        for j in range(i + 1):
            s = torch.zeros_like(x[i, j])
            for k in range(j, i + 1):
                add_product_(s, y[i, k], x[k, j], inner)
            x[i, j].copy_(s)
        on_progress(1.0 - (i / len(x.spans)) ** 3)
    return x


def solve_triangular(low: Tiles, v: Tensor, transposed: bool = False) -> Tensor:
    """low^-1 v, or low^-T v, for v (n, k): a proposal."""
    v = v.clone()
    order = range(len(low.spans))
    for i in reversed(order) if transposed else order:
        span = low.spans[i]
        if transposed:
            for k in range(i + 1, len(low.spans)):
                v[span] -= low[k, i].mT @ v[low.spans[k]]
            v[span] = torch.linalg.solve_triangular(low[i, i].mT, v[span], upper=True)
        else:
            for k in range(i):
                v[span] -= low[i, k] @ v[low.spans[k]]
            v[span] = torch.linalg.solve_triangular(low[i, i], v[span], upper=False)
    return v


def matmul(x: Tiles, v: Tensor, transposed: bool = False) -> Tensor:
    """x v or x^T v for lower triangular x and v (n, k), as it comes."""
    out = torch.zeros_like(v)
    for i, j in x.pairs():
        r, c = (j, i) if transposed else (i, j)
        tile = x[i, j].mT if transposed else x[i, j]
        out[x.spans[r]] += tile @ v[x.spans[c]]
    return out
