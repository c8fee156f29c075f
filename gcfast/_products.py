"""Matrix products with proved error bounds, the one thing that gcfast's proofs trust.

|fl(A B) - A B| <= gamma_k |A| |B| for every order of summation, with or without FMA; k the inner length
(Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.5). Products here are cut into
slices of length ``Tiling.inner``, each rounded by itself and then added: gamma_(inner + slices), not gamma_k.
An underflow costs at most the least normal number, times an operand where denormal inputs are flushed too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfast import ops

PANEL = 1024  # columns of H1 in flight
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
TINY = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126}  # flush-to-zero allowed for


class Tiling(NamedTuple):
    """Tiles of ``rows`` x ``block``, summed over slices of length ``inner``, which divides ``block``."""

    rows: int
    block: int
    inner: int

    def slices(self, k: int) -> int:
        return -(-k // self.inner)

    def gamma(self, k: int, dtype: torch.dtype = torch.float64) -> float:
        """Of a product of inner length k added up by slices, with two roundings to spare."""
        return gamma(min(k, self.inner) + self.slices(k) + 2, dtype)

    def lower(self, n: int) -> Iterator[tuple[int, int, int, int]]:
        """(i0, i1, j0, j1) of the tiles on and below the diagonal, by columns, the diagonal one first."""
        for j0 in range(0, n, self.block):
            j1 = min(j0 + self.block, n)
            yield j0, j1, j0, j1
            for i0 in range(j1, n, self.rows):
                yield i0, min(i0 + self.rows, n), j0, j1

    def scratch(self, like: Tensor) -> Tensor:
        return torch.empty(self.rows * self.block, dtype=like.dtype, device=like.device)


def tiling(device: torch.device) -> Tiling:
    """On a CPU a tile and its scratch stay in cache, so that adding slices costs a few per cent."""
    return Tiling(1024, 256, 128) if device.type == "cpu" else Tiling(4096, 2048, 512)


def _up(x: float, terms: int = 8) -> float:
    """x enlarged by ``terms`` roundings of non-negative float64 numbers and a few more, upward.

    It covers ``ops.abs_products`` and ``ops.gram_error_bound`` of an n x m matrix with ``terms`` = n + m.
    """
    return float(x) * (1.0 + 4.0 * (terms + 8) * UNIT[torch.float64])


def gamma(k: int, dtype: torch.dtype = torch.float64) -> float:
    """gamma_k = k u / (1 - k u), rounded up; inf where k u >= 1/2 (the bound is of no use there)."""
    ku = k * UNIT[dtype]
    return math.inf if ku >= 0.5 else _up(ku / (1.0 - ku))


def _precision_switches() -> list[Any]:
    """Torch's settings that let a float32 product use TF32 or bf16, as objects with ``fp32_precision``."""
    paths = (
        torch.backends,
        getattr(torch.backends.cuda, "matmul", None),
        getattr(getattr(torch.backends, "mkldnn", None), "matmul", None),
    )
    return [p for p in paths if p is not None and hasattr(p, "fp32_precision")]


@contextmanager
def exact_products() -> Iterator[None]:
    """Products by the plain IEEE rules the bounds assume: no TF32, no bf16, no autocast, for the block."""
    switches = [(s, s.fp32_precision) for s in _precision_switches()]
    try:
        for switch, _ in switches:
            switch.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, before in switches:
            switch.fp32_precision = before


def check_products(device: torch.device) -> None:
    """Raise RuntimeError where products are seen to break the bounds: TF32, bf16 or emulation left on.

    Positive entries, so that a shorter mantissa shows; integers for float64, where the product is exact.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(1 << 21, 1 << 22, (2, 128, 128), generator=generator)
    exact = whole[0].to(device).double() @ whole[1].to(device).double()
    a, b = (1 + torch.rand((2, 256, 256), generator=generator)).to(device)
    error = ((a @ b).double() - a.double() @ b.double()).abs() / (a.double() @ b.double())
    # int64 products wrap for nothing here: 2^44 * 128 = 2^51
    if not torch.equal(exact.cpu().long(), whole[0] @ whole[1]) or float(error.amax()) > 256 * 2.0**-24:
        raise RuntimeError(
            f"matrix products on {device} are less exact than IEEE arithmetic (TF32, bf16 or emulated "
            "float64 is on), so nothing can be proved with them: switch that off "
            "(torch.set_float32_matmul_precision('highest'), "
            "no CUBLAS_EMULATE_* or ONEDNN_DEFAULT_FPMATH_MODE in the environment)"
        )


class StackedOnes:
    """H1 = [H, 1] by column panels in float64; H float32 or float64, any strides, never copied whole."""

    def __init__(self, features: Tensor, ones: bool = True):
        self.features, self.ones = features, ones
        self.n, self.columns = features.shape[0], features.shape[1] + int(ones)
        self.dtype, self.device = features.dtype, features.device

    def panels(self, width: int = PANEL, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        m = self.features.shape[1]
        for j in range(0, self.columns, width):
            panel = self.features[:, j : min(j + width, m)].to(dtype)
            if self.ones and j + width >= self.columns:
                panel = torch.cat([panel, panel.new_ones(self.n, 1)], 1)
            yield panel if panel.stride(1) == 1 else panel.contiguous()

    def abs_products(self, left: Tensor | None = None) -> tuple[Tensor, float]:
        """|H1| 1 (n,) and the largest entry of left |H1|, float64; ``left`` ones by default."""
        rows = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        largest = rows.new_zeros(())
        for panel in self.panels(dtype=self.dtype):  # by rows, so that no bit depends on the layout
            panel_rows, columns = ops.abs_products(panel, left)
            rows += panel_rows
            largest = torch.maximum(largest, columns.amax())  # unlike max(), it keeps a NaN
        return rows, float(largest)


class WidePanels(StackedOnes):
    """H1 of a wide layer by column panels that are computed again for every sweep, never stored.

    What is proved of it is proved of the matrix of these float64 values: :func:`gcfast.ops.wide_panel` gives
    the same bits each time, and panels begin at the same columns besides.
    """

    def __init__(
        self, z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, ones: bool = True
    ):
        self.layer = tuple(t.detach().double() for t in (z, weight, bias))
        self.settings: dict[str, Any] = {"activation": activation, "beta": beta}
        self.ones = ones
        self.n, self.columns = z.shape[0], weight.shape[0] + int(ones)
        self.dtype, self.device = torch.float64, z.device

    def panels(self, width: int = PANEL, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        z, weight, bias = self.layer
        m = len(weight)
        for j in range(0, self.columns, width):
            end = min(j + width, self.columns)
            panel = torch.empty((self.n, end - j), dtype=torch.float64, device=self.device)
            columns = slice(j, min(end, m))
            ops.wide_panel(
                z, weight[columns], bias[columns], **self.settings, out=panel[:, : columns.stop - j]
            )
            panel[:, columns.stop - j :] = 1.0
            yield panel.to(dtype)


def add_product_(out: Tensor, a: Tensor, b: Tensor, inner: int, scratch: Tensor) -> None:
    """out += a b for one tile, by slices of length ``inner``, each rounded by itself."""
    part = scratch[: out.numel()].view(out.shape)
    for k in range(0, a.shape[1], inner):
        torch.mm(a[:, k : k + inner], b[k : k + inner], out=part)
        out += part


def panel_slices(columns: int, inner: int) -> int:
    """Slices of length ``inner`` in all panels of H1, each of which may end in one that is not full."""
    return columns // PANEL * -(-PANEL // inner) + -(-(columns % PANEL) // inner)


def add_gram_(g: Tensor, q: Tensor, inner: int | None = None, triangular: bool = False) -> None:
    """g += q q^T on the lower triangle of tiles, in q's dtype; ``triangular``: q is lower triangular."""
    tile = tiling(g.device)
    scratch = tile.scratch(g)
    for i0, i1, j0, j1 in tile.lower(len(g)):
        end = j1 if triangular else q.shape[1]
        add_product_(g[i0:i1, j0:j1], q[i0:i1, :end], q[j0:j1, :end].mT, inner or tile.inner, scratch)


def lower_triangle_(g: Tensor) -> Tensor:
    """Zero above the diagonal in the diagonal tiles: all of a g whose lower triangle of tiles was written."""
    block = tiling(g.device).block
    for j in range(0, len(g), block):
        g[j : j + block, j : j + block].tril_()
    return g


def row_tiles(x: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """(rows, columns, end) of the tiles of x b for lower triangular x, zero from column ``end`` on."""
    tile = tiling(x.device)
    for i in range(0, len(x), tile.block):
        end = min(i + tile.block, len(x))
        for j in range(0, b.shape[1], tile.rows):
            yield slice(i, end), slice(j, min(j + tile.rows, b.shape[1])), end


def lower_times(x: Tensor, b: Tensor) -> Tensor:
    """x b for lower triangular x, by tiles and slices: within tiling.gamma(n) |x||b|."""
    tile = tiling(x.device)
    out, scratch = torch.zeros_like(b), tile.scratch(b)
    for rows, columns, end in row_tiles(x, b):
        add_product_(out[rows, columns], x[rows, :end], b[:end, columns], tile.inner, scratch)
    return out


def lower_gram(h1: StackedOnes) -> Tensor:
    """H1 H1^T (n x n, float64): its lower triangle, zeros above; within gram_error(h1) in the 2-norm."""
    g = torch.zeros((h1.n, h1.n), dtype=torch.float64, device=h1.device)
    for panel in h1.panels():
        add_gram_(g, panel)
    return lower_triangle_(g)


def symmetric_row_sums(low: Tensor) -> Tensor:
    """Row sums of |S| for the symmetric S whose lower triangle is ``low``, zero above the diagonal."""
    rows, columns = ops.abs_products(low)
    return rows + columns - low.diagonal().abs()


def norm_upper(x: Tensor) -> float:
    """Proved upper bound of ||x||_2: sqrt(||x||_1 ||x||_inf), float64."""
    rows, columns = ops.abs_products(x)
    return _up(math.sqrt(float(rows.amax()) * float(columns.amax())), sum(x.shape))


def gram(h1: StackedOnes) -> Tensor:
    """H1 H1^T (n x n, float64), symmetric as stored, for those who need no bound of its error."""
    strip = 512
    g = torch.zeros((h1.n, h1.n), dtype=torch.float64, device=h1.device)
    for panel in h1.panels():
        for i in range(0, h1.n, strip):
            g[i : i + strip, : i + strip].addmm_(panel[i : i + strip], panel[: i + strip].mT)
    return mirror_(g, strip)


def mirror_(g: Tensor, strip: int = 512) -> Tensor:
    """The lower triangle of g above the diagonal as well, in place."""
    for i in range(0, len(g), strip):
        diagonal = g[i : i + strip, i : i + strip]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        g[:i, i : i + strip] = g[i : i + strip, :i].mT
    return g
