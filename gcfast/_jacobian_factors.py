"""What a tile of samples knows of the Jacobian of one group of parameters, and the products of two tiles.

Index letters: i, j samples, c, e outputs, t, s positions (pixels, tokens, uses), J[(i,c), :] a row. An
:class:`Outer` holds J[(i,c)] = sum_t g[i,c,t] (x) a[i,t], which linear operators and convolutions have, and
gives the Hadamard form of a Gram as well as blocks of J; a :class:`Lookup` is the same with one-hot a; a
:class:`Rows` holds J itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import ops
from gcfast._jacobian_graph import Layout, Node, Site, View, _padding

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


class Outer(Factor):
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

    def traced(self) -> Outer:
        def g() -> Tensor:
            return self.g().permute(0, 2, 3, 1, 4).flatten(3).unsqueeze(1)

        size = Size(self.size.q, self.size.r * self.c, self.size.s, self.size.t, self.size.bias)
        return Outer(g, self._a, self._kept, self.n, 1, size)

    def first(self) -> Outer:
        return Outer(lambda: self.g()[:1], lambda: self.a()[:1], self._kept, 1, self.c, self.size, self.order)

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
        assert isinstance(other, Outer)
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
        assert isinstance(other, Outer)
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


class Lookup(Factor):
    """J[(i,c)][v] = sum over the positions that looked v up of g[i,c,t]; ``at``: (n, T), -1 for none."""

    def __init__(self, g: Tensor, at: Tensor, rows: int) -> None:
        self._g, self.at, self._rows = g, at, rows
        self.n, self.c, t, d = g.shape
        self.like = g
        self.size = Size(1, d, rows, t)  # the one-hot vectors would have s = rows

    def traced(self) -> Lookup:
        return Lookup(self._g.transpose(1, 2).flatten(2).unsqueeze(1), self.at, self._rows)

    def first(self) -> Lookup:
        return Lookup(self._g[:1], self.at[:1], self._rows)

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
        assert isinstance(other, Lookup)
        a, b = self.at.flatten(), other.at.flatten()
        scale = ((a[:, None] == b) & (a[:, None] >= 0)).to(out.dtype)
        ops.jacobian_gram(out, self._g, other._g, scale[None], lower=lower)

    def squares(self) -> Tensor:
        same = (self.at[:, :, None] == self.at[:, None]) & (self.at[:, None] >= 0)
        return ((self._g @ self._g.mT) * same[:, None]).sum((2, 3))


class Rows(Factor):
    """J itself, (n, c, p)."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.n, self.c = rows.shape[:2]
        self.like = rows

    def traced(self) -> Rows:
        return Rows(self._rows.flatten(1).unsqueeze(1))

    def first(self) -> Rows:
        return Rows(self._rows[:1])

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


# --- from the cotangents of a site to a factor


def _patches(x: Tensor, node: Node, out: Sequence[int], kernel: Sequence[int], groups: int) -> Tensor:
    """What each output position of a convolution sees: x (N, i, *sizes) -> (N, pixels, q, i/q kernel)."""
    dims = len(out)
    stride, dilation = node._saved_stride, node._saved_dilation
    padding = [(p, p) for p in node._saved_padding]
    for k in range(dims):  # where the last window ends beyond what symmetric padding gives
        needed = (out[k] - 1) * stride[k] + dilation[k] * (kernel[k] - 1) + 1
        low = padding[k][0]
        padding[k] = (low, max(0, needed - low - x.shape[2 + k]))
    flat = [v for pair in reversed(padding) for v in pair]
    x = torch.nn.functional.pad(x, flat) if any(flat) else x.contiguous()
    n, channels = x.shape[:2]
    strides = x.stride()
    windows = x.as_strided(
        (n, groups, channels // groups, *kernel, *out),
        (
            strides[0],
            channels // groups * strides[1],
            strides[1],
            *(dilation[k] * strides[2 + k] for k in range(dims)),
            *(stride[k] * strides[2 + k] for k in range(dims)),
        ),
        x.storage_offset(),
    )
    s = channels // groups * math.prod(kernel)
    return windows.reshape(n, groups, s, math.prod(out)).permute(0, 3, 1, 2)


def _linear(site: Site, g: Tensor, n: int, bias: bool, transposed: bool) -> Outer:
    layout = site.layout
    assert layout is not None
    g = layout.arrange(g, n, 1)
    c, o = g.shape[1], g.shape[-1]
    g = g.reshape(n, c, -1, 1, o)
    x = site.node._saved_mat1 if site.node.name() == "AddmmBackward0" else site.node._saved_self
    x = layout.arrange(x.detach(), n)
    x = x.reshape(n, -1, 1, x.shape[-1])
    if site.live is not None:
        live, dead = site.live
        same = x.shape[1] == len(live) + len(dead)  # samples of another length have other positions
        # not reached in the probe nor here
        if same and (g.is_meta or not bool(g.index_select(2, dead).any())):
            g, x = g.index_select(2, live.to(g.device)), x.index_select(1, live)
    size = Size(1, o, x.shape[-1], x.shape[1], bias)
    return Outer(g, x, (g, x), n, c, size, (0, 1, 2) if transposed else (0, 2, 1))


def _convolution(site: Site, g: Tensor, n: int, bias: bool, shape: Sequence[int]) -> Outer:
    node, c = site.node, g.shape[0]
    q = node._saved_groups
    x = node._saved_input.detach()
    many, k = x.shape[0], x.shape[0] // n
    kernel = list(shape[2:])
    assert site.layout is not None
    layout = Layout(0, site.layout.outer)
    if not node._saved_transposed:
        out, o = list(g.shape[3:]), g.shape[2]
        gg = layout.arrange(g, n, 1).flatten(4)  # (n, c, k, o, pixels)
        gg = gg.unflatten(3, (q, o // q)).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)

        def a() -> Tensor:
            return layout.arrange(_patches(x, node, out, kernel, q), n).flatten(1, 2)

        s = x.shape[1] // q * math.prod(kernel)
        size = Size(q, o // q, s, k * math.prod(out), bias)
        return Outer(gg, a, (g, x), n, c, size)
    # The transposed convolution's weight (i, o/q, kernel) meets x[i, t] and what x[i, t] is spread over.
    spread, i = list(x.shape[2:]), x.shape[1]
    o = g.shape[2]

    def g_patches() -> Tensor:
        seen = _patches(g.flatten(0, 1), node, spread, kernel, q)  # (c N, pixels, q, o/q kernel)
        return layout.arrange(seen.unflatten(0, (c, many)), n, 1).flatten(2, 3)

    xx = layout.arrange(x, n).flatten(3).unflatten(2, (q, i // q)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    size = Size(q, o // q * math.prod(kernel), i // q, k * math.prod(spread))
    return Outer(g_patches, xx, (g, x), n, c, size, (0, 2, 1))


def _normalized(site: Site) -> Tensor:
    """The normalised input of a normalisation, of the input's shape."""
    node = site.node
    name = node.name()
    if name == "EvalNormBackward":
        x, _, mean, var = (t.detach() for t in node.saved_tensors)
        shape = (-1, *(1,) * (x.dim() - 2))
        return (x - mean.view(shape)) * (var + node.eps).rsqrt().view(shape)
    x = node._saved_input.detach()
    if name == "NativeLayerNormBackward0":
        return (x - node._saved_result1) * node._saved_result2
    if name == "NativeGroupNormBackward0":
        groups = x.reshape(x.shape[0], node._saved_group, -1)
        out = (groups - node._saved_result1.unsqueeze(-1)) * node._saved_result2.unsqueeze(-1)
        return out.reshape(x.shape)
    # of a batch, with the statistics that evaluation uses
    shape = (1, -1, *(1,) * (x.dim() - 2))
    scale = (node._saved_running_var + _epsilon(node)).rsqrt()
    return (x - node._saved_running_mean.view(shape)) * scale.view(shape)


def _epsilon(node: Node) -> float:
    return float(node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon)


def _norm(site: Site, g: Tensor, n: int, roles: Sequence[str]) -> Tensor:
    """J (n, c, p) of a normalisation's weight, of its bias, or of both, one after the other."""
    layout, c = site.layout, g.shape[0]
    assert layout is not None
    normalized = getattr(site.node, "_saved_normalized_shape", None)
    if normalized is not None:
        parts = [layout.arrange(g * _normalized(site) if role == "weight" else g, n, 1) for role in roles]
        return torch.cat([part.flatten(2, -1 - len(normalized)).sum(2).flatten(2) for part in parts], 2)
    # sums over pixels of a channel: g is read once, by a product with (x, 1) for each sample and channel
    many, channels = g.shape[1:3]
    g = g.reshape(c, many, channels, -1)
    one = g.new_ones(()).expand(g.shape[1:])
    columns = [_normalized(site).reshape(g.shape[1:]) if role == "weight" else one for role in roles]
    right = torch.stack(columns, 3).flatten(0, 1)
    sums = torch.bmm(g.permute(1, 2, 0, 3).flatten(0, 1), right).view(many, channels, c, len(roles))
    return Layout(0, layout.outer).arrange(sums, n).sum(1).permute(0, 2, 3, 1).flatten(2)


def _operand(site: Site, role: str, g: Tensor) -> Tensor:
    """d operator / d parameter times the cotangent, of the operator's shape."""
    node = site.node
    if site.kind == "sum":
        return g if site.sign == 1.0 else site.sign * g
    if site.kind == "product":
        return g * (node._saved_other if role == "self" else node._saved_self).detach()
    if site.kind == "quotient":
        over = node._saved_other.detach()
        return g / over if role == "self" else -g * node._saved_self.detach() / over.square()
    if site.kind == "slope":  # of a PReLU's negative side
        return g * node._saved_self.detach().clamp(max=0)
    return g


def _reduced(site: Site, g: Tensor, n: int, shape: Sequence[int]) -> Tensor:
    """Sums a cotangent (c, ...) over all positions to which a view of ``shape`` was broadcast or repeated."""
    layout, dims = site.layout, g.dim() - 1
    assert layout is not None
    size = (1,) * (dims - len(shape)) + tuple(shape)
    g = layout.arrange(g, n, 1)
    for axis in range(dims - 1, -1, -1):
        at = 2 + axis
        g = g.unflatten(at, (g.shape[at] // size[axis], size[axis])).sum(at)
    return g.flatten(2)


def vector_rows(site: Site, role: str, g: Tensor, n: int, shape: Sequence[int], bias: bool = False) -> Tensor:
    """J (n, c, p) for a parameter that is no matrix to its operator; ``shape``: of the view that it took;
    ``bias``: and for the bias of the same normalisation."""
    if site.kind == "norm":
        return _norm(site, g, n, (role, "bias") if bias else (role,))
    if site.kind in ("linear", "convolution", "shift"):  # a bias
        assert site.layout is not None
        g = site.layout.arrange(g, n, 1)
        if site.kind == "convolution":
            return g.transpose(2, 3).flatten(3).sum(3)
        return g.flatten(2, -2).sum(2)
    return _reduced(site, _operand(site, role, g), n, shape)


def matrix_factor(
    site: Site, g: Tensor, n: int, bias: bool, view: View, shape: Sequence[int]
) -> Outer | Lookup:
    """The factor of a weight, of which the operator took ``view``, of ``shape``; ``bias``: its bias too."""
    if site.kind == "convolution":
        return _convolution(site, g, n, bias, shape)
    if site.kind == "linear":
        return _linear(site, g, n, bias, view.transposed)
    node, layout = site.node, site.layout
    assert layout is not None
    at = node._saved_indices.masked_fill(_padding(node)[..., 0], -1)
    at = layout.arrange(at, n).reshape(n, -1)
    g = layout.arrange(g, n, 1)
    return Lookup(g.reshape(n, g.shape[1], -1, g.shape[-1]), at, shape[0])


def joined(factors: Sequence[Outer]) -> Outer:
    """The factor of one weight that several like operators took: their positions one after the other."""
    first = factors[0]
    t = sum(f.size.t for f in factors)
    size = Size(first.size.q, first.size.r, first.size.s, t, first.size.bias)
    kept = [x for f in factors for x in f._kept]
    return Outer(
        lambda: torch.cat([f.g() for f in factors], 2),
        lambda: torch.cat([f.a() for f in factors], 1),
        kept,
        first.n,
        first.c,
        size,
        first.order,
    )
