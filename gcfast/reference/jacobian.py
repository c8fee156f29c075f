"""Gram matrices of Jacobians, K += (A A^T) * (G G^T) or J J^T, in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROOM = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements of a tile of products


def jacobian_gram(
    out: Tensor,
    g: Tensor,
    h: Tensor,
    scale: Tensor,
    *,
    ends: Sequence[int] | None = None,
    lower: bool = False,
) -> None:
    """out[(i, c), (j, e)] += sum_{l,t,s} scale[l, (i, t), (j, s)] sum_{o in l} g[i, c, t, o] h[j, e, s, o].

    g (n, C, T, R), h (n2, C2, T2, R), scale (L, n T, n2 T2); `lower`: on and below the diagonal only. A block
    of samples a side and a position t at a time, with as many positions s as the scratch has room for.
    """
    (n, c, t, r), (n2, c2, t2, _) = g.shape, h.shape
    room = _ROOM["cpu" if out.device.type == "cpu" else "cuda"]
    side = max(1, math.isqrt(room // (c * c2)))
    together = max(1, room // (min(side, n) * c * min(side, n2) * c2))  # positions s
    scales = scale.view(-1, n, t, n2, t2)
    layers = list(zip(scales, (0, *(ends or (r,))), ends or (r,)))
    for i0, j0 in itertools.product(range(0, n, side), range(0, n2, side)):
        if lower and j0 > i0:
            continue
        i, j = slice(i0, min(i0 + side, n)), slice(j0, min(j0 + side, n2))
        tile = out[i.start * c : i.stop * c, j.start * c2 : j.stop * c2]
        sums = torch.zeros_like(tile)
        for (layer, begin, end), s0, p in itertools.product(layers, range(0, t2, together), range(t)):
            s = slice(s0, s0 + together)
            part = g[i, :, p, begin:end].flatten(0, 1) @ h[j, :, s, begin:end].flatten(0, 2).mT
            part = part.view(i.stop - i0, c, tile.shape[1], -1)
            weights = layer[i, p, j, s].repeat_interleave(c2, 1).unsqueeze(1)
            if part.shape[-1] == 1:
                sums.view(part.shape).addcmul_(part, weights)
            else:
                sums += part.mul_(weights).sum(-1).view(sums.shape)
        if lower and i0 == j0:
            keep = torch.ones_like(tile, dtype=torch.bool).tril_()
            tile.copy_(torch.where(keep, tile + sums, tile))
        else:
            tile += sums


_GRADIENTS = {"cpu": 1 << 21, "cuda": 1 << 23}  # elements of J at a time: they stay in cache


def gradient_gram(
    out: Tensor, g: Tensor, a: Tensor, h: Tensor | None = None, b: Tensor | None = None
) -> None:
    """out[(i, c), (j, e)] += sum_{r,s} J[(i, c), (r, s)] J'[(j, e), (r, s)]; without h J' = J, lower half.

    J[(i, c), (r, s)] = sum_t g[i, c, t, r] a[i, t, s] of g (n, C, T, R) and a (n, T, S), J' of h and b. Rows
    r of the weight are taken in blocks.
    """
    factors = [(g, a)] if h is None or b is None else [(g, a), (h, b)]
    r, s = g.shape[3], a.shape[2]
    room = _GRADIENTS["cpu" if out.device.type == "cpu" else "cuda"]
    step = max(1, room // (s * sum(x.shape[0] * x.shape[1] for x, _ in factors)))
    sums = torch.zeros_like(out)
    for r0 in range(0, r, step):
        made = []
        for x, y in factors:
            rows = x[..., r0 : r0 + step].transpose(2, 3)  # (n, C, rows, T)
            made.append(torch.bmm(rows.flatten(1, 2), y).view(x.shape[0] * x.shape[1], -1))
        sums.addmm_(made[0], made[-1].mT)
    keep = torch.ones_like(out, dtype=torch.bool)
    out.copy_(torch.where(keep.tril_() if h is None else keep, out + sums, out))
