"""matrix_rank: torch.linalg.matrix_rank's answers, with bounds that hold; of any shape, layout and scale."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import RANK_TARGETS
from rank_cases import Spectrum, ldexp

import gcfast
from gcfast import matrix_rank, ops, reference
from gcfast.ops import rank as _ops_rank
from gcfast.proofs import rank_estimate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 8), (8, 3), (13, 7), (16, 16), (33, 31), (64, 128), (130, 70)]
SHAPES += [(3, 4), (4, 4), (5, 6), (7, 7), (8, 8), (9, 8), (9, 17), (12, 12), (15, 16), (17, 20), (31, 32)]
BEYOND = [(257, 260), (300, 258)]  # of what the kernels take
LAYOUTS = ["contiguous", "transposed", "strided", "column-major batch", "one matrix", "one row", "one column"]
FIELDS = ("rank", "lower", "upper", "sigma_min_lower", "sigma_max_upper")
on_each = pytest.mark.parametrize("target", RANK_TARGETS, indirect=True)


def fields(found):
    return [getattr(found, name) for name in FIELDS]


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(fields(one), fields(other), strict=True))


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def estimate(a, **tolerances):
    """matrix_rank(a), its shapes, dtypes and the order of its fields checked."""
    found = matrix_rank(a, **tolerances)
    extra = [t.shape for t in tolerances.values() if torch.is_tensor(t)]
    batch = torch.broadcast_shapes(a.shape[:-2], *extra)
    for name, value in zip(FIELDS, fields(found), strict=True):
        assert value.shape == batch and value.device == a.device and not value.requires_grad
        assert value.dtype == (torch.float64 if name.startswith("sigma") else torch.int64)
    assert bool(((found.lower >= 0) & (found.lower <= found.rank) & (found.rank <= found.upper)).all())
    assert bool((found.upper <= min(a.shape[-2:])).all())
    assert torch.equal(found.certified, found.lower == found.upper)
    assert bool((found.sigma_min_lower >= 0).all()) and bool((found.sigma_max_upper >= 0).all())
    return found


def compare(a, **tolerances):
    """Beside torch wherever no singular value is within an SVD's rounding of the tolerance; says where."""
    found = estimate(a, **tolerances)
    wide = a.float() if a.dtype in (torch.bfloat16, torch.float16) else a
    both = {k: torch.as_tensor(t, device=a.device) for k, t in tolerances.items()}  # torch takes no mixture
    want = torch.linalg.matrix_rank(wide, **both)
    assert found.rank.shape == want.shape
    s = torch.linalg.svdvals(wide.double())
    if s.shape[-1] == 0:
        assert torch.equal(found.rank, want)
        return torch.ones_like(want, dtype=torch.bool)
    eps = torch.finfo(wide.dtype).eps
    atol, rtol = tolerances.get("atol"), tolerances.get("rtol")
    a_tol = torch.as_tensor(0.0 if atol is None else atol, dtype=torch.float64, device=a.device)
    default = torch.where(a_tol > 0, 0.0, max(a.shape[-2:]) * eps) if atol is not None else None
    r_tol = rtol if rtol is not None else max(a.shape[-2:]) * eps if default is None else default
    tolerance = torch.maximum(a_tol, r_tol * s[..., 0])
    noise = min(4, max(a.shape[-2:]) / 2) * eps * s[..., :1]
    clear = (((s - tolerance[..., None]).abs() > noise) | (s[..., :1] == 0)).all(-1)
    assert torch.equal(found.rank[clear], want[clear])
    slack = 1 + 1e-12
    assert bool((found.sigma_max_upper * slack >= s[..., 0]).all())
    assert bool((found.sigma_min_lower <= s[..., -1] + 1e-13 * s[..., 0]).all())
    return clear


def low_rank(batch, n, m, r):
    return torch.randn(*batch, n, r).double() @ torch.randn(*batch, r, m).double() / math.sqrt(max(1, r))


def orthogonal(batch, n, m):
    q = torch.linalg.qr(torch.randn(*batch, max(n, m), min(n, m)).double())[0]
    return q.mT if n < m else q


def with_values(values, n, m):
    """Of these singular values, (..., min(n, m))."""
    k, batch = min(n, m), values.shape[:-1]
    return orthogonal(batch, n, k) * values[..., None, :] @ orthogonal(batch, k, m)


def duplicated_row(batch, n, m):
    a = torch.randn(*batch, n, m).double()
    a[..., -1, :] = a[..., 0, :]
    return a


KINDS = {
    "random": lambda b, n, m: torch.randn(*b, n, m).double(),
    "rank 1": lambda b, n, m: low_rank(b, n, m, 1),
    "half": lambda b, n, m: low_rank(b, n, m, min(n, m) // 2),
    "n - 1": lambda b, n, m: low_rank(b, n, m, min(n, m) - 1),
    "zero": lambda b, n, m: torch.zeros(*b, n, m).double(),
    "a zero row": lambda b, n, m: torch.randn(*b, n, m).double() * (torch.arange(n) != n // 2)[:, None],
    "a row twice": duplicated_row,
    "orthogonal": orthogonal,
}


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_torch(target, kind, dtype, poison):
    for n, m in SHAPES:
        a = KINDS[kind]((9 if n < 64 else 2,), n, m).to(target.device, dtype)
        clear = compare(a)
        if dtype in (torch.float64, torch.float32):  # rounded to half precision it is of full rank, just so
            assert bool(clear.all()), (n, m)
            assert bool(matrix_rank(a, rtol=1e-5).certified.all()), (n, m)
        if target.backend != "reference":
            assert ops.last_backend("batched_rank") == target.backend


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_torch_beyond_the_kernels(target, kind, dtype):
    for n, m in BEYOND:
        assert bool(compare(KINDS[kind]((2,), n, m).to(target.device, dtype)).all())


def kahan(n, m):
    c = math.cos(1.2)
    upper = torch.eye(n).double() - c * torch.ones(n, n).double().triu(1)
    return math.sin(1.2) ** torch.arange(n).double()[:, None] * upper


def hilbert(n, m):
    return 1 / (torch.arange(n)[:, None] + torch.arange(m) + 1).double()


FAMOUS = {
    "Kahan": kahan,
    "Hilbert": hilbert,
    "Vandermonde": lambda n, m: torch.linspace(-1, 1, n).double()[:, None] ** torch.arange(m),
    "graded": lambda n, m: 10.0 ** -torch.arange(n).double()[:, None] * torch.randn(n, m).double(),
    "wild": lambda n, m: torch.randn(n, m).double() * 10.0 ** torch.randint(-30, 31, (n, m)).double(),
    "wilder": lambda n, m: torch.randn(n, m).double() * 10.0 ** torch.randint(-300, 301, (n, m)).double(),
}


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("kind", FAMOUS)
def test_ill_conditioned_ones(target, kind):
    """Counts in exact arithmetic, where they are open to an SVD; torch's wherever they are not."""
    sizes = [(2, 2), (6, 6), (5, 9)] + ([(10, 10), (14, 14), (8, 24), (24, 24)] if kind != "wilder" else [])
    for n, m in sizes:
        a = FAMOUS[kind](n, n if kind == "Kahan" else m)
        for b in (a, a.float().double()) if kind != "wilder" else (a,):
            for tolerance in ({}, {"rtol": 1e-6}, {"atol": 1e-8}, {"atol": 0.0, "rtol": 0.0}):
                if kind != "wilder":
                    compare(b.to(target.device), **tolerance)
                found = estimate(b.to(target.device), **tolerance)
                atol = tolerance.get("atol", 0.0)
                rtol = tolerance.get("rtol", 0.0 if atol else max(b.shape) * 2.0**-52)
                if n < 24:
                    least, most = Spectrum(b).counts(atol, rtol)
                    assert int(found.lower) <= most and least <= int(found.upper)


@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("factor", [0.5, 0.99, 1.01, 2.0])
def test_singular_values_beside_the_tolerance(target, dtype, factor):
    for n, m in ((2, 2), (5, 9), (16, 16), (20, 12), (40, 64)):
        k = min(n, m)
        for level in (0.3, 1e-3, 1e-5)[: 3 if dtype == torch.float64 else 2]:
            values = torch.linspace(1, 2, k).double().expand(4, k).clone()
            values[:, : k // 2] = factor * level
            values[:, 0] = values[:, 0] if k > 2 else factor * level
            a = with_values(values, n, m).to(target.device, dtype)
            want = k if factor > 1 else k - max(1, k // 2)
            top = torch.linalg.svdvals(a.double())[:, 0]
            for tolerance in ({"atol": level}, {"rtol": level / top}, {"atol": level, "rtol": level / top}):
                clear = compare(a, **tolerance)
                found = matrix_rank(a, **tolerance)
                assert bool(clear.all()) and bool((found.rank == want).all())
                assert bool(found.certified.all())
        # torch's own tolerance: n eps is not far from what an SVD resolves, and only these factors are
        values = torch.ones(4, k).double()
        values[:, -1] = factor * max(n, m) * torch.finfo(dtype).eps
        clear = compare(with_values(values, n, m).to(target.device, dtype))
        assert bool(clear.all()) or factor in (0.99, 1.01) or dtype == torch.float32 or k < 5


@on_each
def test_above_means_strictly_above(target):
    a = torch.diag(torch.tensor([4.0, 3.0, 2.0, 2.0, 0.0], dtype=torch.float64, device=target.device))
    for tolerance, want in (
        ({"atol": 2.0}, 2),
        ({"atol": math.nextafter(2.0, 0)}, 4),
        ({"rtol": 0.5}, 2),
        ({"rtol": 0.5, "atol": 3.0}, 1),
        ({"rtol": 1.0}, 0),
        ({"rtol": 0.75}, 1),
        ({"atol": 4.0}, 0),
        ({"atol": math.inf}, 0),
        ({"atol": 0.0}, 4),
        ({}, 4),
    ):
        found = estimate(a, **tolerance)
        assert int(found.rank) == want == int(torch.linalg.matrix_rank(a, **tolerance)), tolerance
    assert int(estimate(a, atol=1).rank) == 4 and int(estimate(a, atol=torch.tensor(3)).rank) == 1


@on_each
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's own
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_tolerances_broadcast_as_torchs_do(target, dtype, poison):
    a = low_rank((3, 1), 6, 9, 4).to(target.device, dtype)

    def on(*values):
        return torch.tensor(values, dtype=torch.float64, device=target.device)

    cases = [
        {},
        {"atol": 0.5},
        {"rtol": 0.5},
        {"atol": 0.0},
        {"atol": on(0.0, 0.3, 1e-3, 5.0)},  # rtol is 0 where atol > 0, and else the default
        {"atol": on(0.0, 0.3).float()},
        {"rtol": on(1e-3, 0.2, 0.9, 1.5)},
        {"atol": on(0.4, 1e-3)[:, None, None], "rtol": on(1e-3, 0.1, 0.3)[:, None]},
        {"atol": on(0.3, 0.4, 0.5, 0.6)[::2], "rtol": on(1e-3)},
        {"atol": torch.tensor(0.25), "rtol": on(0.1).expand(3, 5)},
    ]
    for tolerances in cases:
        moved = {k: v.to(dtype) if torch.is_tensor(v) and v.dim() else v for k, v in tolerances.items()}
        assert bool(compare(a, **moved).all()), tolerances
        assert torch.equal(estimate(a, **tolerances).rank, matrix_rank(a, **moved).rank)


@on_each
@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (8,), (9,), (17,), (2, 3, 4), (3, 0), (5, 1, 2)])
def test_batches(target, batch, poison):
    for n, m in ((5, 5), (12, 9)):
        a = low_rank(batch, n, m, 4).to(target.device)
        assert bool(compare(a).all())
        assert bool((estimate(a).rank == 4).all())
        assert bool(estimate(a, rtol=1e-9).certified.all())


@on_each
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 0, 4), (3, 4, 0), (0, 3, 3), (2, 0, 0, 3)])
def test_matrices_without_entries(target, shape):
    a = torch.zeros(shape, device=target.device)
    assert bool(compare(a).all()) and bool(compare(a, atol=1.0).all())
    found = estimate(a)
    assert bool((found.upper == 0).all())
    assert bool((found.sigma_min_lower == math.inf).all()) and bool((found.sigma_max_upper == 0).all())


def laid_out(a, layout):
    """The values of `a` (b, n, m), or of a part of it, in another layout; NaN in between."""
    b, n, m = a.shape
    if layout == "transposed":
        return a.mT.contiguous().mT
    if layout == "column-major batch":
        return a.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "strided":
        around = torch.full((2 * b, 3 * n, 2 * m), math.nan, dtype=a.dtype, device=a.device)
        return around[1::2, 2::3, ::2].copy_(a)
    if layout in ("one matrix", "one row", "one column"):
        part = {"one matrix": a[:1], "one row": a[:, :1], "one column": a[:, :, :1]}[layout]
        return part.expand(b, n, m)
    return a


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, dtype, poison):
    for n, m in ((8, 24), (24, 8), (13, 11), (3, 3), (9, 270)):
        a = torch.randn(11, n, m).to(target.device, dtype)
        x = laid_out(a, layout)
        found, alike = estimate(x), matrix_rank(x.contiguous())
        assert same(found, alike)
        assert torch.equal(found.rank, torch.linalg.matrix_rank(x.double(), rtol=1e-5))
        assert torch.equal(matrix_rank(x[1:]).rank, found.rank[1:])


@pytest.mark.parametrize("which", ["batch", "rows", "columns", "all"])
def test_offsets_beyond_32_bits(which):
    """Matrices spread over more than 2^31 elements, of which only the pages they touch are ever there."""
    try:
        store = torch.empty(2**31 + 2**29, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"so much address space is not to be had: {error}")
    far = 2**31 // 6
    strides = {"batch": (far, 8, 1), "rows": (100, far, 1), "columns": (100, 1, far), "all": (far, 997, 31)}
    size = {"batch": (7, 5, 8), "rows": (9, 7, 5), "columns": (9, 5, 7), "all": (7, 6, 5)}[which]
    view = store.as_strided(size, strides[which])
    assert sum((k - 1) * s for k, s in zip(size, strides[which])) > 2**31
    values = low_rank(size[:1], *size[1:], 3).float()
    view.copy_(values)
    with ops.backend("cpu"):
        assert same(matrix_rank(view), matrix_rank(values))
    assert bool((matrix_rank(view).rank == 3).all())


@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_scales(target, dtype):
    """A power of two changes nothing but the bounds of the singular values, and these by as much."""
    extreme = 1000 if dtype == torch.float64 else 110
    for values in (torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([3.0, 2.0, 1e-3, 0.0])):
        a = with_values(values.double().expand(5, 4), 4, 7).to(dtype)
        a = a - 2 * a.fmod(torch.tensor(2.0**-20, dtype=dtype))  # so short that no bit is lost
        plain = estimate(a.to(target.device), rtol=1e-2)
        for k in (-extreme, -360, -340, -30, 30, 340, 360, extreme):
            if abs(k) > extreme:
                continue
            scaled = ldexp(a, k)
            assert torch.equal(ldexp(scaled, -k), a)
            found = estimate(scaled.to(target.device), rtol=1e-2)
            for one, other in zip(fields(found)[:3], fields(plain)[:3]):
                assert torch.equal(one, other), k
            largest = ldexp(plain.sigma_max_upper, k)
            torch.testing.assert_close(found.sigma_max_upper, largest, rtol=1e-3, atol=0)
            least = ldexp(plain.sigma_min_lower, k)
            torch.testing.assert_close(found.sigma_min_lower, least, rtol=1e-3, atol=0)


@on_each
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-150, 1.0, 1e150, 1e160, 1e300, 2.0**-1050, 2.0**-1074])
def test_decimal_scales_and_denormals(target, size):
    whole = torch.randint(-9, 10, (6, 4, 3)).double() @ torch.randint(-9, 10, (6, 3, 6)).double()
    for entries, rank in ((whole, 3), (torch.eye(4, 6, dtype=torch.float64).expand(6, 4, 6), 4)):
        a = entries * size
        found = estimate(a.to(target.device))
        assert bool((found.rank == rank).all()) or size < 2.0**-1040
        for x, low, high in zip(a, found.sigma_min_lower.tolist(), found.sigma_max_upper.tolist()):
            assert Spectrum(x).signs(low)[0] == 0 and Spectrum(x).above(high) == 0
        for x, low, high in zip(a, found.lower.tolist(), found.upper.tolist()):
            least, most = Spectrum(x).counts(0.0, 6 * 2.0**-52)
            assert low <= most and least <= high


def wild_neighbours(n, m, dtype):
    """A batch of all that takes another way through the kernels."""
    a = [torch.randn(n, m).double(), torch.zeros(n, m).double(), low_rank((), n, m, max(1, n // 2))]
    a += [with_values(10.0 ** torch.linspace(0, -e, min(n, m)).double(), n, m) for e in (3, 7, 9, 12)]
    extreme = 300 if dtype == torch.float64 else 37
    a += [torch.randn(n, m).double() * 10.0**e for e in (-extreme, extreme, -5)]
    a += [torch.ones(n, m).double(), torch.eye(n, m).double(), duplicated_row((), n, m)]
    return torch.stack(a).to(dtype)


@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(4, 4), (7, 12), (16, 16), (33, 20)])
def test_a_matrix_does_not_depend_on_its_neighbours(target, shape, dtype, monkeypatch):
    """Not by a bit, alone or in any place of a batch, where a kernel decides; an SVD may round."""
    undecided = []
    monkeypatch.setattr(_ops_rank, "_merge", lambda out, where, better: undecided.append(where))
    many = wild_neighbours(*shape, dtype).to(target.device)
    for tolerance in ({}, {"atol": 1e-3}, {"atol": 0.0, "rtol": 0.0}, {"rtol": 1e-8}):
        alone = [ops.batched_rank(x[None], *limits(x[None], tolerance)) for x in many]
        for _ in range(4):
            order = torch.randint(0, len(many), (random.Random(len(undecided)).randint(2, 30),))
            a = many[order.to(target.device)]
            together = ops.batched_rank(a, *limits(a, tolerance))
            for i, k in enumerate(order.tolist()):
                for one, other in zip(alone[k], together, strict=True):
                    if target.backend == "reference":
                        torch.testing.assert_close(one[0], other[i], rtol=1e-6, atol=1e-290)
                    else:
                        assert torch.equal(one[0], other[i])
    assert undecided or target.backend == "reference"


def limits(a, tolerance):
    n = len(a)
    atol = torch.full((n,), tolerance.get("atol", 0.0), dtype=torch.float64, device=a.device)
    return atol, torch.full_like(atol, tolerance.get("rtol", 1e-14))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_number_of_threads_changes_no_bit(dtype):
    for n, m, batch in ((5, 5, 200), (16, 24, 150), (40, 33, 40)):
        a = torch.cat([wild_neighbours(n, m, dtype), low_rank((batch,), n, m, n // 2).to(dtype)])
        found = []
        for number in (1, 2, 3, 7):
            with threads(number), ops.backend("cpu"):
                found.append(matrix_rank(a, atol=1e-3))
        assert all(same(found[0], other) for other in found[1:])


@on_each
def test_repeats_bit_for_bit(target):
    a = wild_neighbours(12, 17, torch.float64).to(target.device)
    assert same(matrix_rank(a), matrix_rank(a)) and same(matrix_rank(a), matrix_rank(a.clone()))


@on_each
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_kernels_leave_no_gap_to_an_svd(target, dtype, monkeypatch):
    """Where nothing lies near the tolerance a kernel decides, and proves: half of them deficient, too."""
    if target.backend == "reference":
        pytest.skip("it is the SVD")
    monkeypatch.setattr(_ops_rank, "_merge", lambda *args: pytest.fail("an SVD was asked"))
    for n, m in ((4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (64, 128)):
        a = torch.randn(6, n, m).double()
        a[::2] = low_rank((3,), n, m, n // 2)
        for scale in (1.0, 1e-30, 1e30):
            rtol = None if n >= 16 else 1e-6  # of small ones torch's tolerance is all that rounding leaves
            found = matrix_rank((a * scale).to(target.device, dtype), rtol=rtol)
            assert found.rank.tolist() == [n // 2, n] * 3 and bool(found.certified.all())


def undecided_matrices(batch, n, m, tolerance):
    """One singular value at the tolerance, one 1 % to 5 % above it, all else 1."""
    values = torch.ones(batch, n).double()
    values[:, -2] = 1.05 - 0.04 * torch.rand(batch)
    values[:, -1] = 1 + 0.02 * (torch.rand(batch) - 0.5)
    values[:, -2:] *= tolerance
    return with_values(values, n, m)


@on_each
def test_rank_lies_within_its_bounds_whoever_proved_them(target, monkeypatch):
    """An SVD decides what double-double leaves open, but may resolve less of what it has proved."""
    for tolerance in (1e-5, 1e-13, 1e-14):
        a = undecided_matrices(500, 4, 4, tolerance).to(target.device)
        estimate(a, atol=tolerance)
    if target.backend == "reference":
        return
    asked = []

    def says(count):
        def svd(a, atol, rtol):
            asked.append(len(a))
            nothing, n = torch.zeros(len(a), dtype=torch.int64, device=a.device), min(a.shape[1:])
            return nothing + count, nothing, nothing + n, nothing.double(), nothing.double() + math.inf

        return svd

    a = with_values(torch.tensor([3.0, 2.0, 1.0, 1e-3]).double().expand(5, 4), 4, 6).to(target.device)
    at = torch.linalg.svdvals(a)[:, 2]  # a tie: two or three are above
    for count in (0, 2, 3, 4):
        monkeypatch.setattr(_ops_rank.reference, "batched_rank", says(count))
        found = estimate(a, atol=at)
        assert bool((found.lower == 2).all()) and bool((found.upper == 3).all())
        assert bool((found.rank == min(max(count, 2), 3)).all())
        assert bool((found.sigma_max_upper < 3.2).all())
    assert len(asked) == 4


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(target, value, dtype):
    for n, m in ((3, 4), (9, 2), (40, 41), (258, 257)):
        a = torch.randn(2, 5, n, m, dtype=dtype, device=target.device)
        a[1, 2, n // 2, m - 1] = value
        with pytest.raises(ValueError, match="A must be finite; matrix 7 of 10 has a NaN or an infinity"):
            matrix_rank(a)
        with pytest.raises(ValueError, match="matrix 0 of 1"):
            matrix_rank(a[1, 2].mT)


A = torch.ones(3, 4, 5)
FLOAT4 = torch.ones((4, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: matrix_rank([[1.0]]), TypeError, "A must be a tensor; got list"),
        (lambda: matrix_rank(A.cfloat()), TypeError, "A must be real; got torch.complex64"),
        (lambda: matrix_rank(A.int()), TypeError, "A must have a floating dtype; got torch.int32"),
        (lambda: matrix_rank(A.bool()), TypeError, "A must have a floating dtype; got torch.bool"),
        (lambda: matrix_rank(FLOAT4), TypeError, "A must have a floating dtype .* got torch.float4"),
        (lambda: matrix_rank(A[0, 0]), ValueError, r"A must have shape \(..., n, m\); got \(5,\)"),
        (lambda: matrix_rank(A, atol=-1e-9), ValueError, "atol must be >= 0; got -1e-09"),
        (lambda: matrix_rank(A, rtol=-1), ValueError, "rtol must be >= 0; got -1"),
        (lambda: matrix_rank(A, atol=math.nan), ValueError, "atol must be >= 0; got nan"),
        (lambda: matrix_rank(A, rtol=math.nan), ValueError, "rtol must be >= 0; got nan"),
        (
            lambda: matrix_rank(A, atol=torch.tensor([0.0, -1.0, 0.0])),
            ValueError,
            "atol must be >= 0; got -1.0 for matrix 1",
        ),
        (
            lambda: matrix_rank(A, rtol=torch.tensor([0.0, 0.0, math.nan])),
            ValueError,
            "rtol must be >= 0; got nan for matrix 2",
        ),
        (
            lambda: matrix_rank(A, atol=torch.ones(2)),
            ValueError,
            r"atol and rtol must broadcast with the batch shape of A, \(3,\); got \(2,\) and",
        ),
        (lambda: matrix_rank(A, rtol=torch.ones(2)), ValueError, r"got \(2,\)"),
        (
            lambda: matrix_rank(A, atol=torch.ones(3, device="meta")),
            ValueError,
            "atol must be on the device of A, cpu; got meta",
        ),
        (lambda: matrix_rank(A, atol="1"), TypeError, "atol must be a real number or a real tensor; got str"),
        (lambda: matrix_rank(A, atol=True), TypeError, "atol must be a real number .*; got bool"),
        (lambda: matrix_rank(A, rtol=1j), TypeError, "rtol must be a real number .*; got complex"),
        (lambda: matrix_rank(A, rtol=A.bool()), TypeError, "rtol must be a real number .*; got torch.bool"),
        (lambda: ops.batched_rank(A.half(), A[:, 0, 0], A[:, 0, 0]), TypeError, "a must be float32 or"),
        (lambda: ops.batched_rank(A[0], A[0], A[0]), ValueError, r"a must have shape \(B, n, m\)"),
        (lambda: ops.batched_rank(A, A[:, 0, 0], A[:, 0, 0]), TypeError, "atol must be float64"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@on_each
def test_bad_tolerances_are_named_on_each_backend(target):
    for n in (4, 258):
        a = torch.randn(3, n, n, device=target.device)
        bad = torch.tensor([0.0, 1.0, -1.0], device=target.device)
        for name in ("atol", "rtol"):
            with pytest.raises(ValueError, match=f"{name} must be >= 0; got -1.0 for matrix 2"):
                matrix_rank(a, **{name: bad})


@on_each
def test_nothing_is_differentiated(target):
    a = torch.randn(3, 4, 5, device=target.device, requires_grad=True)
    atol = torch.full((3,), 0.1, device=target.device, requires_grad=True)
    estimate(a, atol=atol)
    estimate(a * 2)


@on_each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_contract(target):
    a = torch.randn(5, 6, 4, device=target.device)
    zero = torch.zeros(5, dtype=torch.float64, device=target.device)
    torch.library.opcheck(torch.ops.gcfast.batched_rank.default, (a, zero, zero + 1e-6))
    torch.library.opcheck(torch.ops.gcfast.batched_rank.default, (a.double().mT, zero, zero))

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def compiled(x, t):
        found = matrix_rank(x, atol=t)
        return found.rank + 1, found.sigma_max_upper

    for x in (a, torch.randn(7, 3, 9, device=target.device)):
        for t in (1e-3, zero[:1] + 0.5):
            rank, largest = compiled(x, t)
            plain = matrix_rank(x, atol=t)
            assert torch.equal(rank, plain.rank + 1) and torch.equal(largest, plain.sigma_max_upper)


def test_fake_kernels_give_shapes_and_dtypes():
    with torch._subclasses.FakeTensorMode():
        for size, dtype, atol in (
            ((2, 3, 6, 4), torch.bfloat16, torch.empty(5, 1, 1)),
            ((6, 4), torch.float64, 1e-3),
            ((0, 300, 4), torch.float32, None),
        ):
            found = matrix_rank(torch.empty(size, dtype=dtype), atol=atol)
            batch = (5, 2, 3) if len(size) == 4 else size[:-2]
            assert [tuple(t.shape) for t in fields(found)] == [batch] * 5
            assert [t.dtype for t in fields(found)] == [torch.int64] * 3 + [torch.float64] * 2


@pytest.mark.parametrize("compiling", [False, True])
def test_no_rtol_beside_an_atol(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for atol, rtol in ((0.0, 0.25), (2.0**-1074, 0.0), (1.0, 0.0)):
        assert rank_estimate._relative(atol, 0.25) == rtol
        assert float(rank_estimate._relative(torch.tensor(atol, dtype=torch.float64), 0.25)) == rtol


@pytest.mark.parametrize("tolerance", [np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_a_tolerance_may_be_any_real_number(tolerance):
    eye = torch.eye(3, dtype=torch.float64)
    assert (
        int(matrix_rank(eye, atol=tolerance).rank)
        == int(matrix_rank(eye, rtol=tolerance).rank)
        == 3 * (tolerance < 1)
    )


def test_a_tolerance_of_one_number_may_be_on_another_device():
    # refused for having no numbers, not for its place
    with pytest.raises(TypeError, match="atol: expected a dense tensor"):
        matrix_rank(A, atol=torch.zeros((), device="meta"))


def test_what_it_prints():
    a = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    assert str(matrix_rank(a, atol=1.0)).startswith("rank 2 (proved), 0.000e+00 <= sigma <= 4.")
    tie = str(matrix_rank(a, atol=2.0))
    assert tie.startswith("rank 1 (") and "to" in tie and "proved" in tie
    many = torch.stack([a, torch.eye(3), a])
    assert str(matrix_rank(many, atol=0.9)) == "ranks 2 to 3, 3 of 3 proved"
    assert str(matrix_rank(torch.zeros(0, 3, 3))) == "0 of 0 proved"
    assert gcfast.matrix_rank is matrix_rank and "matrix_rank" in gcfast.__all__


@pytest.mark.parametrize("most", [0, 1, 2], ids=["none", "a factor alone", "single matrices"])
def test_an_svd_that_does_not_converge_leaves_bounds_that_hold(most, monkeypatch):
    """LAPACK's fails for some matrices, at times one of a whole batch."""
    svd, calls = torch.linalg.svd, []

    def failing(x, full_matrices=True):
        calls.append(x.shape)
        converges = (False, x.shape[-1] == x.shape[-2], len(x) == 1)[most]
        if not converges:
            raise torch.linalg.LinAlgError("linalg.svd: failed to converge")
        return svd(x, full_matrices=full_matrices)

    a = torch.randn(3, 4, 7, dtype=torch.float64)
    a[1, 2] = a[1, 0] + a[1, 1]
    zero = torch.zeros(3, dtype=torch.float64)
    plain = reference.batched_rank(a, zero, zero + 1e-12)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    rank, lower, upper, least, largest = reference.batched_rank(a, zero, zero + 1e-12)
    true = torch.tensor([4, 3, 4])
    assert bool(((lower <= true) & (true <= upper)).all()) and len(calls) > 1
    values = torch.linalg.svdvals(a)
    assert bool((least <= values[:, -1]).all() and (largest >= values[:, 0]).all())
    if most:
        assert torch.equal(rank, true) and torch.equal(lower, plain[1]) and lower.tolist() == [4, 3, 4]
