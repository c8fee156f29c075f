"""The Jacobian of a layer for a tile of samples, held as factors: outer products, embedding rows or itself.

Index letters: i, j samples, c, e outputs, t, s positions (pixels, tokens, uses), J[(i,c), :] a row. An
:class:`OuterFactor` holds J[(i,c)] = sum_t g[i,c,t] (x) a[i,t], which linear operators and convolutions
have, and gives the Hadamard form of a Gram as well as blocks of J; an :class:`EmbeddingFactor` is the same
with one-hot a; a :class:`DenseFactor` holds J itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import ops

# A block of J: in the last-level cache between who makes it and the product. On a GPU a count, not measured.
BLOCK_BYTES = {"cpu": 1 << 23, "cuda": 3 << 23}


def block_width(rows: int, like: Tensor) -> int:
    """Columns of a block of J with so many rows."""
    most = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cuda"])
    return max(1, most // (like.element_size() * max(1, rows)))


def gram_add_(out: Tensor, a: Tensor, b: Tensor, lower: bool) -> None:
    """out += a b^T; on and below the diagonal, at least, if ``lower``."""
    if out.device.type == "cpu":
        ops.add_product(out, a, b.mT, inner=1024, lower=lower)
    else:
        out.addmm_(a, b.mT)


@dataclass(frozen=True)
class Size:
    """Extents of a group's factor that do not depend on the samples: q blocks of r x s, T positions."""

    q: int
    r: int
    s: int
    t: int
    bias: bool = False

    @property
    def numel(self) -> int:
        return self.q * self.r * self.s + (self.q * self.r if self.bias else 0)


class Factor:
    """J of n samples and c outputs for one group of parameters."""

    n: int
    c: int
    like: Tensor  # of J's dtype and device

    def pieces(self, width: int) -> Iterator[Tensor]:
        """J in blocks (n, c, about ``width``): of which columns ``width`` and the parameter alone decide."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """J (n, c, p) in the parameter's own order; of a weight alone, without the bias."""
        raise NotImplementedError

    def traced(self) -> Factor:
        """The factor of the Gram that is summed over outputs: one row a sample, c times as wide."""
        raise NotImplementedError

    def first(self) -> Factor:
        """Of the first sample alone."""
        raise NotImplementedError

    def squares(self) -> Tensor:
        """||J[(i,c)]||^2, (n, c)."""
        width = block_width(self.n * self.c, self.like)
        return torch.stack([piece.square().sum(-1) for piece in self.pieces(width)]).sum(0)

    def by_rows(self, other: Factor, out: Tensor, lower: bool) -> None:
        """out += J J_other^T by blocks of J."""
        width = block_width(max(self.n * self.c, other.n * other.c), out)
        if other is self:
            for a in self.pieces(width):
                gram_add_(out, a.flatten(0, 1), a.flatten(0, 1), lower)
            return
        for a, b in zip(self.pieces(width), other.pieces(width)):
            gram_add_(out, a.flatten(0, 1), b.flatten(0, 1), lower)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class OuterFactor(Factor):
    """J[(i,c)][q] = sum_t g[i,c,t,q] a[i,t,q]^T, q r x s matrices; with ``bias`` also sum_t g.

    ``g``: (n, c, T, q, r); ``a``: (n, T, q, s), or what makes it; ``order``: permutes (q, r, s) into the
    parameter's own order.
    """

    def __init__(
        self,
        g: Tensor | Callable[[], Tensor],
        a: Tensor | Callable[[], Tensor],
        kept: Sequence[Tensor],
        n: int,
        c: int,
        size: Size,
        order: tuple[int, ...] = (0, 1, 2),
    ) -> None:
        self._g, self._a, self._kept, self.n, self.c, self.size, self.order = g, a, kept, n, c, size, order
        self.like = kept[0]

    @property
    def shared(self) -> int:
        """Bytes that do not grow with c."""
        return _bytes(*self._kept[1:])

    def g(self) -> Tensor:
        return self._g if isinstance(self._g, Tensor) else self._g()

    def a(self) -> Tensor:
        return self._a if isinstance(self._a, Tensor) else self._a()

    def traced(self) -> OuterFactor:
        def g() -> Tensor:
            return self.g().permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)

        size = Size(self.size.q, self.size.r * self.c, self.size.s, self.size.t, self.size.bias)
        return OuterFactor(g, self._a, self._kept, self.n, 1, size)

    def first(self) -> OuterFactor:
        return OuterFactor(
            lambda: self.g()[:1], lambda: self.a()[:1], self._kept, 1, self.c, self.size, self.order
        )

    def _blocks(self, width: int) -> Iterator[tuple[slice, slice]]:
        """(q, r): rows of one block, or several blocks."""
        size = self.size
        if size.q == 1:
            step = max(1, width // max(1, size.s))
            yield from ((slice(0, 1), slice(i, min(i + step, size.r))) for i in range(0, size.r, step))
            return
        step = max(1, width // max(1, size.r * size.s))
        yield from ((slice(i, min(i + step, size.q)), slice(0, size.r)) for i in range(0, size.q, step))

    def _product(self, g: Tensor, a: Tensor) -> Tensor:
        """(n, c, T, q, r), (n, T, q, s) -> (n, c, q r s)."""
        (n, c, t, q, r), s = g.shape, a.shape[-1]
        if t == 1:
            return (g[:, :, 0, :, :, None] * a[:, None, 0, :, None, :]).reshape(n, c, q * r * s)
        left = g.permute(0, 3, 1, 4, 2).reshape(n * q, c * r, t)
        right = a.permute(0, 2, 1, 3).reshape(n * q, t, s)
        out = torch.bmm(left, right).view(n, q, c, r * s)
        return (out.transpose(1, 2) if q > 1 else out).reshape(n, c, q * r * s)

    def _bias(self, g: Tensor) -> Tensor:
        return g.sum(2).flatten(2)

    def pieces(self, width: int) -> Iterator[Tensor]:
        g, a = self.g(), self.a()
        for q, r in self._blocks(width):
            yield self._product(g[:, :, :, q, r], a[:, :, q])
        if self.size.bias:
            yield self._bias(g)

    def rows(self) -> Tensor:
        size = self.size
        j = self._product(self.g(), self.a()).view(self.n, self.c, size.q, size.r, size.s)
        return j.permute(0, 1, *(2 + k for k in self.order)).flatten(2)

    def bias_rows(self) -> Tensor:
        return self._bias(self.g())

    def hadamard(self, other: Factor, out: Tensor, lower: bool) -> None:
        assert isinstance(other, OuterFactor)
        q, r = self.size.q, self.size.r
        g = self.g().flatten(3)
        h = g if other is self else other.g().flatten(3)
        a = self.a().permute(2, 0, 1, 3).flatten(1, 2)  # (q, n T, s)
        b = a if other is self else other.a().permute(2, 0, 1, 3).flatten(1, 2)
        scale = a @ b.mT
        if self.size.bias:
            scale += 1
        ends = [r * (k + 1) for k in range(q)]
        ops.jacobian_gram(out, g, h, scale, ends=ends, lower=lower)

    def by_rows(self, other: Factor, out: Tensor, lower: bool) -> None:
        assert isinstance(other, OuterFactor)
        if self.size.q > 1:  # many small matrices: a block of J is a batch of them
            super().by_rows(other, out, lower)
            return
        g, a = self.g()[:, :, :, 0], self.a()[:, :, 0]
        rest = () if other is self else (other.g()[:, :, :, 0], other.a()[:, :, 0])
        ops.gradient_gram(out, g, a, *rest)
        if self.size.bias:
            biases = [
                factor.bias_rows().flatten(0, 1) for factor in ((self,) if other is self else (self, other))
            ]
            gram_add_(out, biases[0], biases[-1], lower)

    def squares(self) -> Tensor:
        size, t = self.size, self.size.t
        a = self.a()
        if t == 1:
            of_a = a.square().sum(-1) + float(size.bias)  # (n, 1, q)
            return (self.g().square().sum(-1) * of_a[:, None]).sum((2, 3))
        if t * (size.r + size.s / self.c) > size.r * size.s:  # Grams of positions cost more than rows
            return super().squares()
        of_a = torch.einsum("itqk,isqk->iqts", a, a) + float(size.bias)
        out = a.new_zeros(self.n, self.c)
        g = self.g()
        for c in range(self.c):
            of_g = torch.einsum("itqk,isqk->iqts", g[:, c], g[:, c])
            out[:, c] = (of_a * of_g).sum((1, 2, 3))
        return out


class EmbeddingFactor(Factor):
    """J[(i,c)][v] = sum over the positions that looked v up of g[i,c,t]; ``at``: (n, T), -1 for none."""

    def __init__(self, g: Tensor, at: Tensor, rows: int) -> None:
        self._g, self.at, self._rows = g, at, rows
        self.n, self.c, t, d = g.shape
        self.like = g
        self.size = Size(1, d, rows, t)  # the one-hot vectors would have s = rows

    def traced(self) -> EmbeddingFactor:
        return EmbeddingFactor(self._g.transpose(1, 2).flatten(2).unsqueeze(1), self.at, self._rows)

    def first(self) -> EmbeddingFactor:
        return EmbeddingFactor(self._g[:1], self.at[:1], self._rows)

    def pieces(self, width: int) -> Iterator[Tensor]:
        step = max(1, width // max(1, self.size.r))
        for first in range(0, self._rows, step):
            yield self._between(first, min(first + step, self._rows))

    def _between(self, first: int, last: int) -> Tensor:
        n, c, _, d = self._g.shape
        wide = last - first
        inside = (self.at >= first) & (self.at < last)
        to = torch.where(inside, self.at - first, wide)  # what lies elsewhere goes to a row that is dropped
        out = self._g.new_zeros(n, c, wide + 1, d)
        out.scatter_add_(2, to[:, None, :, None].expand(n, c, -1, d), self._g)
        return out[:, :, :wide].flatten(2)

    def rows(self) -> Tensor:
        return self._between(0, self._rows)

    def hadamard(self, other: Factor, out: Tensor, lower: bool) -> None:
        assert isinstance(other, EmbeddingFactor)
        a, b = self.at.flatten(), other.at.flatten()
        scale = ((a[:, None] == b) & (a[:, None] >= 0)).to(out.dtype)
        ops.jacobian_gram(out, self._g, other._g, scale[None], lower=lower)

    def squares(self) -> Tensor:
        same = (self.at[:, :, None] == self.at[:, None]) & (self.at[:, None] >= 0)
        return ((self._g @ self._g.mT) * same[:, None]).sum((2, 3))


class DenseFactor(Factor):
    """J itself, (n, c, p)."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.n, self.c = rows.shape[:2]
        self.like = rows

    def traced(self) -> DenseFactor:
        return DenseFactor(self._rows.flatten(1).unsqueeze(1))

    def first(self) -> DenseFactor:
        return DenseFactor(self._rows[:1])

    def pieces(self, width: int) -> Iterator[Tensor]:
        yield from self._rows.split(max(1, width), -1)

    def rows(self) -> Tensor:
        return self._rows


def scatter(rows: Tensor, index: Tensor | None, p: int) -> Tensor:
    """Rows for a view's elements -> rows (n, c, p) for its parameter's; ``index`` None: they are the same."""
    if index is None:
        return rows
    index = index.flatten().to(rows.device)
    kept = index >= 0
    out = rows.new_zeros(*rows.shape[:2], p)
    return out.index_add_(2, index[kept], rows if bool(kept.all()) else rows[:, :, kept])


def joined(factors: Sequence[OuterFactor]) -> OuterFactor:
    """The factor of one weight that several like operators took: their positions one after the other."""
    first = factors[0]
    t = sum(f.size.t for f in factors)
    size = Size(first.size.q, first.size.r, first.size.s, t, first.size.bias)
    kept = [x for f in factors for x in f._kept]
    return OuterFactor(
        lambda: torch.cat([f.g() for f in factors], 2),
        lambda: torch.cat([f.a() for f in factors], 1),
        kept,
        first.n,
        first.c,
        size,
        first.order,
    )
