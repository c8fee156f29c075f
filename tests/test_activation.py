"""The C++ activations: distance from exact values over the whole range, hostile values, strides, sizes."""

from __future__ import annotations

import math

import exact
import numpy as np
import pytest
import torch

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64]
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
# Largest distance from the exact value in ulps of it (of the sum of its terms, where a derivative crosses 0).
# tests/core/activations.cpp measures it at a million points a function.
LIMITS = {name: (0, 0, 0) if name == "relu" else (4, 4, 4) for name in reference.ACTIVATIONS}
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


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name, beta", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_from_exact(dtype, name, order, beta):
    x = points(dtype)
    with ops.backend("cpu"):
        got = ops.activation(x, activation=name, order=order, beta=beta)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_dense_float_sweep(dtype):
    x = torch.linspace(-110, 110, 200_001, dtype=dtype)
    got = ops.activation(x).double()
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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_largest(dtype, name, backend):
    big = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, math.inf, math.nan, -big, big, -1e4, 1e4], dtype=dtype)
    for order in range(3):
        with ops.backend(backend):
            y = ops.activation(x, activation=name, order=order).tolist()
        low, high = LIMIT_AT[name][order]
        assert y[:2] == [low, high], (order, y)
        assert math.isnan(y[2])
        top = [big, 1e4] if high == math.inf else [high, high]
        assert y[3:] == [low, pytest.approx(top[0]), low, pytest.approx(top[1])], (order, y)


@pytest.mark.parametrize("beta", [1e-3, 1e3])
def test_softplus_of_extreme_x_times_beta(beta):
    x = torch.tensor([3e38, -3e38, 0.0])
    y = ops.activation(x, beta=beta)
    assert y[0] == x[0] and y[1] == 0
    assert y[2].item() == pytest.approx(math.log(2) / beta, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", SIZES)
def test_bias_shapes_and_strides(dtype, cols, poison):
    for rows in (1, 3, 70):
        store = torch.randn(rows, cols + 5, dtype=dtype)
        bias = torch.randn(2 * cols, dtype=dtype)[::2]
        for x in (store[:, :cols], store[:, :cols].contiguous(), torch.randn(cols, rows, dtype=dtype).t()):
            for b in (None, bias):
                got = ops.activation(x, b, activation="tanh")
                want = torch.tanh(x.double() + (0 if b is None else b.double()))
                assert ops.last_backend("activation") == "cpu"
                torch.testing.assert_close(
                    got.double(),
                    want,
                    rtol=4e-6 if dtype == torch.float32 else 1e-14,
                    atol=1e-6 if dtype == torch.float32 else 1e-14,
                )


@pytest.mark.parametrize("cols", [*SIZES, 3000])
def test_in_place_and_fused_gradient(cols):
    from gcfast._ops_activation import run_activation

    x, g = torch.randn(9, cols, dtype=torch.float64), torch.randn(9, cols, dtype=torch.float64)
    b = torch.randn(cols, dtype=torch.float64)
    want = torch.sigmoid(x + b) * g
    upstream = g.clone()
    assert run_activation("cpu", x, b, "softplus", 1.0, 1, upstream, upstream) is upstream
    torch.testing.assert_close(upstream, want, rtol=1e-14, atol=1e-15)
    y = x.clone()
    assert ops.activation(y, b, activation="sigmoid", out=y) is y
    torch.testing.assert_close(y, torch.sigmoid(x + b), rtol=1e-14, atol=1e-15)


def test_strided_out_leaves_the_gaps_alone():
    x = torch.randn(11, 33)
    for view in (lambda s: s[:, :33], lambda s: s.t()[:11, :33], lambda s: s[:, ::2][:, :33]):
        store = torch.full((70, 70), math.nan)
        out = view(store)[:11]
        ops.activation(x, out=out)
        torch.testing.assert_close(out, reference.activation(x))
        assert store.isnan().sum() == store.numel() - 11 * 33


def test_large_parallel_equals_serial():
    x, b = torch.randn(4001, 37), torch.randn(37)
    threads = torch.get_num_threads()
    y = ops.activation(x, b)
    try:
        torch.set_num_threads(1)
        assert torch.equal(y, ops.activation(x, b))
    finally:
        torch.set_num_threads(threads)
