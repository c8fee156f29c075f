"""Symmetric, accumulating and absolute matrix products, and their error bounds, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_product(gram: Tensor, x: Tensor) -> Tensor:
    """gram x for symmetric gram (n, n) and x (n, c)."""
    return gram @ x


def add_product(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, inner: int = 128, lower: bool = False
) -> None:
    """out += alpha a b, by slices of length `inner`, each rounded by itself; alpha is 1 or -1.

    Tiles, so that on a CPU one and its scratch stay in cache. `lower`: on and below the diagonal only.
    """
    rows, columns = (1024, 256) if out.device.type == "cpu" else (4096, 2048)
    (r, c), k = out.shape, a.shape[1]
    scratch = out.new_empty(min(rows, r) * min(columns, c))
    for j0 in range(0, c, columns):
        j1 = min(j0 + columns, c)
        starts = [j0, *range(j1, r, rows)] if lower else range(0, r, rows)
        for i0 in starts:
            diagonal = lower and i0 == j0
            i1 = j1 if diagonal else min(i0 + rows, r)
            tile = out[i0:i1, j0:j1]
            sums = tile.clone() if diagonal else tile
            part = scratch[: sums.numel()].view(sums.shape)
            for s in range(0, k, inner):
                torch.mm(a[i0:i1, s : s + inner], b[s : s + inner, j0:j1], out=part)
                sums.add_(part, alpha=alpha)
            if diagonal:
                tile.copy_(torch.where(torch.ones_like(tile, dtype=torch.bool).tril_(), sums, tile))


_BLOCK = 1 << 18  # elements of |a| in float64 at a time


def abs_products(a: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(|a| right, left |a|) in float64: a (n, m), left (n,), right (m,), non-negative, ones by default.

    Products and sums element by element: a BLAS may skip a weight of zero, and with it a NaN.
    """
    if a.stride(0) < a.stride(1):
        columns, rows = abs_products(a.mT, right, left)
        return rows, columns
    n, m = a.shape
    rows, columns = (torch.zeros(k, dtype=torch.float64, device=a.device) for k in (n, m))
    step = max(1, _BLOCK // max(1, m))
    for i in range(0, n, step):
        block = a[i : i + step].to(torch.float64).abs()
        rows[i : i + step] = (block if right is None else block * right).sum(1)
        columns += (block if left is None else block * left[i : i + step, None]).sum(0)
    return rows, columns


def gram_error_bound(h: Tensor) -> Tensor:
    """The row sums of |h| |h|^T (n,), as |h| (|h|^T 1), in float64."""
    return abs_products(h, right=abs_products(h)[1])[0]
