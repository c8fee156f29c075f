"""What the proofs decide by their bounds, where a decision turns; and their memory and progress."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from gcfast.features import FeaturesWithOnes
from gcfast.proofs import full_rank, large_matrix_rank, scaling, tiles
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.large_matrix_rank import rank_of_large
from gcfast.proofs.rank_proof import ProofProgress, RankProof, panel_bytes, proof_bytes, proof_flops
from gcfast.proofs.rounding import gamma, round_up
from gcfast.proofs.shift import ShiftProof
from gcfast.proofs.tiles import Tiles
from gcfast.proofs.whitening import Whitened, WhiteningSweep

WIDE, SINGLE = torch.float64, torch.float32
NORMAL = 2.0**-1022


def after(x):
    return math.nextafter(x, math.inf)


def before(x):
    return math.nextafter(x, -math.inf)


# Memory, operations, progress


def test_memory_and_operations():
    for n, m in ((10, 5), (10, 1023), (10, 5000), (700, 3)):
        # six panels of float64, as many as a doubled product needs, and 32 MiB
        assert panel_bytes(n, m) == 6 * 8 * n * min(1024, m + 1) + 32 * 2**20
        triangle = 8 * Tiles.count(n)
        assert proof_bytes(n, m, disk=True) == panel_bytes(n, m)
        assert proof_bytes(n, m) == panel_bytes(n, m) + 3 * triangle
        assert proof_bytes(n, m, sharp=True) == panel_bytes(n, m) + 4 * triangle
        # Grams: of H1, and twice of Q; Q itself, and three times as much where it is doubled; cubes / 3
        assert proof_flops(n, m) == pytest.approx((3 + 1 + 3) * n * n * m + 6 * n**3 / 3, rel=1e-15)


@pytest.mark.parametrize(("n", "m"), [(2000, 4000), (2001, 3), (40, 0)])
def test_progress_is_the_share_of_the_operations(n, m):
    seen = []
    progress = ProofProgress(lambda *step: seen.append(step), n, m)
    cube = n / (3 * max(m, 1))  # of n^3 / 3, in products of n^2 m
    cost = {"Gram": 1.0, "whitening": 2.5, "factor": 2 * cube, "norm": 0.02}
    once, again = ["factor", "whitening"], ["factor", "compose", "whitening"]
    assert progress.whitening(1) == [*once, "norm"] and progress.whitening(3) == [
        *once,
        *again,
        *again,
        "norm",
    ]
    steps = ["Gram", "Cholesky"] + ([*once, *again, "norm"] if n > 2000 else [])
    whole, done = sum(cost.get(step, cube) for step in steps), 0.0
    for step in steps:
        for fraction in (0.5, 1.0):
            progress(step, fraction)
            now = done + fraction * cost.get(step, cube)
            assert seen[-1] == (step, pytest.approx(min(now / whole, 0.999), rel=1e-12))
        done = now
    progress.expect(["factor"])  # another, which the share goes back for, but what is shown does not
    progress("factor", 0.1)
    assert seen[-1] == ("factor", seen[-2][1])
    unexpected = ProofProgress(lambda *step: seen.append(step), n, m)
    unexpected("Cholesky, sharp", 0.25)
    assert seen[-1][1] == pytest.approx(0.25 * cube / (1 + 2 * cube + whole - 1 - cube), rel=1e-12)
    unexpected.end()
    assert seen[-1] == ("done", 1.0)
    nothing = ProofProgress(lambda *step: seen.append(step), n, m)
    nothing.expect([])
    nothing.cube = 0.0
    nothing("Cholesky", 0.5)
    assert seen[-1] == ("Cholesky", 0.999)
    assert progress.passes == (2 if n > 2000 else 1)
    quiet = ProofProgress(None, n, m)
    quiet("Gram", 1.0)
    quiet.end()
    assert quiet.done == 1.0 and quiet.rest[0][0] == "Cholesky"


# prove_full_rank


def proof_of(n=3, columns=4, **options):
    h1 = FeaturesWithOnes(torch.eye(n, columns, dtype=WIDE), ones=False)
    return full_rank._Proof(h1, *(options.get(k) for k in ("sharp", "progress", "max_bytes", "checkpoint")))


def test_nothing_to_prove_is_proved():
    assert prove_full_rank(torch.zeros((0, 5))) == RankProof(True, math.inf, 0.0, 1.0, 0, "no rows")


def test_triangles_go_to_the_disk_where_memory_ends():
    n, columns = 3, 4
    for triangles in (1, 2, 3):
        room = panel_bytes(n, columns) + 8 * Tiles.count(n) * triangles
        assert proof_of(max_bytes=room).scratch(triangles) is None
        assert proof_of(max_bytes=room - 1).scratch(triangles) is not None


@pytest.mark.parametrize("strict", [True, False])
def test_float32_where_it_leaves_enough_of_the_margin(strict, monkeypatch):
    seen = []
    monkeypatch.setattr(
        WhiteningSweep, "begin", lambda h1, x, dtype, plain, scratch: seen.append((dtype, plain))
    )
    proof = proof_of(sharp=strict)
    share, plain = (0.2, 1e-2) if strict else (0.45, 0.3)
    for columns in (100, 25600):
        lost = 0.8 * gamma(256 + columns // 256, SINGLE)  # a row
        for n in (math.ceil(share / lost) - 1, math.ceil(share / lost)):
            proof.h1 = SimpleNamespace(n=n, columns=columns)
            assert proof._sweep(None, 0.0, None) is None
            assert seen.pop() == (SINGLE if n * lost < share else WIDE, plain)
            assert proof._sweep(None, 1e-9, None) is None and seen.pop()[0] == WIDE


def test_rows_are_scaled_where_products_would_leave_the_range():
    for end, beyond in ((2.0**-200, before(2.0**-200)), (2.0**200, after(2.0**200))):
        for value, of in ((end, "H1"), (beyond, "D H1")):
            h = torch.tensor([[value, 0.0]], dtype=WIDE)
            proof = prove_full_rank(h, ones=False)
            assert proof.proved and f"sigma_min({of})^2" in proof.reason
            square = prove_full_rank(h[:, :1], ones=False)
            assert square.proved and f"sigma_min({of})^2" in square.reason
            assert 0.8 * value <= proof.sigma_min_lower <= value <= proof.sigma_max_upper <= 1.1 * value
    assert not prove_full_rank(torch.full((2, 1), 2.0**300, dtype=WIDE), ones=False).proved


def test_a_shift_that_keeps_three_quarters_of_the_estimate_is_enough(monkeypatch):
    h = torch.eye(3, 4, dtype=WIDE)
    grams = []
    for lower, estimate, sharp, route in (
        (0.75, 1.0, True, "shift"),
        (before(0.75), 1.0, True, "whitening"),
        (0.01, 1.0, False, "shift"),
    ):
        short = ShiftProof(lower, estimate, 0.5)
        monkeypatch.setattr(full_rank, "prove_by_shift", lambda g, *a: grams.append(g) or short)  # noqa: B023
        proof = prove_full_rank(h, ones=False, sharp=sharp)
        assert proof.route == route
        if route == "shift":
            assert proof.sigma_min_lower == math.sqrt(lower) * (1 - 1e-15) and proof.margin == 0.5
            assert proof.passes == 0 and "50% of the shift" in proof.reason
        g = grams[-1]
        assert proof.sigma_max_upper == round_up(math.sqrt(round_up(g.norm + g.error)))
    # the better of both bounds, the shift's where they are equal
    monkeypatch.setattr(full_rank, "prove_by_shift", lambda g, *a: ShiftProof(4.0, 1e9, 0.25))
    equal = 2.0 * (1 - 1e-15)
    for least, route in ((before(equal), "shift"), (equal, "shift"), (after(equal), "whitening")):
        white = RankProof(True, least, 9.0, 0.5, 1, "", "whitening")
        monkeypatch.setattr(full_rank._Proof, "_by_whitening", lambda *a: white)  # noqa: B023
        proof = prove_full_rank(h, ones=False)
        assert proof.route == route and proof.sigma_min_lower == max(least, equal)


@pytest.mark.parametrize("by", [0.0, 1e-9])
@pytest.mark.parametrize(
    ("sharp", "margins", "passes", "margin"),
    [
        (True, [0.91], 1, 0.91),
        (True, [0.9, 0.95], 2, 0.95),
        (True, [0.5, 0.4], 2, 0.5),
        (True, [0.5, 0.5], 2, 0.5),
        (False, [0.1], 1, 0.1),
        (False, [-0.1, 0.0, 0.2], 3, 0.2),
        (True, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6, 0.6),
        (True, [-math.inf] * 6, 6, 0.0),
        (True, [0.5, None], 2, 0.5),
    ],
)
def test_passes_of_whitening(sharp, margins, passes, margin, by, monkeypatch):
    shifts, composed, asked, stricts, told, left = [], [], [], [], [], list(margins)
    eye = torch.eye(3, dtype=WIDE)

    def inverse(g, start, scratch, after):
        assert g.dtype == WIDE
        shifts.append(start)
        return Tiles.of(eye.clone()), by

    def sweep(self, x, shift, state):
        assert shift == by
        stricts.append(self.strict)
        value = left.pop(0)
        return None if value is None else Whitened(Tiles.of(eye.float()), 0.1, 0.0, 0.0, value, False)

    monkeypatch.setattr(full_rank, "prove_by_shift", lambda *a: asked.append("shift"))
    monkeypatch.setattr(full_rank, "cholesky_inverse", inverse)
    monkeypatch.setattr(full_rank, "compose_", lambda y, x, after: composed.append(1))
    monkeypatch.setattr(full_rank._Proof, "_sweep", sweep)
    monkeypatch.setattr(full_rank._Proof, "scratch", lambda self, triangles: asked.append(triangles))
    monkeypatch.setattr(ProofProgress, "__call__", lambda self, *step: told.append(step))
    for name in ("norm_sharp", "norm_upper"):
        monkeypatch.setattr(full_rank, name, lambda x: 0.0)
    proof = prove_full_rank(torch.eye(3, 4, dtype=WIDE), ones=False, sharp=sharp)
    assert (proof.passes, proof.margin, proof.proved) == (passes, margin, margin > 0) and not left
    assert shifts == [11.0 * (3 + 4) * 2.0**-53] * passes and len(composed) == passes - 1
    assert asked == [1, 2, "shift", 2, *[3] * (passes - 1)]  # Gram; factor; witness and next factor
    # whitening without a shift that gained nothing is held to more from then on
    gains = [0.0, *(value or 0.0 for value in margins)]
    idle = [by == 0.0 and later <= max(gains[:k]) for k, later in enumerate(gains) if k]
    assert stricts == [sharp or any(idle[:k]) for k in range(passes)]
    if proof.proved:  # ||X|| is off by 2^-1022 a row where it was scaled
        assert proof.sigma_min_lower == margin / (3 * NORMAL) * (1 - 1e-14) and told[-1] == ("norm", 0.0)
    else:
        assert proof.sigma_min_lower == 0.0


def test_the_rest_is_expected_where_a_proof_goes_on(monkeypatch):
    given, asked = [], []

    def by_whitening(self, g, x, state):
        given.append((g is not None, x is not None, state is not None))
        return self._refused("no")

    monkeypatch.setattr(full_rank._Proof, "_by_whitening", by_whitening)
    monkeypatch.setattr(full_rank._Proof, "scratch", lambda self, triangles: asked.append(triangles))
    values = {"sigma_max": 1.0, "last": "", "strict": True, "short": None}
    for stage, kept, passes, more in (
        ("whitening", ["g", "x"], 1, 1),
        ("whitening", ["g", "x"], 2, 1),
        ("factor", ["g"], 0, 2),
        ("factor", ["g", "x"], 1, 1),
    ):
        named = {**values, "stage": stage, "passes": passes, "tiles": kept}
        state = SimpleNamespace(values=named, tensors=lambda name: torch.eye(3, dtype=WIDE))
        proof = proof_of(checkpoint=SimpleNamespace(load=lambda: state))  # noqa: B023
        assert not proof.run().proved
        assert [step for step, _ in proof.progress.rest] == proof.progress.whitening(more)
        assert given.pop() == (stage == "factor", stage == "factor" and "x" in kept, stage == "whitening")
        assert asked == ([1, 2][: len(kept)] if stage == "factor" else [])
        asked.clear()
    monkeypatch.undo()
    swept = []
    monkeypatch.setattr(full_rank._Proof, "scratch", lambda self, triangles: asked.append(triangles))
    monkeypatch.setattr(full_rank._Proof, "_sweep", lambda self, *a: swept.append(a))
    assert not proof._by_whitening(
        None, None, SimpleNamespace(values={"shift": 0.5}, tensors=state.tensors)
    ).proved
    assert asked == [1] and swept[0][1] == 0.5


# The rank of one large matrix


def test_a_large_matrix_is_scaled_and_scaled_back(monkeypatch):
    tolerance, seen = torch.tensor([0.25], dtype=WIDE), []

    def found(h, absolute, relative, lost):
        seen.append((h, absolute, relative, lost))
        return large_matrix_rank._Found(True, 2, 1, 3, 0.5, 2.0)

    monkeypatch.setattr(large_matrix_rank, "_rank_of_scaled", found)
    for size, exponent in ((1.0, 0), (2.0**300, 301), (2.0**-300, -299)):
        x = size * torch.ones((1, 3, 4), dtype=WIDE)
        answer = [float(v) for v in rank_of_large(x, tolerance, tolerance)]
        h, absolute, relative, lost = seen[-1]
        assert torch.equal(h, x[0] * 2.0**-exponent) and relative == 0.25
        assert absolute == 0.25 * 2.0**-exponent and lost == (math.sqrt(12) * 2.0**-1073 if exponent else 0.0)
        assert answer == [2, 1, 3, 0.5 * 2.0**exponent, 2.0 * 2.0**exponent]
    # what scaling lost is taken off, and added
    lost = math.sqrt(12) * 2.0**-1073
    for least, largest in ((1e6 * lost, 1e7 * lost), (0.5 * lost, lost)):
        monkeypatch.setattr(
            large_matrix_rank,
            "_rank_of_scaled",
            lambda *a: large_matrix_rank._Found(True, 2, 1, 3, least, largest),  # noqa: B023
        )
        *_, low, high = rank_of_large(2.0**300 * torch.ones((1, 3, 4), dtype=WIDE), tolerance, tolerance)
        assert float(low) == max(least - lost, 0.0) * 2.0**301 and float(high) == (largest + lost) * 2.0**301
    # where nothing is decided, what was found bounds the SVD's answer
    between = large_matrix_rank._Found(False, 0, 1, 2, 0.0, 9.0)
    monkeypatch.setattr(large_matrix_rank, "_rank_of_scaled", lambda *a: between)
    for size, ranks in ((0.0, [1, 1, 0]), (1.0, [2, 3, 2])):
        x = size * torch.eye(3, 4, dtype=WIDE)[None]
        assert [int(v) for v in rank_of_large(x, tolerance, tolerance)[:3]] == ranks
    assert large_matrix_rank._times_power(1.5, 1024) == math.inf


def test_what_decides_the_rank_of_a_large_matrix(monkeypatch):
    h = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=WIDE))
    unproved = RankProof(False, 0.0, math.inf, 0.0, 0, "")
    facts = {"top": (15.0, 17.0), "shift": None, "counts": (0, 3), "proof": unproved}
    known = dict(facts)
    monkeypatch.setattr(large_matrix_rank, "_top", lambda g, low: known["top"])
    monkeypatch.setattr(large_matrix_rank, "prove_by_shift", lambda g, sharp, after: known["shift"])
    limits = []
    monkeypatch.setattr(
        large_matrix_rank, "_by_counts", lambda g, low, *a: limits.append(a) or known["counts"]
    )
    monkeypatch.setattr(large_matrix_rank, "prove_full_rank", lambda h, ones: known["proof"])
    out, into = 1 + 1e-15, 1 - 1e-15
    largest, smallest = math.sqrt(17.0) * out, math.sqrt(15.0) * into

    def rank(absolute=0.0, relative=0.0, lost=0.0, **others):
        limits.clear()
        known.update(facts, **others)
        return large_matrix_rank._rank_of_scaled(h, absolute, relative, lost)

    found = large_matrix_rank._Found
    # a tolerance no less than the largest singular value
    assert rank(largest) == found(True, 0, 0, 0, 0.0, largest)
    assert rank(before(largest)) != found(True, 0, 0, 0, 0.0, largest)
    assert rank(largest, lost=1e-9) != rank(largest + 1e-9, lost=1e-9) == found(True, 0, 0, 0, 0.0, largest)
    assert rank(0.0, 1.0, top=(17.0 * (1 + 1e-14), 17.0)) == found(True, 0, 0, 0, 0.0, largest)
    assert not rank(0.0, largest / smallest * (1 - 1e-9)).decided
    # counts above and below it
    rank(0.5, 0.25)
    above = (0.25 * largest) ** 2 * (1 + 1e-14) + 1e-290
    assert limits == [((0.25 * smallest) ** 2, above)]
    rank(0.0, 0.0)
    assert limits == [(0.0, 1e-290)]
    assert rank(0.5, counts=(2, 2)) == found(True, 2, 2, 2, 0.0, largest)
    limit = 0.25 * (1 + 1e-14) + 1e-290
    assert rank(0.5, counts=(3, 3)) == found(True, 3, 3, 3, math.sqrt(limit) * into, largest)
    # all of it by a shift beyond the tolerance
    for lower, decided in ((limit, False), (after(limit), True)):
        answer = rank(0.5, counts=(1, 2), shift=ShiftProof(lower, 1.0, 0.5))
        assert answer.decided == decided
    assert answer == found(True, 3, 3, 3, math.sqrt(after(limit)) * into, largest)
    # an SVD says what is left to prove: here all three exceed the tolerance, there two, which are proved
    assert rank(1.0, counts=(1, 3)) == found(False, 2, 1, 3, 0.0, largest)
    assert rank(1.0, counts=(2, 3)) == found(True, 2, 2, 3, 0.0, largest)
    assert rank(9.0, counts=(0, 3), top=(0.0, 82.0)) == found(False, 0, 0, 3, 0.0, math.sqrt(82.0) * out)
    assert rank(0.0, 0.5, counts=(1, 3)) == found(True, 1, 1, 3, 0.0, largest)
    for proved, least, ok in ((True, 0.75, True), (True, 0.5, False), (False, 0.75, False)):
        proof = RankProof(proved, least, 4.5, 0.5, 1, "")
        answer = rank(0.5, counts=(1, 3), proof=proof)
        assert answer == (found(True, 3, 3, 3, least, 4.5) if ok else found(False, 3, 1, 3, 0.0, largest))
    # beyond the tolerance by what rounding and scaling may have changed, and by no less
    for lost in (0.0, 1e-3):
        turn = 0.5 * out + 4 * lost
        for least, ok in ((turn * (1 + 1.5e-15), True), (turn * (1 + 7e-16), False)):
            proof = RankProof(True, least, 4.0, 0.5, 1, "")
            assert rank(0.0, 0.125, lost, counts=(1, 3), proof=proof).decided == ok
    # nothing is known of a Gram that is not finite, or zero
    for size in (0.0, 2.0**600):
        h = torch.full((2, 3), size, dtype=WIDE)
        known.update(facts)
        answer = large_matrix_rank._rank_of_scaled(h, 0.0, 1e-3, 0.0)
        assert answer == found(False, int(size > 0), 0, 2, 0.0, math.inf)


# Scaling


def test_rows_are_scaled_only_where_every_digit_stays():
    def scaled(*row):
        rows = scaling.scaled_rows(FeaturesWithOnes(torch.tensor([row], dtype=WIDE), ones=False))
        return None if rows is None else int(rows.exponents)

    assert scaled(1.0, 2.0**-1021) == -1  # its half is the least normal number
    assert scaled(1.0, before(2.0**-1021)) is None
    assert scaled(0.5, 2.0**-1074) == 0 and scaled(0.25, 2.0**-1074) == 1  # nothing is scaled down
    assert scaled(0.0, -3.0) == -2 and scaled(0.0, 0.0) == 0 and scaled(math.nan, 1.0) is None
    rows = FeaturesWithOnes(torch.tensor([[1.0], [2.0**-9]], dtype=WIDE), ones=False)
    assert (scaling.scaled_rows(rows).low, scaling.scaled_rows(rows).high) == (-1, 8)


def test_a_matrix_is_scaled_where_products_would_leave_the_range():
    for end, beyond in ((2.0**-200, before(2.0**-200)), (2.0**200, after(2.0**200))):
        for sign in (1.0, -1.0):
            x = torch.tensor([[sign * end, 0.0]], dtype=WIDE)
            assert scaling.scaled_matrix(x) == (x, 0)
            scaled, exponent = scaling.scaled_matrix(torch.tensor([[sign * beyond, 0.0]], dtype=WIDE))
            assert exponent == math.frexp(beyond)[1]
            assert float(scaled[0, 0]) == sign * math.frexp(beyond)[0]
    zero = torch.zeros((1, 2), dtype=WIDE)
    assert scaling.scaled_matrix(zero) == (zero, 0)


def test_powers_at_the_least_normal_number():
    for x, exponent, low, high in (
        (after(1.0), -1022, after(NORMAL), after(NORMAL)),
        (before(2.0), -1023, 0.0, NORMAL),  # which ldexp rounds up
        (0.0, 5, 0.0, NORMAL),
        (1.0, 1024, torch.finfo(WIDE).max, math.inf),
    ):
        assert scaling.lower_power(x, exponent) == low and scaling.upper_power(x, exponent) == high
    # 2^1074 is no float64
    for x, exponent, want in ((1.0, -1074, 2.0**-1074), (1.0, 1023, 2.0**1023), (2.0**-1074, 1074, 1.0)):
        one = [torch.tensor(float(v), dtype=WIDE) for v in (x, exponent)]
        assert float(scaling.times_power(*one)) == want


# Proposals


def test_progress_of_factors_and_inverses_is_that_of_their_cubes(monkeypatch):
    inners = []
    for name in ("add_product_", "subtract_product_"):
        honest = getattr(tiles, name)
        monkeypatch.setattr(tiles, name, lambda *a, honest=honest: inners.append(a[3]) or honest(*a))
    n, (block, inner) = 1100, tiles.tiling(torch.device("cpu"))
    a, cubes = 2 * torch.eye(n, dtype=SINGLE), [(min(i + block, n) / n) ** 3 for i in range(0, n, block)]
    low, seen = Tiles(n, SINGLE), []
    assert tiles.cholesky(Tiles.of(a), 0.0, low, seen.append)
    assert seen == cubes
    seen.clear()
    x = tiles.invert_(low, seen.append)
    assert seen == cubes and cubes[-1] == 1.0
    seen.clear()
    tiles.compose_(x, x.clone(), seen.append)
    assert seen == [1 - (i / 3) ** 3 for i in (2, 1, 0)]
    assert set(inners) == {2 * inner}  # half as many sums as where errors count


def test_a_tile_is_inverted_by_halves():
    a = torch.randn((300, 300), generator=torch.Generator().manual_seed(0), dtype=WIDE).tril() / 20
    a.diagonal().add_(2.0)
    x = tiles._invert_tile(a)
    assert float((x @ a - torch.eye(300, dtype=WIDE)).abs().amax()) < 1e-13


def test_a_pivot_no_larger_than_least_is_none():
    one = Tiles.of(torch.tensor([[4.0]], dtype=WIDE))
    assert tiles.cholesky(one, 0.0, Tiles(1), least=before(4.0))
    assert not tiles.cholesky(one, 0.0, Tiles(1), least=4.0)
