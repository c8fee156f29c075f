"""Loss, infimum, gap and distance of a head against 80 digits, at every scale that float64 holds."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath as mp
import pytest
import torch
from heads_exact import DIGITS, Drawn, ExactHeads, ExactLoss, draw, holds, rows_of
from torch import nn

import gcfast
from gcfast.features import checked
from gcfast.losses import resolve_loss
from gcfast.proofs import bounded_logits, exact_products
from gcfast.solve.bounds import bounded_gradients, bounded_heads
from gcfast.solve.problem import make_problem
from gcfast.solve.solution import HeadSolution, evaluate_head

FIELDS = dict.fromkeys(("method", "reason", "interrupted", "iterations", "products", "peak_bytes"), 0)


def _evaluated(drawn: Drawn, lam: float, weight_decay: float) -> HeadSolution:
    problem = make_problem(checked(drawn.features), drawn.targets, drawn.loss, drawn.start)
    options = {"lam": lam, "gap_target": 1e-6, "weight_decay": weight_decay}
    with exact_products():
        return evaluate_head(problem, *drawn.head, **options, **FIELDS)


def _false(drawn: Drawn, solution: HeadSolution, weight_decay: float, steps: int = 4) -> list[str]:
    """What was said and is not so."""
    exact, wrong = drawn.exact, []
    value, infimum = exact.value(solution.weight, solution.bias), exact.infimum()
    if not holds(solution.loss, value):
        wrong.append(f"loss {solution.loss!r} < {mp.nstr(value, 20)}")
    if not solution.infimum <= infimum:
        wrong.append(f"infimum {solution.infimum!r} > {mp.nstr(infimum, 20)}")
    with mp.workdps(DIGITS):
        gap = value - infimum
    if not weight_decay and not holds(solution.gap, gap):
        wrong.append(f"gap {solution.gap!r} < {mp.nstr(gap, 20)}")
    if weight_decay and solution.gap != solution.duality_gap:
        wrong.append("the gap is not that of the regularised problem")
    if solution.regularization > 0:
        center = None if weight_decay else drawn.start
        found = exact.regularised(solution.weight, solution.bias, center, solution.regularization, steps)
        excess, distance, length = found
        of_stored = weight_decay or solution.weight.dtype == torch.float64
        if of_stored and not holds(solution.duality_gap, excess):
            wrong.append(f"duality gap {solution.duality_gap!r} < {mp.nstr(excess, 20)}")
        with mp.workdps(DIGITS):
            relative = distance / length if length else mp.mpf(0)
        if not holds(solution.distance_bound, relative):
            wrong.append(f"distance bound {solution.distance_bound!r} < {mp.nstr(relative, 20)}")
    return wrong


def _sweep(seeds):
    for seed in seeds:
        drawn, decay = draw(seed), (0.0, 1e-3)[seed % 2]
        wrong = _false(drawn, _evaluated(drawn, 10.0 ** (seed % 7 - 6), decay), decay)
        assert not wrong, (seed, drawn.exact.loss.name, wrong)


@pytest.mark.parametrize("part", range(3))
def test_no_head_is_worse_than_it_is_said_to_be(part):
    _sweep(range(30 * part, 30 * (part + 1)))


@pytest.mark.soundness
def test_no_head_of_many_is_worse_than_it_is_said_to_be():
    _sweep(range(10_000, 40_000))


def _draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _problem(name, features, targets, c, start=None):
    zero = torch.zeros((c, features.shape[1]), dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
    exact = ExactHeads(features, targets, ExactLoss(name), c)
    return Drawn(features, targets, resolve_loss(name), exact, start or zero, zero)


def _wild(kind, seed):
    normal = _draws(seed)
    h, labels = normal(20, 30), torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(seed))
    far = 1e15 * normal(3, 30), 1e15 * normal(3)
    if kind == "targets next to 0 and 1":
        y = torch.where(normal(20, 3) > 0, 1e-17 * normal(20, 3).abs(), 1 - 2.0**-53)
        y[::4] = torch.sigmoid(normal(20, 3))[::4]
        return _problem("bce_with_logits", 1000 * h, y, 3)
    if kind == "a class absent":
        return _problem("cross_entropy", h, labels.clamp(max=1), 3, far)
    if kind == "a start far away":
        return _problem("cross_entropy", h, labels, 3, far)
    if kind == "targets far away":
        return _problem("mse", h, 1e15 * normal(20, 3), 3)
    assert kind == "copies that conflict"
    h[10:] = h[:10]
    return _problem("huber", h, 1e9 * normal(20, 3), 3)


KINDS = (
    "targets next to 0 and 1",
    "a class absent",
    "a start far away",
    "targets far away",
    "copies that conflict",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_what_is_said_of_a_solved_head_is_true_at_any_scale(kind, seed):
    drawn = _wild(kind, seed)
    solution = gcfast.solve_head(drawn.features, drawn.targets, loss=drawn.loss, start=drawn.start)
    assert not _false(drawn, solution, 0.0), str(solution)
    assert solution.converged == (solution.gap <= 1e-6)


@pytest.mark.parametrize("target_gap", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce_with_logits", "huber"])
def test_at_ordinary_scales_the_bounds_are_sharp(name, dtype, target_gap):
    normal = _draws(3)
    h, y = normal(20, 30).to(dtype), normal(20, 3)
    y = {"cross_entropy": y.argmax(1), "bce_with_logits": torch.sigmoid(y)}.get(name, y)
    if dtype == torch.float32 and name != "cross_entropy" and target_gap < 1e-9:
        target_gap = 1e-9  # float32 holds no better head
    drawn = _problem(name, h, y, 3)
    solution = gcfast.solve_head(h, y, loss=name, target_gap=target_gap)
    assert solution.converged, str(solution)
    assert not _false(drawn, solution, 0.0)
    with mp.workdps(DIGITS):
        value, infimum = drawn.exact.value(solution.weight, solution.bias), drawn.exact.infimum()
        assert solution.loss <= value * (1 + mp.mpf(1e-9)) + mp.mpf(1e-16)
        assert solution.infimum >= infimum * (1 - mp.mpf(1e-12))
        assert solution.gap <= (value - infimum) * (1 + mp.mpf(1e-6)) + mp.mpf(1e-14)
    assert solution.duality_gap < math.inf and solution.distance_bound < 0.5


@pytest.mark.parametrize("scale", [1.0, 1e5])
@pytest.mark.parametrize("method", ["nearest", "gd"])
def test_the_gap_is_that_of_the_weight_decay_that_was_asked_for(scale, method):
    normal = _draws(4)
    h, y = normal(40, 6), normal(40, 3).argmax(1)
    h[:, 5] *= scale
    drawn = _problem("cross_entropy", h, y, 3)
    solution = gcfast.solve_head(h, y, weight_decay=1e-2, target_gap=1e-3, method=method, max_iterations=300)
    assert solution.regularization == 1e-2 and solution.converged == (solution.gap <= 1e-3)
    assert solution.converged or scale > 1
    assert not _false(drawn, solution, 1e-2, steps=20), str(solution)


@pytest.mark.parametrize(("size", "decay"), [(1.0, 1e-30), (1e300, 1e-2)])
def test_with_weight_decay_no_gap_exceeds_what_lies_above_the_infimum(size, decay):
    """Where features or lambda are extreme the gradient is rounding, and its square over lambda no bound."""
    normal = _draws(11)
    h, y = size * normal(6, 9), normal(6, 2)
    drawn = _problem("mse", h, y, 2)
    solution = gcfast.solve_head(h, y, loss="mse", weight_decay=decay)
    assert solution.gap <= 1.001 * float((y**2).mean()) and solution.converged == (size < 1e300), str(
        solution
    )
    if size < 1e300:  # whose squares the judge's own steps do not hold
        assert not _false(drawn, solution, decay), str(solution)


def test_an_interrupted_path_is_judged_by_the_weight_decay_that_was_asked_for():
    normal = _draws(4)
    h, y = normal(40, 6), normal(40, 3).argmax(1)

    def stop(progress):
        raise KeyboardInterrupt

    solution = gcfast.solve_head(h, y, weight_decay=1e-4, target_gap=1e-6, callback=stop)
    assert solution.interrupted and solution.path[-1][0] > 1e-4
    assert solution.regularization == 1e-4 and not solution.converged
    assert not _false(_problem("cross_entropy", h, y, 3), solution, 1e-4, steps=20), str(solution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["softplus", "tanh"])
def test_features_that_are_made_anew_are_those_that_are_judged(activation, dtype):
    normal = _draws(5)
    z, y = normal(24, 5).to(dtype), normal(24, 3).argmax(1)
    layer = 3 * normal(30, 5).to(dtype), normal(30).to(dtype)
    wide = gcfast.WideFeatures(z, layer, activation=activation)
    h = wide.panel(0, 30)
    for rows, columns, block in wide.blocks():
        assert torch.equal(block, h[rows, columns])
    solution = gcfast.solve_head(wide, y, target_gap=1e-7)
    assert solution.converged, str(solution)
    assert not _false(_problem("cross_entropy", h, y, 3), solution, 0.0)


class _Quartic(gcfast.ConvexLoss):
    name = "mse"  # which makes it no squared loss

    def value(self, z, y):
        return ((z - y) ** 2 + 0.1 * (z - y) ** 4).mean(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_a_loss_of_the_users_own_converges_by_a_bound(weight_decay):
    normal = _draws(6)
    h, y = normal(20, 30), normal(20, 2)
    solution = gcfast.solve_head(h, y, loss=_Quartic(), target_gap=1e-7, weight_decay=weight_decay)
    assert solution.converged, str(solution)
    exact = _problem("mse", h, y, 2).exact
    with mp.workdps(DIGITS):
        weight, bias = (
            [[mp.mpf(x) for x in row] for row in t.tolist()]
            for t in (solution.weight, solution.bias[:, None])
        )
        t = [[a - b for a, b in zip(*row, strict=True)] for row in zip(exact.logits(weight, bias), exact.y)]
        true = mp.fsum(x**2 + mp.mpf(0.1) * x**4 for row in t for x in row) / 40
    assert true <= solution.loss <= true * (1 + mp.mpf(1e-9))
    with pytest.raises(ValueError, match="'exact' is for loss='mse'"):
        gcfast.solve_head(h, y, loss=_Quartic(), method="exact")


def test_what_rounding_may_hide_is_said():
    normal = _draws(7)
    h, head = normal(20, 30), (1e12 * normal(3, 30), 1e12 * normal(3))
    computed, _, _ = bounded_logits(checked(h), *head)
    drawn = replace(_problem("mse", h, computed, 3), head=head)
    solution = _evaluated(drawn, 0.0, 0.0)
    assert not solution.converged and "rounding may hide" in solution.reason, str(solution)
    assert not _false(drawn, solution, 0.0)
    # as computed this is the minimiser itself, and its gradient is zero
    drawn = replace(drawn, start=head)
    assert not _false(drawn, _evaluated(drawn, 1e-3, 0.0), 0.0)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce_with_logits", "huber"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (1, 30), (30, 20)])
def test_gradients_are_as_near_to_the_truth_as_is_said(name, shape):
    """Of the loss at outputs as computed: residuals that are rounded, and sums over the samples that are."""
    n, c = shape[0], 3
    for seed in range(4):
        normal = _draws(seed)
        h = normal(*shape) * 10.0 ** (3 * seed - 6)
        head = normal(c, shape[1]), normal(c)
        z, _, norms = bounded_logits(checked(h), *head)
        y = torch.sigmoid(normal(n, c))
        if name == "cross_entropy":  # labels, and probabilities that leave nothing of p - q but its rounding
            y = y.argmax(1) if seed % 2 else torch.softmax(z, 1)
        drawn = _problem(name, h, y, c)
        loss, exact = drawn.loss, drawn.exact
        (found,) = bounded_heads(checked(h), [head], loss, loss.prepare(y, n, c))
        ((weight, bias, error),) = bounded_gradients(checked(h), [found])
        with mp.workdps(DIGITS):
            slopes = [exact.loss.slope(a, b) for a, b in zip(rows_of(z), exact.y, strict=True)]
            off = mp.mpf(0)
            for k in range(c):
                r = [row[k] / n for row in slopes]
                off += (mp.fsum(r) - mp.mpf(float(bias[k]))) ** 2
                for j, column in enumerate(zip(*exact.h, strict=True)):
                    off += (mp.fdot(column, r) - mp.mpf(float(weight[k, j]))) ** 2
            assert mp.sqrt(off) <= error * (1 + 1e-9)
            for row, norm in zip(exact.h, norms.tolist(), strict=True):
                assert mp.sqrt(1 + mp.fdot(row, row)) <= norm
        assert error <= 1e-11 * (1 + float(h.abs().amax())) ** 2  # and it says something


def test_where_nothing_finite_is_known_it_is_inf_and_no_guess():
    normal = _draws(8)
    h, y = normal(5, 6), normal(5, 2)
    drawn = _problem("mse", 1e200 * h, y, 2)
    for size in (1.0, 1e200):
        far = replace(drawn, head=(size * normal(2, 6), normal(2)))
        solution = _evaluated(far, 1e-3, 0.0)
        assert solution.gap == solution.loss == solution.duality_gap == solution.distance_bound == math.inf
        assert not solution.converged
    at_start = gcfast.solve_head(h, 0 * y, loss="mse")
    assert at_start.converged and at_start.duality_gap == at_start.distance_bound == math.inf


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certificate_bounds_the_loss_of_the_model_and_of_its_head(loss, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    x = torch.randn((20, 4), dtype=dtype)
    y = torch.randn((20, 3), dtype=dtype) if loss == "mse" else torch.arange(20) % 3
    found = gcfast.certify(model, (x, y), loss=loss)
    with torch.no_grad():
        h, outputs = model[:2](x), model(x)
    drawn = _problem(loss, h, y, 3)
    true = drawn.exact.value(model[2].weight, model[2].bias)
    computed = _problem(loss, outputs, y, 3).exact.value(torch.eye(3), torch.zeros(3))
    assert found.status == "holds" and found.infimum == 0.0
    for value in (true, computed):
        assert holds(found.loss, value) and holds(found.gap, value)
    assert found.loss <= 1.00001 * float(true)


def test_steps_go_to_a_head_that_is_within_the_target_as_it_is_stored():
    """Next to outputs of 1e17 a logit that is 14 larger is the same number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, y = torch.randn((20, 4), dtype=torch.float64), torch.arange(20) % 3
    assert gcfast.certify(model, (x, y), loss="cross_entropy").steps_to(1e-6) < math.inf
    with torch.no_grad():
        model[2].weight *= 1e18
    found = gcfast.certify(model, (x, y), loss="cross_entropy")
    assert found.sigma_min_lower > 0 and found.steps_to(1e-6) == math.inf


def test_a_loss_that_states_no_rounding_is_listed():
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, y = _draws(9)(20, 4), _draws(10)(20, 3)
    named = {a.name: a for a in gcfast.certify(model, (x, y), loss=_Quartic()).assumptions}
    assert named["rounding of the loss"].status == "unknown"
    assert "rounding of the loss" not in {
        a.name for a in gcfast.certify(model, (x, y), loss="mse").assumptions
    }
