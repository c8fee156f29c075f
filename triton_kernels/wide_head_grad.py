"""residual^T Phi, the op `wide_head_grad`: a tile of Phi goes from registers into the second product.

A program owns BN columns and a share of the rows; the shares are summed in a fixed order. Counts and the
limit of 16 outputs are those of wide_forward.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Specialization, architecture, multiprocessors, run
from ._wide import blocks, constants, every, features, mode_of, operand, panel, panel_columns, rows_of
from .activations import scale_arguments
from .wide_forward import fused, launch


@triton.jit(do_not_specialize=["n", "m", "c", "steps", "share", "beta_hi", "beta_lo", "beta_inv"])
def wide_head_grad_kernel(
    z, weight, bias, residual, out, n, m, d, c, steps, share, z_stride, weight_stride, residual_stride,
    beta_hi, beta_lo, beta_inv,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    TF32: tl.constexpr, AS_BF16: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out[s, k, j] for share s of `share` row blocks each."""
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    side = tl.arange(0, BC)
    work: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BC, BN], work)
    for block in range(share):
        row = (split * share + block) * BM + tl.arange(0, BM)
        phi = features(
            z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride, beta_hi, beta_lo, beta_inv,
            BM, BN, BK, TF32, AS_BF16, ACT, SCALED,
        )  # fmt: skip
        at = row[None, :].to(tl.int64) * residual_stride + side[:, None]
        r = tl.load(residual + at, mask=(side[:, None] < c) & (row[None, :] < n), other=0.0)
        phi = operand(phi.to(residual.dtype.element_ty), AS_BF16)
        r = operand(r, AS_BF16)
        part = tl.dot(r, phi, input_precision=TF32, out_dtype=work)
        sums += part
    at = (split.to(tl.int64) * c + side[:, None]) * m + col[None, :]
    tl.store(out + at, sums, mask=(side[:, None] < c) & (col[None, :] < m))


def wide_head_grad(
    z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, kind: int, beta: float, precision: str
) -> Tensor:
    """(C, m); z (n, d), weight (m, d), bias (m,), residual (n, C), any strides, sizes >= 1."""
    z, weight, bias, residual = rows_of(z), rows_of(weight), bias.contiguous(), rows_of(residual)
    mode = mode_of(z, precision)
    (n, d), m, c = z.shape, weight.shape[0], residual.shape[1]
    if not fused(architecture(z.device), c):
        out = z.new_empty(c, m)
        for columns in blocks(m, panel_columns(n, m, mode)):
            phi = torch.empty(n, columns.stop - columns.start, dtype=z.dtype, device=z.device)
            panel(z, weight[columns], bias[columns], kind, beta, mode, phi)
            out[:, columns] = residual.mT @ phi
        return out
    tile = launch(mode)
    all_rows, columns_ = triton.cdiv(n, tile.blocks["BM"]), triton.cdiv(m, tile.blocks["BN"])
    share = triton.cdiv(all_rows, min(all_rows, triton.cdiv(2 * multiprocessors(z.device), columns_)))
    splits = triton.cdiv(all_rows, share)
    dtype = torch.float64 if mode == "fp64" else torch.float32
    parts = torch.empty(splits, c, m, dtype=dtype, device=z.device)
    run(
        wide_head_grad_kernel,
        (columns_, splits),
        tile,
        z.device,
        *(z, weight, bias, residual, parts, n, m, d, c, triton.cdiv(d, tile.blocks["BK"]), share),
        *(z.stride(0), weight.stride(0), residual.stride(0)),
        *scale_arguments(beta, z.dtype),
        **constants(mode, kind, beta),
    )
    return parts.sum(dim=0).to(z.dtype)


def specializations() -> Iterator[Specialization]:
    """Each way of products and each activation."""
    integers = ("n", "m", "d", "c", "steps", "share")
    strides = ("z_stride", "weight_stride", "residual_stride")
    pointers = ("z", "weight", "bias", "residual")
    yield from every(wide_head_grad_kernel, pointers, integers, strides, {}, launch, (90,), ("out",))
