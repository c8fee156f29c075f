"""A loss of a user's that breaks its protocol at one sample is refused, with the sample and what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gcfast
from gcfast import ConvexLoss
from gcfast.losses import MSE, CrossEntropy, Huber, check_convex, resolve_loss

N, C, MARKED = 300, 3, 290
Z = torch.randn((N, C), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn((N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y[MARKED, 0] = 7.0


class _Half(ConvexLoss):
    """(1/2) |z - y|^2 a sample, all of it in closed form."""

    name = "half"

    def value(self, z, y):
        return 0.5 * (z - y).square().sum(1)

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)

    def residual(self, z, y):
        return z - y

    def curvature_product(self, z, y, v):
        return v

    def curvature_diagonal(self, z, y):
        return torch.ones_like(z)

    def terms(self, z, y):
        r = z - y
        return 0.5 * r.square().sum(1), r, (0.5 * r.square() + r * y).sum(1)

    def smoothness(self, c):
        return 1.0

    def dominance(self, c):
        return 2.0

    def reachable(self, z, y, eps):
        return y

    def group_infimum(self, y, group, groups):
        total = torch.zeros((groups, y.shape[1]), dtype=y.dtype).index_add_(0, group, y)
        mean = total / group.bincount(minlength=groups)[:, None]
        return torch.zeros(groups, dtype=y.dtype).index_add_(0, group, self.value(mean[group], y))


def _marked(y, x, other):
    """x, and ``other`` at the sample that is marked."""
    mark = y[:, 0] == 7.0
    return torch.where(mark if x.dim() == 1 else mark[:, None], other, x)


def _value(change):
    """The bare value with a change at the marked sample; the rest by automatic differentiation."""

    class Changed(ConvexLoss):
        name = "changed"

        def value(self, z, y):
            plain = 0.5 * (z - y).square().sum(1)
            return _marked(y, plain, change(z, y, plain))

        def infimum(self, y):
            return torch.zeros(len(y), dtype=torch.float64)

    return Changed()


def _half(**methods):
    return type("Changed", (_Half,), methods)()


def _of(method, change):
    """_Half with one of its methods changed at the marked sample."""
    plain = getattr(_Half, method)

    def changed(self, *arguments):
        y = arguments[0] if method == "infimum" else arguments[1]
        x = plain(self, *arguments)
        return _marked(y, x, change(x))

    return _half(**{method: changed})


def _terms(place, change):
    def terms(self, z, y):
        found = list(_Half.terms(self, z, y))
        found[place] = _marked(y, found[place], change(found[place]))
        return tuple(found)

    return _half(terms=terms)


# what is wrong, and what the error says
AT_ONE_SAMPLE = {
    "not convex": (_value(lambda z, y, plain: torch.sin(z).sum(1) + 3), "convex"),
    "concave far away": (_value(lambda z, y, plain: plain.clamp(max=1e3)), "is not convex"),
    "hardly convex": (_value(lambda z, y, plain: 1e-9 * torch.log1p(z.square().sum(1))), "is not convex"),
    "not a number": (_value(lambda z, y, plain: torch.full_like(plain, math.nan)), "is not finite"),
    "infinite": (_value(lambda z, y, plain: torch.full_like(plain, math.inf)), "is not finite"),
    "infinite nearby": (
        _value(lambda z, y, plain: torch.where((z[:, 0] - Z[MARKED, 0]).abs() > 0.05, math.inf, plain)),
        "is not finite",
    ),
    "no gradient": (
        _value(lambda z, y, plain: plain.detach() + 0 * z.sum(1)),
        "no gradient of a convex value",
    ),
    "too low": (_value(lambda z, y, plain: plain - 0.01), "falls below its own infimum"),
    "infimum too high": (_of("infimum", lambda x: x + 0.01), "falls below its own infimum"),
    "infimum infinite": (_of("infimum", lambda x: x - math.inf), "the infimum -inf, which is not finite"),
    "residual": (_of("residual", lambda x: 1.001 * x), "another residual in terms"),
    "curvature": (_of("curvature_product", lambda x: 1.001 * x), "curvature_"),
    "diagonal": (_of("curvature_diagonal", lambda x: 1.001 * x), "curvature_diagonal"),
    "terms, value": (_terms(0, lambda x: 1.001 * x), "another value in terms"),
    "terms, residual": (_terms(1, lambda x: 1.001 * x), "another residual in terms"),
    "terms, conjugate": (_terms(2, lambda x: x - 1e-6 * x.abs()), "conjugate in terms"),
    "reachable": (_of("reachable", lambda x: x + 0.1), "reachable outputs of value"),
}


@pytest.mark.parametrize("name", AT_ONE_SAMPLE)
def test_what_is_wrong_at_one_sample_is_found_there(name):
    loss, words = AT_ONE_SAMPLE[name]
    with pytest.raises(ValueError, match=rf"^loss: <Changed \w+> .*{words}.*sample {MARKED}\)"):
        check_convex(loss, Z, Y)
    others = [i for i in range(N) if i != MARKED]
    check_convex(loss, Z[others], Y[others])


OF_ALL = {
    "smoothness": (_half(smoothness=lambda self, c: 0.99), "smoothness"),
    "dominance": (_half(dominance=lambda self, c: 2.1), "dominance"),
    "gap_bound": (_half(gap_bound=lambda self, y, c, norm: 0.45 * norm**2 / len(y)), "gap_bound"),
    "group_infimum": (
        _half(group_infimum=lambda self, y, group, groups: 1.1 * _Half.group_infimum(self, y, group, groups)),
        "group_infimum",
    ),
    "residual of all": (
        _half(residual=lambda self, z, y: 2 * (z - y), terms=ConvexLoss.terms),
        "no gradient of a convex value",
    ),
    "mixes samples": (_half(value=lambda self, z, y: _Half.value(self, z, y) + z.mean() ** 2), "one sample"),
    "mean": (
        _half(value=lambda self, z, y: _Half.value(self, z, y).mean()),
        r"value must give .*\(300,\).*\(\)",
    ),
    "elements": (_half(value=lambda self, z, y: (z - y) ** 2), r"value must give .*\(300, 3\)"),
    "float32": (_half(value=lambda self, z, y: _Half.value(self, z, y).float()), "float64.*float32"),
    "no tensor": (_half(value=lambda self, z, y: 1.0), "value must give .*float"),
    "one infimum": (_half(infimum=lambda self, y: torch.zeros(1)), r"infimum must give .*\(1,\)"),
    "infimum no tensor": (_half(infimum=lambda self, y: 0.0), "infimum must give .*float"),
    "residual of another shape": (_half(residual=lambda self, z, y: (z - y).sum(1)), "residual must give"),
    "goes by places": (
        _half(value=lambda self, z, y: _Half.value(self, z, y) * (torch.arange(len(z)) < N // 2)),
        "one sample",
    ),
    "smoothness NaN": (_half(smoothness=lambda self, c: math.nan), "smoothness must give a number"),
    "smoothness no number": (_half(smoothness=lambda self, c: None), "smoothness must give a number"),
    "dominance no number": (_half(dominance=lambda self, c: "a"), "dominance must give a number"),
    "gap_bound no number": (_half(gap_bound=lambda self, y, c, norm: None), "gap_bound must give a number"),
    "rounding below 0": (
        _half(rounding=lambda self, z, y, value, residual: (-value, residual.abs())),
        "rounding below 0",
    ),
    "rounding of residuals below 0": (
        _half(rounding=lambda self, z, y, value, residual: (value, residual)),
        "rounding below 0",
    ),
    "rounding alone": (
        _half(rounding=lambda self, z, y, value, residual: value),
        "rounding must give .*NoneType",
    ),
    "excess below 0": (_half(excess=lambda self, z, y, e, value, residual: -value), "excess below 0"),
    "excess too small": (
        _half(excess=lambda self, z, y, e, value, residual: 0.49 * e.square().sum(1)),
        "excess that is less",
    ),
    "raises": (_half(value=lambda self, z, y: z @ y), "value failed at outputs"),
    "conjugate of all": (
        _half(terms=lambda self, z, y: (self.value(z, y), z - y, 0.4 * (z - y).square().sum(1))),
        "conjugate",
    ),
}


@pytest.mark.parametrize("name", OF_ALL)
def test_what_is_wrong_everywhere_is_found(name):
    loss, words = OF_ALL[name]
    calls = [check_convex]
    if "infimum" in name:  # which is asked for before there are outputs
        calls.append(lambda loss, h, y: gcfast.solve_head(h, y, loss=loss))
    for call in calls:
        with pytest.raises(ValueError, match=f"^loss: <Changed half>.*{words}"):
            call(loss, Z, Y)


@pytest.mark.parametrize(
    "loss",
    [
        _half(excess=lambda self, z, y, e, value, residual: 0.5 * e.square().sum(1)),
        _half(smoothness=lambda self, c: torch.tensor(1.0)),
        _half(rounding=lambda self, z, y, value, residual: (1e-15 * value, 1e-15 * residual.abs())),
    ],
)
def test_bounds_that_hold_pass(loss):
    check_convex(loss, Z, Y)


def test_a_value_below_the_infimum_leaves_no_bound_of_the_gap():
    class Lifted(_Half):
        """Beside 1e9 an infimum that is too high by 1/100 looks like rounding."""

        def value(self, z, y):
            return 1e9 + _Half.value(self, z, y)

        def infimum(self, y):
            return torch.full((len(y),), 1e9 + 0.01, dtype=torch.float64)

        residual, terms, group_infimum = ConvexLoss.residual, ConvexLoss.terms, ConvexLoss.group_infimum
        reachable, dominance = ConvexLoss.reachable, ConvexLoss.dominance

    h = torch.randn((10, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = gcfast.solve_head(h, Y[:10], loss=Lifted(), max_iterations=50)
    assert solution.gap == math.inf and not solution.converged


@pytest.mark.parametrize(
    ("loss", "option", "value", "words"),
    [
        (Huber(), "delta", -1.0, "delta: expected a positive finite number; got -1.0"),
        (Huber(), "delta", math.nan, "delta: expected a positive finite number; got nan"),
        (CrossEntropy(), "label_smoothing", 5.0, r"label_smoothing: expected a number in \[0, 1\]; got 5.0"),
    ],
)
def test_options_that_were_set_later_are_checked(loss, option, value, words):
    setattr(loss, option, value)
    with pytest.raises(ValueError, match=f"^loss: .* with {words}"):
        resolve_loss(loss)


class _Cosh(ConvexLoss):
    """Overflows far away, has a flat piece and a kink; convex all the same."""

    def value(self, z, y):
        return torch.cosh(z - y).sum(1) + (z - y).abs().sum(1).clamp(min=0.5)

    def infimum(self, y):
        return torch.full((len(y),), float(y.shape[1]) + 0.5)


class _Logistic(ConvexLoss):
    """Its infimum is not attained, and far away its value is rounding alone."""

    def value(self, z, y):
        return torch.logsumexp(z, 1) - z[:, 0]

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


class _Tiny(_Half):
    """With no second derivative for autograd to find."""

    def value(self, z, y):
        return 1e-12 * (z - y).sum(1)

    def infimum(self, y):
        return torch.full((len(y),), -1e300, dtype=torch.float64)

    residual, terms = ConvexLoss.residual, ConvexLoss.terms
    curvature_product, curvature_diagonal = ConvexLoss.curvature_product, ConvexLoss.curvature_diagonal
    reachable, group_infimum = ConvexLoss.reachable, ConvexLoss.group_infimum
    dominance = ConvexLoss.dominance


@pytest.mark.parametrize(
    "loss", [_Half(), _Cosh(), _Logistic(), _Tiny()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 7, N])
def test_honest_losses_pass(loss, scale, n):
    check_convex(loss, scale * Z[:n], Y[:n])
    check_convex(loss, scale * Z[:n], Y[:n], seen=Z[:n])


@pytest.mark.parametrize("scale", [1e3, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_one_output_far_from_where_its_loss_is_active_passes(scale, seed):
    """The value is 0 there, and what rounding leaves of it is not to be judged by it."""
    z = scale * torch.randn((1, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    check_convex(_Logistic(), z, Y[:1])


@pytest.mark.parametrize("scale", [1e-13, 1e-3, 1e5])
def test_a_loss_is_judged_by_its_own_size(scale):
    class Wave(ConvexLoss):
        def value(self, z, y):
            return scale * (torch.sin(z).sum(1) + 3)

        def infimum(self, y):
            return torch.zeros(len(y), dtype=torch.float64)

    with pytest.raises(ValueError, match="is not convex"):
        check_convex(Wave(), Z, Y)


def test_outputs_seen_before_are_compared():
    """A bump between two outputs, which no chord around either of them meets."""

    class Bump(ConvexLoss):
        def value(self, z, y):
            return (z.sum(1) - 1e6).square() * 1e-12 + ((z.sum(1) - 3e5).abs() < 1e3).double()

        def infimum(self, y):
            return torch.zeros(len(y), dtype=torch.float64)

    start, end = torch.zeros((5, 1), dtype=torch.float64), torch.full((5, 1), 6e5, dtype=torch.float64)
    with pytest.raises(ValueError, match="is not convex"):
        check_convex(Bump(), end, end, seen=start)


def test_many_outputs_are_looked_at_in_blocks(monkeypatch):
    monkeypatch.setattr("gcfast.losses.convexity.BLOCK", 64)
    check_convex(_Half(), Z, Y)
    with pytest.raises(ValueError, match=f"sample {MARKED}"):
        check_convex(AT_ONE_SAMPLE["not convex"][0], Z, Y)


def _calls():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 320), nn.Tanh(), nn.Linear(320, C)).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    with torch.no_grad():
        h = model[:2](x)
    return {
        "certify": lambda loss: gcfast.certify(model, (x, Y), loss=loss),
        "certify features": lambda loss: gcfast.certify(h, Y, loss=loss),
        **{
            method: lambda loss, method=method: gcfast.solve_head(h, Y, loss=loss, method=method)
            for method in ("nearest", "gd", "sgd")
        },
        "model": lambda loss: gcfast.solve_head(model, (x, Y), loss=loss),
        "trainability": lambda loss: gcfast.trainability(model[2], h, Y, loss),
    }


@pytest.mark.parametrize("name", ["not convex", "infimum too high", "terms, conjugate"])
def test_every_call_looks_at_every_sample(name):
    loss, words = AT_ONE_SAMPLE[name]
    for call in _calls().values():
        with pytest.raises(ValueError, match=rf"loss: .*{words}.*sample {MARKED}\)"):
            call(loss)


def test_the_solution_is_looked_at_too():
    """What is right until the outputs meet their targets."""

    class Late(_Half):
        def infimum(self, y):
            return torch.full((len(y),), self.low, dtype=torch.float64)

    loss, seen = Late(), []
    loss.low = 0.0

    def spoil(progress):
        seen.append(progress)
        loss.low = 0.1

    h = torch.randn((N, 320), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"loss: .*falls below its own infimum"):
        gcfast.solve_head(h, Y, loss=loss, callback=spoil)
    assert seen


@pytest.mark.parametrize("kind", [MSE, CrossEntropy, Huber])
def test_ours_are_not_to_be_subclassed_or_patched(kind):
    """Their closed forms are inherited by a value that they are not of."""

    class Doubled(kind):
        def value(self, z, y):
            return 2 * super().value(z, y)

    patched = kind()
    patched.value = lambda z, y: (z - y).abs().mean(1)
    for loss in (Doubled(), patched):
        with pytest.raises(TypeError, match=r"loss: .* changes a loss of gcfast's.*gcfast\.ConvexLoss"):
            resolve_loss(loss)
    assert resolve_loss(kind()).name == kind.name


def test_a_loss_that_bears_the_name_of_ours_is_not_ours():
    class Named(_Half):
        name = "mse"

    h = torch.randn((20, 30), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pytest.raises(ValueError, match="'exact' is for loss='mse'"):
        gcfast.solve_head(h, Y[:20], loss=Named(), method="exact")
