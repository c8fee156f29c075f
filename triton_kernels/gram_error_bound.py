"""Products with |A| in float64: |A| right and left |A| in one reading, and |H| (|H|^T 1) in two.

A program owns a strip of rows and a block of columns: it adds |a| left into a tile in registers, summed over
the rows once at the end, and writes each row's share of |A| right as it goes. The shares of strips and blocks
are summed by a second, small reduction, in a fixed order.

Count, for n x m elements of s bytes: n m s read, 8 n m / BLOCK_M and 8 n m / (rows of a strip) of shares
written and read again (2 to 5 % together in long strips). |H| (|H|^T 1) reads H twice: 50,000 x 1,024 in
float64 is 0.27 ms at 3 TB/s. Column panels of 25 MB would find the second reading in L2, but they last 8
microseconds each, less than their three launches; instead the second pass runs from the end, where as much
as L2 holds is still there. The arithmetic is two float64 multiply-adds an element and a conversion, less than
the bytes take where float64 runs at half of float32's rate; on devices with 1/64 of it, it is what limits.
What only a GPU shows: coalescing, the order that reductions take there, and 16-bit loads in their own type.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcfast.triton_kernels._launch import (
    ARCHITECTURES,
    TRITON_TYPES,
    Launch,
    Specialization,
    architecture,
    multiprocessors,
    run,
)

# 8 elements a thread: 8 to 2 KB in flight a program (float64 to half) and its tile of column sums in 16
# registers of 40 to 96, so that five to ten programs fit a multiprocessor: 10 to 80 KB in flight, where
# 3 TB/s over 132 of them at 600 ns need 14. The widths keep the shares of the row sums at 0.8 % of the bytes,
# written, and read once. Registers are those compiled: none of these tiles spills, some wider ones do.
# Nothing was measured yet that would let the architectures differ.
_BLOCKS = {
    torch.float64: Launch({"BLOCK_N": 8, "BLOCK_M": 128}, num_warps=4),
    torch.float32: Launch({"BLOCK_N": 4, "BLOCK_M": 256}, num_warps=4),
    torch.bfloat16: Launch({"BLOCK_N": 2, "BLOCK_M": 512}, num_warps=4),
    torch.float16: Launch({"BLOCK_N": 2, "BLOCK_M": 512}, num_warps=4),
}
_LAUNCHES = {(arch, dtype): launch for arch in ARCHITECTURES for dtype, launch in _BLOCKS.items()}
_PROGRAMS = 16  # a multiprocessor, at least, before strips grow longer: two rounds or three of what fits
_STRIP = 256  # rows, at most: the shares of the column sums are 0.4 to 1.6 % of the bytes then, likewise


@triton.jit(do_not_specialize=["n", "steps", "column_stride"])
def abs_products_kernel(  # type: ignore[no-untyped-def]
    a,
    left,  # None: ones
    right,  # None: ones
    row_parts,  # (column blocks, n), None: not wanted
    column_parts,  # (strips, m), None: not wanted
    n,
    m,
    steps,
    row_stride,
    column_stride,
    CONTIGUOUS: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    blocks = tl.cdiv(m, BLOCK_M)
    strip, block = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64)
    columns = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column_offsets = columns if CONTIGUOUS else columns * column_stride
    if right is not None:
        right_weights = tl.load(right + columns, mask=columns < m, other=0.0)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    for step in range(steps):
        rows = (strip * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        tile = tl.load(a + rows[:, None] * row_stride + column_offsets[None, :], mask=inside, other=0.0)
        if tile.dtype.primitive_bitwidth == 16:
            tile = tile.to(tl.float32)  # exact, and the interpreter knows no arithmetic in bfloat16
        tile = tl.abs(tile.to(tl.float64))
        if row_parts is not None:
            weighted = tile * right_weights[None, :] if right is not None else tile
            tl.store(row_parts + block * n + rows, tl.sum(weighted, 1), mask=rows < n)
        if column_parts is not None:
            if left is not None:
                left_weights = tl.load(left + rows, mask=rows < n, other=0.0)
                sums += tile * left_weights[:, None]
            else:
                sums += tile
    if column_parts is not None:
        tl.store(column_parts + strip * m + columns, tl.sum(sums, 0), mask=columns < m)


def _pass(
    a: Tensor, left: Tensor | None, right: Tensor | None, rows: bool, columns: bool, backwards: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """One reading of `a`, whose smaller stride is the columns'."""
    n, m = a.shape
    launch = _LAUNCHES[architecture(a.device), a.dtype]
    height, width = launch.blocks["BLOCK_N"], launch.blocks["BLOCK_M"]
    blocks = triton.cdiv(m, width)
    wanted = triton.cdiv(_PROGRAMS * multiprocessors(a.device), blocks)  # strips
    steps = max(1, min(_STRIP // height, n // (height * wanted)))
    strips = triton.cdiv(n, height * steps)
    row_parts = torch.empty((blocks, n), dtype=torch.float64, device=a.device) if rows else None
    column_parts = torch.empty((strips, m), dtype=torch.float64, device=a.device) if columns else None
    run(
        abs_products_kernel,
        (strips * blocks,),
        launch,
        a.device,
        *(a, left, right, row_parts, column_parts, n, m, steps, a.stride(0), a.stride(1)),
        CONTIGUOUS=a.stride(1) == 1,
        REVERSED=backwards,
    )
    # torch's sum along a dimension has a fixed order too
    return (
        None if row_parts is None else row_parts.sum(0),
        None if column_parts is None else column_parts.sum(0),
    )


def abs_products(a: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """(|a| right, left |a|); a (n, m) of any strides, n and m >= 1, the weights contiguous."""
    if a.stride(0) < a.stride(1):
        columns, rows = _pass(a.mT, right, left, True, True)
    else:
        rows, columns = _pass(a, left, right, True, True)
    assert rows is not None and columns is not None
    return rows, columns


def gram_error_bound(h: Tensor) -> Tensor:
    """|h| (|h|^T 1); h (n, m) of any strides, n and m >= 1."""
    if h.stride(0) < h.stride(1):
        sums, _ = _pass(h.mT, None, None, True, False)
        _, out = _pass(h.mT, sums, None, False, True, backwards=True)
    else:
        _, sums = _pass(h, None, None, False, True)
        out, _ = _pass(h, None, sums, True, False, backwards=True)
    assert out is not None
    return out


def specializations() -> Iterator[Specialization]:
    """Every compilation that :func:`abs_products` and :func:`gram_error_bound` can ask for."""
    absent = dict.fromkeys(("left", "right", "row_parts", "column_parts"))
    uses = [  # the arguments that are there, and whether it runs backwards
        (("row_parts", "column_parts"), False),
        (("left", "row_parts", "column_parts"), False),
        (("right", "row_parts", "column_parts"), False),
        (("left", "right", "row_parts", "column_parts"), False),
        (("row_parts",), False),
        (("column_parts",), False),
        (("left", "column_parts"), True),
        (("right", "row_parts"), True),
    ]
    for (arch, dtype), launch in _LAUNCHES.items():
        for given, backwards in uses:
            # rows of unit stride, aligned or not (16 divides the sizes: loads of 16 bytes), and any strides
            for contiguous, aligned in ((True, True), (True, False), (False, False)):
                signature = {"a": "*" + TRITON_TYPES[dtype]} | dict.fromkeys(given, "*fp64")
                sizes = ("n", "m", "steps", "row_stride", "column_stride")
                yield Specialization(
                    kernel=abs_products_kernel,
                    signature=signature | dict.fromkeys(sizes, "i32"),
                    constants={k: v for k, v in absent.items() if k not in given}
                    | {"CONTIGUOUS": contiguous, "REVERSED": backwards},
                    launch=launch,
                    architectures=(arch,),
                    divisible=frozenset({"a", *given} | ({"m", "row_stride"} if aligned else set())),
                )
