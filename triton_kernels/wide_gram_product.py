"""Phi (Phi^T r), the op `wide_gram_product`: one computation of Phi, by column panels that stay in L2.

A panel of some 24 MB is produced by a fused product and activation, then read twice by the library's skinny
products: g = panel^T r needs all rows before out += panel g can begin. Count for n = 50,000, m = 55,000,
d = 512, C = 10 in TF32 on an H100: 2 n m d = 2.8 TFLOP, 7 ms; three passes of 11 GB through L2 at 5.5 TB/s,
6 ms, the first one under the product; 440 panels of three launches. Storing the features moves as many bytes
through device memory at 3 TB/s. In IEEE fp32 the product alone takes 47 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._wide import blocks, mode_of, panel, panel_columns, rows_of


def wide_gram_product(
    z: Tensor, weight: Tensor, bias: Tensor, r: Tensor, kind: int, beta: float, precision: str
) -> Tensor:
    """(n, C); z (n, d), weight (m, d), bias (m,), r (n, C), any strides, sizes >= 1."""
    z, weight, bias, mode = rows_of(z), rows_of(weight), bias.contiguous(), mode_of(z, precision)
    (n, _), m = z.shape, weight.shape[0]
    width = panel_columns(n, m, mode)
    half = z.dtype in (torch.bfloat16, torch.float16)
    scratch = torch.empty(n * width, dtype=z.dtype, device=z.device)
    out = torch.zeros(r.shape, dtype=torch.float32 if half else z.dtype, device=z.device)
    for columns in blocks(m, width):
        phi = scratch[: n * (columns.stop - columns.start)].view(n, -1)
        panel(z, weight[columns], bias[columns], kind, beta, mode, phi)
        if half:  # K r grows with m: what is summed over panels is not rounded between them
            out += phi.float() @ (phi.mT.float() @ r.float())
        else:
            out.addmm_(phi, phi.mT @ r)
    return out.to(z.dtype)
