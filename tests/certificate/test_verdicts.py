"""What a certificate says, in numbers and in words, and from which circumstances."""

from __future__ import annotations

import inspect
import json
import math
from types import SimpleNamespace
from typing import Any

import mpmath as mp
import pytest
import torch
from heads_exact import DIGITS, ExactLoss, rows_of
from torch import nn

import gcfast
from gcfast.certificate import Assumption, Certificate, Offender, direct, theorem
from gcfast.certificate.certificate import abbreviated
from gcfast.certificate.certification import Certification
from gcfast.certificate.evidence import Evidence
from gcfast.features import checked
from gcfast.losses import ConvexLoss, bounds_at, mean_above, resolve_loss
from gcfast.proofs import proof_bytes
from gcfast.storage import StateFile


def _certificate(**given: Any) -> Certificate:
    said: dict[str, Any] = {"status": "holds", "route": "direct", "reason": "proved", "n": 20, "width": 30}
    said |= {"rank_lower": 20, "sigma_min_lower": 0.5, "sigma_max_upper": 4.0, "offenders": []}
    return Certificate(**(said | {"assumptions": []} | given))


# -- steps


def _with_loss(loss: str | ConvexLoss, z: Any, y: Any, error: float = 0.0, **given: Any) -> Certificate:
    convex = resolve_loss(loss)
    z, y = torch.as_tensor(z, dtype=torch.float64), torch.as_tensor(y)
    of_loss = {"_convex": convex, "_outputs": z, "_error": torch.full_like(z, error), "_targets": y}
    return _certificate(**({"n": len(z), "gap": 1.0, "infimum": 0.0} | of_loss | given))


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1.0), (2e-160, 3e-155), (0.5, 4.0), (1e160, 1e165)])
@pytest.mark.parametrize(("gap", "eps"), [(1.0, 1e-3), (1e-9, 0.9e-9), (1e300, 1e-3)])
def test_steps_of_the_squared_loss_are_those_of_its_linear_rate(low, high, gap, eps):
    certificate = _with_loss("mse", [[0.0]], [[0.0]], gap=gap, sigma_min_lower=low, sigma_max_upper=high)
    with mp.workdps(DIGITS):
        rate = (mp.mpf(low) / mp.mpf(high)) ** 2
        stated = mp.log(mp.mpf(gap) / mp.mpf(eps)) / -mp.log1p(-rate) / 2
        assert stated <= certificate.steps_to(eps) <= mp.ceil(stated * (1 + mp.mpf(1e-13)))


SMOOTH = {"cross_entropy": 0.5, "bce_with_logits": 0.25 / 3, "huber": 1 / 3}  # of three outputs
TARGETS = {
    "cross_entropy": [0, 2, 1, 1],
    "bce_with_logits": [[0.0, 1.0, 0.25], [0.5, 0.75, 1.0], [1.0, 0.0, 0.0], [0.125, 1.0, 1.0]],
    "huber": [[5.0, 0.0, -3.0], [0.0, 7.0, 0.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]],
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("low", "high", "error"), [(1e-6, 1.0, 0.0), (1e-3, 8.0, 2.0), (1e157, 1e165, 0.5)])
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_steps_of_other_losses_are_smoothness_and_distance(name, low, high, error, eps):
    y = torch.tensor(TARGETS[name])
    y = y if name == "cross_entropy" else y.double()
    z = torch.linspace(-2, 3, 12, dtype=torch.float64).view(4, 3)
    goal = resolve_loss(name).reachable(z, y, 0.5 * eps)
    exact = ExactLoss(name)
    with mp.workdps(DIGITS):
        targets = exact.targets(y, 3)
        infimum = mp.fsum(exact.infimum([row]) for row in targets) / 4
        reached = mp.fsum(exact.value(a, b) for a, b in zip(rows_of(goal), targets, strict=True)) / 4
        away = mp.fsum((abs(a - b) + error) ** 2 for p in zip(rows_of(goal), rows_of(z)) for a, b in zip(*p))
        beta = mp.mpf(SMOOTH[name]) * mp.mpf(high) ** 2 / 4
        stated = beta * away / mp.mpf(low) ** 2 / (2 * (mp.mpf(eps) - reached + infimum))
    bounds = {"sigma_min_lower": low, "sigma_max_upper": high, "infimum": float(infimum)}
    found = _with_loss(name, z, y, error, **bounds).steps_to(eps)
    assert stated <= found <= mp.ceil(stated * (1 + mp.mpf(1e-8)))


class _Near(ConvexLoss):
    """A loss of the user's own that says how to reach its infimum."""

    name = "near"
    smooth = math.inf

    def value(self, z, y):
        return ((z - y) ** 2).mean(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)

    def smoothness(self, c):
        return self.smooth

    def reachable(self, z, y, eps):
        return y


def test_steps_are_none_or_without_end():
    z, y = [[0.0, 1.0]], torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    of_huber = _with_loss("huber", z, y, gap=0.25)
    assert of_huber.steps_to(0.25) == of_huber.steps_to(1.0) == 0 < of_huber.steps_to(0.2) < math.inf
    assert of_huber.steps_to(0.2).is_integer()
    open_label = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # no outputs attain the infimum
    endless = {
        "no sigma_min": _with_loss("huber", z, y, sigma_min_lower=0.0),
        "no sigma_max": _with_loss("huber", z, y, sigma_max_upper=math.inf),
        "a condition beyond float64": _with_loss("mse", z, y, sigma_min_lower=1e-160, sigma_max_upper=1.0),
        "no goal": _with_loss("cross_entropy", z, open_label),
        "no smoothness": _with_loss(_Near(), z, y),
        "no finite gap": _with_loss("mse", z, y, gap=math.inf),
    }
    for why, certificate in endless.items():
        assert certificate.steps_to(1e-3) == math.inf, why
    smooth = _Near()
    smooth.smooth = 1.0
    assert 0 < _with_loss(smooth, z, y).steps_to(1e-3) < math.inf
    # a goal whose own loss, as it is stored, leaves nothing of eps
    goal = of_huber._convex.reachable(of_huber._outputs, y, 1.0)
    all_of_it = mean_above(bounds_at(of_huber._convex, goal, y, torch.zeros_like(goal)).value)
    assert of_huber.steps_to(all_of_it) == math.inf > of_huber.steps_to(1e3 * all_of_it)
    for eps in (0.0, -1.0):
        with pytest.raises(ValueError, match="eps"):
            of_huber.steps_to(eps)
    with pytest.raises(ValueError, match="steps_to needs a loss"):
        _certificate(gap=1.0, infimum=0.0).steps_to(0.5)


# -- words


def test_a_certificate_in_words():
    eleven = [Offender("equal inputs", [k, k + 1], [0, 1], True) for k in range(11)]
    ten = eleven[:10]
    of_loss = {"loss_name": "mse", "loss": 1.25, "infimum": 0.5, "gap": 0.75}
    holds = [Assumption("width", "holds", "n = 20")]
    assert str(_certificate(assumptions=holds, offenders=ten, **of_loss)).splitlines() == [
        "expressivity condition HOLDS (route: direct)",
        "  proved",
        "  n = 20 samples, m = 30 features, rank(H1) >= 20 proved",
        "  5.000e-01 <= sigma_min(H1), sigma_max(H1) <= 4.000e+00 (proved, rounding included)",
        "  mse: L = 1.25, global minimum L* = 0.5, gap L - L* = 0.75",
        "  [holds] width: n = 20",
        *[f"  offender: equal inputs: samples {o.samples}, targets [0, 1] (conflicting)" for o in ten],
    ]
    found = str(_certificate(status="unknown", route=None, sigma_min_lower=0.0, offenders=eleven))
    lines = found.splitlines()
    assert lines[0] == "expressivity condition UNKNOWN" and "sigma" not in found and "L*" not in found
    assert len(lines) == 3 + 10 + 1 and lines[-1] == "  ... and 1 more offenders"
    near = Offender("dependency", [1, 2], [3, 4], None, [1.0, -1.0], 0.25)
    assert str(near) == "dependency: samples [1, 2], targets [3, 4], relative residual 2.5e-01"
    assert abbreviated(list(range(8))) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert abbreviated(list(range(10))) == "[0, 1, 2, 3, 4, 5, 6, 7, ... 2 more]"
    assert abbreviated(list(range(9))) == "[0, 1, 2, 3, 4, 5, 6, 7, ... 1 more]"
    plain = _certificate(sigma_max_upper=math.inf).to_dict()
    assert plain["sigma_max_upper"] is None and plain["sigma_min_lower"] == 0.5
    certificate = _certificate(assumptions=holds, offenders=ten)
    plain = certificate.to_dict()
    plain["assumptions"][0]["status"] = plain["offenders"][0]["samples"] = None  # a copy is edited
    assert (certificate.assumptions[0].status, certificate.offenders[0].samples) == ("holds", [0, 1])
    assert _certificate().to_json() == json.dumps(_certificate().to_dict(), indent=2)


# -- what decides


def _draws(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, m), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sharp_bound_is_the_default_up_to_4096_samples():
    for n in (4096, 4097):
        features = checked(torch.arange(n, dtype=torch.float64)[:, None])
        for sharp in (None, True, False):
            run = Certification(features, None, features, None, True, None, None, sharp, None, None)
            assert run.sharp == (n == 4096 if sharp is None else sharp)


def test_a_checkpoint_is_of_the_direct_route(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"no checkpoint")
    model = nn.Sequential(gcfast.WideLayer(3, 8), nn.Linear(8, 2)).double()
    data = _draws(8, 3), torch.arange(8) % 2
    assert gcfast.certify(model, data, route="theorem", checkpoint=path).status == "holds"
    for route in (None, "direct"):
        with pytest.raises(ValueError, match="checkpoint"):
            gcfast.certify(model, data, route=route, checkpoint=path)
    assert path.read_bytes() == b"no checkpoint"


def test_the_state_is_kept_as_often_by_whoever_keeps_it():
    calls = (
        (gcfast.certify, "checkpoint_seconds"),
        (gcfast.solve_head, "checkpoint_seconds"),
        (StateFile, "every"),
    )
    assert len({inspect.signature(call).parameters[name].default for call, name in calls}) == 1


def test_the_loss_is_that_of_the_head_where_its_features_were_gone_through():
    """Then the outputs are logits made anew, with an error; else they are the model's own."""
    model = nn.Sequential(gcfast.WideLayer(3, 8), nn.Linear(8, 2)).double()
    data = 9 * _draws(8, 3), _draws(8, 2, seed=1)
    direct, by_theorem = (gcfast.certify(model, data, loss="mse", route=r) for r in ("direct", "theorem"))
    assert direct.status == by_theorem.status == "holds" and 0 < direct.sigma_min_lower < 1
    assert bool((direct._error > 0).all()) and not by_theorem._error.any()
    outputs = model(data[0]).detach()
    assert torch.equal(by_theorem._outputs, outputs) and direct.loss > by_theorem.loss
    assert direct.loss == pytest.approx(by_theorem.loss, rel=1e-9)


def test_copies_are_counted():
    model = nn.Sequential(gcfast.WideLayer(3, 12), nn.Linear(12, 2)).double()
    for what, x, given in (("inputs", _draws(9, 3), (model,)), ("features", _draws(9, 12), ())):
        y = torch.arange(9) % 2
        x[[3, 4]], x[8] = x[0].clone(), x[1]
        found = gcfast.certify(*given, (x, y)) if given else gcfast.certify(x, y)
        named = {a.name: a.reason for a in found.assumptions}
        assert named[f"distinct {what}"].startswith("3 samples are copies")
        assert [o.samples for o in found.offenders] == [[0, 3, 4], [1, 8]]
        assert found.reason.startswith("2 groups of equal samples make rank(H1) < n; 2 of them have")
        assert (found.status, found.rank_lower) == ("fails", 6)
        assert "one row of each has proved rank 6, the others add none" in named["rank at the frozen weights"]


def test_the_layer_may_be_as_wide_as_there_are_samples_and_no_narrower():
    data = _draws(8, 3), torch.arange(8) % 2
    for m in (7, 8):
        model = nn.Sequential(gcfast.WideLayer(3, m), nn.Linear(m, 2)).double()
        found = gcfast.certify(model, data, route="theorem")
        assert found.status == ("holds" if m == 8 else "unknown")
        assert ("needs m >= n" in found.reason) == (m == 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_not_stored_are_said_to_be_made_anew(dtype):
    found = gcfast.certify(gcfast.WideFeatures(_draws(8, 3).to(dtype), gcfast.WideLayer(3, 12, dtype=dtype)))
    rounded = ", rounded to float32" if dtype == torch.float32 else ""
    assert f"evaluated in float64{rounded}, its features never stored" in str(found)


# -- the direct route's memory


def test_the_proof_needs_its_panels_and_no_more():
    """Its tiles may lie in files; one byte less than the panels is refused."""
    h = _draws(20, 30)
    panels = proof_bytes(20, 30, disk=True)
    assert gcfast.certify(h, max_bytes=panels).status == "holds" and panels < proof_bytes(20, 30)
    with pytest.raises(MemoryError, match=f"n = 20 needs {panels:,} bytes"):
        gcfast.certify(h, max_bytes=panels - 1)


@pytest.mark.parametrize("short", [0, 1])
def test_what_spoils_the_rank_is_sought_where_three_square_matrices_fit(monkeypatch, short):
    h = torch.randint(-9, 9, (20, 30), generator=torch.Generator().manual_seed(0)).double()
    h[3] = h[1] + h[2] - h[0]
    unproved = SimpleNamespace(proved=False, sigma_max_upper=9.0, reason="no")
    monkeypatch.setattr(direct, "prove_full_rank", lambda *args, **options: unproved)
    monkeypatch.setattr(direct, "proof_bytes", lambda *args, **options: 1)
    options = {"ones": True, "sharp": True, "on_progress": None, "checkpoint": None}

    def found(room: int) -> Evidence:
        evidence = Evidence(20, None)
        direct.prove_directly(evidence, checked(h), [], max_bytes=room, **options)
        return evidence

    squares = 3 * 8 * 20 * 20  # the Gram, its factor, and what is kept of it
    assert [o.kind for o in found(squares - short).offenders] == ["dependency"] * (1 - short)
    copy = 8 * 20 * 30  # of the rows that are proved independent
    assert found(squares + copy - short).rank_lower == (0 if short else 19)


# -- the theorem's assumptions


@pytest.mark.parametrize(
    ("verdicts", "status", "words"),
    [
        (["analytic"], "holds", "every operator before the head is real analytic"),
        (["analytic", "unknown"], "unknown", "op1"),
        (["unknown", "not analytic"], "fails", "op0; op1"),
        (["not analytic"] * 5, "fails", "op0; op1; op2; op3; op4"),
        (["unknown"] * 6, "unknown", "op0; op1; op2; op3; op4; ..."),
    ],
)
def test_operators_that_are_not_analytic_are_named(monkeypatch, verdicts, status, words):
    class Found(SimpleNamespace):
        def __str__(self):
            return f"op{self.number}"

    found = [Found(verdict=v, number=k) for k, v in enumerate(verdicts)]
    monkeypatch.setattr(theorem, "analyticity", lambda *args: found)
    for forced in (False, True):
        evidence = Evidence(3, None)
        call = (evidence, None, nn.Identity(), SimpleNamespace(head=None, first_batch=None), forced)
        if forced and status != "holds":
            with pytest.raises(ValueError, match=f"real analytic in .*; {words}. Use route='direct'"):
                theorem._analytic(*call)
        else:
            assert theorem._analytic(*call) == (status == "holds")
        (said,) = evidence.assumptions
        assert (said.status, said.reason) == (status, words)


@pytest.mark.parametrize(
    ("rows", "zero", "groups"),
    [
        ([[0, 1, 2], [1, -2, 0], [1, 2, 0], [0, -2, 1]], [], []),
        ([[0, 1, 2], [1, -2, 0], [0, -1, -2]], [], [[0, 2]]),
        ([[1, -2, 0], [3, 0, 0], [-1, 2, -0.0]], [], [[0, 2]]),
        ([[1, 0, 2], [1, 0, 2], [-1, 0, 2]], [], [[0, 1]]),
        ([[1, 0, 2], [0, -0.0, 0], [5, 0, 2]], [1], []),
        ([[1, 0, 2], [0, -0.0, 0], [-1, 0, -2], [0, 0, 0]], [1, 3], [[0, 2], [1, 3]]),
    ],
)
def test_rows_that_are_zero_or_opposite_are_found_exactly(rows, zero, groups):
    evidence = Evidence(len(rows), None)
    found = theorem._distinct_up_to_sign(evidence, torch.tensor(rows, dtype=torch.float64))
    (said,) = evidence.assumptions
    assert found == (not zero and not groups) == (said.status == "holds")
    assert [o.samples for o in evidence.offenders] == [*([zero[:1]] if zero else []), *groups]
    counted = f"{len(zero)} rows are zero, {len(groups)} groups are equal or opposite"
    assert said.reason.startswith(f"no two of {len(rows)} stored rows" if found else counted)
