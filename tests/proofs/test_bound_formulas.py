"""Every bound of the proofs against its formula, from both sides: neither below what is proved, nor loosened.

The formulas are written out here in plain float64, on dense matrices. The unit roundoff and the least normal
number are made so coarse that no term hides behind another, and tiles so small that there are several.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from gcfast.features import FeaturesWithOnes, StoredFeatures
from gcfast.proofs import (
    eigenvalue_counts,
    large_matrix_rank,
    logits,
    mirror_,
    rounding,
    shift,
    tiles,
    whitening,
)
from gcfast.proofs.rounding import Tiling
from gcfast.proofs.tiles import Tiles

U = {torch.float64: 2.0**-12, torch.float32: 2.0**-9}
LEAST = {torch.float64: 2.0**-21, torch.float32: 2.0**-17}
BLOCK, SLICE = 4, 2
WIDE, SINGLE = torch.float64, torch.float32


@pytest.fixture
def coarse(monkeypatch):
    for dtype in (WIDE, SINGLE):
        monkeypatch.setitem(rounding.UNIT, dtype, U[dtype])
        monkeypatch.setitem(rounding.SMALLEST_NORMAL, dtype, LEAST[dtype])
    monkeypatch.setattr(logits, "SMALLEST", LEAST[WIDE])
    monkeypatch.setattr(logits, "ROOT", LEAST[WIDE] ** 0.5)
    for module in (rounding, shift, tiles, whitening, eigenvalue_counts, large_matrix_rank):
        monkeypatch.setattr(module, "tiling", lambda device: Tiling(BLOCK, SLICE))


def up(x, terms=8):
    """Rounded up: enlarged by 4 u for each of ``terms`` roundings and 8 more."""
    return x * (1 + 4 * (terms + 8) * U[WIDE])


def gamma(k, dtype=WIDE):
    return up(k * U[dtype] / (1 - k * U[dtype]))


def slices(k, inner=SLICE):
    return -(-k // inner)


def gamma_of_tiles(n, dtype=WIDE):
    """A slice, the sum of the slices, and two roundings more."""
    return gamma(min(n, SLICE) + slices(n) + 2, dtype)


def rows_of(a):
    """||a||_inf, the largest row sum."""
    return float(a.double().abs().sum(1).amax())


def symmetric(low):
    return low.tril() + low.tril(-1).mT


def draw(*shape, seed=0, dtype=WIDE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def close(x, y, by=1e-11):
    assert y * (1 - by) <= x <= y * (1 + by), (x, y)


# The numbers that all others are made of, as they are


def test_units_and_least_numbers_are_those_of_ieee():
    for dtype in (WIDE, SINGLE):
        assert rounding.UNIT[dtype] == torch.finfo(dtype).eps / 2
        assert rounding.SMALLEST_NORMAL[dtype] == torch.finfo(dtype).tiny
    assert torch.finfo(WIDE).tiny == logits.SMALLEST == logits.ROOT**2
    assert rounding.round_up(1.0) == rounding.round_up(1.0, 8)
    for terms in (0, 8, 1000, 10**9):
        assert Fraction(rounding.round_up(1.0, terms)) == 1 + Fraction(4 * (terms + 8), 2**53)
    close(rounding.round_up(3.0, 2**48), 3.0 * (1 + 4 * (2**48 + 8) * 2.0**-53))


@pytest.mark.parametrize("dtype", [WIDE, SINGLE])
def test_gamma_is_its_formula_rounded_up(dtype):
    unit = Fraction(torch.finfo(dtype).eps) / 2
    half = int(1 / (2 * unit))
    for k in (1, 2, 3, 1000, half // 4, half // 2, half - 1):
        exact = k * unit / (1 - k * unit)
        assert exact <= Fraction(rounding.gamma(k, dtype)) <= exact * (1 + Fraction(66, 2**53))
    assert rounding.gamma(half, dtype) == rounding.gamma(9 * half, dtype) == math.inf
    assert rounding.gamma(1) == rounding.gamma(1, WIDE)


def test_tiles_and_slices_cover_what_they_divide():
    for device in ("cpu", "cuda"):
        tile = rounding.tiling(torch.device(device))
        assert tile.block % tile.slice_length == 0
        for n in (1, tile.block - 1, tile.block, tile.block + 1, 3 * tile.block):
            covered = [i for span in tile.spans(n) for i in range(span.start, span.stop)]
            assert covered == list(range(n)) and len(tile.spans(n)) == math.ceil(n / tile.block)
        assert tile.spans(0) == []
    # products of 16,384 terms are added up by as many slices as a slice has terms: the least gamma
    small = rounding.tiling(torch.device("cpu"))
    assert small.slices(16384) == small.slice_length
    tile = Tiling(6, 3)
    for k, count in ((1, 1), (2, 1), (3, 1), (4, 2), (7, 3)):
        assert tile.slices(k) == count
        for dtype in (WIDE, SINGLE):
            assert tile.gamma(k, dtype) == rounding.gamma(min(k, 3) + count + 2, dtype)
    assert tile.gamma(7) == tile.gamma(7, WIDE)
    for columns in (1, 5, 1024, 1025, 2049, 3000):
        for inner in (1, 3, 128, 512):
            panels = [min(1024, columns - j) for j in range(0, columns, 1024)]
            assert rounding.panel_slices(columns, inner) == sum(math.ceil(p / inner) for p in panels)


def test_products_are_added_subtracted_and_mirrored(monkeypatch):
    monkeypatch.setattr(rounding, "tiling", lambda device: Tiling(BLOCK, SLICE))
    a, b, start = draw(9, 5), draw(5, 9, seed=1), draw(9, 9, seed=2)
    for add, sign in ((rounding.add_product_, 1), (rounding.subtract_product_, -1)):
        out = start.clone()
        add(out, a, b, 2)
        torch.testing.assert_close(out, start + sign * (a @ b))
    out = start.clone()
    rounding.add_exact_product_(out, a, b)
    torch.testing.assert_close(out, start + a @ b)
    assert torch.equal(mirror_(start.clone()), symmetric(start))


def test_splits_are_as_fine_as_exact_products_allow():
    for k in (1, 2, 3, 4, 5, 8, 9, 1000, 4097):
        bits = whitening.doubled_bits(k)
        assert k * 4**bits <= 2**53 < k * 4 ** (bits + 1)
    largest = torch.tensor([0.0, 2.0**-1001, 1.0, 1.5, 2.0**1022], dtype=WIDE)
    assert whitening.power_of_two(largest).tolist() == [2.0**-999, 2.0**-999, 2.0, 2.0, 2.0**1023]
    # float32 slices: gamma is 2^-16
    close(rounding.gamma(whitening.INNER32, SINGLE), 2.0**-16, 1e-4)


# Bounds of products, in their formulas


@pytest.mark.parametrize("columns", [13, 1030])
def test_the_grams_error(coarse, columns):
    n = 9
    h = draw(n, columns - 1) / columns
    fractions = []
    g = shift.GramSweep.begin(FeaturesWithOnes(h)).run(FeaturesWithOnes(h), fractions.append)
    assert fractions == [min(j + 1024, columns) / columns for j in range(0, columns, 1024)]
    a = torch.cat([h.abs(), torch.ones(n, 1, dtype=WIDE)], 1)
    largest = up(rows_of(a @ a.mT), n + columns)
    tiny = n * columns * LEAST[WIDE] * (2 + rows_of(a))
    count = sum(slices(min(1024, columns - j)) for j in range(0, columns, 1024))
    close(g.largest, largest)
    close(g.error, up(gamma(SLICE + count + 2) * largest + tiny))
    close(g.norm, up(rows_of(symmetric(g.lower.dense())), 2 * n))
    wide = FeaturesWithOnes(torch.full((2, 5), 2.0**600, dtype=WIDE), ones=False)
    unbounded = shift.bounded_gram(wide)
    assert unbounded.error == unbounded.norm == math.inf
    one = shift.bounded_gram(FeaturesWithOnes(h[:, :1], ones=False))  # a product of one term
    largest = up(rows_of(h[:, :1].abs() @ h[:, :1].abs().mT), n + 1)
    close(one.error, up(gamma(1 + 1 + 2) * largest + n * LEAST[WIDE] * (2 + rows_of(h[:, :1]))))


@pytest.mark.parametrize("dtype", [WIDE, SINGLE])
@pytest.mark.parametrize("n", [1, 9])
def test_the_residual_of_a_cholesky_factor(coarse, monkeypatch, n, dtype):
    """The factor is spoiled, so that its residual is as large as the other terms."""
    a = draw(n, 14, seed=3, dtype=dtype) / 4
    g, by = (a @ a.mT).tril() + torch.eye(n, dtype=dtype), 0.125
    solve, factor = torch.linalg.solve_triangular, torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **k: 1.01 * solve(*a, **k))
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda s: (1.01 * factor(s)[0], torch.tensor(0, dtype=torch.int32))
    )
    low, fractions = Tiles(n, dtype), []
    bound = shift.verified_cholesky(Tiles.of(g), by, low, fractions.append)
    dense = low.dense().double()
    products = up(rows_of(dense.abs() @ dense.abs().mT), 2 * n)
    residual = up(rows_of(symmetric(g).double() - by * torch.eye(n, dtype=WIDE) - dense @ dense.mT), 2 * n)
    tiny = 4 * n * n * LEAST[dtype] * (2 + products)
    want = gamma_of_tiles(n, dtype) * products + residual * (1 + 4 * U[dtype]) + 4 * U[dtype] * by + tiny
    close(bound, up(want), 1e-11 if dtype == WIDE else 1e-5)
    assert fractions == [(min(i + BLOCK, n) / n) ** 3 for i in range(0, n, BLOCK)]
    assert fractions[-1] == 1.0


def test_what_a_shift_proves(coarse, monkeypatch):
    """By residuals as told: twice what is lost, then a share of the estimate, then a smaller one."""
    g = shift.BoundedGram(Tiles.of(torch.eye(9, dtype=WIDE)), 0.25, 1.0, 3.0)
    lost = 0.25 + gamma_of_tiles(9) * 3.0
    first = 2.2 * lost

    def told(*residuals):
        asked, left = [], list(residuals)

        def verified(a, by, low, after):
            asked.append(by)
            after(1.0)
            return left.pop(0)

        monkeypatch.setattr(shift, "verified_cholesky", verified)
        return asked

    monkeypatch.setattr(shift, "least_eigenvalue", lambda low: 100.0)
    steps = []
    lower = lambda by, residual: by - up(0.25 + residual + 8 * U[WIDE] * by)  # noqa: E731
    for sharp, residuals, share in (
        (False, (0.03,), None),
        (True, (0.03, 0.5), 0.94),
        (True, (0.03, None, 0.5), 0.8),
        (True, (0.03, None, None), None),
        (True, (0.03, 200.0, 0.5), None),  # a bad one is no reason to look on, nor to forget the first
    ):
        asked = told(*residuals)
        proof = shift.prove_by_shift(g, sharp, lambda *step: steps.append(step))
        close(asked[0], first)
        by = first if share is None else share * (first + 100.0)
        want = lower(by, residuals[0] if share is None else residuals[-1])
        close(proof.lower, want)
        close(proof.margin, want / by)
        close(proof.estimate, first + 100.0 if sharp else first)
        shares = [0.94, 0.8][: len(asked) - 1]
        for x, part in zip(asked[1:], shares, strict=True):
            close(x, part * (first + 100.0))
    assert set(steps) == {("Cholesky", 1.0), ("Cholesky, sharp", 1.0)}
    # nothing is left, or nothing was to be had
    told(first)
    assert shift.prove_by_shift(g, False, lambda *step: None) is None
    told(None)
    assert shift.prove_by_shift(g, True, lambda *step: None) is None
    endless = shift.BoundedGram(g.lower, math.inf, math.inf, 3.0)
    assert shift.prove_by_shift(endless, True, lambda *step: None) is None
    # a second shift no larger than the first is not tried
    equal = first / 0.94 - first
    while 0.94 * (first + equal) != first:
        equal = math.nextafter(equal, 0.0 if 0.94 * (first + equal) > first else math.inf)
    for least in (0.0, equal):
        monkeypatch.setattr(shift, "least_eigenvalue", lambda low: least)  # noqa: B023
        asked = told(0.03)
        assert shift.prove_by_shift(g, True, lambda *step: None).lower > 0 and len(asked) == 1
    # of bounds that are equal the first stays, and 0 is none
    monkeypatch.setattr(shift, "least_eigenvalue", lambda low: 100.0)
    for lower in (1.0, 0.0):
        monkeypatch.setattr(shift, "_down", lambda by, *errors: lower)  # noqa: B023
        told(0.03, 0.5)
        proof = shift.prove_by_shift(g, True, lambda *step: None)
        assert proof is None if lower == 0.0 else math.isclose(proof.margin, 1.0 / first)


def test_a_positive_matrix_is_bounded_by_the_roots_of_its_diagonal(monkeypatch):
    monkeypatch.setitem(rounding.UNIT, WIDE, U[WIDE])
    k, seen = torch.diag(torch.tensor([0.25, 9.0, 16.0], dtype=WIDE)), []
    honest = shift.prove_by_shift
    monkeypatch.setattr(shift, "prove_by_shift", lambda g, *a: seen.append(g) or honest(g, *a))
    found = shift.prove_least_eigenvalue(k)
    assert 0.8 * 0.25 < found <= 0.25 and seen[0].error == seen[0].norm == 0.0
    close(seen[0].largest, up(4.0 * (0.5 + 3 + 4), 3))  # a row of sqrt(k_ii k_jj)
    assert shift.prove_least_eigenvalue(-k) == 0.0


def test_nothing_is_proved_of_what_is_too_small():
    for size in (2.0**-1074, 1e-310, 1e-300, 0.0):
        assert 0.0 <= shift.prove_least_eigenvalue(size * torch.eye(3, dtype=WIDE)) <= size
        near = size * torch.tensor([[1, 1 - 1e-13], [1 - 1e-13, 1]], dtype=WIDE)
        assert 0.0 <= shift.prove_least_eigenvalue(near) <= 1.1e-13 * size


def test_the_least_eigenvalue_is_estimated_in_few_steps(coarse, monkeypatch):
    low = Tiles.of(torch.diag(torch.tensor([10 * 1.01**i for i in range(150)], dtype=WIDE)))
    assert 100 <= shift.least_eigenvalue(low) <= 105
    steps, growth = [], 1.0

    def solve(low, v, transposed=False):  # the inverse of some matrix, which grows with each step
        assert v.shape == (150, 8)
        steps.append(transposed)
        return 0.01 * growth ** ((len(steps) - 1) // 2) * v

    monkeypatch.setattr(tiles, "solve_triangular", solve)
    close(shift.least_eigenvalue(low), 1e4)
    assert steps == [False, True, False, True, False]  # the third step sees that nothing changes
    steps.clear()
    growth = math.sqrt(1.021)
    close(shift.least_eigenvalue(low), 1e4 / 1.021**7)
    assert len(steps) == 16  # of eight steps
    steps.clear()
    growth = math.sqrt(1.019)
    close(shift.least_eigenvalue(low), 1e4 / 1.019**2)
    monkeypatch.undo()
    assert shift.least_eigenvalue(Tiles.of(torch.full((1, 1), 2.0**-600, dtype=WIDE))) == 0.0  # overflows


# Whitening


@pytest.mark.parametrize("dtype", [WIDE, SINGLE])
@pytest.mark.parametrize("doubled", [False, True])
def test_the_errors_of_whitening(coarse, doubled, dtype):
    n, columns = 9, 13
    terms = n + columns
    h = draw(n, columns, seed=5)
    h1 = FeaturesWithOnes(h, ones=False)
    x = Tiles.of(torch.linalg.inv(torch.linalg.cholesky(h @ h.mT)) + 2.0**-8 * torch.eye(n, dtype=WIDE))
    a, b = x.dense().abs(), h.abs()
    partner = 2 + rows_of(a) + rows_of(b)
    tiny = 4 * n * terms * LEAST[WIDE] * partner
    witness = up(gamma_of_tiles(n) * up(math.sqrt(rows_of(a @ b) * rows_of((a @ b).mT)), 2 * terms) + tiny)
    power = lambda v: torch.exp2(torch.floor(torch.log2(v)) + 1)  # noqa: E731
    if doubled:
        delta = 2.0 ** -((53 - math.ceil(math.log2(n))) // 2) / 2
        r, c = power(a.amax(1)), power(b.amax(0))
        sums, scales = (up(float(v.norm()), 2 * terms) for v in (b.sum(0), c))
        rounded = delta * (float((a.sum(1) + n * delta * r).norm()) * scales + float(r.norm()) * sums)
        factor = gamma(min(n, SLICE) + 2 * slices(n) + 2)
        error = up(factor * up(rounded, 4 * (n + columns)))
        close(whitening.doubled_error(x, columns, a.sum(1), sums, scales), error)
        witness = up(error + tiny)
    plain = 0.0 if doubled else 1.0
    sweep = whitening.WhiteningSweep.begin(h1, x, dtype, plain)
    assert sweep.doubled == doubled
    close(sweep.witness_error, witness)
    close(sweep.tiny, tiny)
    fractions = []
    white = sweep.run(h1, x, fractions.append)
    assert fractions == [1.0]
    q = (x.dense() @ h).to(dtype)
    near = 1e-11 if dtype == WIDE else 1e-5
    inner = SLICE if dtype == WIDE else 256
    qq = up(rows_of(q.abs().double() @ q.abs().double().mT), terms)
    product = up(
        gamma(min(inner, columns) + slices(columns, inner) + 2, dtype) * qq
        + 4 * n * columns * LEAST[dtype] * (2 + qq)
    )
    close(white.product_error, product, near)
    g2 = symmetric(white.gram.dense()).double()
    close(white.distance, up(rows_of(g2 - torch.eye(n, dtype=WIDE)), 2 * terms))
    if doubled or dtype != WIDE:
        square = up(float(g2.diagonal().sum()) + n * product, n)
        unit = U[WIDE] * doubled + U[dtype] * (dtype != WIDE)
        lost = tiny + n * columns * LEAST[dtype]
        witness = up(witness + 1.01 * unit * math.sqrt(square) + lost)
    close(white.witness_error, witness, near)
    inside = 1.0 - white.distance - white.product_error
    assert inside > 0 and white.margin == math.sqrt(inside) * (1 - 1e-15) - white.witness_error
    # no witness, no sweep; no plain product where it would lose ``plain``
    far = Tiles.of(1e12 * x.dense())
    assert whitening.WhiteningSweep.begin(h1, far, dtype, plain) is None
    if not doubled:
        at = whitening.WhiteningSweep.begin(h1, x, dtype, sweep.witness_error)
        assert at.doubled and not whitening.WhiteningSweep.begin(h1, x, dtype, at.witness_error * 1e9).doubled
        small = x.clone(scale=0.1)
        nothing = whitening.WhiteningSweep.begin(h1, small, dtype, plain).run(h1, small)
        assert nothing.distance > 1.0 and nothing.margin == -nothing.witness_error


def test_norms(coarse, monkeypatch):
    n = 9
    a = draw(n, n, seed=6).tril()
    x = Tiles.of(a)
    close(whitening.norm_upper(x), up(math.sqrt(rows_of(a) * rows_of(a.mT)), 2 * n))
    assert whitening.norm_sharp(Tiles.of(a[:1, :1])) == whitening.norm_upper(Tiles.of(a[:1, :1]))
    assert whitening.norm_sharp(Tiles(n)) == 0.0
    seen = {}
    honest, product = whitening.verified_cholesky, tiles.triangular_gram

    def gram(y, inner):
        seen.update(y=y.dense(), inner=inner)
        g = product(y, inner)
        seen["diagonal"] = g.diagonal().clone()
        return g

    def verified(m, by, low):
        seen["t"] = float((m.diagonal() + seen["diagonal"])[0])
        residual = honest(m, by, low) if next(refusals) is None else None
        seen["residual"] = residual
        return residual

    monkeypatch.setattr(tiles, "triangular_gram", gram)
    monkeypatch.setattr(whitening, "verified_cholesky", verified)
    truth = float(torch.linalg.matrix_norm(a, 2))
    for count, slack in enumerate((1.05, 1.25, 2.0)):
        refusals = iter([True] * count + [None])
        found = whitening.norm_sharp(x)
        y, u, t = seen["y"], U[WIDE], seen["t"]
        assert torch.equal(torch.frexp(y)[0], torch.frexp(a)[0])  # scaled by a power of two
        scale = float(y[0, 0] / a[0, 0])
        assert seen["inner"] == SLICE and 0.25 < t < slack * 1.0001
        close(t, slack * (truth * scale) ** 2, 0.02)  # the estimate is from below
        products = up(rows_of(y.abs() @ y.abs().mT), 2 * n)
        tiny = 4 * n * n * LEAST[WIDE]
        error = up(gamma(min(SLICE, n) + slices(n) + 2) * products + tiny)
        size = math.sqrt(up(float((y * y).sum()) + n * error, n))
        hidden = error + seen["residual"] + 4 * u * (t + float(seen["diagonal"].amax()))
        bound = math.sqrt(up(t + hidden, n)) + u * size * (1 + 4 * u) + tiny
        close(found, min(whitening.norm_upper(x), up(bound / scale)))
    refusals = iter([True] * 3)
    assert whitening.norm_sharp(x) == whitening.norm_upper(x)


def test_shifts_of_a_cholesky_inverse(coarse, monkeypatch):
    asked = []
    g = Tiles.of(torch.diag(torch.tensor([1.0, 8.0, 2.0], dtype=WIDE)))
    honest = tiles.cholesky

    def cholesky(a, by, low, after, least):
        asked.append((by, least))
        return honest(a, by, low, after, least) if len(asked) > refused else False

    monkeypatch.setattr(tiles, "cholesky", cholesky)
    shifts = [(0.0, 4 * 3 * U[WIDE] * 8.0)] + [(0.5 * 8.0 * 100.0**k, 0.0) for k in range(5)]
    for refused in (0, 1, 2, 5):
        asked.clear()
        fractions = []
        x, by = whitening.cholesky_inverse(g, 0.5, None, fractions.append)
        assert asked == shifts[: refused + 1] and by == shifts[refused][0]
        torch.testing.assert_close(x.dense(), torch.diag((g.diagonal() + by).rsqrt()), rtol=1e-12, atol=0.0)
        assert fractions == [0.5, 1.0]
    refused = 9
    asked.clear()
    assert whitening.cholesky_inverse(g, 0.5) is None and asked == shifts


# Counts of eigenvalues, and the largest


def test_a_factor_is_unpacked_as_lapack_packs_it():
    pairs = singles = swaps = 0
    for seed in range(6):
        for n in (1, 2, 5, 9):
            s = draw(n, n, seed=seed)
            s = s + s.mT
            if seed % 2:
                s.fill_diagonal_(0.0)
            factor, pivots, _ = torch.linalg.ldl_factor_ex(s)
            factor += torch.ones_like(s).triu(1)  # which is not the factor's
            low, diagonal, below, order = eigenvalue_counts._unpack(factor, pivots)
            assert torch.equal(low, low.tril()) and low.diagonal().tolist() == [1.0] * n
            middle = torch.diag(diagonal) + torch.diag(below[:-1], -1) + torch.diag(below[:-1], 1)
            torch.testing.assert_close(low @ middle @ low.mT, s[order][:, order], rtol=0.0, atol=1e-12)
            pairs, singles = pairs + int((below != 0).sum()), singles + int((below == 0).sum())
            swaps += order != list(range(n))
    assert min(pairs, singles, swaps) > 9


@pytest.mark.parametrize("by", [0.25, -0.25])
def test_the_error_of_a_count(coarse, monkeypatch, by):
    """By a spoiled factor that has pivots of two rows."""
    n = 9
    s = (draw(n, n, seed=7) + draw(n, n, seed=7).mT).fill_diagonal_(0.125)
    honest = torch.linalg.ldl_factor_ex

    def spoiled(a):
        factor, pivots, info = honest(a)
        return 1.01 * factor, pivots, info

    monkeypatch.setattr(torch.linalg, "ldl_factor_ex", spoiled)
    count, error = eigenvalue_counts.count_above(s.tril(), by)
    shifted = s - by * torch.eye(n, dtype=WIDE)
    low, diagonal, below, order = eigenvalue_counts._unpack(*spoiled(shifted)[:2])
    middle = torch.diag(diagonal) + torch.diag(below[:-1], -1) + torch.diag(below[:-1], 1)
    assert bool((below != 0).any()) and bool((below == 0).any())
    magnitude = up(rows_of(low.abs() @ middle.abs() @ low.abs().mT), 4 * n)
    residual = up(rows_of(shifted[order][:, order] - low @ middle @ low.mT), 2 * n)
    size = up(rows_of(s), 2 * n) + abs(by)
    tiny = 8 * n * n * LEAST[WIDE] * (2 + magnitude)
    u = U[WIDE]
    lost = (gamma_of_tiles(n) + 4 * u) * magnitude + residual * (1 + 4 * u) + 4 * u * size + tiny
    close(error, up(lost))
    assert count == int((torch.linalg.eigvalsh(middle) > 0).sum())


def test_a_pair_counts_one_where_rounding_cannot_hide_another_case(coarse, monkeypatch):
    def count(a, b, c, alone):
        factor = torch.zeros((3, 3), dtype=WIDE)
        factor[0, 0], factor[1, 0], factor[1, 1], factor[2, 2] = a, b, c, alone
        pivots = torch.tensor([-2, -2, 3], dtype=torch.int32)
        monkeypatch.setattr(torch.linalg, "ldl_factor_ex", lambda full: (factor, pivots, torch.tensor(0)))
        return eigenvalue_counts.count_above(torch.eye(3, dtype=WIDE), 0.5)

    limit = 1 + 8 * U[WIDE]  # off^2 over first second, which must be more
    for a, c in ((4.0, 1.0), (-4.0, -1.0)):
        assert count(a, math.sqrt(4 * limit * (1 + 1e-9)), c, 1.0)[0] == 2
        assert count(a, math.sqrt(4 * limit * (1 - 1e-9)), c, 1.0) == (0, math.inf)
    a = b = limit  # off^2 is the limit to the bit
    assert count(a, b, 1.0, 1.0) == (0, math.inf)
    monkeypatch.setattr(torch.linalg, "ldl_factor_ex", lambda full: (full, full[0], torch.tensor(1)))
    assert eigenvalue_counts.count_above(torch.eye(3, dtype=WIDE), 0.5) == (0, math.inf)
    assert count(1.0, 2.0, -1.0, -1.0)[0] == 1 and count(1.0, 2.0, -1.0, 0.0) == (0, math.inf)


def test_bounds_of_the_largest_eigenvalue(coarse):
    n = 9
    h = draw(n, 12, seed=8)  # so that six steps depend on where they begin
    low = (h @ h.mT).tril()
    s = symmetric(low)
    v = 1 + 0.5 * torch.arange(n).cos().to(WIDE)
    for _ in range(6):
        v = v / v.norm()
        quotient, v = float(v @ s @ v), s @ v
    for norm in (rows_of(s), 1e9):
        g = shift.BoundedGram(Tiles.of(low), 0.25, norm, 1.0)
        least, most = large_matrix_rank._top(g, low)
        if norm < 1e9:
            close(least, quotient - 0.25 - 8 * (n + 4) * U[WIDE] * norm)
        else:
            assert least == 0.0
        close(most, min(norm, up(float(s.norm()), n * n)) + 0.25)
    assert least <= float(torch.linalg.eigvalsh(s)[-1]) <= most


def test_counts_bound_the_rank_where_their_shifts_are_clear_of_the_tolerance(coarse, monkeypatch):
    n, asked = 9, []
    low = torch.eye(n, dtype=WIDE)
    g = shift.BoundedGram(Tiles.of(low), 0.25, 1.0, 2.0)
    lost = 4 * (0.25 + gamma_of_tiles(n) * 2.0)
    above, below, u = 300.0, 200.0, U[WIDE]

    def told(*found):
        asked.clear()
        left = list(found)
        monkeypatch.setattr(large_matrix_rank, "count_above", lambda low, by: asked.append(by) or left.pop(0))
        return large_matrix_rank._by_counts(g, low, below, above)

    # errors that leave the shift just clear of the tolerance, or just not
    over = lost / (1 + 64 * u) - 0.25 - 4 * u * (above + lost)
    under = (lost - below * 8 * u) / (1 + 64 * u) - 0.25
    small, large = 1 - 1e-9, 1 + 1e-9
    assert told((4, over * small), (6, under * small)) == (4, 6)
    close(asked[0], above + lost)
    close(asked[1], below - lost)
    assert told((4, over * large), (6, under * large)) == (0, n)
    assert told((n, 0.0)) == (n, n)  # nothing is left to ask
    below = lost  # a shift of zero says nothing
    assert told((4, 0.0)) == (4, n)
    below = lost * large
    assert len(asked) == 1 and told((4, 0.0), (6, math.inf)) == (4, n) and len(asked) == 2


# Logits


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_error_of_logits(coarse, with_bias):
    n, m, c = 3, 5, 2
    h, weight = draw(n, m), draw(c, m, seed=1)
    bias = draw(c, seed=2) if with_bias else None
    z, error, norms = logits.bounded_logits(StoredFeatures(h), weight, bias)
    torch.testing.assert_close(z, h @ weight.mT + (0.0 if bias is None else bias))
    size = h.abs() @ weight.abs().mT + (0.0 if bias is None else bias.abs())
    g = gamma(m + 4)
    # a product that underflows, and an operand of either kind that is flushed
    flushed = LEAST[WIDE] * (m + 1 + weight.abs().sum(1) + h.abs().sum(1, keepdim=True))
    torch.testing.assert_close(error, (size * g + flushed) * (1 + 2 * g), rtol=1e-12, atol=0.0)
    square = h.square().sum(1) + with_bias
    want = square.sqrt() * (1 + g) + math.sqrt(m * LEAST[WIDE])
    torch.testing.assert_close(norms, want, rtol=1e-12, atol=0.0)
    _, endless, _ = logits.bounded_logits(StoredFeatures(1e300 * h), 1e300 * weight, bias)
    assert bool((endless == math.inf).all())
