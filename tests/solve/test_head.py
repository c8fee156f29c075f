"""solve_head against closed forms, scikit-learn-free references, and its own certificates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gcfast


def _features(n=60, m=90, dtype=torch.float64, seed=0):
    return torch.randn((n, m), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _labels(n=60, c=4, seed=1):
    return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))


def _start(m=90, c=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    w, b = torch.randn((c, m), generator=g, dtype=dtype), torch.randn((c,), generator=g, dtype=dtype)
    return 0.1 * w, 0.1 * b


def _regularised_minimum(h, targets, start, lam, value):
    """min mean loss + lam/2 |V - start|^2 by L-BFGS in float64 on (W, b) itself."""
    w, b = start[0].clone().requires_grad_(), start[1].clone().requires_grad_()
    opt = torch.optim.LBFGS(
        [w, b],
        max_iter=3000,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def objective():
        penalty = ((w - start[0]) ** 2).sum() + ((b - start[1]) ** 2).sum()
        return value(h @ w.T + b, targets) + 0.5 * lam * penalty

    def closure():
        opt.zero_grad()
        total = objective()
        total.backward()
        return total

    for _ in range(5):
        opt.step(closure)
    return w.detach(), b.detach(), float(objective().detach())


LOSSES = {
    "cross_entropy": (lambda n, c: _labels(n, c), F.cross_entropy),
    "soft": (lambda n, c: torch.softmax(_features(n, c, seed=7), 1), F.cross_entropy),
    "mse": (lambda n, c: _features(n, c, seed=8), F.mse_loss),
    "bce_with_logits": (
        lambda n, c: (_features(n, c, seed=9) > 0).double(),
        F.binary_cross_entropy_with_logits,
    ),
    "huber": (lambda n, c: 2 * _features(n, c, seed=10), F.huber_loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nearest_reaches_the_target_and_is_the_regularised_minimiser(name):
    make, value = LOSSES[name]
    h, targets, start = _features(), make(60, 4), _start()
    solution = gcfast.solve_head(
        h, targets, loss="cross_entropy" if name == "soft" else name, start=start, target_gap=1e-4
    )
    assert solution.converged and 0 <= solution.gap <= 1e-4, str(solution)
    true = float(value(h @ solution.weight.T + solution.bias, targets))
    assert math.isclose(true, solution.loss, rel_tol=1e-9, abs_tol=1e-14)
    w, b, best = _regularised_minimum(h, targets, start, solution.regularization, value)
    u2 = float(((solution.weight - start[0]) ** 2).sum() + ((solution.bias - start[1]) ** 2).sum())
    mine = solution.loss + 0.5 * solution.regularization * u2
    assert mine - best <= solution.duality_gap * (1 + 1e-6) + 1e-12  # the certificate is true
    distance = math.sqrt(float(((solution.weight - w) ** 2).sum() + ((solution.bias - b) ** 2).sum()) / u2)
    assert distance <= solution.distance_bound + 1e-3 and solution.distance_bound < 0.2
    assert solution.path[0][1] > solution.path[-1][1] and solution.seconds > 0 and solution.peak_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "c"), [(1, 1, 2), (2, 1, 2), (31, 31, 3), (33, 60, 10), (252, 260, 2)])
def test_sizes_and_dtypes(device, n, m, c, dtype):
    h, y = _features(n, m, dtype).to(device), _labels(n, c).to(device)
    w, b = _start(m, c, dtype)
    solution = gcfast.solve_head(h, y, target_gap=1e-6, start=(w.to(device), b.to(device)))
    assert solution.converged, str(solution)
    assert solution.weight.dtype == dtype and solution.weight.shape == (c, m)
    logits = h.double() @ solution.weight.double().T + solution.bias.double()
    assert float(F.cross_entropy(logits, y)) <= 1e-6


def _many(n=1400, m=1500, c=5, seed=0):
    """More than 1,024 samples take the working set; a common mean is hard on its float32 Gram."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn((c, 20), generator=g, dtype=torch.float64)
    y = torch.randint(0, c, (n,), generator=g)
    z = 0.7 * centres[y] + torch.randn((n, 20), generator=g, dtype=torch.float64)
    directions = torch.randn((20, m), generator=g, dtype=torch.float64) / 20**0.5
    return torch.nn.functional.softplus(4 * z @ directions + 1.0), y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_working_set_certifies_the_whole_problem(dtype, monkeypatch):
    from gcfast.solve import head_solver

    def never(*_):
        raise AssertionError("the working set did not arrive")

    h, y = _many()
    h = h.to(dtype)
    monkeypatch.setattr(head_solver, "AllSamples", never)
    solution = gcfast.solve_head(h, y, target_gap=1e-7)
    assert solution.converged and solution.gap <= 1e-7, str(solution)
    loss = F.cross_entropy(h.double() @ solution.weight.double().T + solution.bias.double(), y)
    assert math.isclose(float(loss), solution.loss, rel_tol=1e-6)
    assert solution.distance_bound < 0.2


@pytest.mark.parametrize("mean", [300.0, 1000.0])
def test_where_float32_ends_the_working_set_goes_on_in_float64(monkeypatch, mean):
    from gcfast.solve import head_solver

    def never(*_):
        raise AssertionError("all samples were asked")

    h, y = _many()
    h = (h + mean).float()
    monkeypatch.setattr(head_solver, "AllSamples", never)
    solution = gcfast.solve_head(h, y, target_gap=1e-7)
    assert solution.form == "K of the samples that matter, float64"
    assert solution.converged and solution.distance_bound < 0.2, str(solution)
    loss = F.cross_entropy(h.double() @ solution.weight.double().T + solution.bias.double(), y)
    assert math.isclose(float(loss), solution.loss, rel_tol=1e-6)


def test_the_working_set_has_no_float64_beyond_its_room():
    from gcfast.features.checks import as_features
    from gcfast.losses import resolve_loss
    from gcfast.solve.problem import HeadProblem
    from gcfast.solve.working_set import WorkingSet

    h, y = _many(n=1100)
    start = torch.zeros((5, 1500), dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    problem = HeadProblem(
        as_features(h.float()), y, resolve_loss("cross_entropy"), *start, 0.0, torch.float32
    )
    working = WorkingSet("set", problem, 100)
    working.add(torch.arange(80))
    assert not working.finer() and working.gram.dtype == torch.float32
    working.most = 114
    before = working.gram.clone()
    assert working.finer() and not working.finer()
    assert working.gram.dtype == torch.float64 and working.most == 80
    exact = h[:80].float().double() @ h[:80].float().double().T + 1
    assert torch.allclose(working.gram, exact, rtol=1e-14) and not torch.equal(working.gram.float(), before)


def test_samples_that_only_the_bias_feels_keep_the_working_set_from_certifying(monkeypatch):
    """Pairs h, -h of one label cancel in the gradient of the weights, not in that of the bias."""
    from gcfast.features.checks import as_features
    from gcfast.losses import resolve_loss
    from gcfast.solve import working_set
    from gcfast.solve.newton import NewtonState
    from gcfast.solve.problem import HeadProblem

    h = torch.zeros((36, 30), dtype=torch.float64)
    h[:6, :10] = _features(6, 10)
    pairs = _features(15, 20, seed=1)
    h[6:, 10:] = torch.stack([pairs, -pairs], 1).flatten(0, 1)
    y = torch.tensor([0, 1, 2, 0, 1, 2] + 30 * [0])
    start = torch.zeros((3, 30), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    problem = HeadProblem(as_features(h), y, resolve_loss("cross_entropy"), *start, 0.0, torch.float64)
    working = working_set.WorkingSet("set", problem)
    working.add(torch.arange(6))
    zero = torch.zeros((36, 3), dtype=torch.float64)
    polished = lambda: working.polish(NewtonState(zero, zero), 1e-2)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(working_set, "FINE", math.inf)  # no sample joins
        assert polished() is None
    assert polished() is not None and len(working.rows) == 36


def test_a_killed_working_set_goes_on_in_float64(tmp_path):
    h, y = _many()
    h = (h + 300).float()
    whole = gcfast.solve_head(h, y, target_gap=1e-7)
    stopped = None

    def stop(progress):
        nonlocal stopped
        if progress.iteration == len(whole.path) - 1:
            stopped = progress.iteration
            raise KeyboardInterrupt

    options = {"target_gap": 1e-7, "checkpoint": tmp_path / "path", "checkpoint_seconds": 0.0}
    assert gcfast.solve_head(h, y, callback=stop, **options).interrupted and stopped
    seen = []
    again = gcfast.solve_head(h, y, callback=lambda progress: seen.append(progress.iteration), **options)
    assert again.form == whole.form == "K of the samples that matter, float64"
    assert min(seen) > 1 and torch.allclose(again.weight, whole.weight, rtol=1e-4, atol=1e-7)
    assert again.path == [pytest.approx(point, rel=1e-6) for point in whole.path]


def test_the_working_set_finds_what_all_samples_give(monkeypatch):
    from gcfast.solve.working_set import WorkingSet, WorkingSetFull

    def full(*_):
        raise WorkingSetFull

    h, y = _many()
    fast = gcfast.solve_head(h, y, target_gap=1e-4)
    monkeypatch.setattr(WorkingSet, "minimise", full)  # all samples at once, Gram in float64
    slow = gcfast.solve_head(h, y, target_gap=1e-4)
    assert fast.converged and slow.converged

    def norm(s):
        return float(torch.cat([s.weight, s.bias[:, None]], 1).norm())

    # the nearer one to the same loss: norms agree as far as the losses do
    slack = 0.03 + 0.2 * abs(math.log(fast.loss / slow.loss))
    assert abs(norm(fast) - norm(slow)) <= slack * norm(slow)


def test_noisy_labels_put_every_sample_into_the_working_set():
    h, y = _many(n=1100)
    y = torch.randint(0, 5, (1100,), generator=torch.Generator().manual_seed(3))
    solution = gcfast.solve_head(h, y, target_gap=1e-5)
    assert solution.converged, str(solution)
    assert solution.distance_bound < 0.2


def test_an_interrupted_working_set_keeps_the_best():
    def stop(progress):
        if progress.iteration == 3:
            raise KeyboardInterrupt

    h, y = _many()
    solution = gcfast.solve_head(h, y, target_gap=1e-12, callback=stop)
    assert solution.interrupted and math.isclose(solution.loss, solution.path[-1][1], rel_tol=1e-3)


def test_conflicting_copies_in_the_working_set():
    h, y = _many()
    h[5] = h[9]
    y[5], y[9] = 0, 1
    solution = gcfast.solve_head(h, y, target_gap=1e-6)
    assert solution.converged and math.isclose(solution.infimum, 2 * math.log(2) / len(y))


def test_a_start_within_the_target_is_left_alone():
    h, y = _features(), _labels()
    first = gcfast.solve_head(h, y, target_gap=1e-5)
    again = gcfast.solve_head(h, y, start=(first.weight, first.bias), target_gap=1e-4)
    assert torch.equal(again.weight, first.weight) and again.iterations == 0


def test_nearest_moves_no_further_than_needed():
    # any head of that loss is at least as far from the start: compare with gradient descent to the same loss
    h, y, start = _features(), _labels(), _start()
    near = gcfast.solve_head(h, y, start=start, target_gap=1e-3)
    gd = gcfast.solve_head(h, y, start=start, target_gap=near.loss, method="gd", max_iterations=200_000)
    assert gd.converged

    def far(s):
        return float(((s.weight - start[0]) ** 2).sum() + ((s.bias - start[1]) ** 2).sum())

    assert far(near) <= far(gd) * 1.01


def test_no_head_is_farther_from_the_minimiser_than_its_bound():
    """Far from all targets Huber's loss is linear, the minimiser has a closed form and the bound is sharp."""
    from gcfast.features.checks import as_features
    from gcfast.losses import Huber
    from gcfast.solve.problem import HeadProblem
    from gcfast.solve.solution import evaluate_head

    h, y, lam = _features(20, 6), torch.full((20, 2), 100.0, dtype=torch.float64), 0.3
    zero = torch.zeros((2, 6), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    problem = HeadProblem(as_features(h), y, Huber(), *zero, 0.0, torch.float64)
    nearest = torch.cat([h.mean(0), torch.ones(1)]).expand(2, 7) / (2 * lam)  # each slope is 1/2
    fields = dict.fromkeys(("method", "reason", "interrupted", "iterations", "products", "peak_bytes"), 0)
    for step in (0.0, 0.01, 1.0):
        u = nearest + step * _features(2, 7, seed=3)
        solution = evaluate_head(
            problem, u[:, :6], u[:, 6], lam=lam, gap_target=1.0, weight_decay=0.0, **fields
        )
        bound = solution.distance_bound * float(u.norm())
        assert bound == pytest.approx(float((u - nearest).norm()), rel=1e-6, abs=1e-6)


def test_the_loss_that_decides_is_that_of_the_head_as_stored():
    from gcfast.features.checks import as_features
    from gcfast.losses import resolve_loss
    from gcfast.solve.problem import HeadProblem

    h, y = _features(dtype=torch.float32), _labels()
    w, b = (1e4 * part for part in _start())  # of which float32 keeps three digits behind the point
    problem = HeadProblem(as_features(h), y, resolve_loss("cross_entropy"), w, b, 0.0, torch.float32)
    du, db = _features(4, 90, seed=5), _features(1, 4, seed=6)[0]
    for dw, dv in ((du, 0 * db), (0 * du, db), (du, db)):
        stored = h.double() @ (w + dw).float().double().T + (b + dv).float().double()
        true = float(F.cross_entropy(stored, y))
        assert problem.stored_loss(dw, dv) == pytest.approx(true, rel=1e-12)
        assert problem.mean_loss(problem.logits(w + dw, b + dv)) != pytest.approx(true, rel=1e-10)


def test_exact_is_the_limit_of_gradient_descent():
    h, start = _features(30, 50), _start(50, 2)
    y = _features(30, 2, seed=5)
    exact = gcfast.solve_head(h, y, loss="mse", start=start, method="exact")
    assert exact.converged and exact.loss < 1e-24
    gd = gcfast.solve_head(
        h, y, loss="mse", start=start, method="gd", target_gap=1e-26, max_iterations=100_000
    )
    torch.testing.assert_close(exact.weight, gd.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_weight_decay_is_that_of_torch_optim(name):
    make, value = LOSSES[name]
    h, targets = _features(), make(60, 4)
    zero = (torch.zeros(4, 90, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    solution = gcfast.solve_head(h, targets, loss=name, weight_decay=1e-2, target_gap=1e-8, start=_start())
    w, _, best = _regularised_minimum(h, targets, zero, 1e-2, value)
    norm2 = float((solution.weight**2).sum() + (solution.bias**2).sum())
    assert solution.converged and solution.duality_gap <= 1e-8
    assert abs(solution.loss + 0.5e-2 * norm2 - best) <= 1e-8
    torch.testing.assert_close(solution.weight, w, rtol=0, atol=1e-3)


def test_the_path_ends_at_the_weight_decay():
    """A small one, which several points of the path precede."""
    make, value = LOSSES["cross_entropy"]
    h, targets = _features(), make(60, 4)
    solution = gcfast.solve_head(h, targets, weight_decay=2e-4, target_gap=1e-8)
    assert len(solution.path) > 1 and solution.regularization == solution.path[-1][0] == 2e-4
    zero = (torch.zeros(4, 90, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    _, _, best = _regularised_minimum(h, targets, zero, 2e-4, value)
    norm2 = float((solution.weight**2).sum() + (solution.bias**2).sum())
    assert solution.converged and abs(solution.loss + 1e-4 * norm2 - best) <= 1e-8


def test_sgd_descends_to_the_target():
    solution = gcfast.solve_head(
        _features(40, 300), _labels(40), method="sgd", target_gap=5e-2, max_iterations=2000
    )
    assert solution.converged and solution.method == "sgd"


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_gd_descends_on_features_whose_columns_have_mean_zero(size):
    """A vector of ones is orthogonal to all of them, and says nothing of the largest singular value."""
    h, y = _features(), _features(60, 3, seed=3)
    h = size * (h - h.mean(0))
    solution = gcfast.solve_head(h, y, loss="mse", method="gd", max_iterations=300)
    losses = [loss for _, loss in solution.path]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("method", ["gd", "sgd"])
def test_however_many_steps_are_allowed_the_target_ends_them(method):
    options = {"loss": "mse", "method": method, "max_iterations": 2**62}
    h, y = _features(), _features(60, 3, seed=3)
    assert gcfast.solve_head(h, y, target_gap=0.1, **options).converged

    def stop(progress):
        if progress.iteration > 5:
            raise KeyboardInterrupt

    found = gcfast.solve_head(h, y, callback=stop, **options)
    assert found.interrupted and found.loss < float((y**2).mean())
    if method == "gd":  # a head that no step moves
        still = gcfast.solve_head(
            h, 0 * y + 1, start=(0 * y.T @ h, 1 + 0 * y[0]), weight_decay=1e-300, **options
        )
        assert still.reason == "no step changes the head any more" and still.iterations < 10


ONES = torch.ones((5, 1), dtype=torch.float64)


@pytest.mark.parametrize("method", ["nearest", "gd", "sgd"])
@pytest.mark.parametrize(("bias", "decay"), [(True, 0.0), (False, 0.0), (False, 1e-2)])
@pytest.mark.parametrize(
    ("h", "c"),
    [
        (ONES[:, :0], 2),
        (0 * ONES, 2),
        (0 * ONES.half(), 3),
        (1e-200 * ONES, 2),
        (1e-160 * torch.eye(5, dtype=torch.float64), 2),
        (ONES, 1),
        (ONES[:1, :0], 1),
        (gcfast.WideFeatures(ONES.cumsum(0), (ONES[:0], ONES[:0, 0])), 2),
    ],
    ids=[
        "no features",
        "zeros",
        "zeros of float16",
        "tiny",
        "a tiny identity",
        "one output",
        "nothing",
        "no units",
    ],
)
def test_where_there_is_next_to_nothing_to_solve_for_it_ends(h, c, bias, decay, method):
    """Curvatures, squares and lambda may be zero here."""
    n, m = (h.n, h.m) if isinstance(h, gcfast.WideFeatures) else h.shape
    start = torch.ones(c, m), torch.zeros(c) if bias else None
    options = {} if method == "nearest" else {"max_iterations": 20}
    for loss, y in (("cross_entropy", torch.arange(n) % c), ("huber", torch.ones(n, c))):
        found = gcfast.solve_head(h, y, loss=loss, start=start, weight_decay=decay, method=method, **options)
        assert found.loss <= 1.1 and found.gap <= 1.5, str(found)
        assert found.converged or loss == "huber" or c > 1


def test_a_head_that_its_dtype_cannot_hold_is_not_given():
    """Features of float16 next to zero, which only weights beyond its largest number can tell apart."""
    h, y = (1e-7 * _features(20, 30)).half(), _features(20, 3, seed=3)
    for method in ("nearest", "exact", "gd"):
        found = gcfast.solve_head(h, y, loss="mse", method=method, max_iterations=20)
        assert bool(found.weight.isfinite().all()) and found.loss <= float((y**2).mean()) * (1 + 1e-12)
        assert not found.converged and (method == "gd" or "does not fit in torch.float16" in found.reason)
    for weight, kind, words in (
        (torch.full((3, 30), 1e30), ValueError, "start: the weights do not fit in torch.float16"),
        (torch.full((3, 30), math.inf), ValueError, "start: the weights are not finite"),
        (torch.ones((3, 30), dtype=torch.complex64), TypeError, "start: expected real numbers"),
    ):
        with pytest.raises(kind, match=words):
            gcfast.solve_head(h, y, loss="mse", start=(weight, None))


@pytest.mark.parametrize("label", [2 * 10**9, 2**40, 2**62, 2**63 - 1])
def test_a_label_that_no_head_has_an_output_for_is_named(label):
    h, y = _features(3, 4), torch.tensor([0, 1, label])
    with pytest.raises((ValueError, MemoryError), match=f"targets: label(s up to)? {label}"):
        gcfast.solve_head(h, y)
    if label > 2**31:
        with pytest.raises(ValueError, match=f"targets: label {label} of sample 2"):
            gcfast.certify(h, y, loss="cross_entropy")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_any_whole_dtype(dtype):
    assert gcfast.solve_head(_features(), _labels().to(dtype)).converged


def test_a_model_that_was_made_in_inference_mode_is_updated():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 3))
    solution = gcfast.solve_head(model, (torch.randn(20, 6), _labels(20, 3)), target_gap=0.1)
    assert solution.converged and torch.equal(model[2].weight, solution.weight)


def test_a_model_is_updated_in_place_and_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 80), nn.BatchNorm1d(80), nn.Softplus(), nn.Linear(80, 3))
    x, y = torch.randn(40, 6), _labels(40, 3)
    model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    solution = gcfast.solve_head(model, (x, y), target_gap=1e-5)
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"3.weight", "3.bias"}
    assert model.training and model[3].weight.requires_grad
    model.eval()
    assert float(F.cross_entropy(model(x), y).detach()) <= 1.01e-5 and solution.converged


def test_a_head_without_bias():
    model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 3, bias=False))
    solution = gcfast.solve_head(model, (torch.randn(40, 6), _labels(40, 3)))
    assert solution.converged and solution.bias is None


def test_copies_with_conflicting_labels_stop_at_their_infimum():
    h, y = _features(), _labels()
    h[5] = h[9]
    y[5], y[9] = 0, 1
    solution = gcfast.solve_head(h, y, target_gap=1e-6)
    assert math.isclose(solution.infimum, 2 * math.log(2) / 60)
    assert solution.converged and solution.loss >= solution.infimum


def test_out_of_reach_is_said_not_hidden():
    h, y = _features(200, 3), _labels(200)
    solution = gcfast.solve_head(h, y)
    assert (
        not solution.converged
        and "n = 200" in solution.reason
        and "m + 1 = 4" in solution.reason
        and "widen" in solution.reason
    )
    w, b = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    _, _, best = _regularised_minimum(h, y, (w, b), 0.0, F.cross_entropy)
    assert solution.loss <= best + 1e-4  # and it is the best head all the same


def test_the_callback_sees_progress_and_interruption_keeps_the_best():
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 3:
            raise KeyboardInterrupt

    h, y = _features(), _labels()
    solution = gcfast.solve_head(h, y, target_gap=1e-12, callback=stop)
    assert solution.interrupted and not solution.converged
    assert math.isclose(solution.loss, seen[-1].loss, rel_tol=1e-6)
    assert [p.iteration for p in seen] == [1, 2, 3] and seen[0].loss > seen[2].loss
    assert all(0 <= p.fraction <= 1 for p in seen)


class _Quartic(gcfast.ConvexLoss):
    name = "quartic"

    def value(self, z, y):
        return ((z - y) ** 2).mean(1) + 0.1 * ((z - y) ** 4).mean(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


def test_a_loss_of_the_users_own():
    solution = gcfast.solve_head(_features(), _features(60, 2, seed=4), loss=_Quartic(), target_gap=1e-5)
    assert solution.converged, str(solution)


H, Y = _features(), _labels()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: gcfast.solve_head(H, Y, target_gap=0),
            ValueError,
            "target_gap: expected a finite number > 0",
        ),
        (lambda: gcfast.solve_head(H, Y, weight_decay=-1), ValueError, "weight_decay"),
        (lambda: gcfast.solve_head(H, Y, method="adam"), ValueError, "method.*nearest"),
        (lambda: gcfast.solve_head(H, Y, method="exact"), ValueError, "'exact' is for loss='mse'"),
        (
            lambda: gcfast.solve_head(H[:, :20], torch.randn(60, 1), loss="mse", method="exact"),
            ValueError,
            "n = 60, m = 20",
        ),
        (lambda: gcfast.solve_head(H, -Y - 1), ValueError, "out of range"),
        (lambda: gcfast.solve_head(H, Y[:-1]), ValueError, r"\(60,\)"),
        (
            lambda: gcfast.solve_head(H, Y, start=(torch.zeros(4, 89), torch.zeros(4))),
            ValueError,
            r"\(C, 90\)",
        ),
        (
            lambda: gcfast.solve_head(H, Y, start=(torch.full((4, 90), math.nan), torch.zeros(4))),
            ValueError,
            "not finite",
        ),
        (lambda: gcfast.solve_head(H, Y, max_bytes=1000), MemoryError, "Way out"),
        (lambda: gcfast.solve_head(H.clone().fill_(math.inf), Y), ValueError, "not finite"),
        (lambda: gcfast.solve_head(H[:0], Y[:0]), ValueError, "empty"),
        (lambda: gcfast.solve_head(H, [0, 1]), TypeError, "list"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "features",
    [
        torch.empty(3, 0),
        torch.empty(3, 0, dtype=torch.float64),
        gcfast.WideFeatures(torch.ones(3, 2), (torch.empty(0, 2), torch.empty(0))),
    ],
    ids=["float32", "float64", "wide"],
)
def test_without_features_there_is_a_bias_to_solve_for(features):
    solution = gcfast.solve_head(features, torch.tensor([0, 0, 1]))
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert solution.converged and solution.weight.shape == (2, 0)
    assert entropy - 1e-15 <= solution.loss <= entropy + 1e-6 and abs(solution.infimum - entropy) < 1e-14
    assert solution.bias.diff() == pytest.approx(-math.log(2), abs=2e-3)


class _Keeping(nn.Linear):
    """Takes a copy of its weight in the first pass."""

    copy = None

    def forward(self, h):
        self.copy = self.weight.detach().clone() if self.copy is None else self.copy
        return F.linear(h, self.copy, self.bias)


class _Clipping(nn.Sequential):
    """Clips its head after every pass."""

    def forward(self, x):
        out = super().forward(x)
        self[-1].weight.data.clamp_(-0.05, 0.05)
        return out


class _Reading(nn.Sequential):
    """Scales its inputs by a number of its head, which numpy reads: no operator of torch tells of it."""

    numbers = None

    def forward(self, x):
        self.numbers = self[-1].weight.detach().numpy() if self.numbers is None else self.numbers
        return super().forward(x * (1 + float(self.numbers[0, 0])))


@pytest.mark.parametrize(
    ("kind", "head", "words"),
    [
        (nn.Sequential, _Keeping, "model: .* now that another head is written to it"),
        (_Clipping, nn.Linear, "model: .* now that another head is written to it"),
        (_Reading, nn.Linear, "model: the same samples gave other features"),
    ],
)
def test_a_model_whose_outputs_do_not_follow_a_new_head_keeps_the_old_one(kind, head, words):
    torch.manual_seed(0)
    model = kind(nn.Linear(3, 60), nn.Tanh(), head(60, 2))
    x = torch.randn(40, 3)
    model(x)
    before = model[-1].weight.detach().clone()
    with pytest.raises(ValueError, match=words):
        gcfast.solve_head(model, (x, torch.arange(40) % 2))
    assert torch.equal(model[-1].weight, before)


class _Rounding(nn.Sequential):
    def forward(self, x):
        return super().forward(x.floor())


@pytest.mark.parametrize("batches", [lambda *pair: pair, lambda *pair: [pair], lambda *pair: iter([pair])])
def test_samples_that_the_body_alone_makes_equal_may_be_told_apart_by_another(batches):
    model = _Rounding(gcfast.WideLayer(1, 60), nn.Linear(60, 2))
    x, y = torch.arange(20.0)[:, None] / 2, torch.arange(20) % 2  # two samples between two whole numbers
    once = type(batches(x, y)).__name__ == "list_iterator"
    found = gcfast.solve_head(model, batches(x, y), fixed=once)
    assert found.infimum == 0 and not found.converged and found.gap >= found.loss > 0.69
    assert "samples 0 and 1 have equal features" in found.reason
    x[1::2] = x[::2]
    found = gcfast.solve_head(model, batches(x, y), fixed=once)
    assert found.converged != once and (found.infimum > 0.69) != once
    x[3] += 0.25  # one group of copies is none any more
    found = gcfast.solve_head(model, batches(x, y), fixed=once)
    assert not found.converged and found.gap > 0.06
