"""Phi head^T + head_bias, the op `wide_forward`: a tile of Phi goes from registers into the second product.

A program owns BM rows and a share of the columns of Phi; the shares are summed in a fixed order. Where rows
alone fill the device there is one share. The second product adds 2 n m max(C, 16) FLOP, 3 % at d = 512 and
C = 10, and reads the head from L2. More than 16 outputs go by panels of Phi and the library's product: their
sums would take the registers that the tile of Phi needs.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Specialization, architecture, multiprocessors, run
from ._wide import (
    blocks,
    constants,
    every,
    features,
    mode_of,
    operand,
    panel,
    panel_columns,
    rows_of,
)
from .activations import scale_arguments

OUTPUTS = 16  # that a program holds sums of: a tensor core's least


def fused(arch: int, sides: int) -> bool:
    """Whether the second product is made from registers: on sm_90, whose wgmma has operands in shared memory.

    With mma.sync and with tcgen05 every tile that was tried, down to 32 x 32, spilled; panels do not.
    """
    return arch == 90 and sides <= OUTPUTS


def launch(mode: str, arch: int = 90) -> Launch:
    """Smaller than the panels' tile: the outputs' sums and the head want registers too."""
    rows = 64 if mode in ("fp64", "ieee", "tf32x3") else 128
    double = mode == "fp64"
    size = {"BM": rows, "BN": 64, "BK": 16 if double else 32, "BC": OUTPUTS}
    return Launch(size, num_warps=8, num_stages=3 if double else 2)  # fp64 spilled with two stages


@triton.jit(do_not_specialize=["n", "m", "c", "steps", "share", "beta_hi", "beta_lo", "beta_inv"])
def wide_forward_kernel(
    z, weight, bias, head, out, n, m, d, c, steps, share, z_stride, weight_stride, head_stride,
    beta_hi, beta_lo, beta_inv,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    TF32: tl.constexpr, AS_BF16: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out[s, i, k] for share s of `share` column blocks each."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    side = tl.arange(0, BC)
    work: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BM, BC], work)
    for block in range(share):
        col = (split * share + block) * BN + tl.arange(0, BN)
        phi = features(
            z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride, beta_hi, beta_lo, beta_inv,
            BM, BN, BK, TF32, AS_BF16, ACT, SCALED,
        )  # fmt: skip
        at = side[None, :].to(tl.int64) * head_stride + col[:, None]
        v = tl.load(head + at, mask=(side[None, :] < c) & (col[:, None] < m), other=0.0)
        phi = operand(phi.to(head.dtype.element_ty), AS_BF16)
        v = operand(v, AS_BF16)
        part = tl.dot(phi, v, input_precision=TF32, out_dtype=work)
        sums += part
    at = (split.to(tl.int64) * n + row[:, None]) * c + side[None, :]
    tl.store(out + at, sums, mask=(row[:, None] < n) & (side[None, :] < c))


def wide_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    kind: int,
    beta: float,
    precision: str,
) -> Tensor:
    """(n, C); z (n, d), weight (m, d), bias (m,), head_weight (C, m), any strides, sizes >= 1."""
    z, weight, bias, head = rows_of(z), rows_of(weight), bias.contiguous(), rows_of(head_weight)
    mode = mode_of(z, precision)
    (n, d), (c, m) = z.shape, head.shape
    dtype = torch.float64 if mode == "fp64" else torch.float32
    if not fused(architecture(z.device), c):
        width = panel_columns(n, m, mode)
        sums = torch.zeros(n, c, dtype=dtype, device=z.device)
        for columns in blocks(m, width):
            phi = torch.empty(n, columns.stop - columns.start, dtype=z.dtype, device=z.device)
            panel(z, weight[columns], bias[columns], kind, beta, mode, phi)
            sums += phi @ head[:, columns].mT
    else:
        tile = launch(mode)
        rows, all_columns = triton.cdiv(n, tile.blocks["BM"]), triton.cdiv(m, tile.blocks["BN"])
        share = triton.cdiv(all_columns, min(all_columns, triton.cdiv(2 * multiprocessors(z.device), rows)))
        splits = triton.cdiv(all_columns, share)
        parts = torch.empty(splits, n, c, dtype=dtype, device=z.device)
        run(
            wide_forward_kernel,
            (rows, splits),
            tile,
            z.device,
            *(z, weight, bias, head, parts, n, m, d, c, triton.cdiv(d, tile.blocks["BK"]), share),
            *(z.stride(0), weight.stride(0), head.stride(0)),
            *scale_arguments(beta, z.dtype),
            **constants(mode, kind, beta),
        )
        sums = parts.sum(dim=0)
    return (sums if head_bias is None else sums + head_bias).to(z.dtype)


def specializations() -> Iterator[Specialization]:
    """Each way of products and each activation."""
    integers = ("n", "m", "d", "c", "steps", "share")
    strides = ("z_stride", "weight_stride", "head_stride")
    pointers = ("z", "weight", "bias", "head")
    yield from every(wide_forward_kernel, pointers, integers, strides, {}, launch, (90,), ("out",))
