"""The Gram of a Jacobian from its layers' factors, added to out: a tile stays in registers for all of them.

A program owns a tile of out and goes through layers, pairs of positions (t, s) and blocks of o; a pair's sums
over o are multiplied by their scales, gathered by the samples of row and column, and added to the tile's
totals. Out is read and written once, and with `lower` only tiles that meet the lower triangle have a program.
Where layers end is read from the device; factors are not padded for it: only a layer's last block of o needs
a mask, and where all layers begin at multiples of 16 the loads of the others are of 16 bytes.

Count for an MLP in float32 with `lower`: n = 512, C = 10, layers of 512, 512 and 10. 27 GFLOP: 0.45 ms at an
H100's nominal 60 TFLOP/s of IEEE float32, 0.2 ms at a third of TF32's 400. Half of out read and written,
105 MB, both factors, 42 MB, and the scales, 3 MB: 0.05 ms at 3 TB/s. A tile of 64 x 64 takes 512 bytes an o
for 8,192 FLOP: 27 GFLOP are 1.7 GB through L2, 0.3 ms at 5.5 TB/s, under IEEE's products, half above TF32's.
Of torch's products and multiplications a layer's factor Gram of 105 MB would be written and read twice, and
all of out read and written, for each layer: 1.9 GB of memory, 0.6 ms, besides twice the products. A late
convolution (n = 8, C = 10, 16 positions, 512 columns) is 3 tiles of 256 products each: too few programs for
the device.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ARCHITECTURES, TRITON_TYPES, Launch, Specialization, architecture, run
from ._wide import INSTRUCTION

# Square, as the triangle's numbering wants. A thread holds as many totals as sums, 16 each, and the gather of
# scales takes another 50 registers: 168 to 247 as compiled, a program of 8 warps a multiprocessor. By 4 warps
# 64 x 64 spilled in float64 and on sm_80 in tf32x3, and 128 x 128 by 8 or 16 in float32; so did twice the BK
# of tf32x3, whose operands are in registers twice where products take them from there (not on sm_100), and on
# sm_80 of IEEE.
_BLOCKS = {
    "fp64": Launch({"BM": 64, "BN": 64, "BK": 16}, num_warps=8, num_stages=3),
    "ieee": Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),
    "tf32x3": Launch({"BM": 64, "BN": 64, "BK": 16}, num_warps=8, num_stages=3),
}
_LAUNCHES = {(arch, mode): launch for arch in ARCHITECTURES for mode, launch in _BLOCKS.items()}
_LAUNCHES[100, "tf32x3"] = Launch({"BM": 64, "BN": 64, "BK": 32}, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["rows", "columns", "positions_g", "positions_h", "layers"])
def jacobian_gram_kernel(
    out, g, h, scale, bounds, rows, columns, outputs_g, outputs_h, positions_g, positions_h, layers,
    out_row, out_column, g_sample, g_output, g_position, h_sample, h_output, h_position,
    scale_layer, scale_row, scale_column,
    LOWER: tl.constexpr, ALIGNED: tl.constexpr, TF32: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(columns, BN)
    if LOWER:  # square tiles: two rows of the triangle make one of the grid, the long ones first
        odd = tiles & 1
        long = tiles - pid // (tiles + 1 - odd)
        across = pid % (tiles + 1 - odd)
        down = tl.where(across < long, long - 1, tiles - long - odd)
        across = tl.where(across < long, across, across - long)
    else:
        down, across = pid // tiles, pid % tiles
    row = down * BM + tl.arange(0, BM)
    col = across * BN + tl.arange(0, BN)
    # What pads a tile is computed from the last row and column, without masks, and not stored.
    near_row, near_col = tl.minimum(row, rows - 1), tl.minimum(col, columns - 1)
    i, j = (near_row // outputs_g).to(tl.int64), (near_col // outputs_h).to(tl.int64)
    inner = tl.arange(0, BK)
    g_at = g + i * g_sample + (near_row % outputs_g).to(tl.int64) * g_output
    h_at = h + j * h_sample + (near_col % outputs_h).to(tl.int64) * h_output
    work: tl.constexpr = g.dtype.element_ty
    total = tl.zeros([BM, BN], work)
    for layer in range(layers):
        begin, end = tl.load(bounds + layer), tl.load(bounds + layer + 1)
        steps = ((end - begin) // BK).to(tl.int32)
        left = (end - begin) % BK
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        for pair in range(positions_g * positions_h):
            t, s = (pair // positions_h).to(tl.int64), (pair % positions_h).to(tl.int64)
            a_at = (g_at + (t * g_position + begin))[:, None] + inner[None, :]
            b_at = (h_at + (s * h_position + begin))[None, :] + inner[:, None]
            sums = tl.zeros([BM, BN], work)
            for _ in range(steps):
                sums = tl.dot(tl.load(a_at), tl.load(b_at), sums, input_precision=TF32, out_dtype=work)
                a_at += BK
                b_at += BK
            if left > 0:
                a = tl.load(a_at, mask=inner[None, :] < left, other=0.0)
                b = tl.load(b_at, mask=inner[:, None] < left, other=0.0)
                sums = tl.dot(a, b, sums, input_precision=TF32, out_dtype=work)
            scales = scale + ((i * positions_g + t) * scale_row)[:, None]
            total += sums * tl.load(scales + ((j * positions_h + s) * scale_column)[None, :])
        scale += scale_layer
    inside = (row[:, None] < rows) & (col[None, :] < columns)
    if LOWER:
        inside &= row[:, None] >= col[None, :]
    out_at = out + row[:, None].to(tl.int64) * out_row + col[None, :].to(tl.int64) * out_column
    tl.store(out_at, tl.load(out_at, mask=inside, other=0.0) + total, mask=inside)


@functools.lru_cache(maxsize=64)
def _bounds(ends: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *ends), dtype=torch.int64, device=device)


def jacobian_gram(
    out: Tensor, g: Tensor, h: Tensor, scale: Tensor, ends: tuple[int, ...], lower: bool, precision: str
) -> None:
    """g (n, C, T, R), h (n2, C2, T2, R) with o of unit stride; out and scale of any; sizes >= 1."""
    mode = "fp64" if out.dtype == torch.float64 else "ieee" if precision == "ieee" else "tf32x3"
    launch = _LAUNCHES[architecture(out.device), mode]
    down, across = (triton.cdiv(size, launch.blocks[b]) for size, b in zip(out.shape, ("BM", "BN")))
    run(
        jacobian_gram_kernel,
        (down * (down + 1) // 2 if lower else down * across,),
        launch,
        out.device,
        *(out, g, h, scale, _bounds(ends, out.device), *out.shape, g.shape[1], h.shape[1]),
        *(g.shape[2], h.shape[2], len(ends)),
        *(*out.stride(), *g.stride()[:3], *h.stride()[:3], *scale.stride()),
        LOWER=lower,
        ALIGNED=all(end % 16 == 0 for end in ends[:-1]),
        TF32="tf32x3" if mode == "tf32x3" else "ieee",
    )


def specializations() -> Iterator[Specialization]:
    """Every compilation that :func:`jacobian_gram` can ask for."""
    integers = ("rows", "columns", "outputs_g", "outputs_h", "positions_g", "positions_h", "layers")
    strides = ("out_row", "g_sample", "g_output", "g_position", "h_sample", "h_output", "h_position")
    scales = ("scale_layer", "scale_row", "scale_column")
    for (arch, mode), launch in _LAUNCHES.items():
        pointer = "*" + TRITON_TYPES[torch.float64 if mode == "fp64" else torch.float32]
        for lower in (False, True):
            # factors whose rows begin where loads of 16 bytes may, or somewhere; rows of out of unit stride
            for aligned in (True, False):
                yield Specialization(
                    jacobian_gram_kernel,
                    dict.fromkeys(("out", "g", "h", "scale"), pointer)
                    | {"bounds": "*i64"}
                    | dict.fromkeys((*integers, *strides, *scales, "out_column"), "i32"),
                    {"LOWER": lower, "ALIGNED": aligned, "TF32": "tf32x3" if mode == "tf32x3" else "ieee"},
                    launch,
                    (arch,),
                    frozenset(("out", "g", "h", "scale", "bounds", *(strides if aligned else ()))),
                    {k: v for k, v in INSTRUCTION.get(mode, {}).items() if k == arch},
                )
