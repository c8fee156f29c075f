"""out = (grad *) act^(order)(x + bias) over rows of unit column stride, the op `activation`."""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ARCHITECTURES, TRITON_TYPES, Launch, Specialization, architecture, run
from .activations import activate, scale, scale_arguments

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# One compilation serves every size and beta, with bias and gradient or without.
@triton.jit(
    do_not_specialize=["rows", "rest", "cols", "has_bias", "has_grad", "beta_hi", "beta_lo", "beta_inv"]
)
def activation_kernel(
    x_ptr,
    bias_ptr,
    grad_ptr,
    out_ptr,
    rows,
    rest,
    cols,
    x_stride,
    grad_stride,
    out_stride,
    has_bias,
    has_grad,
    beta_hi,
    beta_lo,
    beta_inv,
    ACT: tl.constexpr,
    ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`rows` rows of `cols` elements, then one of `rest`, 0 unless cols == COLS; column blocks fastest.

    An element is read before it is written, by the same thread: out may be x or grad.
    """
    col_blocks = (cols + COLS - 1) // COLS
    block = tl.program_id(0)
    first_row = (block // col_blocks).to(tl.int64) * ROWS
    first_col = (block % col_blocks).to(tl.int64) * COLS
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    # What is left from here on, at most a tile of it.
    rows = tl.minimum(rows - first_row, ROWS).to(tl.int32)
    cols = tl.minimum(cols - first_col, COLS).to(tl.int32)
    mask = (row < rows) & (col < cols) | (row == rows) & (col < rest)
    # A mask forbids vector loads unless its ends are known to be multiples of 16: whole tiles go without.
    whole = (rows == ROWS) & (cols == COLS)
    x_ptr += first_row * x_stride + first_col
    bias_ptr += first_col
    grad_ptr += first_row * grad_stride + first_col
    out_ptr += first_row * out_stride + first_col
    row = row.to(tl.int64)
    precision: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = _load(x_ptr + (row * x_stride + col), mask, whole).to(precision)
    if has_bias:
        x += _load(bias_ptr + col, col < cols, whole).to(precision)
    hi, lo, inv = scale(beta_hi, beta_lo, beta_inv, precision)
    y = activate(x, hi, lo, inv, ACT, ORDER, SCALED)
    if has_grad:
        y *= _load(grad_ptr + (row * grad_stride + col), mask, whole).to(precision)
    y = y.to(out_ptr.dtype.element_ty)
    out_at = out_ptr + (row * out_stride + col)
    if whole:
        tl.store(out_at, y)
    else:
        tl.store(out_at, y, mask=mask)


@triton.jit
def _load(at, mask, whole):
    if whole:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=mask, other=0.0)
    return value


# A program of 4 warps takes rows of 64 columns: wide enough for whole cache lines of every dtype, narrow
# enough that a matrix of few columns wastes little; a contiguous tensor without bias is cut into such rows.
# Rows a program by architecture and bytes an element: a thread holds 16 or 32 bytes of an operand and, at up
# to 71 registers, 900 threads and more are resident, enough for the 16 KB a multiprocessor that 3 TB/s times
# 0.7 us ask for on an H100. At 8 TB/s (sm_100) all but fp64 take twice as many (up to 96 registers; gelu' of
# 8 fp32 elements spilled there). More than 4 fp64 elements a thread spill. Below 2^17 elements there are
# fewer programs than multiprocessors, but there a launch takes longer than its work.
#
# What is free meanwhile: an H100 (132 multiprocessors at 1.7 GHz, 128 lanes, 64 of them fp64) issues 76
# instructions an fp32 element (8 bytes), 38 a bf16 one, and in fp64 153 of which 76 fp64. Counted in the
# machine code for sm_90, of the function with its load and store, for orders 0, 1 and 2, fp64 instructions in
# brackets; the tile adds 10 (fp64: 20 to 30) instructions an element. None was timed.
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
# So all of fp32 and fp64 hides behind memory there. In bf16 and fp16 only relu does: softplus takes 1.1 times
# as long as its bytes, gelu 1.6 times, the second derivative of gelu_tanh twice. On sm_100 (36 instructions
# an fp32 element at 8 TB/s) arithmetic is the limit of all but relu.
_COLUMNS = 64
_ROWS = {
    80: {2: 16, 4: 16, 8: 8},
    90: {2: 16, 4: 16, 8: 8},
    100: {2: 32, 4: 32, 8: 8},
}


def _launch(arch: int, dtype: torch.dtype) -> Launch:
    return Launch({"ROWS": _ROWS[arch][dtype.itemsize], "COLS": _COLUMNS}, num_warps=4)


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
    launch = _launch(architecture(x.device), x.dtype)
    x_stride, grad_stride, out_stride = (0 if t is None else t.stride(0) for t in (x, grad, out))
    rest = 0
    if bias is None and all(t is None or t.is_contiguous() for t in (x, grad, out)):
        rows, rest = divmod(rows * cols, _COLUMNS)
        cols = x_stride = grad_stride = out_stride = _COLUMNS
    grid = triton.cdiv(rows + (rest > 0), launch.blocks["ROWS"]) * triton.cdiv(cols, _COLUMNS)
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
        rest,
        cols,
        x_stride,
        grad_stride,
        out_stride,
        int(bias is not None),
        int(grad is not None),
        *scale_arguments(beta, x.dtype),
        ACT=act,
        ORDER=order,
        SCALED=act == 0 and beta != 1.0,
    )


def specializations() -> Iterator[Specialization]:
    """Each activation, order and dtype for each architecture, softplus with and without beta."""
    integers = ("rows", "rest", "cols", "x_stride", "grad_stride", "out_stride", "has_bias", "has_grad")
    for arch, dtype, order in itertools.product(ARCHITECTURES, _DTYPES, range(3)):
        pointers = dict.fromkeys(("x_ptr", "bias_ptr", "grad_ptr", "out_ptr"), "*" + TRITON_TYPES[dtype])
        wide = "i64" if dtype == torch.float64 else "fp32"
        scalars = {"beta_hi": wide, "beta_lo": "fp32", "beta_inv": wide}
        for act, scaled in ((0, True), *((act, False) for act in range(7))):
            yield Specialization(
                activation_kernel,
                {**pointers, **dict.fromkeys(integers, "i32"), **scalars},
                {"ACT": act, "ORDER": order, "SCALED": scaled},
                _launch(arch, dtype),
                (arch,),
                frozenset((*pointers, "x_stride", "grad_stride", "out_stride")),
            )
