"""Products with |A|: exact on integers, within the stated bound otherwise, and nothing bad is ever lost."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from conftest import TARGETS

from gcfast import ops
from gcfast.ops import dispatch
from gcfast.proofs.full_rank import prove_full_rank

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(0, 0), (0, 3), (3, 0), (1, 1), (1, 2), (2, 1), (1, 507), (507, 1), (31, 33), (33, 31)]
SHAPES += [(2, 252), (33, 507), (252, 2), (252, 31), (507, 252)]
LAYOUTS = ["contiguous", "transposed", "rows of a wider one", "every other row", "no unit stride", "expanded"]
KERNELS = [p for p in TARGETS if p.values[0][0] in dispatch._KERNELS and p.values[0][0] != "cuda"]
on_each = pytest.mark.parametrize("target", KERNELS, indirect=True)
U = Fraction(1, 2**53)


def gamma(k: int) -> Fraction:
    return k * U / (1 - k * U)


def serves(target, dtype):
    return target.backend != "cpu" or dtype in (torch.float32, torch.float64)


def whole_numbers(*shape, high=100):
    """Float64 integers: every product and sum is exact, in any order."""
    return torch.randint(-high, high + 1, shape).double()


def laid_out(a, layout):
    """The values of `a` (of its first column, if expanded) in another layout; NaN in between."""
    n, m = a.shape
    if layout == "transposed":
        return a.T.contiguous().T
    if layout == "expanded":
        return a[:, :1].expand(n, m)
    rows, columns = {"rows of a wider one": (1, 2), "every other row": (2, 1), "no unit stride": (2, 3)}.get(
        layout, (1, 1)
    )
    around = torch.full((n * rows, m * columns), math.nan, dtype=a.dtype, device=a.device)
    view = around[:, :m] if layout == "rows of a wider one" else around[::rows, ::columns]
    return view.copy_(a)


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact(target, dtype, poison):
    if not serves(target, dtype):
        pytest.skip("float32 and float64 only")
    few = target.interpreted and dtype != torch.float32
    for n, m in SHAPES:
        if few and n * m > 500:
            continue
        h, left, right = whole_numbers(n, m), whole_numbers(n).abs(), whole_numbers(m).abs()
        a = h.abs()
        h, left_d, right_d = h.to(target.device, dtype), left.to(target.device), right.to(target.device)
        got = ops.gram_error_bound(h)
        assert got.dtype == torch.float64 and got.device == h.device
        assert torch.equal(got.cpu(), a @ a.sum(0)), (n, m)
        assert ops.last_backend("gram_error_bound") == target.backend
        cases = [
            ((left_d, right_d), (a @ right, left @ a)),
            ((None, None), (a.sum(1), a.sum(0))),
            ((left_d, None), (a.sum(1), left @ a)),
            ((None, right_d), (a @ right, a.sum(0))),
        ]
        for weights, want in cases[:1] if target.interpreted and n * m > 2000 else cases:
            rows, columns = ops.abs_products(h, *weights)
            assert rows.dtype == columns.dtype == torch.float64
            assert torch.equal(rows.cpu(), want[0]) and torch.equal(columns.cpu(), want[1]), (n, m)


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37, 70), (70, 37), (1, 40), (40, 1)])
def test_layouts(target, shape, layout, poison):
    h = laid_out(whole_numbers(*shape).to(target.device, torch.float32), layout)
    a = h.double().abs()
    left, right = (whole_numbers(k, 2).abs().to(target.device)[:, 1] for k in shape)
    assert torch.equal(ops.gram_error_bound(h), a @ a.sum(0))
    rows, columns = ops.abs_products(h, left, right)
    assert torch.equal(rows, a @ right) and torch.equal(columns, left @ a)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_within_the_stated_bound_of_the_exact_values(target, dtype, transposed):
    if not serves(target, dtype):
        pytest.skip("float32 and float64 only")
    n, m = 29, 43
    h = (torch.randn(n, m).double() * 10.0 ** torch.randint(-3, 4, (n, m))).to(dtype)
    left, right = torch.rand(n).double(), torch.rand(m).double()
    exact = [[abs(Fraction(v)) for v in row] for row in h.double().tolist()]
    sums = [sum(column) for column in zip(*exact)]
    h = h.to(target.device)
    h = h.T.contiguous().T if transposed else h
    rows, columns = ops.abs_products(h, left.to(target.device), right.to(target.device))

    def check(got, want, k):
        for g, w in zip(got.tolist(), want, strict=True):
            assert abs(Fraction(g) - w) <= gamma(k) * w

    def dot(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True))

    check(ops.gram_error_bound(h), [dot(row, sums) for row in exact], n + m)
    check(rows, [dot(row, map(Fraction, right.tolist())) for row in exact], m)
    check(columns, [dot(column, map(Fraction, left.tolist())) for column in zip(*exact)], n)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(61, 1500), (1500, 61)])
def test_large_random_ones_stay_near_torch(target, shape, dtype):
    if target.interpreted:
        shape = tuple(min(k, 600) for k in shape)
    h = torch.randn(shape, dtype=dtype, device=target.device)
    a = h.double().abs()
    bound = 2 * float(gamma(sum(shape)))  # one for each side
    torch.testing.assert_close(ops.gram_error_bound(h), a @ a.sum(0), rtol=bound, atol=0)


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (17, 33), (36, 69)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity_are_never_lost(target, dtype, place, value):
    i, j = place
    h = torch.randn(37, 70, dtype=dtype, device=target.device)
    h[i, j] = value
    for x in (h, h.T.contiguous().T):
        bound = ops.gram_error_bound(x)
        assert not bool(bound.isfinite().any())  # each row meets column j
        assert not math.isfinite(float(bound.amax()))
        rows, columns = ops.abs_products(x)
        assert (~rows.isfinite()).nonzero().tolist() == [[i]]
        assert (~columns.isfinite()).nonzero().tolist() == [[j]]
        assert bool(rows[i].isnan() if math.isnan(value) else rows[i] == math.inf)
        left, right = (torch.zeros(k, dtype=torch.float64, device=target.device) for k in x.shape)
        rows, columns = ops.abs_products(x, left, right)  # a weight of zero hides nothing
        assert bool(rows[i].isnan()) and bool(columns[j].isnan())
        assert int(rows.isnan().sum()) == int(columns.isnan().sum()) == 1


@on_each
def test_extreme_values(target):
    def on_device(value, dtype):
        return torch.full((40, 50), value, dtype=dtype, device=target.device)

    huge = ops.gram_error_bound(on_device(-1e38, torch.float32))  # beyond float32, exact enough in float64
    want = 2000 * float(torch.tensor(1e38)) ** 2
    torch.testing.assert_close(huge, torch.full_like(huge, want))
    assert bool((ops.gram_error_bound(on_device(1e300, torch.float64)) == math.inf).all())
    for dtype, tiny in ((torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)):
        rows, columns = ops.abs_products(on_device(-tiny, dtype))
        assert bool((rows == 50 * tiny).all()) and bool((columns == 40 * tiny).all())
    least = ops.gram_error_bound(on_device(2.0**-149, torch.float32))
    assert bool((least == 2000 * 2.0**-298).all())


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    h = torch.randn(507, 252)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with ops.backend("cpu"):
                results.append((ops.gram_error_bound(h), ops.gram_error_bound(h.T), *ops.abs_products(h)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@on_each
def test_repeats_bit_for_bit(target):
    h = torch.randn(130, 200, device=target.device)
    first = (ops.gram_error_bound(h), *ops.abs_products(h))
    for _ in range(2):
        again = (ops.gram_error_bound(h), *ops.abs_products(h))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@on_each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_contract(target):
    h = torch.randn(9, 14, device=target.device)
    left, right = (torch.rand(k, dtype=torch.float64, device=target.device) for k in h.shape)
    torch.library.opcheck(torch.ops.gcfast.gram_error_bound.default, (h,))
    torch.library.opcheck(torch.ops.gcfast.gram_error_bound.default, (h.T,))
    torch.library.opcheck(torch.ops.gcfast.abs_products.default, (h, left, right))
    torch.library.opcheck(torch.ops.gcfast.abs_products.default, (h, None, None))

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def both(x, w):
        return ops.gram_error_bound(x) + 1, ops.abs_products(x, w)[1]

    for x in (h, torch.randn(5, 8, device=target.device)):
        got = both(x, left[: len(x)])
        assert torch.equal(got[0], ops.gram_error_bound(x) + 1)
        assert torch.equal(got[1], ops.abs_products(x, left[: len(x)])[1])


def test_fake_kernels_give_shapes_and_dtypes():
    with torch._subclasses.FakeTensorMode():
        h = torch.empty(6, 4, dtype=torch.bfloat16)
        outs = (ops.gram_error_bound(h), *ops.abs_products(h))
        assert [tuple(o.shape) for o in outs] == [(6,), (6,), (4,)]
        assert all(o.dtype == torch.float64 for o in outs)


def test_half_precision_on_the_cpu_is_served_by_the_reference():
    h = torch.randn(5, 6).bfloat16()
    a = h.double().abs()
    torch.testing.assert_close(ops.gram_error_bound(h), a @ a.sum(0))
    assert ops.last_backend("gram_error_bound") == "reference"
    with (
        ops.backend("cpu"),
        pytest.raises(ops.BackendError, match="serves float32 and float64, got bfloat16"),
    ):
        ops.gram_error_bound(h)


@on_each
def test_the_proof_of_rank_under_each_backend(target):
    h = torch.randn(40, 60, dtype=torch.float64)
    true = float(torch.linalg.svdvals(torch.cat([h, torch.ones(40, 1)], 1))[-1])
    proof = prove_full_rank(h.to(target.device))
    assert proof.proved and 0.85 * true <= proof.sigma_min_lower <= true * (1 + 1e-9)
    assert ops.last_backend("gram_error_bound") == target.backend
    h[3] = h[17]
    assert not prove_full_rank(h.to(target.device)).proved
    h[5, 6] = math.nan
    assert not prove_full_rank(h.to(target.device)).proved


A, W = torch.zeros(3, 4), torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.gram_error_bound([1.0]), TypeError, "h must be a tensor; got list"),
        (lambda: ops.gram_error_bound(A.long()), TypeError, "h must have a floating dtype; got int64"),
        (lambda: ops.gram_error_bound(A[0]), ValueError, r"h must have shape \(n, m\); got \(4,\)"),
        (
            lambda: ops.gram_error_bound(A.clone().requires_grad_()),
            RuntimeError,
            "gram_error_bound cannot be",
        ),
        (lambda: ops.abs_products(A[None]), ValueError, r"a must have shape \(n, m\); got \(1, 3, 4\)"),
        (lambda: ops.abs_products(A, W.float()), TypeError, "left must be float64; got float32"),
        (lambda: ops.abs_products(A, None, W), ValueError, r"right must have shape \(4,\) \(m from a\)"),
        (lambda: ops.abs_products(A, W[:2]), ValueError, r"left must have shape \(3,\) \(n from a\)"),
        (
            lambda: ops.abs_products(A, W.to("meta")),
            ValueError,
            "left must be on the device of a, cpu; got meta",
        ),
        (lambda: ops.abs_products(A, W.clone().requires_grad_()), RuntimeError, "abs_products cannot be"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_gradient_is_needed_under_no_grad():
    h = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not ops.gram_error_bound(h).requires_grad
