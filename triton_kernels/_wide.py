"""What the kernels of the wide layer share: a tile of Phi = act(z weight^T + bias), its launch table, panels.

Counts for an H100 (nominal 400 TFLOP/s TF32, 800 bf16, 60 fp64 and fp32; 5.5 TB/s between L2 and the
multiprocessors; nothing here has been timed). An element of Phi costs 2 d FLOP: at d = 512 2.6 ps in TF32,
1.3 ps in bf16, 17 ps in fp64 or fp32, and two special-function-free activations of 31 instructions, 1.9 ps,
on pipes that are idle meanwhile. Moved through L2 and back it costs 1.5 ps in fp32: worth avoiding for
wide_forward and wide_head_grad, whose second product is made from registers; wide_gram_product, which needs
it twice, pays half as much again. Device memory never sees it.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ARCHITECTURES, TRITON_TYPES, Launch, Specialization, architecture, interpreted, run
from .activations import activate, scale, scale_arguments

# How products are made: the dtype of the inputs and, for float32, the precision that is allowed.
MODES = ("fp64", "ieee", "tf32x3", "tf32", "fp32 as bf16", "bf16", "fp16")
_DTYPE = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

# A tile of Phi is BM x BN, made by steps of BK. fp64 and IEEE fp32 (FMAs on ordinary lanes) hold 16 sums a
# thread, tf32x3 32, the others 64, of registers that the activation needs as well; 128 x 128 by 8 warps is
# what a multiprocessor's tensor cores want, and it reads (128 + 128) / (2 * 128 * 128) numbers a FLOP: 128
# FLOP a byte in bf16, half of what L2 would feed at 800 TFLOP/s without caching in the first level. BK and
# stages are what no architecture, activation or alignment spilled with; twice the BK of tf32x3 and of halves
# did where d is no multiple of 16.
_PHI = {
    "fp64": Launch({"BM": 64, "BN": 64, "BK": 16}, num_warps=8, num_stages=3),
    "ieee": Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
    "tf32x3": Launch({"BM": 128, "BN": 64, "BK": 16}, num_warps=8, num_stages=3),
    "tf32": Launch({"BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=3),
    "fp32 as bf16": Launch({"BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=3),
    "bf16": Launch({"BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=4),
    "fp16": Launch({"BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=4),
}
# sm_100 takes its sums from tensor memory all at once: gelu spilled with 64 of them from fp32.
_NARROW = Launch({"BM": 128, "BN": 64, "BK": 32}, num_warps=8, num_stages=3)
# With the slope there are two activations of each sum, and the gradient from above: fewer sums a thread.
_SLOPE = {
    "fp64": Launch({"BM": 64, "BN": 32, "BK": 16}, num_warps=8, num_stages=3),
    "ieee": Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
    "tf32x3": Launch({"BM": 128, "BN": 64, "BK": 16}, num_warps=8, num_stages=3),
    "tf32": Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
    "fp32 as bf16": Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
    "bf16": Launch({"BM": 128, "BN": 64, "BK": 32}, num_warps=8, num_stages=4),
    "fp16": Launch({"BM": 128, "BN": 64, "BK": 32}, num_warps=8, num_stages=4),
}
PANEL_BYTES = 24 << 20  # about half of an H100's L2


def mode_of(z: Tensor, precision: str) -> str:
    if z.dtype == torch.float32:
        return "fp32 as bf16" if precision == "bf16" else precision
    return next(mode for mode, dtype in _DTYPE.items() if dtype == z.dtype)


def phi_launch(mode: str, arch: int) -> Launch:
    return _NARROW if arch == 100 and mode in ("tf32", "fp32 as bf16") else _PHI[mode]


def slope_launch(mode: str, arch: int) -> Launch:
    return _SLOPE[mode]


def constants(mode: str, kind: int, beta: float) -> dict[str, Any]:
    """The constants of every kernel of the wide layer."""
    tf32 = mode if mode in ("tf32", "tf32x3") else "ieee"
    return {"TF32": tf32, "AS_BF16": mode == "fp32 as bf16", "ACT": kind, "SCALED": kind == 0 and beta != 1.0}


@triton.jit
def operand(x, AS_BF16: tl.constexpr):
    """A tile as a product takes it. The interpreter multiplies bf16 wrongly, but exactly after a cast."""
    if AS_BF16:
        x = x.to(tl.bfloat16)
    if interpreted and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def pre_activations(
    z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr, AS_BF16: tl.constexpr,
):  # fmt: skip
    """z weight^T + bias at rows `row` (BM) and columns `col` (BN), 0 beyond n and m; sums run along d."""
    work: tl.constexpr = tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32
    inner = tl.arange(0, BK)
    z_at = z + row[:, None].to(tl.int64) * z_stride + inner[None, :]
    w_at = weight + col[None, :].to(tl.int64) * weight_stride + inner[:, None]
    sums = tl.zeros([BM, BN], work)
    for step in range(steps):
        left = d - step * BK
        a = tl.load(z_at, mask=(row[:, None] < n) & (inner[None, :] < left), other=0.0)
        b = tl.load(w_at, mask=(col[None, :] < m) & (inner[:, None] < left), other=0.0)
        a = operand(a, AS_BF16)
        b = operand(b, AS_BF16)
        sums = tl.dot(a, b, sums, input_precision=TF32, out_dtype=work)
        z_at += BK
        w_at += BK
    shift = tl.load(bias + col, mask=col < m, other=0.0).to(work)
    return sums + shift[None, :]


@triton.jit
def features(
    z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride, beta_hi, beta_lo, beta_inv,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr, AS_BF16: tl.constexpr,
    ACT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A tile of Phi, 0 beyond n and m: what meets it there in a product counts for nothing."""
    pre = pre_activations(
        z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride, BM, BN, BK, TF32, AS_BF16
    )
    hi, lo, inv = scale(beta_hi, beta_lo, beta_inv, pre.dtype)
    phi = activate(pre, hi, lo, inv, ACT, 0, SCALED)
    return tl.where((row[:, None] < n) & (col[None, :] < m), phi, 0.0)


@triton.jit(do_not_specialize=["n", "m", "steps", "beta_hi", "beta_lo", "beta_inv"])
def panel_kernel(
    z, weight, bias, up, phi, slope, n, m, d, steps, z_stride, weight_stride, out_stride,
    beta_hi, beta_lo, beta_inv,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr, AS_BF16: tl.constexpr,
    ACT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """phi = act(pre) and, unless it is None, slope = act'(pre) up, panels of one row stride."""
    columns = tl.cdiv(m, BN)
    pid = tl.program_id(0)
    row = (pid // columns) * BM + tl.arange(0, BM)
    col = (pid % columns) * BN + tl.arange(0, BN)
    pre = pre_activations(
        z, weight, bias, row, col, n, m, d, steps, z_stride, weight_stride, BM, BN, BK, TF32, AS_BF16
    )
    hi, lo, inv = scale(beta_hi, beta_lo, beta_inv, pre.dtype)
    inside = (row[:, None] < n) & (col[None, :] < m)
    at = row[:, None].to(tl.int64) * out_stride + col[None, :]
    value = activate(pre, hi, lo, inv, ACT, 0, SCALED)
    tl.store(phi + at, value.to(phi.dtype.element_ty), mask=inside)
    if slope is not None:
        above = tl.load(up + at, mask=inside, other=0.0).to(pre.dtype)
        value = activate(pre, hi, lo, inv, ACT, 1, SCALED) * above
        tl.store(slope + at, value.to(slope.dtype.element_ty), mask=inside)


def rows_of(x: Tensor) -> Tensor:
    """x with a unit column stride."""
    return x if x.stride(1) == 1 else x.contiguous()


def panel(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    kind: int,
    beta: float,
    mode: str,
    phi: Tensor,
    up: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """phi (n, w) = act(z weight^T + bias) for the w rows of weight that are given; slope likewise."""
    (n, d), m = z.shape, weight.shape[0]
    launch = (phi_launch if slope is None else slope_launch)(mode, architecture(z.device))
    tile = launch.blocks
    run(
        panel_kernel,
        (triton.cdiv(n, tile["BM"]) * triton.cdiv(m, tile["BN"]),),
        launch,
        z.device,
        *(z, weight, bias, up, phi, slope, n, m, d, triton.cdiv(d, tile["BK"])),
        *(z.stride(0), weight.stride(0), phi.stride(0)),
        *scale_arguments(beta, z.dtype),
        **constants(mode, kind, beta),
    )


def panel_columns(n: int, m: int, mode: str, panels: int = 1) -> int:
    """Columns of a panel such that `panels` of them stay in the second-level cache."""
    size = 8 if mode == "fp64" else 2 if mode in ("bf16", "fp16") else 4
    width = PANEL_BYTES // (panels * n * size) // 128 * 128
    return min(m, max(128, width))


def blocks(m: int, width: int) -> Iterator[slice]:
    return (slice(j, min(j + width, m)) for j in range(0, m, width))


INSTRUCTION = {  # what a tile's product must have become, by architecture
    "fp64": {80: "DMMA", 90: "DMMA"},
    "tf32x3": {80: "HMMA"},
    "tf32": {80: "HMMA"},
    "fp32 as bf16": {80: "HMMA"},
    "bf16": {80: "HMMA", 90: "HGMMA"},
    "fp16": {80: "HMMA", 90: "HGMMA"},
}


def every(
    kernel: Any,
    pointers: tuple[str, ...],
    integers: tuple[str, ...],
    strides: tuple[str, ...],
    fixed: dict[str, Any],
    launch: Callable[[str, int], Launch],
    architectures: tuple[int, ...] = ARCHITECTURES,
    sums: tuple[str, ...] = (),
) -> Iterator[Specialization]:
    """A kernel of the wide layer for each way of products, activation and architecture.

    Listed for d divisible by 16: the masks of the loads are then known to be the same for 16 bytes at a time,
    and they are wide and asynchronous. Any other d gets loads of single elements, and no pipeline in halves.
    """
    for arch, mode in itertools.product(architectures, MODES):
        dtype = _DTYPE.get(mode, torch.float32)
        scalar = "i64" if mode == "fp64" else "fp32"
        for kind, beta in ((0, 2.0), *((kind, 1.0) for kind in range(7))):
            yield Specialization(
                kernel,
                dict.fromkeys(pointers, "*" + TRITON_TYPES[dtype])
                | dict.fromkeys(sums, "*fp64" if mode == "fp64" else "*fp32")
                | dict.fromkeys((*integers, *strides), "i32")
                | {"beta_hi": scalar, "beta_lo": "fp32", "beta_inv": scalar},
                {**fixed, **constants(mode, kind, beta)},
                launch(mode, arch),
                (arch,),
                frozenset((*pointers, *sums, "d", *strides)),
                {k: v for k, v in INSTRUCTION.get(mode, {}).items() if k == arch},
            )


def specializations() -> Iterator[Specialization]:
    """Panels of Phi, alone and with the slope that the backward pass needs."""
    integers, strides = ("n", "m", "d", "steps"), ("z_stride", "weight_stride", "out_stride")
    pointers = ("z", "weight", "bias", "phi")
    alone = {"up": None, "slope": None}
    yield from every(panel_kernel, pointers, integers, strides, alone, phi_launch)
    yield from every(panel_kernel, (*pointers, "up", "slope"), integers, strides, {}, slope_launch)
