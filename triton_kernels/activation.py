"""out = (grad *) act^(order)(x + bias) over rows of unit column stride, the op `activation`."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ARCHITECTURES, TRITON_TYPES, Launch, Specialization, architecture, run
from .activations import activate, scale, scale_arguments


@triton.jit
def _load(at, mask, whole):
    """Masks of a width that is no multiple of 16 forbid vector loads: whole tiles go without."""
    if whole:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value


# What is not a multiple of 16 in general is not specialised on: one compilation serves every size and beta.
@triton.jit(do_not_specialize=["rows", "cols", "beta_hi", "beta_lo", "beta_inv"])
def activation_kernel(
    x_ptr,
    bias_ptr,
    grad_ptr,
    out_ptr,
    rows,
    cols,
    x_stride,
    grad_stride,
    out_stride,
    beta_hi,
    beta_lo,
    beta_inv,
    ACT: tl.constexpr,
    ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One ROWS x COLS tile a program, column blocks fastest; read, then written: out may be x or grad."""
    col_blocks = (cols + COLS - 1) // COLS
    block = tl.program_id(0)
    first_row = (block // col_blocks).to(tl.int64) * ROWS
    first_col = (block % col_blocks).to(tl.int64) * COLS
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = first_col + tl.arange(0, COLS)[None, :]
    whole = (first_row + ROWS <= rows) & (first_col + COLS <= cols)
    mask = (row < rows) & (col < cols)
    precision: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = _load(x_ptr + (row * x_stride + col), mask, whole).to(precision)
    if HAS_GRAD:
        grad = _load(grad_ptr + (row * grad_stride + col), mask, whole).to(precision)
    if HAS_BIAS:
        x += _load(bias_ptr + col, col < cols, whole).to(precision)
    hi, lo, inv = scale(beta_hi, beta_lo, beta_inv, precision)
    y = activate(x, hi, lo, inv, ACT, ORDER, SCALED)
    if HAS_GRAD:
        y *= grad
    y = y.to(out_ptr.dtype.element_ty)
    out_at = out_ptr + (row * out_stride + col)
    if whole:
        tl.store(out_at, y)
    else:
        tl.store(out_at, y, mask=mask)


# Elements a program of 4 warps, by architecture and bytes an element. The work is bytes: a thread holds 16 to
# 64 of them of each operand and, at the 24 to 102 registers of the kernels, enough threads are resident for
# the 16 KB a multiprocessor that 3 TB/s times 0.7 us ask for on an H100; at 8 TB/s (sm_100) the narrow types
# need twice as many, hence the longer tile.
#
# What is free meanwhile: an H100 (132 multiprocessors at 1.7 GHz, 128 lanes, 64 of them fp64) issues 76
# instructions an fp32 element (8 bytes), 38 a bf16 one, and in fp64 153 of which 76 fp64. Counted in the
# machine code for sm_90, loads and addresses of a whole tile included, fp64 instructions in brackets, for
# orders 0, 1 and 2 (none was timed):
#
#               fp32        fp64
#   softplus    31 29 29     65 (42)   43 (29)   42 (29)
#     beta      43 35 38     86 (51)   50 (32)   53 (35)
#   sigmoid     29 29 37     43 (29)   42 (29)   53 (36)
#   tanh        31 30 37     45 (31)   43 (31)   52 (37)
#   gelu        49 49 27    100 (64)  106 (64)   39 (26)
#   gelu_tanh   44 56 67     68 (45)   78 (57)   82 (66)
#   silu        32 35 37     55 (33)   55 (37)   51 (37)
#   relu         5  7  5      8 (1)    11 (2)     8 (1)
#
# So all of it hides behind memory there but gelu and gelu_tanh in bf16 and fp16, which take up to 1.8 times
# as long as their bytes; on sm_100 (36 instructions an fp32 element at 8 TB/s) arithmetic is the limit.
_ELEMENTS = {
    80: {2: 1024, 4: 1024, 8: 1024},
    90: {2: 1024, 4: 1024, 8: 1024},
    100: {2: 2048, 4: 1024, 8: 1024},
}
# Below this many elements a quarter of a tile a program: 64 whole tiles would leave half the device idle.
_SMALL = 1 << 20
_WIDTHS = (1024, 128, 32)  # columns a tile: a piece of one row, or several short rows


def _columns(cols: int) -> int:
    """The widest tile that computes at most a quarter more elements than the narrowest one would."""
    padded = {width: -(-cols // width) * width for width in _WIDTHS}
    return next(w for w in _WIDTHS if padded[w] <= 1.25 * min(padded.values()))


@functools.cache
def _launch(rows: int, cols: int, itemsize: int, arch: int) -> Launch:
    elements = _ELEMENTS[arch][itemsize] // (4 if rows * cols < _SMALL else 1)
    width = elements if rows == 1 else min(elements, _columns(cols))
    return Launch({"ROWS": elements // width, "COLS": width}, num_warps=4)


def activation(
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    act: int,
    order: int,
    beta: float,
) -> None:
    """out[i, j] = (grad[i, j] *) act^(order)(x[i, j] + bias[j]).

    x, grad and out (rows, cols) of unit column stride and any row stride, bias (cols,) contiguous, all on one
    device and of one dtype out of float32, float64, bfloat16 and float16; the last two are computed in
    float32 and rounded once. out may be x or grad. `act` indexes ``gcfast.reference.ACTIVATIONS``.
    """
    rows, cols = x.shape
    if rows == 0 or cols == 0:
        return
    strides = [0 if t is None else t.stride(0) for t in (x, grad, out)]
    if bias is None and all(t is None or t.is_contiguous() for t in (x, grad, out)):
        rows, cols, strides = 1, rows * cols, [0, 0, 0]
    launch = _launch(rows, cols, x.element_size(), architecture(x.device))
    grid = -(-rows // launch.blocks["ROWS"]) * -(-cols // launch.blocks["COLS"])
    run(
        activation_kernel,
        (grid,),
        launch,
        x.device,
        x,
        x if bias is None else bias,
        x if grad is None else grad,
        out,
        rows,
        cols,
        *strides,
        *scale_arguments(beta, x.dtype),
        ACT=act,
        ORDER=order,
        SCALED=act == 0 and beta != 1.0,
        HAS_BIAS=bias is not None,
        HAS_GRAD=grad is not None,
    )


def _specialization(
    dtype: torch.dtype,
    act: int,
    order: int,
    *,
    scaled: bool = False,
    bias: bool = False,
    grad: bool = False,
    shape: tuple[int, int] = (1, 1 << 24),
    arch: int,
) -> Specialization:
    pointer = "*" + TRITON_TYPES[dtype]
    signature = dict.fromkeys(("x_ptr", "bias_ptr", "grad_ptr", "out_ptr"), pointer)
    signature |= dict.fromkeys(("rows", "cols", "x_stride", "grad_stride", "out_stride"), "i32")
    wide = "i64" if dtype == torch.float64 else "fp32"
    signature |= {"beta_hi": wide, "beta_lo": "fp32", "beta_inv": wide}
    constants = {"ACT": act, "ORDER": order, "SCALED": scaled, "HAS_BIAS": bias, "HAS_GRAD": grad}
    aligned = frozenset(n for n in signature if n.endswith(("_ptr", "_stride")))
    launch = _launch(*shape, dtype.itemsize, arch)
    return Specialization(activation_kernel, signature, constants, launch, (arch,), aligned)


# The arithmetic, what is loaded, and the tile: code of one does not depend on the others.
INDEPENDENT = (("ACT", "ORDER", "SCALED"), ("HAS_BIAS", "HAS_GRAD"), ("ROWS", "COLS"))


def specializations() -> Iterator[Specialization]:
    """Each activation and order in each dtype, each combination of operands, each tile: all once.

    Not the full product (ten thousand): see ``INDEPENDENT``.
    """
    for arch in ARCHITECTURES:
        make = functools.partial(_specialization, arch=arch)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for order in range(3):
                for act in range(7):
                    yield make(dtype, act, order)
                yield make(dtype, 0, order, scaled=True)
            for bias in (False, True):
                for grad in (False, True):
                    yield make(dtype, 0, 1, bias=bias, grad=grad, shape=(1000, 4096))
            for rows in (16, _SMALL):  # on either side of _SMALL
                for cols in _WIDTHS:
                    yield make(dtype, 0, 0, bias=True, shape=(rows, cols))
