"""Ranks of many small matrices: torch.linalg.matrix_rank, which proves nothing, beside gcfast.matrix_rank."""

from __future__ import annotations

import pytest
import torch
from _compare import compare, copy_bandwidth, matmul_peak, show, sized

import gcfast
from gcfast import ops

DTYPES = [torch.float32, torch.float64]
ids = [str(d).removeprefix("torch.") for d in DTYPES]
SHAPES = sized(
    {
        "cpu": [(4096, 8, 8), (4096, 16, 16), (1024, 32, 32), (512, 64, 64), (256, 64, 128), (64, 128, 256)],
        "cuda": [(4096, 32, 32), (4096, 64, 128)],
    },
    smallest={"cpu": [(4, 8, 8), (2, 16, 32)], "cuda": [(2, 16, 32)]},
)
CASES = sorted({(device, *shape) for device, shapes in SHAPES.items() for shape in shapes})
KINDS = ["full rank", "half of them deficient"]


def matrices(kind: str, batch: int, n: int, m: int) -> torch.Tensor:
    # away from the singular ones: of thousands of random square ones some are of lower rank to float32
    a = torch.randn(batch, n, m, dtype=torch.float64) + 3 * n**0.5 * torch.eye(n, m, dtype=torch.float64)
    if kind != "full rank":  # by a quarter
        r = 3 * n // 4
        half = torch.randn(batch // 2, n, r).double() @ torch.randn(batch // 2, r, m).double()
        a[::2] = half / r**0.5
    return a


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "batch", "n", "m"), CASES)
def bench_table(benchmark, device, where, batch, n, m, kind, dtype):
    if where != device.type:
        pytest.skip(f"a size for {where}")
    a = matrices(kind, batch, n, m).to(device, dtype)
    found, want = gcfast.matrix_rank(a), torch.linalg.matrix_rank(a)
    assert torch.equal(found.rank, want) and bool(((found.lower <= want) & (want <= found.upper)).all())
    backend = ops.last_backend("batched_rank")
    deficient = want < n
    assert int(deficient.sum()) == (batch // 2 if kind != "full rank" else 0)
    # for up to 16 columns torch's float64 tolerance, squared, is no more than double-double's rounding
    assert bool(found.certified[~deficient].all()) and (m <= 16 or bool(found.certified.all()))
    candidates = {
        "torch.linalg.matrix_rank": lambda: torch.linalg.matrix_rank(a),
        str(backend): lambda: gcfast.matrix_rank(a),
    }
    timings = benchmark.pedantic(lambda: compare(candidates, repeats=9, warmup=1), rounds=1)
    # additions and multiplications of a triangle of the Gram and of one elimination of it
    products = batch * (n * n * m + n**3 / 3) / matmul_peak(torch.float64)
    reading = a.numel() * a.element_size() / copy_bandwidth()
    limit = "Gram and one elimination at matmul peak", "bytes read once, at copy bandwidth"
    title = f"matrix_rank, {batch} x ({n} x {m}), {kind}, {dtype}"
    show(title, timings, max(products, reading), limit[products < reading])
