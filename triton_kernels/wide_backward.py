"""Gradients of the wide layer and its head, the op `wide_backward`: Phi and its slope by panels in L2.

With D = act'(z weight^T + bias) o (g head), a panel of Phi and one of D come out of one product; dz = D
weight, dweight = D^T z and dhead = g^T Phi are the library's products. 3 * 2 n m d FLOP, as many as
eager torch with stored features needs for both passes; nothing of size n m is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._wide import blocks, mode_of, panel, panel_columns, rows_of


def wide_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    kind: int,
    beta: float,
    precision: str,
    need_z: bool,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz, dweight, dbias, dhead; those not needed are empty. Sizes >= 1, any strides."""
    z, weight, bias, mode = rows_of(z), rows_of(weight), bias.contiguous(), mode_of(z, precision)
    (n, _), m = z.shape, weight.shape[0]
    half = z.dtype in (torch.bfloat16, torch.float16)
    width = panel_columns(n, m, mode, panels=3)
    options = {"dtype": torch.float32 if half else z.dtype, "device": z.device}
    dz = torch.zeros(z.shape if need_z else 0, **options)  # type: ignore[call-overload]
    dweight = z.new_empty(weight.shape if need_hidden else 0)
    dbias = z.new_empty(m if need_hidden else 0)
    dhead = z.new_empty(head_weight.shape if need_head else 0)
    scratch = torch.empty(3, n * width, dtype=z.dtype, device=z.device)
    below = need_z or need_hidden
    for columns in blocks(m, width):
        size = n * (columns.stop - columns.start)
        phi, up, slope = (s[:size].view(n, -1) for s in scratch)
        if below:
            torch.mm(g, head_weight[:, columns], out=up)
            panel(z, weight[columns], bias[columns], kind, beta, mode, phi, up, slope)
        else:
            panel(z, weight[columns], bias[columns], kind, beta, mode, phi)
        if need_z:
            dz += slope @ weight[columns]
        if need_hidden:
            torch.mm(slope.mT, z, out=dweight[columns])
            dbias[columns] = slope.sum(dim=0)
        if need_head:
            dhead[:, columns] = g.mT @ phi
    return dz.to(z.dtype), dweight, dbias, dhead
