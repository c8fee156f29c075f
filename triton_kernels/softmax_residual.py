"""Cross-entropy with its residual and conjugate term, and the curvature product, a row of logits at a time.

The numbers are formed as in csrc/cpu/softmax_residual.cpp: with k the first maximum and a_c = f_c - f_k, the
sums run over c != k, have terms of one sign, and go through log1p; 1 - p_k and p_k - 1 are never formed.
float16 and bfloat16 are computed in float32 and rounded once, at the store.

Bytes. Up to 1,024 columns a row lives in registers: logits are read once, the residual is written once, which
is the least there is. Longer rows are read in chunks, twice (the curvature product: logits three times, v
twice). The later reads hit L2 while the rows in work fit there. By registers that is 2 programs a
multiprocessor for the residual and 4 for the curvature product; with an H100's 132 of them and 50 MB up to
about 47,000 and 12,000 columns of float32, twice that for bfloat16. Beyond, the later reads come from memory:
3/2 of the least bytes for the residual with labels, 2 times the least for the curvature product.

Arithmetic. About 50 instructions an element (exp is half of it), and a tile is padded to a power of two.
By nominal figures copy bandwidth leaves an H100 about 70 for an element of float32, half as many for
bfloat16: float32 waits for memory, float16 and bfloat16 for the arithmetic. None of this has been timed.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import ARCHITECTURES, TRITON_TYPES, Launch, Specialization, architecture, run
from ._math import at_least, divide, exp_nonpositive, log1p_any, two_sum


@triton.jit
def _load(pointers, live, other):
    """In the dtype of the arithmetic: float64, else float32 (exact)."""
    x = tl.load(pointers, mask=live, other=other)
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _finite(a):
    """f - max where it multiplies exp(f - max), which is 0 there: 0 * inf must be 0."""
    return at_least(a, -1e4)


@triton.jit
def _exp_terms(f, top, at_top):
    """exp(f - top), 0 at its first maximum, and f - top: an ulp lost there would be |f - top| ulps in exp."""
    hi, lo = two_sum(f, -top)
    return tl.where(at_top, 0.0, exp_nonpositive(hi, lo)), hi


@triton.jit
def _label(target, row, live, c):
    """The label (0 where it is not in [0, c), so that it can be read through), and NaN there, else 0."""
    label = tl.load(target + row, mask=live, other=0)
    inside = (label >= 0) & (label < c)
    return tl.where(inside, label, 0).to(tl.int32), tl.where(inside, 0.0, float("nan"))


@triton.jit
def _tile(n, c, unit, NARROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of a program's tile, the offsets of the columns, and the axis that they lie on.

    Wide: rows along axis 0, lanes along the columns. Narrow: the tile is transposed and its columns are
    multiplied by `unit`, a 1 that the compiler cannot see through, so that it puts the lanes along the rows:
    a thread holds up to 16 elements of one row, sums almost without shuffles, and does the row's own
    arithmetic once, not in every lane.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    if NARROW:
        row = first + tl.arange(0, ROWS)[None, :]
        col = tl.arange(0, COLS)[:, None]
        return row, col, col * unit, row < n, (row < n) & (col < c)
    else:
        row = first + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, COLS)[None, :]
        return row, col, col, row < n, (row < n) & (col < c)


@triton.jit(do_not_specialize=["unit"])
def softmax_residual_rows_kernel(
    logits, target, loss, residual, neg_entropy, n, c, logits_stride, target_stride, unit,
    keep: tl.float64, spread: tl.float64, rest: tl.float64,
    SOFT: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of at most COLS columns."""
    AXIS: tl.constexpr = 0 if NARROW else 1
    row, col, offset, row_live, live = _tile(n, c, unit, NARROW, ROWS, COLS)
    f = _load(logits + row * logits_stride + offset, live, -float("inf"))
    # q = keep * y + spread and 1 - q = keep * (1 - y) + rest, rounded to the arithmetic's dtype
    keep = tl.full([1, 1], keep, f.dtype)
    spread = tl.full([1, 1], spread, f.dtype)
    rest = tl.full([1, 1], rest, f.dtype)

    top, k = tl.max(f, AXIS, return_indices=True, keep_dims=True)
    at_top = col == k
    e, a = _exp_terms(f, top, at_top)
    s = tl.sum(e, AXIS, keep_dims=True)
    weighted = tl.sum(e * _finite(a), AXIS, keep_dims=True)
    poison = top - top  # NaN when the maximum is infinite
    if SOFT:
        y = _load(target + row * target_stride + offset, live, 0.0)
        q = keep * y + spread
        scale = tl.sum(tl.where(live, q, 0.0), AXIS, keep_dims=True)
        data = tl.sum(tl.where(live & (q != 0.0), q * a, 0.0), AXIS, keep_dims=True)
        other = keep * (1.0 - y) + rest
    else:
        label, bad = _label(target, row, row_live, c)
        poison += bad
        at_label = col == label
        q = tl.where(at_label, keep + spread, spread)
        scale = 1.0
        data = _load(logits + row * logits_stride + label, row_live, 0.0) - top
        every = tl.sum(tl.where(live, a, 0.0), AXIS, keep_dims=True)
        data = tl.where(spread == 0.0, data, keep * data + spread * every)
        other = tl.where(at_label, rest, keep + rest)
    log_sum = log1p_any(s) + poison
    inverse = divide(1.0, 1.0 + s + poison)
    out = tl.where(at_top, other - s * inverse, e * inverse - q)
    tl.store(residual + row * c + col, out, mask=live)
    tl.store(loss + row, scale * log_sum - data, mask=row_live)
    tl.store(neg_entropy + row, weighted * inverse - log_sum, mask=row_live)


@triton.jit(do_not_specialize=["unit"])
def softmax_curvature_rows_kernel(
    logits, v, out, n, c, logits_stride, v_stride, unit,
    NARROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of at most COLS columns."""
    AXIS: tl.constexpr = 0 if NARROW else 1
    row, col, offset, _row_live, live = _tile(n, c, unit, NARROW, ROWS, COLS)
    f = _load(logits + row * logits_stride + offset, live, -float("inf"))
    w = _load(v + row * v_stride + offset, live, 0.0)
    top, k = tl.max(f, AXIS, return_indices=True, keep_dims=True)
    at_top = col == k
    e, _a = _exp_terms(f, top, at_top)
    w -= tl.sum(tl.where(at_top, w, 0.0), AXIS, keep_dims=True)
    inverse = divide(1.0, 1.0 + tl.sum(e, AXIS, keep_dims=True) + (top - top))
    mu = tl.sum(tl.where(live, e * w, 0.0), AXIS, keep_dims=True) * inverse
    p = tl.where(at_top, inverse, e * inverse)
    tl.store(out + row * c + col, p * (w - mu), mask=live)


@triton.jit
def _scan(logits, c, BLOCK: tl.constexpr):
    """Of one row in chunks: the maximum, its first index, and the sum of exp(f - max) over the others.

    Each chunk's sum is relative to the chunk's own maximum; the smaller of two maxima then joins the sum of
    the larger as an ordinary term. The running sum is in float64: rescaling costs a float32 nothing.
    """
    zero = _load(logits, False, 0.0)
    top = zero - float("inf")
    k = tl.full([], 0, tl.int32)
    s = tl.full([], 0.0, tl.float64)
    for start in range(0, c, BLOCK):
        col = start + tl.arange(0, BLOCK)
        f = _load(logits + col, col < c, -float("inf"))
        chunk_top, at = tl.max(f, 0, return_indices=True)
        base = tl.where(chunk_top == -float("inf"), 0.0, chunk_top)  # a chunk of nothing but -inf adds 0
        e, _a = _exp_terms(f, base, col == start + at)
        part = tl.sum(e, 0).to(tl.float64)
        more = chunk_top > top
        low = tl.where(more, top, chunk_top).to(tl.float64)
        high = tl.where(more, chunk_top, top).to(tl.float64)
        hi, lo = two_sum(low, -high)
        scale = tl.where(low == -float("inf"), 0.0, exp_nonpositive(hi, lo))
        s = tl.where(more, part + (s + 1.0) * scale, s + (part + 1.0) * scale)
        k = tl.where(more, (start + at).to(tl.int32), k)
        top = tl.where(more, chunk_top, top)
    return top, k, s.to(zero.dtype)


@triton.jit
def softmax_residual_long_kernel(
    logits, target, loss, residual, neg_entropy, c, logits_stride, target_stride,
    keep: tl.float64, spread: tl.float64, rest: tl.float64,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of any length: the maximum and the sum first, then everything else."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    residual += row * c
    top, k, s = _scan(logits, c, BLOCK)
    keep = tl.full([], keep, top.dtype)
    spread = tl.full([], spread, top.dtype)
    rest = tl.full([], rest, top.dtype)
    poison = top - top
    if SOFT:
        target += row * target_stride
    else:
        label, bad = _label(target, row, True, c)
        poison += bad
        at_label = _load(logits + label, True, 0.0) - top
    log_sum = log1p_any(s) + poison
    inverse = divide(1.0, 1.0 + s + poison)
    at_k = s * inverse

    # A sum for each lane, so that no chunk waits for a reduction.
    weighted = tl.zeros([BLOCK], top.dtype)
    scale = tl.zeros([BLOCK], top.dtype)
    data = tl.zeros([BLOCK], top.dtype)
    for start in range(0, c, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = col < c
        e, a = _exp_terms(_load(logits + col, live, -float("inf")), top, col == k)
        weighted += e * _finite(a)
        if SOFT:
            y = _load(target + col, live, 0.0)
            q = keep * y + spread
            scale += tl.where(live, q, 0.0)
            data += tl.where(live & (q != 0.0), q * a, 0.0)
            other = keep * (1.0 - y) + rest
        else:
            q = tl.where(col == label, keep + spread, spread)
            data += tl.where(live, a, 0.0)
            other = tl.where(col == label, rest, keep + rest)
        tl.store(residual + col, tl.where(col == k, other - at_k, e * inverse - q), mask=live)
    if SOFT:
        value = tl.sum(scale, 0) * log_sum - tl.sum(data, 0)
    else:
        mixed = keep * at_label + spread * tl.sum(data, 0)
        value = log_sum - tl.where(spread == 0.0, at_label, mixed)
    tl.store(loss + row, value)
    tl.store(neg_entropy + row, tl.sum(weighted, 0) * inverse - log_sum)


@triton.jit
def softmax_curvature_long_kernel(logits, v, out, c, logits_stride, v_stride, BLOCK: tl.constexpr):
    """One row of any length. mu takes a pass of its own: its terms are differences to v at the maximum."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    v += row * v_stride
    out += row * c
    top, k, s = _scan(logits, c, BLOCK)
    inverse = divide(1.0, 1.0 + s + (top - top))
    at_top = _load(v + k, True, 0.0)
    total = tl.zeros([BLOCK], top.dtype)
    for start in range(0, c, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = col < c
        e, _a = _exp_terms(_load(logits + col, live, -float("inf")), top, col == k)
        total += tl.where(live, e * (_load(v + col, live, 0.0) - at_top), 0.0)
    mu = tl.sum(total, 0) * inverse
    for start in range(0, c, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = col < c
        e, _a = _exp_terms(_load(logits + col, live, -float("inf")), top, col == k)
        p = tl.where(col == k, inverse, e * inverse)
        tl.store(out + col, p * ((_load(v + col, live, 0.0) - at_top) - mu), mask=live)


# Widths of a tile. Up to 16 columns a thread holds a row, up to 32 half of one: 16 elements, or 8 of float64,
# half as much of a row (Triton 3.6 spills 16). Wider tiles are
# for one warp (no barriers): 16 elements of float32 or 8 of float64 a thread, twice that at 1,024 columns. A
# row's own arithmetic (a logarithm, two divisions) falls on every lane of a wide tile: fewer elements a lane
# would cost more of it, more would cost registers. The register file (64 Ki a multiprocessor) is the same on
# all three architectures: one set of rows.
_NARROW = (16, 32)
_COLS = (*_NARROW, 64, 128, 256, 512, 1024)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _rows_launch(cols: int, dtype: torch.dtype) -> Launch:
    double = dtype == torch.float64
    if cols in _NARROW:
        return Launch({"ROWS": (1024 if double else 2048) // cols, "COLS": cols}, num_warps=4)
    rows = max(1, (256 if double else 512) // cols)
    return Launch({"ROWS": rows, "COLS": cols}, num_warps=2 if double and cols == 1024 else 1)


def _long_launch(dtype: torch.dtype) -> Launch:
    """16 warps: few programs, so that the rows in work fit in L2. 4 elements a thread and chunk: 8 spill.

    float64 takes 2, which are as many bytes as 4 of float32: on sm_80 4 of them spill.
    """
    return Launch({"BLOCK": 1024 if dtype == torch.float64 else 2048}, num_warps=16)


# By architecture, dtype and width of the tile (0: long rows).
_LAUNCHES = {
    (arch, dtype, cols): _rows_launch(cols, dtype) if cols else _long_launch(dtype)
    for arch in ARCHITECTURES
    for dtype in _DTYPES
    for cols in (*_COLS, 0)
}


def _pick(device: torch.device, dtype: torch.dtype, c: int) -> tuple[Launch, int, bool]:
    """The configuration for rows of c, the rows of a program (0: a long row), and whether it is narrow."""
    if c >= 2**31:  # columns are counted in 32 bits; rows and addresses in 64
        raise ValueError(f"logits must have less than 2^31 columns on the triton backend; got {c}")
    cols = next((width for width in _COLS if c <= width), 0)
    launch = _LAUNCHES[architecture(device), dtype, cols]
    return launch, launch.blocks.get("ROWS", 0), cols in _NARROW


def softmax_residual(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float,
    loss: torch.Tensor,
    residual: torch.Tensor,
    neg_entropy: torch.Tensor,
) -> None:
    """Into the last three, contiguous. logits and soft targets: unit column stride; labels contiguous."""
    (n, c), device = logits.shape, logits.device
    soft = target.is_floating_point()
    strides = (logits.stride(0), target.stride(0) if soft else 0)
    eps = label_smoothing
    smoothing = (1.0 - eps, eps / c, eps * (c - 1) / c)
    tensors = (logits, target, loss, residual, neg_entropy)
    launch, rows, narrow = _pick(device, logits.dtype, c)
    if rows:
        grid, kernel = (triton.cdiv(n, rows),), softmax_residual_rows_kernel
        run(kernel, grid, launch, device, *tensors, n, c, *strides, 1, *smoothing, SOFT=soft, NARROW=narrow)
    else:
        kernel = softmax_residual_long_kernel
        run(kernel, (n,), launch, device, *tensors, c, *strides, *smoothing, SOFT=soft)


def softmax_curvature(logits: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Into out, contiguous. logits and v: unit column stride."""
    (n, c), device = logits.shape, logits.device
    strides = (logits.stride(0), v.stride(0))
    launch, rows, narrow = _pick(device, logits.dtype, c)
    if rows:
        grid, kernel = (triton.cdiv(n, rows),), softmax_curvature_rows_kernel
        run(kernel, grid, launch, device, logits, v, out, n, c, *strides, 1, NARROW=narrow)
    else:
        run(softmax_curvature_long_kernel, (n,), launch, device, logits, v, out, c, *strides)


def specializations() -> list[Specialization]:
    """Every kernel, dtype, kind of target and width: 96. Integers come as for dense rows.

    Widths of 128 and more are listed for a number of columns divisible by 16, where loads are 16 bytes wide
    (8 for long rows of halves). Triton also compiles the variant for other numbers, with a load for each
    element, when it meets one.
    """
    listed = []
    for dtype in _DTYPES:
        element = "*" + TRITON_TYPES[dtype]
        for cols in (*_COLS, 0):
            launch, long = _LAUNCHES[80, dtype, cols], cols == 0
            counts = {"c": "i32"} if long else {"n": "i32", "c": "i32"}
            unit: dict[str, str] = {} if long else {"unit": "i32"}
            narrow: dict[str, bool] = {} if long else {"NARROW": cols in _NARROW}
            wide = {"c"} if long or cols >= 128 else set()
            kernel = softmax_residual_long_kernel if long else softmax_residual_rows_kernel
            outputs = dict.fromkeys(("loss", "residual", "neg_entropy"), element)
            for soft in (False, True):
                pointers = {"logits": element, "target": element if soft else "*i64", **outputs}
                strides = {"logits_stride": "i32", "target_stride": "i32"}
                signature = (
                    pointers | counts | strides | unit | dict.fromkeys(("keep", "spread", "rest"), "fp64")
                )
                divisible = frozenset(pointers) | (wide | set(strides) if wide else set())
                constants = {"SOFT": soft, **narrow}
                listed.append(Specialization(kernel, signature, constants, launch, divisible=divisible))
            kernel = softmax_curvature_long_kernel if long else softmax_curvature_rows_kernel
            pointers = dict.fromkeys(("logits", "v", "out"), element)
            strides = {"logits_stride": "i32", "v_stride": "i32"}
            divisible = frozenset(pointers) | (wide | set(strides) if wide else set())
            signature = pointers | counts | strides | unit
            listed.append(Specialization(kernel, signature, narrow, launch, divisible=divisible))
    return listed
