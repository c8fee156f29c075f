"""What matrix_rank and prove_full_rank prove, judged in exact arithmetic on matrices made to deceive them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import RANK_TARGETS
from rank_cases import (
    FAMILIES,
    Spectrum,
    biased_sums,
    combination,
    exact_rank,
    integers,
    ldexp,
    product,
    repeated_columns,
    scaled,
    small_first_pivot,
)

from gcfast import matrix_rank, ops, reference
from gcfast.ops import rank as _ops_rank
from gcfast.proofs.full_rank import prove_full_rank

pytest.importorskip("flint")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = [torch.float32, torch.float64]
SMALL = [(2, 2), (2, 5), (3, 3), (4, 7), (5, 5), (7, 4), (8, 8), (9, 13)]
LARGE = [(17, 16), (24, 40), (40, 40), (64, 128), (128, 128)]
IN_LARGE = [product, combination, repeated_columns]
on_each = pytest.mark.parametrize("target", RANK_TARGETS, indirect=True)
names = [f.__name__ for f in FAMILIES]
LEVELS = {"double": 2.0**-53, "double-double": 2.0**-106}


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices gain nothing from more, and on a busy machine lose much; test_rank.py varies them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20240501)


def judged(target, a, **tolerances):
    """The estimate's tensors on the CPU, its own order of bounds checked."""
    tolerances = {k: v.to(target.device) if torch.is_tensor(v) else v for k, v in tolerances.items()}
    found = matrix_rank(a.to(target.device), **tolerances)
    rank, lower, upper = found.rank.cpu(), found.lower.cpu(), found.upper.cpu()
    assert bool(((lower <= rank) & (rank <= upper)).all())
    return found, lower, upper


def check_ranks(target, a):
    """lower <= the exact rank without a tolerance and with torch's; returns the exact ranks."""
    exact = torch.tensor([exact_rank(x) for x in a])
    for tolerances in ({"atol": 0.0, "rtol": 0.0}, {}):
        _, lower, _ = judged(target, a, **tolerances)
        assert bool((lower <= exact).all()), (int((lower > exact).nonzero()[0]), tolerances)
    return exact


def check_counts(target, a, atol):
    """lower <= the exact number of singular values above atol <= upper; returns that number."""
    exact = torch.tensor([Spectrum(x).above(float(t)) for x, t in zip(a, atol)])
    _, lower, upper = judged(target, a, atol=atol)
    wrong = (lower > exact) | (upper < exact)
    assert not bool(wrong.any()), [(int(t[wrong][0])) for t in (lower, exact, upper)]
    return exact


def check_extremes(target, a):
    """sigma_min_lower and sigma_max_upper against the exact spectrum."""
    found, *_ = judged(target, a, atol=0.0, rtol=0.0)
    for x, least, largest in zip(a, found.sigma_min_lower.tolist(), found.sigma_max_upper.tolist()):
        spectrum = Spectrum(x)
        assert spectrum.signs(least)[0] == 0, "a singular value below sigma_min_lower"
        assert largest == math.inf or spectrum.above(largest) == 0, "one above sigma_max_upper"


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_no_rank_above_the_exact_one_is_proved(target, family, dtype, generator):
    deficient = 0
    for n, m in SMALL:
        deficient += int((check_ranks(target, family(generator, 64, n, m, dtype)) < min(n, m)).sum())
    for n, m in LARGE if family in IN_LARGE else ():
        check_ranks(target, family(generator, 1 if n > 40 else 3, n, m, dtype))
    # each matters: the deficient ones, and those of full rank by a hair
    assert deficient > 64 if "one_ulp" not in family.__name__ else deficient == 0


@on_each
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_counts_at_the_level_of_rounding(target, family, level, generator):
    """Tolerances around what the Gram's rounding may move, in double and in double-double."""
    for n, m, batch in ((3, 3, 32), (4, 7, 32), (6, 40, 16), (4, 1200, 6)):
        a = family(generator, batch, n, m, torch.float64)
        squares = a.square().sum((1, 2)) * level * m
        factor = 10 ** (5 * torch.rand(batch, generator=generator, dtype=torch.float64) - 2)
        check_counts(target, a, (squares * factor).sqrt())


@on_each
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("family", [biased_sums, repeated_columns], ids=lambda f: f.__name__)
def test_counts_where_all_roundings_go_one_way(target, family, level, generator):
    """Sums that come near their error bounds; tolerances between what is and what is computed."""
    for n, m, batch in ((2, 700, 150), (2, 4000, 50), (3, 700, 100), (3, 3000, 50)):
        a = family(generator, batch, n, m, torch.float64)
        squares = a.square().sum((1, 2)) * level * m
        factor = 10 ** (2 * torch.rand(batch, generator=generator, dtype=torch.float64) - 1.7)
        check_counts(target, a, (squares * factor).sqrt())


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("shape", [(3, 3), (4, 5), (5, 9), (8, 8)])
def test_counts_where_an_elimination_without_pivots_grows(target, shape, level, generator):
    check_counts(target, *small_first_pivot(generator, 3000, *shape, level))


def hadamard(order: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def beside(value: torch.Tensor) -> torch.Tensor:
    """The value, its neighbours, and 1e-12 and 1e-9 to each side of it: (7, ...)."""
    up, down = (torch.nextafter(value, torch.full_like(value, s * math.inf)) for s in (1, -1))
    return torch.stack([value, up, down, *(value * (1 + d) for d in (1e-12, -1e-12, 1e-9, -1e-9))])


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("scale", [0, -30, 200, -330, 400, -480])
def test_counts_at_exact_singular_values(target, scale, generator):
    """Rows d_i times a Hadamard matrix's, permuted: the singular values are d_i sqrt(order), exactly."""
    for order, batch in ((1, 8), (4, 24), (16, 12), (64, 2)):
        n = max(1, order - 1)
        d = torch.randint(0, 9, (batch, n), generator=generator).double()
        d[:, 0] = 1 + 2.0 ** -torch.randint(1, 52, (batch,), generator=generator).double()
        a = d[..., None] * hadamard(order)[:n, torch.randperm(order, generator=generator)] * 2.0**scale
        at = d[:, -1].clamp(min=1) * math.sqrt(order) * 2.0**scale
        at[::2] = d[::2, 0] * math.sqrt(order) * 2.0**scale
        for atol in beside(at):
            exact = (d * math.sqrt(order) * 2.0**scale > atol[:, None]).sum(-1)
            assert torch.equal(check_counts(target, a, atol), exact)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_beside_any_singular_value(target, dtype, generator):
    for n, m, batch in ((1, 4, 16), (2, 2, 24), (3, 5, 24), (6, 6, 24), (12, 16, 6), (24, 24, 1)):
        for spread in (0, 2, 8):
            grade = 10 ** (-spread * torch.rand(batch, n, 1, generator=generator))
            a = (grade * torch.randn(batch, n, m, generator=generator)).to(dtype)
            values = torch.linalg.svdvals(a.double())
            k = torch.randint(0, min(n, m), (batch, 1), generator=generator)
            for atol in beside(values.gather(1, k)[:, 0]):
                check_counts(target, a, atol)


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_above_a_share_of_the_largest(target, dtype, generator):
    batch = 10
    for n, m in ((2, 2), (3, 7), (6, 6), (9, 5)):
        for family in (None, product, scaled(product, 12)):
            a = torch.randn(batch, n, m, generator=generator).to(dtype)
            a = a if family is None else family(generator, batch, n, m, dtype)
            s = torch.linalg.svdvals(a.double())
            k = torch.randint(0, min(n, m), (batch, 1), generator=generator)
            shares = (s.gather(1, k)[:, 0] / s[:, 0]).clamp(min=1e-13)
            for rtol in (*beside(shares), torch.full_like(shares, 1.0), torch.full_like(shares, 2.0)):
                atol = s[:, -1] * (torch.arange(batch) % 3 == 0)
                exact = torch.tensor(
                    [Spectrum(x).counts(float(p), float(q)) for x, p, q in zip(a, atol, rtol)]
                )
                _, lower, upper = judged(target, a, atol=atol, rtol=rtol)
                assert bool((lower <= exact[:, 1]).all()) and bool((exact[:, 0] <= upper).all())


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_bounds_of_the_extreme_singular_values(target, family, dtype, generator):
    for n, m in (*SMALL[1:5], (2, 700)):  # the last one for sums whose roundings go one way
        a = torch.randn(8, n, m, generator=generator).to(dtype)
        a = torch.cat([family(generator, 8, n, m, dtype), a])
        check_extremes(target, a)


@on_each
def test_counts_where_many_rows_nearly_make_another(target, generator):
    """Up to its rounding the last row is the sum of the others, half of them with a minus: partial sums are
    large, what is left of them is the smallest singular value, and the tolerances lie beside that."""
    n, m, batch = 33, 33, 48
    a = 0.5 + 0.5 * torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    weights = 1 - 0.1 * torch.rand(batch, n, generator=generator, dtype=torch.float64)
    weights[:, n // 2 :] *= -1
    weights[:, -1] = -1
    a[:, -1] = (weights[:, None, :-1] @ a[:, :-1])[:, 0]
    whole = (a * 2.0**53).mT.tolist(), (weights * 2.0**53).tolist()  # whole numbers: the sums are exact
    left = [[sum(int(u) * int(v) for u, v in zip(x, w)) for x in columns] for columns, w in zip(*whole)]
    left = torch.tensor(left, dtype=torch.float64)[..., None] * 2.0**-106
    across = torch.linalg.qr(a[:, :-1].mT)[0]
    least = (left - across @ (across.mT @ left)).norm(dim=(1, 2)) / weights.norm(dim=1)
    for share, count in ((0.9, n), (0.99, n), (1.01, n - 1)):
        _, lower, upper = judged(target, a, atol=share * least)
        assert bool(((lower <= count) & (count <= upper)).all()), (share, upper)


@on_each
@pytest.mark.parametrize("exponent", [-1074, -1060, -1000, -700, -512, -346, -344, 344, 346, 512, 700, 900])
def test_deficient_ones_near_the_ends_of_the_range(target, exponent, generator):
    """Squares that under- or overflow, and rows of the greatest difference that can be."""
    factors = integers(generator, 32, 4, 3, high=9), integers(generator, 32, 3, 6, high=9)
    a = ldexp(factors[0] @ factors[1], exponent)
    assert exact_rank(a[0]) == exact_rank(factors[0][0] @ factors[1][0])  # nothing was lost
    check_ranks(target, a)
    check_counts(target, a, torch.linalg.svdvals(factors[0] @ factors[1])[:, 2] * 2.0 ** min(exponent, 1000))
    mixed = a.clone()
    mixed[:, :2] = ldexp(mixed[:, :2], -exponent)  # rows 2 and 3 stay as they are
    check_ranks(target, mixed)
    full = integers(generator, 16, 2, 6, high=2)  # sqrt(k) 2^exponent, rounded anywhere
    full = ldexp(full, exponent)
    for x in (mixed, full, full[:, :1]):
        check_extremes(target, x)


def test_a_deficient_matrix_is_never_proved_to_have_full_rank(generator):
    seen = 0
    for family in FAMILIES:
        for dtype in DTYPES:
            for n, m in ((2, 2), (3, 3), (4, 7), (8, 8), (24, 40), (64, 64)):
                for x in family(generator, 6 if n < 24 else 1, n, m, dtype):
                    proof = prove_full_rank(x, ones=False)
                    exact = exact_rank(x)
                    seen += exact < n
                    assert not proof.proved or exact == n, (family.__name__, n, m)
                    with_ones = torch.cat([x, torch.ones(n, 1, dtype=dtype)], 1)
                    if n <= 8 and prove_full_rank(x).proved:
                        assert exact_rank(with_ones) == n
    assert seen > 400


def of_spectrum(generator, batch, n, m, values):
    q = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))[0]
    p = torch.linalg.qr(torch.randn(batch, m, n, generator=generator, dtype=torch.float64))[0]
    return (q * values) @ p.mT


SPECTRA = {
    "geometric": lambda n, c: c ** -torch.linspace(0, 1, n, dtype=torch.float64),
    "one small": lambda n, c: torch.cat([torch.ones(n - 1), torch.tensor([1 / c])]).double(),
    "one large": lambda n, c: torch.cat([torch.ones(1), torch.full((n - 1,), 1 / c)]).double(),
    "arithmetic": lambda n, c: torch.linspace(1, 1 / c, n, dtype=torch.float64),
    "harmonic": lambda n, c: 1 / torch.linspace(1, c, n, dtype=torch.float64),
}


@on_each
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e10])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_full_rank_up_to_a_condition_of_1e10_is_always_proved(
    target, spectrum, condition, generator, monkeypatch
):
    if target.backend != "reference":  # by a kernel, and not by the SVD of what it leaves open

        def refuse(*args):
            raise AssertionError("a kernel left it open")

        monkeypatch.setattr(_ops_rank.reference, "batched_rank", refuse)
    for n, m, batch in ((2, 2, 9), (5, 8, 9), (16, 16, 9), (33, 47, 3), (100, 100, 1), (256, 256, 1)):
        a = of_spectrum(generator, batch, n, m, SPECTRA[spectrum](n, condition))
        found, lower, _ = judged(target, a, atol=0.0, rtol=0.0)
        assert bool((lower == n).all()) and bool(found.certified.all())
        least = found.sigma_min_lower * condition
        # the proof of the double-double kernel takes L's inverse, whose norm is known to a factor at worst
        assert bool((least <= 1 + 1e-4).all()) and bool((least > 0.1 / n).all()), (n, least)
        assert bool((found.sigma_max_upper >= 1 - 1e-13).all())


def test_the_svd_is_proved_by_itself(generator):
    """reference.batched_rank trusts nothing of an SVD: a wrong one gives weak bounds, not wrong ones."""
    a = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64)
    atol, exact = torch.full((6,), 1.5, dtype=torch.float64), [Spectrum(x).above(1.5) for x in a]
    real = torch.linalg.svd
    ways = {
        "values": lambda u, s, v: (u, s * 1.5, v),
        "left": lambda u, s, v: (u * 1.1, s, v),
        "right": lambda u, s, v: (u, s, v.roll(1, -1)),
        "order": lambda u, s, v: (u, s.flip(-1).clone().sort(descending=True)[0] * 0, v),
    }
    for name, spoil in ways.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "svd", lambda x, spoil=spoil, **kw: spoil(*real(x, **kw)))
            _, lower, upper, least, largest = reference.batched_rank(a, atol, torch.zeros_like(atol))
        assert all(low <= e <= up for low, e, up in zip(lower.tolist(), exact, upper.tolist())), name
        for x, lo, hi in zip(a, least.tolist(), largest.tolist()):
            assert Spectrum(x).signs(lo)[0] == 0 and Spectrum(x).above(hi) == 0, name


@st.composite
def floats_with_repeats(draw):
    """Small matrices of arbitrary floats in which rows are combinations of each other, exactly or nearly."""
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    low = draw(st.integers(-40, 20))
    entry = st.one_of(
        st.integers(-4, 4).map(float),
        st.integers(-(2**53), 2**53).map(float),
        st.tuples(st.integers(-(2**52), 2**52), st.integers(low, low + 30)).map(lambda p: math.ldexp(*p)),
        st.sampled_from([0.0, 1.0, 1 + 2.0**-52, 1 - 2.0**-53, 2.0**26 + 1, 2.0**-537, 2.0**-1074, 2.0**345]),
    )
    rows = draw(st.lists(st.lists(entry, min_size=m, max_size=m), min_size=n, max_size=n))
    a = torch.tensor(rows, dtype=torch.float64)
    for _ in range(draw(st.integers(0, 3))):
        i, j, k = (draw(st.integers(0, n - 1)) for _ in range(3))
        a[i] = a[j] * draw(st.sampled_from([1.0, -2.0, 0.5])) + a[k] * draw(st.sampled_from([0.0, 1.0, -4.0]))
    return a


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
@hypothesis.given(a=floats_with_repeats(), at=st.floats(0, 1e6), which=st.integers(0, 5))
def test_any_matrix(a, at, which):
    spectrum, exact = Spectrum(a), exact_rank(a)
    s = torch.linalg.svdvals(a)
    for atol in (0.0, at, float(s[which % len(s)])):
        if not math.isfinite(atol):
            continue
        for backend in ("cpu", "reference"):
            with ops.backend(backend):
                found = matrix_rank(a, atol=atol, rtol=0.0)
            assert found.lower <= spectrum.above(atol) <= found.upper and found.lower <= exact
            assert spectrum.signs(float(found.sigma_min_lower))[0] == 0
            largest = float(found.sigma_max_upper)
            assert largest == math.inf or spectrum.above(largest) == 0


def test_the_judges_can_tell():
    """exact_rank and Spectrum on what is known by hand."""
    a = torch.diag(torch.tensor([3.0, 0.0, 2.0, 3.0 + 2.0**-50], dtype=torch.float64))
    assert exact_rank(a) == 3 and exact_rank(torch.zeros(2, 3)) == 0 and exact_rank(torch.zeros(0, 3)) == 0
    signs = [Spectrum(a).signs(t) for t in (0.0, 2.0, 2.5, 3.0)]
    assert signs == [(0, 1, 3), (1, 1, 2), (2, 0, 2), (2, 1, 1)]
    assert Spectrum(a[:2]).signs(1e-300) == (1, 0, 1)
    assert Spectrum(a).counts(0.0, 1.0) == (0, 1)  # a tie with the largest itself
    assert Spectrum(a).counts(0.0, 0.9) == (2, 2) and Spectrum(a).counts(2.0, 0.5) == (2, 2)
    assert Spectrum(a.ldexp(torch.tensor(-1000))).above(2.0**-999) == 2
    tiny = torch.tensor([[2.0**-1074, 0.0], [0.0, 2.0**900]], dtype=torch.float64)
    assert exact_rank(tiny) == 2 and Spectrum(tiny).above(2.0**-1074) == 1
