"""out += a b by slices: exact sums, layouts, the proved bound, bits that nothing may change, errors."""

from __future__ import annotations

import pytest
import torch

from gcfast import ops, reference
from gcfast.proofs.rounding import gamma

DTYPES = (torch.float32, torch.float64)
LAYOUTS = ("rows", "gap", "columns", "slice of columns", "spread")


def laid(x, layout):
    """x with other strides, NaN around it."""
    n, m = x.shape
    shape, view = {
        "rows": ((n, m), lambda w: w),
        "gap": ((n, m + 5), lambda w: w[:, 2 : m + 2]),
        "columns": ((m, n), lambda w: w.mT),
        "slice of columns": ((m, n + 130), lambda w: w[:, 1 : n + 1].mT),
        "spread": ((2 * n, 3 * m), lambda w: w[::2, ::3]),
    }[layout]
    return view(torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)).copy_(x)


def whole(*shape, dtype, device="cpu"):
    """Small integers: every order of summation is exact."""
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=g).to(device, dtype)


def real(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def added(out, a, b, **settings):
    """A copy of out, in out's own layout, with the product added."""
    copy = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
    ops.add_product(copy, a, b, **settings)
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 2, 7, 8, 9, 16, 17, 31, 70])
def test_exact_on_ragged_sizes(device, r, dtype):
    for c in (1, 2, 8, 15, 16, 17, 24, 25, 48, 49, 70):
        for k in (1, 2, 15, 33, 70):
            out, a, b = (whole(*s, dtype=dtype, device=device) for s in ((r, c), (r, k), (k, c)))
            product = (a.double() @ b.double()).to(dtype)
            assert torch.equal(added(out, a, b, inner=16), out + product)
            assert torch.equal(added(out, a, b, inner=33, alpha=-1), out - product)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(device, layout, dtype):
    n, k = 203, 77
    out, a, b = (whole(*s, dtype=dtype, device=device) for s in ((n, n), (n, k), (k, n)))
    want = out + (a.double() @ b.double()).to(dtype)
    triangle = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    for other in LAYOUTS:
        x, y = laid(a, other), laid(b, layout)
        assert torch.equal(added(laid(out, layout), x, laid(b, other)), want)
        assert torch.equal(added(laid(out, other), laid(a, layout), y), want)
        kept = torch.where(triangle, out, float("nan"))
        got = added(laid(kept, layout), x, y, lower=True)
        assert torch.equal(got.tril(), want.tril()) and bool(got[~triangle].isnan().all())


def test_what_lies_around_out_stays(device):
    storage = torch.full((90, 200), float("nan"), device=device)
    for out in (storage[3:40, 5:60], storage.mT[7:90, 2:50]):
        storage.fill_(float("nan"))
        out.zero_()
        r, c = out.shape
        ops.add_product(out, torch.ones(r, 9, device=device), torch.ones(9, c, device=device))
        assert bool((out == 9).all()) and int((~storage.isnan()).sum()) == r * c


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 23, 24, 25, 47, 49, 96, 130, 700])
def test_lower_leaves_the_rest_alone(device, n, dtype):
    a = whole(n, 61, dtype=dtype, device=device)
    upper = torch.full((n, n), float("nan"), dtype=dtype, device=device).triu_(1)
    upper[0, -1] = -0.0 if n > 1 else 0.0
    for out in (upper.clone(), upper.mT.contiguous().mT):
        ops.add_product(out, a, a.mT, inner=16, lower=True)
        assert torch.equal(out.tril().nan_to_num(), (a @ a.mT).tril())
        above = torch.ones(n, n, dtype=torch.bool, device=device).triu_(1)
        assert torch.equal(out[above].nan_to_num(5), upper[above].nan_to_num(5))
        assert torch.equal(out[above].signbit(), upper[above].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("r", "c", "k", "inner"), [(70, 50, 1000, 128), (33, 130, 700, 256), (64, 64, 300, 7)]
)
def test_the_proved_bound_holds(device, r, c, k, inner, dtype):
    for sign in (torch.Tensor.clone, torch.abs):  # all positive: roundings add up
        a, b = sign(real(r, k, dtype=dtype)), sign(real(k, c, dtype=dtype, seed=1))
        truth = reference_sum(a, b)
        size = a.double().abs() @ b.double().abs()
        got = added(torch.zeros(r, c, dtype=dtype).to(device), a.to(device), b.to(device), inner=inner).cpu()
        slices = -(-k // inner)
        error = (got.double() - truth).abs()
        assert bool((error <= gamma(min(inner, k) + slices + 2, dtype) * size + 1e-30).all())
        plain = ((a @ b).double() - truth).abs()
        eps = torch.finfo(dtype).eps
        assert float(error.max()) <= float(plain.max() + 4 * eps * size.max())


def reference_sum(a, b):
    """a b rounded to float64 from sums in twice its digits where that is needed."""
    if a.dtype == torch.float32:
        return a.double() @ b.double()
    import numpy as np

    return torch.from_numpy((a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)).astype(float))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_threads_or_pieces(dtype):
    n, k = 530, 300
    out, a, b = (real(*s, dtype=dtype, seed=i) for i, s in enumerate(((n, n), (n, k), (k, n))))
    want = added(out, a, b)
    assert ops.last_backend("add_product") == "cpu"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(added(out, a, b), want)
            lower = added(out, a, b, lower=True)
            assert torch.equal(lower.tril(), want.tril()) and torch.equal(lower.triu(1), out.triu(1))
    finally:
        torch.set_num_threads(before)
    for layout in LAYOUTS:
        assert torch.equal(added(laid(out, layout), laid(a, layout), laid(b, layout)), want)
    for rows in (slice(0, 1), slice(3, 100), slice(529, 530)):
        for columns in (slice(0, 530), slice(7, 8), slice(500, 523)):
            got = added(out[rows, columns], a[rows], b[:, columns])
            assert torch.equal(got, want[rows, columns])
    halves = out.clone()
    for part in (slice(0, 256), slice(256, 300)):  # whole slices: the same sums in turn
        ops.add_product(halves, a[:, part], b[part])
    assert torch.equal(halves, want)


def test_one_slice_is_summed_from_zero(device):
    big = torch.full((1, 1), 2.0**60, dtype=torch.float64, device=device)
    a, b = (torch.ones(s, dtype=torch.float64, device=device) for s in ((1, 256), (256, 1)))
    assert float(added(big, 2 * a, b, inner=256)) == 2.0**60 + 512
    assert float(added(big, a / 2, b, inner=128)) == 2.0**60  # two slices of 64, each lost
    assert float(added(big, a / 2, b, inner=256)) == 2.0**60  # 128: half of an ulp, to even
    assert float(added(big, a, b, inner=10**12)) == 2.0**60 + 256


def test_nan_and_infinities_reach_what_they_meet(device):
    a, b = (torch.ones(s, device=device) for s in ((30, 40), (40, 50)))
    a[3, 7], b[9, 11] = float("nan"), float("inf")
    out = added(torch.zeros(30, 50, device=device), a, b, inner=16)
    assert bool(out[3].isnan().all()) and int(out.isnan().sum()) == 50
    assert bool(out[[*range(3), *range(4, 30)], 11].isinf().all()) and int(out.isinf().sum()) == 29
    full = torch.full((30, 50), float("nan"), device=device)
    assert bool(added(full, a, b).isnan().all())  # it is read


@pytest.mark.parametrize(("r", "c", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(device, r, c, k):
    out = torch.full((r, c), float("nan"), device=device)
    ops.add_product(out, torch.zeros(r, k, device=device), torch.zeros(k, c, device=device))
    assert bool(out.isnan().all())


@pytest.mark.parametrize("lower", [False, True])
def test_the_reference_is_the_same_to_its_roundings(lower):
    n, k = 1100, 150
    out, a = real(n, n), real(n, k, seed=1)
    want = out.clone()
    reference.add_product(want, a, a.mT, alpha=-1.0, lower=lower)
    got = added(out, a, a.mT, alpha=-1, lower=lower)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
    if lower:
        assert torch.equal(want.triu(1), out.triu(1))
    with ops.backend("reference"):
        assert torch.equal(added(out, a, a.mT, alpha=-1, lower=lower), want)
    assert ops.last_backend("add_product") == "reference"


def test_library_contract():
    out, a, b = real(20, 30), real(20, 10), real(10, 30)
    torch.library.opcheck(torch.ops.gcfast.add_product.default, (out.clone(), a, b, -1.0, 4, False))

    def f(out, a, b):
        out = out * 2
        ops.add_product(out, a, b, inner=4)
        return out + 1

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(out, a, b), f(out, a, b))


ROW = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("out", "a", "b", "settings", "error", "words"),
    [
        (ROW.long(), ROW, ROW, {}, TypeError, "out must have a floating dtype; got int64"),
        (ROW.bfloat16(), ROW, ROW, {}, TypeError, "out must be float32 or float64; got bfloat16"),
        (ROW[0], ROW, ROW, {}, ValueError, r"out must have shape \(r, c\); got \(4,\)"),
        (ROW[:1].expand(3, 4), ROW[:, :3], ROW, {}, ValueError, "out must not be expanded"),
        (ROW, ROW.double(), ROW, {}, TypeError, "a must have the dtype of out, float32; got float64"),
        (ROW, ROW, ROW.mT.double(), {}, TypeError, "b must have the dtype of out, float32; got float64"),
        (ROW, ROW.to("meta"), ROW, {}, ValueError, "a must be on the device of out, cpu; got meta"),
        (ROW, ROW.mT, ROW, {}, ValueError, r"a must have shape \(3, k\), r from out; got \(4, 3\)"),
        (ROW, ROW, ROW, {}, ValueError, r"b must have shape \(4, 4\) \(k from a, c from out\); got \(3, 4\)"),
        (ROW, ROW, torch.zeros(4, 4), {"alpha": 2}, ValueError, "alpha must be 1 or -1; got 2"),
        (ROW, ROW, torch.zeros(4, 4), {"inner": 0}, ValueError, "inner must be >= 1; got 0"),
        (ROW, ROW, torch.zeros(4, 4), {"lower": True}, ValueError, r"out must be square .*; got \(3, 4\)"),
        (ROW, ROW.clone().requires_grad_(), torch.zeros(4, 4), {}, RuntimeError, "detach a"),
    ],
)
def test_bad_input_is_named(out, a, b, settings, error, words):
    with pytest.raises(error, match=words):
        ops.add_product(out, a, b, **settings)
