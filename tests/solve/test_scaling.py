"""Badly scaled features: columns and rows of any length, a large common mean, and nearly equal samples.

The path ends where the problem that was asked is solved, and where it cannot be, it says so in bounded work.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import gcfast

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _labels(n, c, seed=1):
    return torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))


def _objective(h, y, weight, bias, decay):
    weight, bias = weight.double(), bias.double()
    loss = F.cross_entropy(h.double() @ weight.T + bias, y)
    return float(loss + 0.5 * decay * ((weight**2).sum() + (bias**2).sum()))


def _least(h, y, c, decay):
    """The least objective, by Newton's method on all weights of columns scaled to length one."""
    h1 = torch.cat([h.double(), torch.ones(len(h), 1, dtype=torch.float64)], 1)
    size = h1.norm(dim=0)
    x, penalty = h1 / size, (decay / size**2).repeat_interleave(c)
    g = torch.zeros(x.shape[1] * c, dtype=torch.float64)

    def value(g):
        return F.cross_entropy(x @ g.view(-1, c), y) + 0.5 * (penalty * g * g).sum()

    for _ in range(100):
        p = torch.softmax(x @ g.view(-1, c), 1)
        grad = (x.T @ (p - F.one_hot(y, c)) / len(x)).flatten() + penalty * g
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("ij,icd,ik->jckd", x, curvature, x).reshape(len(g), len(g)) / len(x)
        # a shift of all outputs changes nothing: pinv, not solve
        step = torch.linalg.pinv(hessian + torch.diag(penalty), rtol=1e-14, hermitian=True) @ grad
        t = 1.0
        while t > 1e-9 and value(g - t * step) > value(g):
            t /= 2
        g = g - t * step
    return float(value(g))


@pytest.mark.parametrize(
    ("decay", "size", "dtype"),
    [
        (1e-2, 1e5, torch.float64),
        (1e-2, 1e5, torch.float32),
        (1e-2, 1e-5, torch.float32),
        (1e-6, 1e5, torch.float64),
        (1.0, 1e3, torch.float32),
    ],
)
def test_the_weight_decay_asked_is_the_one_solved(decay, size, dtype):
    """Where one column is far larger, the loss stands still for decades of lambda above it."""
    h, y = _normal(300, 6), _labels(300, 3)
    h[:, 5] *= size
    h = h.to(dtype)
    solution = gcfast.solve_head(h, y, weight_decay=decay, target_gap=1e-6)
    assert solution.converged and solution.gap <= 1e-6, str(solution)
    assert solution.regularization == decay
    excess = _objective(h, y, solution.weight, solution.bias, decay) - _least(h, y, 3, decay)
    assert -1e-12 <= excess <= solution.gap + 1e-12


@DTYPES
@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_one_large_column_does_not_end_the_path(dtype, size):
    h, y = _normal(60, 81), _labels(60, 3)
    h[:, 7] *= size
    h = h.to(dtype)
    solution = gcfast.solve_head(h, y)
    assert solution.converged and solution.distance_bound < 0.2, str(solution)
    assert _objective(h, y, solution.weight, solution.bias, 0.0) <= 1e-6


def _scaled(seed):
    g = torch.Generator().manual_seed(seed)
    n, c = 20 + 13 * seed, 2 + seed % 4
    h = _normal(n, n + n // 3 + 1, seed=seed)
    h *= 10 ** (12 * torch.rand(h.shape[1], generator=g, dtype=torch.float64) - 6)
    return h, _labels(n, c, seed)


@DTYPES
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("seed", range(4))
def test_columns_of_any_scale(seed, loss, dtype):
    h, y = _scaled(seed)
    h = h.to(dtype)
    targets = F.one_hot(y).to(dtype) if loss == "mse" else y
    solution = gcfast.solve_head(h, targets, loss=loss)
    assert solution.converged and solution.distance_bound < 0.3, str(solution)
    z = h.double() @ solution.weight.double().T + solution.bias.double()
    true = F.mse_loss(z, targets.double()) if loss == "mse" else F.cross_entropy(z, y)
    assert math.isclose(float(true), solution.loss, rel_tol=1e-6, abs_tol=1e-12)
    decayed = gcfast.solve_head(h.double(), targets, loss=loss, weight_decay=1e-2)
    assert decayed.converged and decayed.regularization == 1e-2, str(decayed)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}, {"loss": "mse"}])
def test_a_common_mean_of_ten_thousand_deviations(options, dtype):
    h, y = (_normal(60, 81) + 1e4).to(dtype), _labels(60, 3)
    targets = F.one_hot(y).to(dtype) if "loss" in options else y
    solution = gcfast.solve_head(h, targets, **options)
    assert solution.converged, str(solution)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}, {"loss": "mse"}])
def test_rows_of_very_different_length(options, dtype):
    h, y = _normal(60, 81), _labels(60, 3)
    h *= 10 ** (4 * torch.rand((60, 1), generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 2)
    targets = F.one_hot(y).to(dtype) if "loss" in options else y
    solution = gcfast.solve_head(h.to(dtype), targets, **options)
    assert solution.converged, str(solution)


def _alike(n, spread):
    """Features of a body that makes nearly the same of all samples."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn((1, 8), generator=g) + spread * torch.randn((n, 8), generator=g)
    layer = torch.randn((n + n // 10, 8), generator=g), torch.randn(n + n // 10, generator=g)
    return gcfast.WideFeatures(z, layer, beta=4.0).rows(slice(0, n), torch.float64)


def test_nearly_equal_samples_have_a_nearest_head_too():
    """K in float64 loses what tells them apart, and the nearest head with it; the features do not."""
    y = _labels(100, 3)
    solution = gcfast.solve_head(_alike(100, 0.1), y)
    assert solution.converged and solution.distance_bound < 0.2, str(solution)
    assert solution.form == "H by its singular vectors, float64, where K fails"
    lams = [lam for lam, _ in solution.path]
    assert lams == sorted(lams, reverse=True)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-2}, {"loss": "mse"}])
@pytest.mark.parametrize("size", [1e-300, 1e-12, 1e-9, 1e20, 1e100, 1e160, 1e300])
def test_features_of_any_size(size, options):
    """Where float64 holds neither their squares nor what they are beside the bias's ones, it is said."""
    h, y = size * _normal(40, 50), _labels(40, 3)
    targets = F.one_hot(y).double() if "loss" in options else y
    solution = gcfast.solve_head(h, targets, **options)
    if 1e-12 <= size <= (1.0 if "weight_decay" in options else 1e100):
        assert solution.converged, str(solution)
    elif size > 1e100:
        assert not solution.converged and "overflow" in solution.reason
    assert len(solution.path) <= 100


def test_copies_that_conflict_and_targets_far_away():
    h, y = _normal(20, 30), 1e9 * _normal(20, 3, seed=1)
    h[10:] = h[:10]
    solution = gcfast.solve_head(h, y, loss="huber")
    assert math.isfinite(solution.loss) and len(solution.path) <= 100


@pytest.mark.parametrize("loss", ["huber", "bce_with_logits", "cross_entropy"])
def test_outputs_far_from_their_targets(loss):
    """There these losses are linear, and have no curvature to go by."""
    far, h, y, start = 1e5, _normal(60, 81), _normal(60, 3, seed=3), None
    if loss == "huber":
        y = far * y
    else:
        y = torch.sigmoid(y) if loss == "bce_with_logits" else torch.softmax(y, 1)
        start = far * _normal(3, 81, seed=5), _normal(3, seed=6)
    solution = gcfast.solve_head(h, y, loss=loss, start=start)
    assert solution.converged and solution.iterations < 600, str(solution)
    if loss == "huber":
        decayed = gcfast.solve_head(h, y, loss=loss, weight_decay=1e-6)
        assert decayed.converged and decayed.regularization == 1e-6, str(decayed)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 1e-3}])
def test_more_outputs_than_one_factorisation_couples(options, monkeypatch):
    """As 700 samples of ten classes have, with one column of 1e8 beside columns of 1."""
    from gcfast.solve import gram_forms, spectrum

    for module in (gram_forms, spectrum):
        monkeypatch.setattr(module, "COUPLED", 100)
    h, y = _normal(60, 81), _labels(60, 4)
    h[:, 7] *= 1e8
    solution = gcfast.solve_head(h, y, **options)
    assert solution.converged and solution.distance_bound < 0.2, str(solution)


def test_what_memory_leaves_out_is_named():
    h, y = _normal(120, 141), _labels(120, 3)
    h[:, 7] *= 1e8
    solution = gcfast.solve_head(h, y, max_bytes=70_000_000)
    assert not solution.converged
    allowed = int(solution.reason.split("max_bytes=")[1].split(",")[0])
    assert gcfast.solve_head(h, y, max_bytes=allowed).converged


def test_what_is_within_the_target_is_not_said_to_be_above_it():
    """Where the nearest head is not found, another one may be."""
    solution = gcfast.solve_head(_normal(40, 50) + 1e6, _normal(40, 3, seed=4), loss="mse")
    assert solution.converged and solution.reason.startswith("within the target gap"), str(solution)


class _Stop(Exception):
    pass


def test_a_run_killed_where_the_features_own_basis_has_taken_over_goes_on(tmp_path):
    h, y = _alike(100, 0.1), _labels(100, 3)
    whole = gcfast.solve_head(h, y)

    def stop(progress):
        if progress.iteration == len(whole.path) - 1:
            raise _Stop

    options = {"checkpoint": tmp_path / "path", "checkpoint_seconds": 0.0}
    with pytest.raises(_Stop):
        gcfast.solve_head(h, y, callback=stop, **options)
    seen = []
    again = gcfast.solve_head(h, y, callback=lambda progress: seen.append(progress.iteration), **options)
    assert again.converged and again.form == whole.form and seen[0] > 1
    assert float((again.weight - whole.weight).norm()) <= 0.2 * float(whole.weight.norm())


def test_a_path_that_leads_nowhere_ends():
    """Dependent rows, no two of them equal: no head brings the loss to zero, however small lambda is."""
    h, y = _normal(60, 20, seed=2) @ _normal(20, 81, seed=3), _labels(60, 3)
    solution = gcfast.solve_head(h, y)
    assert not solution.converged and "too nearly dependent" in solution.reason
    assert len(solution.path) < 40 and solution.iterations < 600
    best = _least(h[:, :20], y, 3, 0.0)
    assert solution.loss <= best + 1e-4


def test_with_weight_decay_a_path_that_leads_nowhere_goes_to_its_end_at_once():
    h = _normal(20, 30) * 10 ** torch.linspace(-150, 150, 20, dtype=torch.float64)[:, None]
    solution = gcfast.solve_head(h, _normal(20, 3, seed=3), loss="mse", weight_decay=1e-2)
    assert not solution.converged and len(solution.path) < 40 and solution.iterations < 1000
    assert solution.gap <= 2.0  # what the head of zeros has
