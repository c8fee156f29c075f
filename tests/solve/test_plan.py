"""plan: what is counted is what is done, what is planned to be sent is what a simulated ring sends."""

from __future__ import annotations

import numpy as np
import pytest
import sharded
import torch

import gcfast
from gcfast import Rates
from gcfast.proofs import rounding
from gcfast.proofs import tiles as _tiles
from gcfast.proofs.rounding import Tiling
from gcfast.solve import gram_forms, planning
from gcfast.solve.grams import FreeGram

RATES = Rates(3e11, 1.5e11, 2e10)


def _problem():
    g = torch.Generator().manual_seed(0)
    layer = gcfast.WideLayer(8, 400, beta=4.0)
    layer.reset_parameters(g)
    z, y = torch.randn((350, 8), generator=g), torch.arange(350) % 3
    real = (z @ torch.randn((8, 3), generator=g)).tanh() + 0.02 * torch.randn((350, 3), generator=g)
    return gcfast.WideFeatures(z, layer), y, real


def test_it_says_what_solve_head_does():
    wide, y, _ = _problem()
    planned = gcfast.plan(wide, y, rates=RATES)["solve"]
    done = gcfast.solve_head(wide, y, target_gap=1e-4)
    assert (done.form, done.peak_bytes) == (planned.form, planned.bytes)
    room = planned.bytes - 1
    smaller = gcfast.plan(wide, y, rates=RATES, max_bytes=room)["solve"]
    done = gcfast.solve_head(wide, y, target_gap=1e-4, max_bytes=room)
    assert done.converged and (done.form, done.peak_bytes) == (smaller.form, smaller.bytes)
    assert smaller.bytes <= room and smaller.form != planned.form
    assert not gcfast.plan(wide, y, rates=RATES, max_bytes=1000)["solve"].fits
    with pytest.raises(MemoryError, match=r"smallest form .* needs [\d,]+ bytes"):
        gcfast.solve_head(wide, y, max_bytes=1000)


@pytest.mark.parametrize("loss", ["cross_entropy", "soft", "mse", "bce_with_logits", "huber", "decay"])
def test_every_form_gives_the_same_answer(loss, monkeypatch):
    wide, y, real = _problem()
    targets = {
        "cross_entropy": real.argmax(1),
        "soft": real.softmax(1),
        "bce_with_logits": (real > 0).float(),
        "decay": y,
    }
    options = {"weight_decay": 1e-4} if loss == "decay" else {}
    name = "cross_entropy" if loss in ("soft", "decay") else loss
    sizes = gram_forms.sizes_of(wide, 3)
    # float32 where the curvature vanishes along the path
    attained = loss not in ("cross_entropy", "bce_with_logits", "decay")
    forms = gram_forms.options(sizes, False, attained, None, RATES)
    assert len({o.name for o in forms}) == len(forms) == (4 if attained else 7)
    answers = []
    for form in forms:
        monkeypatch.setattr(gram_forms, "options", lambda *_, form=form: [form])
        solution = gcfast.solve_head(wide, targets.get(loss, real), loss=name, target_gap=1e-3, **options)
        assert solution.converged and solution.form == form.name, str(solution)
        assert solution.distance_bound < 0.3, (form.name, solution.distance_bound)
        answers.append(solution)
    first = answers[0]
    for other in answers[1:]:
        # points of one path: their losses say how far apart they may be
        near = 0.05 + 0.3 * abs(torch.tensor(other.loss / first.loss).log().item())
        assert float((other.weight - first.weight).norm()) <= near * float(first.weight.norm())


def test_rates_of_this_machine_change_the_seconds_not_the_form(monkeypatch):
    wide, y, _ = _problem()
    monkeypatch.setattr(planning, "measured", lambda device: Rates(1e15, 1e6, 1e12))  # no float64 to speak of
    planned = gcfast.plan(wide, y)["solve"]
    assert planned.form == gcfast.solve_head(wide, y, target_gap=1e-3).form
    assert planned.seconds > gcfast.plan(wide, y, rates=RATES)["solve"].seconds


def test_the_table_names_every_form_and_its_reason():
    text = str(gcfast.plan(n=20_000, m=22_000, d=128, c=10, max_bytes=10**9, rates=RATES))
    assert "n = 20,000 samples, m = 22,000 features (recomputed from 128 inputs), C = 10" in text
    assert "K of the samples that matter" in text and "do not fit" in text and "DOES NOT FIT" in text
    assert "300 GFLOP/s in float32, 150 in float64, 20 GB/s" in text
    stored = gcfast.plan(n=2000, m=2200, c=10, dtype=torch.float64, rates=RATES)
    assert "(stored)" in str(stored) and stored["certify"].fits and stored.sharded is None
    assert "fails at once" in gcfast.plan(n=500, m=300, c=2, rates=RATES)["certify"].form


def test_the_ones_column_of_the_bias_is_planned_with():
    """m features and the ones column give rank m + 1 at most: a sample more is one too many."""
    h = torch.randn((13, 11), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (12, 13):
        enough = gcfast.certify(h[:n]).status == "holds"
        form = gcfast.plan(n=n, m=11, c=2, rates=RATES)["certify"].form
        assert enough == (n == 12) and ("fails at once" in form) == (not enough)


@pytest.mark.parametrize("n", [300, 6000, 20_000])
def test_no_form_of_the_gram_counts_less_than_it_stores(n):
    s = gram_forms.Sizes(n, n + n // 10, 10, None, torch.float64, torch.device("cpu"))
    stored = {"dense": n * n, "tiles": n * (n + 1) // 2}
    forms = [o for o in gram_forms.options(s, False, False, None, RATES) if o.form in stored]
    assert len(forms) == 4
    for form in forms:
        assert form.bytes >= form.dtype.itemsize * stored[form.form], form.name
    room = 8 * n * n - 1
    fitting = [o for o in gram_forms.options(s, False, False, room, RATES) if o.bytes <= room]
    assert "K whole, float64" not in {o.name for o in fitting}


def test_rows_of_a_gram_that_is_never_stored_are_its_own():
    """Also those that stay in the cache while others have to leave it, in whatever order they are asked."""
    wide, _, _ = _problem()
    whole = wide.panel(0, 400)
    exact = whole @ whole.mT + 1.0
    gram = FreeGram(wide, True, torch.float64, 6)
    for index in ([0, 1, 2, 3], [9, 2, 4, 1], [4, 9, 5], [1, 2, 3, 4, 5, 6, 7, 8], [8, 1, 0]):
        rows = gram.rows(torch.tensor(index))
        torch.testing.assert_close(rows, exact[index], rtol=1e-5, atol=1e-4)


def test_a_model_is_planned_without_running_it():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 90), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(90, 3))

    def never(*_):
        raise AssertionError("it ran")

    model[0].register_forward_hook(never)
    found = gcfast.plan(model, (torch.randn(50, 4), torch.zeros(50).long()), rates=RATES)
    assert (found.n, found.m, found.c, found.d) == (50, 90, 3, None)
    wide = gcfast.widen(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)), 50
    )
    few = gcfast.plan(wide, (torch.randn(50, 4), torch.zeros(50).long()), rates=RATES, max_bytes=10_000)
    assert (few.m, few.d) == (55, 6)


def test_numbers_of_numpy_do_not_overflow():
    sizes = {"n": 2_000_000, "m": 2_200_000, "d": 120, "c": 100, "devices": 8}
    whole = {name: np.int32(value) for name, value in sizes.items()}
    assert str(gcfast.plan(**whole, rates=RATES, max_bytes=np.int64(10**9))) == str(
        gcfast.plan(**sizes, rates=RATES, max_bytes=10**9)
    )


def test_rates_are_measured_once_and_draw_no_random_numbers():
    planning.measured.cache_clear()
    before = torch.get_rng_state()
    rates = gcfast.plan(n=100, m=110, c=2).rates
    assert torch.equal(torch.get_rng_state(), before)
    assert gcfast.plan(n=200, m=220, c=2).rates is rates
    assert all(1e8 < value < 1e15 for value in (rates.f32, rates.f64, rates.memory))


def test_float64_is_preferred_unless_it_costs_three_times_as_much():
    s = gram_forms.Sizes(3000, 3300, 10, 64, torch.float32, torch.device("cpu"))
    best = gram_forms.options(s, False, False, None, RATES)[0]
    assert best.dtype == torch.float64
    assert gram_forms.options(s, True, False, None, RATES)[0].form == "set"


@pytest.mark.parametrize("p", [2, 3, 4])
def test_what_is_planned_to_be_sent_is_sent(p, monkeypatch):
    for module in (rounding, _tiles, sharded):
        monkeypatch.setattr(module, "tiling", lambda device: Tiling(12, 4))
    n, d, c = 24 * p, 5, 7 * p
    m = 96 * p - 1  # (m + 1) C in p equal chunks
    g = torch.Generator().manual_seed(0)
    layer = (torch.randn((m, d), generator=g), torch.randn(m, generator=g))
    z, r = torch.randn((n, d), generator=g), torch.randn((n, c), generator=g)
    planned = gcfast.plan(n=n, m=m, d=d, c=c, devices=p, rates=RATES).sharded
    assert planned.rows == n // p
    blocks = [gcfast.WideFeatures(part, layer, beta=4.0) for part in z.chunk(p)]
    whole = gcfast.WideFeatures(z, layer, beta=4.0)

    ring = sharded.Ring(p)
    product = sharded.gram_product(ring, blocks, list(r.chunk(p)))
    torch.testing.assert_close(product, whole.gram_times(r) + r.sum(0), rtol=1e-4, atol=1e-2)
    assert ring.sent == [planned.product_bytes] * p

    ring = sharded.Ring(p)
    owned = sharded.gram(ring, blocks)
    assert ring.sent == [planned.gram_bytes] * p
    ring = sharded.Ring(p)
    for tiles in owned:  # far from singular
        for key, tile in tiles.items():
            if key[0] == key[1]:
                tile.diagonal().add_(1.0)
    sharded.cholesky(ring, owned, 2 * p)
    assert sum(ring.sent) == (p - 1) * planned.factor_bytes and max(ring.sent) <= planned.factor_bytes
    low = torch.zeros((n, n), dtype=torch.float64)
    for tiles in owned:
        for (i, j), tile in tiles.items():
            low[12 * i : 12 * i + 12, 12 * j : 12 * j + 12] = tile
    exact = whole.panel(0, m)
    want = torch.linalg.cholesky(exact @ exact.mT + torch.eye(n))
    torch.testing.assert_close(low, want, rtol=1e-9, atol=1e-9)


BAD = [
    ({}, "n: expected a positive int"),
    ({"n": 5, "m": 6}, "c: expected a positive int"),
    ({"n": 5, "m": 6, "c": 2, "rates": "abacus"}, "rates: expected one of"),
    ({"n": 5, "m": 6, "c": 2, "devices": 2, "rates": RATES}, "devices: sharding"),
    ({"n": 5, "m": 6, "c": 2, "max_bytes": -1, "rates": RATES}, "max_bytes"),
    ({"model_or_features": torch.ones(3, 4), "n": 3}, "not both"),
    ({"n": 5, "m": 6, "c": 2, "loss": "hinge"}, "loss"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gcfast.plan(**options)
