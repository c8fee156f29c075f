"""The Jacobian of one use of a parameter from inputs and cotangents: linear, convolution, norm, embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcfast.jacobian.factors import EmbeddingFactor, OuterFactor, Size
from gcfast.jacobian.sites import Layout, Node, Site, View, padding_mask


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


def _linear(site: Site, g: Tensor, n: int, bias: bool, transposed: bool) -> OuterFactor:
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
    return OuterFactor(g, x, (g, x), n, c, size, (0, 1, 2) if transposed else (0, 2, 1))


def _convolution(site: Site, g: Tensor, n: int, bias: bool, shape: Sequence[int]) -> OuterFactor:
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
        return OuterFactor(gg, a, (g, x), n, c, size)
    # The transposed convolution's weight (i, o/q, kernel) meets x[i, t] and what x[i, t] is spread over.
    spread, i = list(x.shape[2:]), x.shape[1]
    o = g.shape[2]

    def g_patches() -> Tensor:
        seen = _patches(g.flatten(0, 1), node, spread, kernel, q)  # (c N, pixels, q, o/q kernel)
        return layout.arrange(seen.unflatten(0, (c, many)), n, 1).flatten(2, 3)

    xx = layout.arrange(x, n).flatten(3).unflatten(2, (q, i // q)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    size = Size(q, o // q * math.prod(kernel), i // q, k * math.prod(spread))
    return OuterFactor(g_patches, xx, (g, x), n, c, size, (0, 2, 1))


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
) -> OuterFactor | EmbeddingFactor:
    """The factor of a weight, of which the operator took ``view``, of ``shape``; ``bias``: its bias too."""
    if site.kind == "convolution":
        return _convolution(site, g, n, bias, shape)
    if site.kind == "linear":
        return _linear(site, g, n, bias, view.transposed)
    node, layout = site.node, site.layout
    assert layout is not None
    at = node._saved_indices.masked_fill(padding_mask(node)[..., 0], -1)
    at = layout.arrange(at, n).reshape(n, -1)
    g = layout.arrange(g, n, 1)
    return EmbeddingFactor(g.reshape(n, g.shape[1], -1, g.shape[-1]), at, shape[0])
