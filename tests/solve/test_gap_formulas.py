"""The formulas of gap and distance, written again in exact fractions: the code says no less, and hardly more.

Each case lets another term of a formula be the largest, so that none of them can be left out or enlarged.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from gcfast.features import checked
from gcfast.losses import LossBounds, resolve_loss
from gcfast.proofs import exact_products
from gcfast.solve.bounds import (
    BoundedHead,
    bounded_gap,
    bounded_gradients,
    bounded_heads,
    norm_above,
    norm_below,
    row_norms,
)
from gcfast.solve.problem import HeadProblem, make_problem
from gcfast.solve.solution import HeadSolution, evaluate_head

U, LEAST, ROOT = Fraction(1, 2**53), Fraction(1, 2**1022), Fraction(1, 2**511)


def _gamma(k: int) -> Fraction:
    return k * U / (1 - k * U)


def _root(x: Fraction) -> Fraction:
    """The square root to 500 bits and more."""
    shift = 4096
    return Fraction(math.isqrt((x.numerator << 2 * shift) // x.denominator), 1 << shift)


def _norm(*parts: Tensor | None) -> Fraction:
    return _root(sum((Fraction(v) ** 2 for p in parts if p is not None for v in p.flatten().tolist()), U * 0))


def _is(found: float, stated: Fraction, spare: float = 1e-13) -> None:
    """``found`` is no less than what is stated, and no more than rounding asks for."""
    assert 1 <= Fraction(found) / stated <= 1 + Fraction(spare), (found, float(stated))


def _rows(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- norms


def test_norms_of_rows_allow_for_what_they_round():
    for c in range(1, 5):
        found = Fraction(float(row_norms(torch.eye(c, dtype=torch.float64)[:1])))
        assert abs(found - (1 + _gamma(c + 4))) <= U  # the formula, rounded to nearest
        nothing = Fraction(float(row_norms(torch.zeros((1, c), dtype=torch.float64))))
        assert abs(nothing / ROOT - _root(Fraction(c))) <= 4 * U  # the squares of anything below may vanish


def test_norms_lie_on_either_side_at_any_scale():
    normal = torch.randn((40, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, x in enumerate(normal):
        x = x * 2.0 ** (k * 50 - 1000)
        true = _norm(x)
        assert norm_below(x[:2], None, x[2:]) <= true <= norm_above(x[:2], None, x[2:])
        _is(norm_above(x[:2], x[2:]), true)
        _is(-norm_below(x), -true * (1 - _gamma(100)) + LEAST)
        if 400 < 50 * k < 1500:
            assert true <= Fraction(float(row_norms(x[None])))
    many = torch.ones(10**6, dtype=torch.float64)
    _is(norm_above(many), 1000 * (1 + _gamma(10**6)))
    _is(norm_below(many), 1000 * (1 + _gamma(10**6)) * (1 - _gamma(20 * 10**6)))
    assert norm_above(0 * many) == 0 and norm_below(0 * many) == -float(LEAST)
    for strange in (math.nan, math.inf, 1.7e308):
        assert norm_above(strange * many[:4]) == math.inf
    assert 1e-322 <= norm_above(_rows(1e-322)) <= 2e-322


# -- gradients and the gap


def _bounded(head: Any, excess: Any = (0.0,), residual: Any = 0.0, error: Any = 0.0, norms: Any = 1.0) -> Any:
    n = len(excess)
    full = [torch.full((n, len(head[0])), x, dtype=torch.float64) for x in (0.0, residual, error)]
    at = LossBounds(full[0], _rows(*excess), _rows(*excess), full[1], full[2], _rows(*excess))
    return BoundedHead(head, at, 0.0, 0.0, torch.full((n,), norms, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("residual", "error", "norms"),
    [(1.0, 0.0, 1.0), (3.0, 0.0, 5.0), (1.0, 1e-3, 7.0), (0.0, 2.0, 3.0), (0.0, 0.0, 0.0)],
)
def test_the_error_of_a_gradient_is_what_its_sums_may_lose(residual, error, norms, bias):
    for n, m, c in ((1, 1, 1), (2, 3, 1), (5, 2, 3)):
        h = torch.arange(1.0, n * m + 1, dtype=torch.float64).view(n, m)
        head = torch.zeros((c, m), dtype=torch.float64), torch.zeros(c, dtype=torch.float64) if bias else None
        heads = [_bounded(head, (0.0,) * n, residual * k, error, norms) for k in (1, 2)]
        for k, (weight, shift, lost) in zip((1, 2), bounded_gradients(checked(h), heads), strict=True):
            mean = [Fraction(x) / n * int(residual * k) for x in h.sum(0).tolist()]
            assert weight.tolist() == [[float(x) for x in mean]] * c
            assert shift is None if not bias else shift.tolist() == [residual * k] * c
            of_rows = _root(Fraction(c)) * (_gamma(n + 1) * Fraction(residual) * k + Fraction(error))
            _is(lost, Fraction(norms) * of_rows + 2 * LEAST * _root(Fraction(c * (m + 1))))


def test_heads_that_are_bounded_together_are_those_that_are_bounded_alone():
    h, y = _rows([1, 2, 3], [4, 5, 6]), _rows([1, 0], [0, 1])
    heads = [(_rows([k, 1, 2], [3, k, 5]), _rows(k, 7)) for k in (1, 2)]
    loss = resolve_loss("mse")
    for head, found in zip(heads, bounded_heads(checked(h), heads, loss, y), strict=True):
        (alone,) = bounded_heads(checked(h), [head], loss, y)
        outputs = h @ head[0].mT + head[1]
        assert torch.equal(found.at.outputs, outputs) and torch.equal(alone.at.outputs, outputs)
        assert (found.loss, found.computed) == (alone.loss, alone.computed)
        assert found.computed == float(((outputs - y) ** 2).mean())


# head - center, the gradient of the loss, what rounding may hide of it, lambda, and the excess
GAPS = {
    "the gradient": ([0, 0, 0], [3, 0, 4], 0, 0.25, 0),
    "a gradient of the bias": ([0, 0, 0], [0, 0, 3], 0, 8, 0),
    "the penalty": ([2, 0, 0], [0, 0, 0], 0, 0.125, 0),
    "the penalty of the bias": ([0, 0, 2], [0, 0, 0], 0, 4, 0),
    "what rounding hides": ([0, 0, 0], [0, 0, 0], 5, 0.25, 0),
    "all of them": ([1, 2, 4], [8, 16, 32], 64, 0.5, 128),
    "a sum without digits": ([2, 4, -8], [-1, -2, 4], 0, 0.5, 0),
    "the same of the bias": ([0, 0, -8], [0, 0, 4], 0, 0.5, 0),
    "the same, far larger": ([2, 4, -8], [-32, -64, 128], 0, 16, 0),
    "the excess": ([0, 0, 0], [0, 0, 0], 0, 1, 7),
    "underflow of the gradient": ([0, 0, 0], [0, 0, 0], 0, 2.0**-1060, 0),
    "the same beside what rounding hides": ([0, 0, 0], [0, 0, 0], 2.0**-1021, 2.0**-1060, 0),
    "underflow of the gap": ([0, 0, 0], [0, 0, 0], 0, 1, 0),
}


@pytest.mark.parametrize("name", GAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_gap_is_the_excess_and_the_gradient_with_all_that_rounding_may_hide(name, bias):
    step, slope, lost, lam, excess = GAPS[name]
    u, g = _rows(*step), _rows(*slope)
    center = _rows([1, 2]), _rows(3) if bias else None
    head = center[0] + u[None, :2], _rows(3) + u[2:] if bias else None
    given = g[None, :2], g[2:] if bias else None, float(lost)
    found, computed = bounded_gap(_bounded(head, (excess, 0.0)), given, center, lam)
    parts = slice(3 if bias else 2)
    gradient, length, of_g = _norm((g + lam * u)[parts]), _norm(u[parts]), _norm(g[parts])
    most = (
        gradient + Fraction(lost) + _gamma(7) * (of_g + Fraction(lam) * length) + LEAST * _root(Fraction(3))
    )
    _is(found, Fraction(excess) / 2 + LEAST + most**2 / (2 * Fraction(lam)))
    stated = gradient**2 / (2 * Fraction(lam))
    assert computed == 0 if stated == 0 else abs(Fraction(computed) / stated - 1) <= Fraction(1e-13)


def test_a_gap_of_which_nothing_is_known_is_infinite():
    head = _rows([1, 2]), _rows(3)
    for strange in (math.inf, math.nan, 1e200):
        given = strange * _rows([1, 2]), _rows(3), 0.0
        assert bounded_gap(_bounded(head), given, head, 1.0)[0] == math.inf
        (found,) = bounded_gradients(checked(_rows([1, 2])), [_bounded(head, residual=strange, norms=1e200)])
        assert found[2] == math.inf
    assert bounded_gap(_bounded(head, (math.inf,)), (head[0], head[1], 0.0), head, 1.0)[0] == math.inf


# -- what is said of a head


def _problem(dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[HeadProblem, Tensor, Tensor]:
    """Far from all targets, where Huber's slopes are all the same, and a head near the start."""
    generator = torch.Generator().manual_seed(1)
    h = torch.rand((8, 3), generator=generator).double() * size
    start = size * torch.ones((2, 3), dtype=torch.float64), size * torch.ones(2, dtype=torch.float64)
    y = torch.full((8, 2), 9.0, dtype=torch.float64)
    problem = make_problem(checked(h), y, resolve_loss("huber"), start, dtype)
    return problem, start[0] + 0.5 * h.mean(0), start[1] + 0.5 * size / 3


def _said(problem: HeadProblem, weight: Tensor, bias: Tensor, **given: Any) -> HeadSolution:
    fields = {"interrupted": False, "method": "nearest", "iterations": 0, "products": 0, "peak_bytes": 0}
    fields |= {"lam": 1.0, "weight_decay": 0.0, "gap_target": 0.0, "reason": "as given"} | given
    with exact_products():
        return evaluate_head(problem, weight, bias, **fields)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lam", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("size", [1.0, 2.0**-30])
def test_the_distance_is_that_of_the_gap_and_of_the_rounding(dtype, lam, size):
    problem, weight, bias = _problem(dtype, size)
    found = _said(problem, weight, bias, lam=lam)
    moved = _norm(weight - found.weight.double(), bias - found.bias.double())
    length = _norm(found.weight.double() - problem.weight, found.bias.double() - problem.bias)
    far = _root(2 * Fraction(found.duality_gap) / Fraction(lam)) + moved
    _is(found.distance_bound, far / length)
    assert (moved > 0) == (dtype == torch.float32)
    # the gradient in the head is that of the rounded one
    leaves = [p.double().requires_grad_() for p in (found.weight, found.bias)]
    loss = torch.nn.functional.huber_loss(problem.logits(*leaves), problem.targets)
    loss.backward()
    assert found.residual == pytest.approx(float(torch.cat([p.grad.flatten() for p in leaves]).norm()))
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert found.regularization == lam and found.weight.dtype == found.bias.dtype == dtype


def test_the_duality_gap_is_that_of_the_head_before_it_is_rounded():
    """Rounded, the minimiser of a squared loss has a gradient."""
    problem, _, _ = _problem()
    h = torch.cat([problem.features.panel(0, 3), torch.ones((8, 1), dtype=torch.float64)], 1)
    system = h.T @ h / 8 + torch.eye(4, dtype=torch.float64)  # two outputs: (2 / 16) |H V - Y|^2
    step = torch.linalg.solve(system, h.T @ (problem.targets - problem.start_logits) / 8).T
    gaps = []
    for dtype in (torch.float64, torch.float32):
        of_mse = make_problem(
            problem.features, problem.targets, resolve_loss("mse"), (problem.weight, problem.bias), dtype
        )
        gaps.append(_said(of_mse, problem.weight + step[:, :3], problem.bias + step[:, 3]).duality_gap)
    assert gaps[0] < 1e-26 and gaps[1] < 1e-26


def test_without_a_length_or_a_penalty_no_distance_is_known():
    problem, _, _ = _problem()
    for lam in (1.0, 0.0):
        found = _said(problem, problem.weight, problem.bias, lam=lam)
        assert found.distance_bound == math.inf and (found.duality_gap == math.inf) == (lam == 0)
    # from a start at zero, under a penalty that leaves next to nothing of the head
    problem = make_problem(problem.features, problem.targets, problem.loss, None)
    (slope,) = bounded_gradients(problem.features, problem.bounded(problem.weight, problem.bias)[:1])
    tiny = _said(problem, -slope[0] / 1e300, -slope[1] / 1e300, lam=1e300)
    assert tiny.duality_gap >= float(LEAST) and 0 < tiny.distance_bound < 1
    denormal = _said(problem, problem.weight + 1e-310, problem.bias, lam=1.0)
    assert denormal.distance_bound == math.inf


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_head_has_converged_where_its_gap_is_the_target(decay):
    """And otherwise it is said why: what rounding hides, or that no step went further down."""
    problem, weight, bias = _problem()
    problem = make_problem(problem.features, problem.targets, problem.loss, (weight, bias), None)
    problem.infimum = 0.5  # of another problem: it is subtracted
    found = _said(problem, weight, bias, weight_decay=decay)
    if decay:
        zero = torch.zeros_like(weight), torch.zeros_like(bias)
        (slope,) = bounded_gradients(problem.features, problem.bounded(weight, bias)[:1])
        computed = bounded_gap(problem.bounded(weight, bias)[0], slope, zero, decay)[1]
        assert found.gap == found.duality_gap
    else:
        computed = float(problem.loss.value(problem.start_logits, problem.targets).mean()) - 0.5
    assert computed < found.gap < computed + 1e-12

    def said(gap_target: float, **given: Any) -> tuple[bool, str]:
        solution = _said(problem, weight, bias, weight_decay=decay, gap_target=gap_target, **given)
        assert solution.gap == found.gap
        return solution.converged, solution.reason

    below = math.nextafter(computed, 0.0)
    stuck = f"no step went further down, at a gap of {found.gap:.3g}" if decay else "as given"
    assert said(found.gap) == (True, "as given")
    for target in (math.nextafter(found.gap, 0.0), computed):
        converged, reason = said(target)
        assert not converged and "rounding may hide" in reason and f"gap is {computed:.3g}" in reason
        assert f"hide {found.gap - computed:.3g} more" in reason
    assert said(below) == (False, stuck)
    assert said(below, interrupted=True) == (False, "as given")
    assert said(below, method="gd") == (False, "as given")
    assert said(below, lam=2.0) == (False, "as given")
