"""The activations of every backend: distance from exact values over the whole range, hostile inputs, strides.

Triton's interpreter runs the arithmetic of the Triton kernels, but not all that a GPU does. Seen on a GPU
only, by these tests with the target `triton` in place of `triton-interpreted`: fused multiply-adds (here a
correction term stands in for them), the seed of the reciprocal (inline assembly), denormals in the hardware,
rounding to nearest of bfloat16 stores (the interpreter truncates), vector loads, launches of many programs.
"""

from __future__ import annotations

import math

import exact
import numpy as np
import pytest
import torch
from conftest import ANALYTIC, TARGETS

from gcfast import ops, reference
from gcfast.ops.activations import run_activation

DTYPES = [torch.float32, torch.float64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
# Largest distance from the exact value in ulps of it (of the sum of its terms, where a derivative crosses 0).
# tests/core/activations.cpp measures the C++ at a million points a function.
LIMITS = {name: (0, 0, 0) if name == "relu" else (4, 4, 4) for name in reference.ACTIVATIONS}
KERNELS = [p for p in TARGETS if p.values[0][0] != "reference"]
INTERPRETED_OR_GPU = [p for p in TARGETS if p.values[0][0] == "triton"]
CASES = [(name, 1.0) for name in reference.ACTIVATIONS] + [("softplus", b) for b in (0.1, 3.7, 100.0)]
SIZES = [1, 2, 31, 33, 252, 507]


def points(dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    reach = 104.0 if dtype == torch.float32 else 746.0

    def uniform(n: int, scale: float) -> torch.Tensor:
        return (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1) * scale

    tiny = 10.0 ** uniform(40, 30) * torch.sign(uniform(40, 1))
    groups = [uniform(80, 3), uniform(60, 40), uniform(80, reach), tiny, torch.tensor([0.0, 1e4, -1e4])]
    return torch.cat(groups).to(dtype)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", KERNELS, indirect=True)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name, beta", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_from_exact(dtype, name, order, beta, target):
    x = points(dtype)
    got = ops.activation(x.to(target.device), activation=name, order=order, beta=beta)
    assert ops.last_backend("activation") == target.backend
    worst = max(
        exact.ulps(y, exact.activation(name, v, order, beta), NUMPY[dtype], exact.terms_of(name, v, order))
        for v, y in zip(x.tolist(), got.tolist())
    )
    assert worst <= LIMITS[name][order]


def test_the_measure_sees_errors():
    # F.softplus cuts off at 20: the measure must notice, or the test above proves nothing.
    x = torch.tensor([20.5], dtype=torch.float64)
    y = torch.nn.functional.softplus(x).item()
    assert exact.ulps(y, exact.activation("softplus", 20.5, 0), np.float64) > 1e5


@pytest.mark.parametrize("target", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_dense_float_sweep(dtype, target):
    x = torch.linspace(-110, 110, 20_001 if target.interpreted else 200_001, dtype=dtype)
    got = ops.activation(x.to(target.device)).cpu().double()
    want = torch.nn.functional.softplus(x.double(), threshold=1000)
    spacing = torch.finfo(dtype).eps * want.clamp(min=torch.finfo(dtype).tiny)
    assert ((got - want).abs() / spacing).max() <= 4


LIMIT_AT = {  # values at -inf and inf, orders 0, 1, 2
    "softplus": ((0, math.inf), (0, 1), (0, 0)),
    "sigmoid": ((0, 1), (0, 0), (0, 0)),
    "tanh": ((-1, 1), (0, 0), (0, 0)),
    "gelu": ((0, math.inf), (0, 1), (0, 0)),
    "gelu_tanh": ((0, math.inf), (0, 1), (0, 0)),
    "silu": ((0, math.inf), (0, 1), (0, 0)),
    "relu": ((0, math.inf), (0, 1), (0, 0)),
}


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_largest(dtype, name, target):
    big = torch.finfo(dtype).max
    x = [-math.inf, math.inf, math.nan, -big, big, -1e4, 1e4]
    x = torch.tensor(x, dtype=dtype, device=target.device)
    for order in range(3):
        y = ops.activation(x, activation=name, order=order).tolist()
        low, high = LIMIT_AT[name][order]
        assert y[:2] == [low, high], (order, y)
        assert math.isnan(y[2])
        top = [big, 1e4] if high == math.inf else [high, high]
        assert y[3:] == [low, pytest.approx(top[0]), low, pytest.approx(top[1])], (order, y)


@pytest.mark.parametrize("beta", [1e-3, 1e3])
def test_softplus_of_extreme_x_times_beta(beta, target):
    x = torch.tensor([3e38, -3e38, 0.0], device=target.device)
    y = ops.activation(x, beta=beta)
    assert y[0] == x[0] and y[1] == 0
    assert y[2].item() == pytest.approx(math.log(2) / beta, rel=1e-6)
    assert ops.activation(x, beta=beta, order=1).tolist() == [1, 0, 0.5]
    assert ops.activation(x, beta=beta, order=2).tolist() == [0, 0, pytest.approx(beta / 4)]


def test_beta_that_no_float32_holds(target):
    # A Python float reaches a Triton kernel in float32: a float64 one must be given all of beta.
    for beta in (1e-60, 1e60):
        x = torch.tensor([-1.5, 0.5], dtype=torch.float64, device=target.device) / beta
        want = torch.nn.functional.softplus(torch.tensor([-1.5, 0.5], dtype=torch.float64)) / beta
        torch.testing.assert_close(ops.activation(x, beta=beta).cpu(), want, rtol=1e-14, atol=0)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", SIZES)
def test_bias_shapes_and_strides(dtype, cols, poison, target):
    for rows in (1, 3) if target.interpreted else (1, 3, 70):
        store = torch.randn(rows, cols + 5, dtype=dtype, device=target.device)
        bias = torch.randn(2 * cols, dtype=dtype, device=target.device)[::2]
        turned = torch.randn(cols, rows, dtype=dtype, device=target.device).t()
        for x in (store[:, :cols], store[:, :cols].contiguous(), turned):
            for b in (None, bias):
                got = ops.activation(x, b, activation="tanh")
                want = torch.tanh(x.double() + (0 if b is None else b.double()))
                assert ops.last_backend("activation") == target.backend
                torch.testing.assert_close(
                    got.double(),
                    want,
                    rtol=4e-6 if dtype == torch.float32 else 1e-14,
                    atol=1e-6 if dtype == torch.float32 else 1e-14,
                )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cols", [*SIZES, 3000])
def test_in_place_and_fused_gradient(cols, target):
    x, g = torch.randn(2, 9, cols, dtype=torch.float64, device=target.device)
    b = torch.randn(cols, dtype=torch.float64, device=target.device)
    want = torch.sigmoid(x + b) * g
    for upstream in (g.clone(), torch.cat([g, g], dim=1)[:, :cols]):
        assert run_activation(target.backend, x, b, "softplus", 1.0, 1, upstream, upstream) is upstream
        torch.testing.assert_close(upstream, want, rtol=1e-14, atol=1e-15)
    y = x.clone()
    assert ops.activation(y, b, activation="sigmoid", out=y) is y
    torch.testing.assert_close(y, torch.sigmoid(x + b), rtol=1e-14, atol=1e-15)


def test_strided_out_leaves_the_gaps_alone(target):
    x = torch.randn(11, 33, device=target.device)
    for view in (lambda s: s[:, :33], lambda s: s.t()[:11, :33], lambda s: s[:, ::2][:, :33]):
        store = torch.full((70, 70), math.nan, device=target.device)
        out = view(store)[:11]
        ops.activation(x, out=out)
        torch.testing.assert_close(out, reference.activation(x))
        assert store.isnan().sum() == store.numel() - 11 * 33


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
def test_empty_and_without_dimensions(shape, target):
    x = torch.randn(shape, device=target.device)
    torch.testing.assert_close(ops.activation(x), reference.activation(x))


# Tiles that are whole and tiles that are cut, in rows and in columns; one row and a rest; no whole row.
TILED = [(16, 64), (1, 1024), (1, 1025), (32, 128), (33, 130), (5, 507), (9, 100), (40, 31), (1, 63)]


@pytest.mark.parametrize("target", INTERPRETED_OR_GPU, indirect=True)
@pytest.mark.parametrize("shape", [*TILED, (1 << 10, 1 << 10)])
@pytest.mark.parametrize("bias, grad", [(False, False), (True, False), (True, True), (False, True)])
def test_tiles(shape, bias, grad, target, poison):
    if target.interpreted and shape[0] * shape[1] >= 1 << 20:
        pytest.skip("a thousand programs: for a GPU")
    x, g = torch.randn(2, *shape, device=target.device)
    b = torch.randn(shape[1], device=target.device) if bias else None
    got = run_activation(target.backend, x, b, "silu", 1.0, 1, g if grad else None)
    want = reference.activation(x, b, activation="silu", order=1, grad=g if grad else None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("target", INTERPRETED_OR_GPU, indirect=True)
@pytest.mark.parametrize("cols", [63, 64, 65])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 17])
def test_nothing_is_written_outside(rows, cols, target):
    for dtype in DTYPES:
        for columns in (cols, 130):  # a contiguous out, with memory of someone else after it; a strided one
            store = torch.full((rows + 20, columns), math.nan, dtype=dtype, device=target.device)
            x = torch.randn(rows, cols, dtype=dtype, device=target.device)
            ops.activation(x, out=store[:rows, :cols])
            torch.testing.assert_close(store[:rows, :cols], reference.activation(x))
            assert store.isnan().sum() == store.numel() - x.numel()


@pytest.mark.parametrize("target", INTERPRETED_OR_GPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_round_once(dtype, target):
    x = (torch.randn(3, 130) * 4).to(target.device, dtype)
    b, g = torch.randn(130).to(target.device, dtype), torch.randn(3, 130).to(target.device, dtype)
    got = run_activation("triton", x, b, "softplus", 3.7, 1, g).double()
    t = 3.7 * (x.double() + b.double())
    want = torch.sigmoid(t) * g.double()
    info = torch.finfo(dtype)
    # Half an ulp for the rounding, a little for float32; the interpreter truncates bfloat16, one whole ulp.
    ulps = 1.01 if target.interpreted and dtype == torch.bfloat16 else 0.51
    spacing = torch.exp2(want.abs().clamp(min=info.tiny).log2().floor()) * info.eps
    assert ((got - want).abs() / spacing).max() <= ulps


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", INTERPRETED_OR_GPU, indirect=True)
@pytest.mark.parametrize("name", ANALYTIC)
def test_gradients_by_triton(name, target):
    beta = 1.7 if name == "softplus" else 1.0
    x = torch.randn(2, 3, dtype=torch.float64, device=target.device, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, device=target.device, requires_grad=True)

    def f(x, b):
        return ops.activation(x, b, activation=name, beta=beta)

    assert torch.autograd.gradcheck(f, (x, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, b), fast_mode=True)
    assert ops.last_backend("activation") == "triton"


@pytest.mark.parametrize("target", INTERPRETED_OR_GPU, indirect=True)
def test_wide_forward_by_triton(target):
    shapes = ((9, 3), (40, 3), (40,), (2, 40), (2,))
    args = [torch.randn(s, dtype=torch.float64, device=target.device, requires_grad=True) for s in shapes]
    got, want = ops.wide_forward(*args), reference.wide_forward(*args)
    assert ops.last_backend("wide_forward") == "triton"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    g = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, args, g), torch.autograd.grad(want, args, g), rtol=1e-12, atol=1e-12
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [((1 << 31) + 1000,), (3, (1 << 30) + 7)])
def test_more_than_two_to_the_31_elements(shape):
    elements = math.prod(shape)
    if torch.cuda.mem_get_info()[0] < 5 * elements:
        pytest.skip(f"needs {5 * elements >> 30} GiB of free GPU memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    bias = torch.ones(shape[-1:], dtype=x.dtype, device="cuda") if len(shape) > 1 else None
    with ops.backend("triton"):
        ops.activation(x, bias, activation="sigmoid", out=x)
    want = torch.sigmoid(torch.tensor(0.0 if bias is None else 1.0)).bfloat16()
    assert (x == want.item()).all()


def test_large_parallel_equals_serial():
    # on the CPU, whose threads share the work
    x, b = torch.randn(4001, 37), torch.randn(37)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(2, threads))
        y = ops.activation(x, b)
        torch.set_num_threads(1)
        assert torch.equal(y, ops.activation(x, b))
    finally:
        torch.set_num_threads(threads)
