"""Proofs of rank: never for a deficient matrix, always for a well-conditioned one, bounds below the truth."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gcfast.features.stacked_ones import FeaturesWithOnes
from gcfast.proofs import rounding, whitening
from gcfast.proofs import shift as _shift
from gcfast.proofs import tiles as _tiles
from gcfast.proofs.dependency import near_dependency
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.rounding import Tiling, gamma
from gcfast.proofs.tiles import Tiles
from gcfast.storage import StateFile

SIZES = [(1, 1), (2, 1), (2, 2), (5, 4), (31, 40), (33, 33), (252, 300), (507, 506), (700, 900)]


def _with_condition(n, m, condition, seed=0, spectrum="geometric"):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn((n, n), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn((m, n), generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if spectrum != "geometric":
        small = {"one small": n - 1, "half small": n // 2, "one large": 1}[spectrum]
        values = torch.cat([torch.ones(small), torch.full((n - small,), 1 / condition)]).double()
    return (u * values) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("sharp", [True, False])
def test_random_features_are_proved_and_bounds_hold(device, n, m, dtype, sharp):
    h = torch.randn((n, m), generator=torch.Generator().manual_seed(n), dtype=dtype)
    proof = prove_full_rank(h.to(device), sharp=sharp)
    true = torch.linalg.svdvals(torch.cat([h.double(), torch.ones(n, 1, dtype=torch.float64)], 1))
    assert proof.proved, proof.reason
    assert proof.sigma_min_lower <= float(true[-1]) * (1 + 1e-9)
    assert proof.sigma_max_upper >= float(true[0]) * (1 - 1e-9)
    if sharp:
        assert proof.sigma_min_lower >= 0.85 * float(true[-1])


SPECTRA = ["geometric", "one small", "half small", "one large"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e8, 1e10, 1e11, 1e13])
@pytest.mark.parametrize(("n", "m"), [(40, 60), (300, 330), (600, 600)])
def test_ill_conditioned_matrices_are_proved(n, m, condition, spectrum):
    a = _with_condition(n, m, condition, seed=n, spectrum=spectrum)
    proof = prove_full_rank(a, ones=False)
    assert proof.proved, proof.reason
    # the matrix as stored is within 1e-16 sqrt(n) of the one described
    assert 0.5 / condition <= proof.sigma_min_lower <= (1 + 1e-16 * condition * n**0.5 + 1e-4) / condition
    assert proof.route == ("shift" if condition == 1e3 else "whitening" if condition >= 1e8 else proof.route)
    assert prove_full_rank(a, ones=False, sharp=False).proved


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_thousand_rows_of_condition_1e10_are_proved(spectrum, seed):
    a = _with_condition(2000, 2000 + 100 * seed, 1e10, seed, spectrum)
    proof = prove_full_rank(a, ones=False, sharp=False)
    assert proof.proved and proof.sigma_min_lower <= 1.0001e-10, proof.reason


def test_layouts_give_the_same_proof():
    h = torch.randn((60, 80), dtype=torch.float64)
    plain = prove_full_rank(h)
    strided = torch.zeros((120, 240), dtype=torch.float64)[::2, ::3].copy_(h)
    assert prove_full_rank(strided) == plain
    assert prove_full_rank(h.T.contiguous().T) == plain


@pytest.mark.parametrize("seed", range(40))
def test_integer_matrices_deficient_by_construction_are_never_proved(seed):
    g = torch.Generator().manual_seed(seed)
    n, m = int(torch.randint(2, 60, (), generator=g)), int(torch.randint(60, 90, (), generator=g))
    r = int(torch.randint(1, n, (), generator=g))
    # small integers: every entry of the product is exact, so its rank is at most r < n
    a = (
        torch.randint(-9, 10, (n, r), generator=g).double()
        @ torch.randint(-9, 10, (r, m), generator=g).double()
    )
    a *= 2.0 ** int(torch.randint(-60, 60, (), generator=g))
    assert not prove_full_rank(a, ones=False).proved


@pytest.mark.parametrize("seed", range(20))
def test_exact_copies_and_exact_combinations_are_never_proved(seed):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn((50, 70), generator=g, dtype=torch.float64)
    h[7] = h[31]
    assert not prove_full_rank(h).proved
    h = torch.randint(-1000, 1000, (50, 70), generator=g).double()
    h[7] = 2 * h[31] - h[2]  # affine: dependent with the ones column too
    assert not prove_full_rank(h).proved


@pytest.mark.parametrize("n", [150, 300, 520])
def test_matrices_deficient_by_one_are_never_proved(n):
    # more than a tile of rows; integers, so that the rank is n - 1 exactly
    g = torch.Generator().manual_seed(n)
    h = torch.randint(-1000, 1000, (n, n + 10), generator=g).double()
    h[n // 2] = h[:20].sum(0) - h[-19:].sum(0)  # weights that add up to 1: dependent with ones, too
    for scale in (1.0, 2.0**-300, 2.0**300):
        assert not prove_full_rank(h * scale).proved
        assert not prove_full_rank(h * scale, ones=False).proved
    rows = 2.0 ** torch.randint(-40, 40, (n, 1), generator=g).double()
    assert not prove_full_rank(h * rows, ones=False).proved
    left = torch.randint(-9, 10, (n, n - 1), generator=g).double()
    product = left @ torch.randint(-9, 10, (n - 1, n + 10), generator=g).double()
    assert not prove_full_rank(product, ones=False).proved
    assert not prove_full_rank(product.float(), ones=False).proved  # entries below 2^24


def test_more_rows_than_columns_is_never_proved():
    assert not prove_full_rank(torch.randn((30, 20), dtype=torch.float64)).proved


def test_a_difference_of_one_ulp_is_not_called_deficient():
    h = torch.randn((20, 30), dtype=torch.float64)
    h[3] = h[5]
    h[3, 4] = torch.nextafter(h[3, 4], torch.tensor(math.inf, dtype=torch.float64))
    proof = prove_full_rank(h)
    true = float(torch.linalg.svdvals(torch.cat([h, torch.ones(20, 1, dtype=torch.float64)], 1))[-1])
    # rank 20 in truth: either answer is sound
    assert not proof.proved or proof.sigma_min_lower <= 2 * true + 1e-16
    found = near_dependency(h)
    assert found is not None and not found.exact and sorted(found.samples) == [3, 5]


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1.0, 1e30, 1e120])
def test_scales(scale):
    h = torch.randn((40, 50), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    proof = prove_full_rank(h * scale, ones=False)
    true = float(torch.linalg.svdvals(h)[-1])
    assert proof.proved, proof.reason
    assert 0.8 * true <= proof.sigma_min_lower / scale <= true


def test_the_bounds_are_those_of_the_products():
    # a hostile check of the heart of the proof: actual rounding errors stay below gamma_k |A||B|
    for dtype, k in [(torch.float32, 256), (torch.float64, 1024)]:
        a = torch.randn((40, k), dtype=dtype) * 10.0 ** torch.randint(-4, 4, (40, k))
        b = torch.randn((k, 30), dtype=dtype)
        computed = a @ b
        bound = gamma(k, dtype) * (a.abs().double() @ b.abs().double())
        for i, j in [(0, 0), (3, 7), (39, 29)]:
            exact = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[i], b[:, j], strict=True))
            assert abs(Fraction(float(computed[i, j])) - exact) <= Fraction(float(bound[i, j]))


class _Rounded(TorchFunctionMode):
    """float32 products of operands with so many bits: 8 as by bf16, 11 as by TF32."""

    def __init__(self, bits):
        super().__init__()
        self.factor = 2.0 ** (24 - bits) + 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.matmul and args[0].dtype == torch.float32:
            args = [x * self.factor - (x * self.factor - x) for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [8, 11])
def test_nothing_is_proved_by_products_of_short_numbers(bits):
    h = torch.randn((10, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert prove_full_rank(h).proved
    with _Rounded(bits), pytest.raises(RuntimeError, match=r"cpu are less exact than IEEE .*TF32, bf16"):
        prove_full_rank(h)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows, slices of 2: every sum of the proofs at sizes that rational arithmetic can follow."""
    for module in (rounding, _shift, _tiles, whitening):
        monkeypatch.setattr(module, "tiling", lambda device: Tiling(4, 2))


@pytest.fixture
def worst_products(monkeypatch):
    """Every trusted product errs upward by nearly all that it may: what no bound accounts for shows."""
    for module in (rounding, _shift, _tiles, whitening):
        monkeypatch.setattr(module, "tiling", lambda device: Tiling(16, 8))

    def add_product(out, a, b, inner, *, lower=False):
        for k in range(0, a.shape[1], inner):
            left, right = a[:, k : k + inner], b[k : k + inner]
            # two units are left to the product itself and to the rounding of this sum
            excess = max(left.shape[1] - 2, 0) * torch.finfo(a.dtype).eps / 2
            part = left @ right + excess * (left.abs() @ right.abs())
            out += part.tril() if lower else part

    for module in (_shift, _tiles, whitening):
        monkeypatch.setattr(module, "add_product_", add_product)


def _exact(t):
    return [[Fraction(v) for v in row] for row in t.double().tolist()]


def _product(a, b):
    columns = list(zip(*b, strict=True))
    return [[sum(u * v for u, v in zip(row, column, strict=True)) for column in columns] for row in a]


def _gram(a):
    return _product(a, [list(column) for column in zip(*a, strict=True)])


def _distance(a, b):
    rows = [[float(u - v) for u, v in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]
    return float(torch.linalg.matrix_norm(torch.tensor(rows, dtype=torch.float64), 2))


def _symmetric(low):
    return low.tril() + low.tril(-1).mT


@pytest.mark.parametrize("scale", [2.0**-400, 1.0, 2.0**400])
def test_the_error_of_the_gram_is_bounded(scale, worst_products):
    h1 = FeaturesWithOnes(torch.rand((21, 29), dtype=torch.float64) * scale, ones=False)
    g = _shift.bounded_gram(h1)
    exact = [[v / Fraction(scale) ** 2 for v in row] for row in _gram(_exact(h1.features.matrix))]
    lower = g.lower.dense()
    error = _distance(_exact(_symmetric(lower) / scale**2), exact)
    assert 0.1 * g.error <= error * scale**2 <= g.error
    assert bool((lower.triu(1) == 0).all())
    assert float(torch.linalg.matrix_norm(_symmetric(lower), 2)) <= g.norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quality", [1.0, 1.0 + 1e-3])
def test_the_residual_of_a_cholesky_factor_is_bounded_whatever_the_factor(
    dtype, quality, worst_products, monkeypatch
):
    a = torch.rand((21, 30), dtype=dtype)
    g = (a @ a.mT).tril()
    solve = torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **k: quality * solve(*a, **k))
    tiles = Tiles(len(g), dtype)
    bound = _shift.verified_cholesky(Tiles.of(g), 0.0625, tiles)
    low = tiles.dense()
    shifted = _exact(_symmetric(g))
    for i, row in enumerate(shifted):
        row[i] -= Fraction(0.0625)
    residual = _distance(_gram(_exact(low)), shifted)
    assert 0.03 * bound <= residual <= bound
    # products may err so that the residual looks smaller than it is
    assert bound >= gamma(8 + 3, dtype) * float((low.abs() @ low.abs().mT).sum(1).amax())
    if quality == 1.0:
        assert bound <= 100 * torch.finfo(dtype).eps * float(g.norm())


def test_a_residual_in_one_column_of_tiles_counts_in_its_row_as_well(small_tiles, monkeypatch):
    pairs = iter([(i, j) for i in range(6) for j in range(i)])
    solve = torch.linalg.solve_triangular
    wrong = lambda *a, **k: solve(*a, **k) + (1e-3 if next(pairs)[1] == 0 else 0.0)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "solve_triangular", wrong)
    g, low = torch.eye(24, dtype=torch.float64), Tiles(24)
    bound = _shift.verified_cholesky(Tiles.of(g), 0.0, low)
    residual = float(torch.linalg.matrix_norm(low.dense() @ low.dense().mT - g, 2))
    assert 0.4 * bound <= residual <= bound


@pytest.mark.parametrize("seed", range(10))
def test_hostile_products_prove_nothing_of_a_deficient_matrix(seed, worst_products):
    # positive entries: the errors, too, are then a positive matrix, and lift the vanishing eigenvalue
    h = torch.rand((40, 60), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h[7] = h[31]
    for ones in (True, False):
        assert not prove_full_rank(h, ones=ones).proved


def test_what_the_shift_loses_enters_its_bound(worst_products):
    h1 = FeaturesWithOnes(torch.randn((40, 60), dtype=torch.float64), ones=False)
    g = _shift.bounded_gram(h1)
    for sharp in (False, True):
        proof = _shift.prove_by_shift(g, sharp, lambda step, fraction: None)
        shift = proof.lower / proof.margin
        assert g.error <= shift - proof.lower <= 4 * g.error
        assert proof.lower <= float(torch.linalg.svdvals(h1.features.matrix)[-1]) ** 2


def test_no_cholesky_factor_beyond_the_least_eigenvalue():
    g = torch.diag(torch.linspace(1, 2, 300, dtype=torch.float64))
    low = Tiles(len(g))
    assert _shift.verified_cholesky(Tiles.of(g), 0.99, low) is not None
    assert _shift.verified_cholesky(Tiles.of(g), 1.01, low) is None


def test_powers_of_two_and_splits_are_exact():
    a = torch.randn((40, 30), dtype=torch.float64) * 10.0 ** torch.randint(-300, 300, (40, 1)).double()
    a[3] = 0
    largest = a.abs().amax(1)
    scale = whitening.power_of_two(largest)
    assert bool((torch.frexp(scale)[0] == 0.5).all()) and bool((scale >= largest).all())
    assert bool((scale[largest > 1e-300] <= 2 * largest[largest > 1e-300]).all())
    high, low = whitening.split(a, scale[:, None], 20)
    assert _exact(a) == [
        [u + v for u, v in zip(r, s, strict=True)] for r, s in zip(_exact(high), _exact(low), strict=True)
    ]
    assert bool((low.abs() <= scale[:, None] * 2.0**-21).all())
    assert bool(((high / scale[:, None] * 2.0**20) % 1 == 0).all())


def test_doubled_products_are_bounded_and_five_digits_better(worst_products):
    n, m = 21, 29
    x = 1e8 * torch.rand((n, n), dtype=torch.float64).tril()
    h = torch.rand((n, m), dtype=torch.float64)
    exact = _product(_exact(x), _exact(h))
    scales = float(whitening.power_of_two(h.abs().amax(0)).norm())
    tiles = Tiles.of(x)
    columns = float(h.abs().sum(0).norm())
    bound = whitening.doubled_error(tiles, m, x.abs().sum(1), columns, scales)
    assert bound <= 1e-5 * gamma(n) * float((x.abs() @ h.abs()).norm())
    # the last rounding is as large as a plain product's: look at the sum before it
    parts = []
    add = torch.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "add", lambda a, b, out: parts.append((a, b)) or add(a, b, out=out))
        last = whitening.times_doubled(tiles, h, x.abs().amax(1))
    high, rest = (torch.cat(p) for p in zip(*parts, strict=True))
    both = [
        [u + v for u, v in zip(r, s, strict=True)] for r, s in zip(_exact(high), _exact(rest), strict=True)
    ]
    assert 0.01 * bound <= _distance(both, exact) <= bound
    assert _distance(_exact(last), exact) <= bound + 2.0**-53 * float(last.norm()) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("dtype", "condition"), [(torch.float32, 1e9), (torch.float64, 1e9), (torch.float64, 1e14)]
)
def test_every_error_of_whitening_is_bounded_and_enters_the_margin(dtype, condition, small_tiles):
    n, m = 12, 15
    h1 = FeaturesWithOnes(_with_condition(n, m, condition), ones=False)
    h = h1.features.matrix
    x, _ = whitening.cholesky_inverse(_shift.bounded_gram(h1).lower, 1e-13)
    for _ in range(3):
        g2 = whitening.WhiteningSweep.begin(h1, x, torch.float64).run(h1, x).gram
        _tiles.compose_(whitening.cholesky_inverse(g2, 1e-13)[0], x)
    white = whitening.WhiteningSweep.begin(h1, x, dtype).run(h1, x)
    assert white.doubled == (condition == 1e14)
    q = whitening.times_doubled(x, h, _tiles.row_maxima(x)) if white.doubled else _tiles.times(x, h)
    q = q.to(dtype)
    assert 0 < _distance(_exact(q), _product(_exact(x.dense()), _exact(h))) <= white.witness_error
    symmetric = _symmetric(white.gram.dense())
    assert 0 < _distance(_exact(symmetric), _gram(_exact(q))) <= white.product_error
    truth = float(torch.linalg.matrix_norm(symmetric.double() - torch.eye(n, dtype=torch.float64), 2))
    assert truth <= white.distance
    margin = math.sqrt(1 - white.distance - white.product_error) - white.witness_error
    assert math.isclose(white.margin, margin, rel_tol=1e-12)
    assert white.witness_error > (1e-8 if condition == 1e9 else 1e-13)


@pytest.mark.parametrize(("stage", "condition"), [("Gram", 10), ("whitening", 1e9)])
def test_a_proof_that_was_stopped_between_panels_ends_as_if_it_had_not_been(stage, condition, tmp_path):
    h = _with_condition(20, 2500, condition)  # three panels
    whole = prove_full_rank(h, sharp=False)
    assert whole.proved and whole.route == ("shift" if stage == "Gram" else "whitening")
    seen = []

    def stop(step, fraction):
        seen.append(step)
        if seen.count(stage) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StateFile(tmp_path / "state", "proof", "of h", 0.0) as file:
        prove_full_rank(h, sharp=False, progress=stop, checkpoint=file)
    again = []
    with StateFile(tmp_path / "state", "proof", "of h", 0.0) as file:
        resumed = prove_full_rank(
            h, sharp=False, progress=lambda *step: again.append(step[0]), checkpoint=file
        )
    assert resumed == whole and again[:2].count(stage) == 1  # the last of three panels
