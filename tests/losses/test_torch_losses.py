"""A loss of torch's is that loss, to rounding, or refused with the argument's name."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gcfast
from gcfast.losses import check_matches_outputs, resolve_loss

KINDS = [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss]
HONOURED = {
    nn.CrossEntropyLoss: {
        "label_smoothing": [0.0, 0.1, 1.0, 1, True, 1.5, "a"],
        "ignore_index": [-100, 0, 2, -1],
    },
    nn.HuberLoss: {"delta": [1.0, 2, 0.3, 0.0, -1.0, 1e-300, float("inf"), float("nan"), None]},
}
REFUSED = {
    "reduction": ["mean", "sum", "none"],
    "size_average": [None, True, False],
    "reduce": [None, True, False],
    "weight": [None, torch.ones(3), torch.ones(1)],
    "pos_weight": [None, torch.tensor(2.0)],
    "beta": [1.0, 1, 0.5, 0.0],
}
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("loss: ", "targets: ")


def arguments(kind):
    """Of torch's class, as this torch has them: one that is in neither table above is a KeyError."""
    return list(inspect.signature(kind).parameters)


@st.composite
def modules(draw):
    """A torch loss, whose constructor may refuse (then None), and what was given to it."""
    kind = draw(st.sampled_from(KINDS))
    choices = {**REFUSED, **HONOURED.get(kind, {})}
    names = [name for name in arguments(kind) if draw(st.integers(0, 5)) == 0]
    given = {name: draw(st.sampled_from(choices[name])) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size_average and reduce are deprecated
        if draw(st.booleans()):
            return kind(**given), given
        module = kind()  # torch reads what is set later, too
        for name, value in given.items():
            setattr(module, name, value)
        return module, given


@st.composite
def targets(draw, n, c):
    """Targets of n samples, mostly such as some loss takes."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["labels", "probabilities", "hard", "real"]))
    if form == "labels":
        y = torch.randint(0, c, (n,), generator=g).to(draw(st.sampled_from(INTEGERS)))
        if draw(st.integers(0, 4)) == 0 and y.dtype != torch.bool and n:
            y[-1] = draw(st.sampled_from([-100, -1, 0, 2, c])) if y.dtype != torch.uint8 else 200
    elif form == "hard":
        y = torch.randint(0, 2, (n, c), generator=g).to(draw(st.sampled_from(INTEGERS + FLOATS)))
    else:
        y = torch.randn((n, c), generator=g, dtype=torch.float64)
        if form == "probabilities":
            y = y.softmax(1) * draw(st.sampled_from([1.0] * 5 + [1 + 1e-9, 1.00005, 0.5]))
        y = y.to(draw(st.sampled_from(FLOATS)))
        if draw(st.integers(0, 9)) == 0 and n:
            y[0, 0] = draw(st.sampled_from([float("nan"), float("inf"), -0.1]))
    shape = draw(st.sampled_from(["as is"] * 6 + ["flat", "column", "row", "longer", "scalar"]))
    return {
        "as is": lambda: y,
        "flat": lambda: y.reshape(-1),
        "column": lambda: y.reshape(len(y), -1)[:, :1],
        "row": lambda: y[None],
        "longer": lambda: torch.cat([y, y]),
        "scalar": lambda: y.reshape(-1)[0],
    }[shape]()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(module=modules(), data=st.data())
def test_the_value_is_torchs_or_the_argument_is_named(module, data):
    module, given = module
    n, c = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    y = data.draw(targets(n, c))
    z = 2 * torch.randn((n, c), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    flat = c == 1 and data.draw(st.booleans())
    outputs = z[:, 0] if flat else z  # as a model gives them that squeezes its one output
    try:
        loss = resolve_loss(module)
        check_matches_outputs(loss, y, outputs.shape[1:])
        ours = loss.value(z, loss.prepare(y, n, c)).mean()
    except (ValueError, TypeError) as error:
        assert str(error).startswith(NAMES), (given, error)
        return
    # what torch does not take by its dtype or as a column of labels, it takes by another name
    if isinstance(module, nn.CrossEntropyLoss):
        wanted = y.double() if y.is_floating_point() else y.long().reshape(-1)
        outputs = z
    else:
        wanted = y.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it broadcasts
        theirs = module(outputs, wanted)
    rounding = 1e-12
    if isinstance(module, nn.CrossEntropyLoss) and y.is_floating_point():
        rounding += min(1e-4, (c + 8) * torch.finfo(y.dtype).eps)  # of the sums of the rows
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_what_torch_takes_every_day_is_taken(kind, dtype):
    """Labels in any integer dtype, one-hot or real targets, probabilities summed in their own dtype."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn((20, 3), generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, (20,), generator=g)
    if not dtype.is_floating_point:
        y = (labels if kind is nn.CrossEntropyLoss else F.one_hot(labels, 3)).to(dtype)
    elif torch.finfo(dtype).eps < 1e-4:
        y = torch.rand((20, 3), generator=g, dtype=dtype).softmax(1)
    else:
        y = F.one_hot(labels, 3).to(dtype)
    if kind is nn.CrossEntropyLoss and dtype == torch.bool:
        with pytest.raises(TypeError, match=r"targets: .*torch\.bool"):
            resolve_loss(kind()).prepare(y, 20, 3)
        return
    wanted = labels if kind is nn.CrossEntropyLoss and not dtype.is_floating_point else y.double()
    for options in ({}, {"label_smoothing": 0.1, "ignore_index": -7}, {"delta": 0.2}):
        if options.keys() <= set(arguments(kind)):
            loss = resolve_loss(kind(**options))
            ours = loss.value(z, loss.prepare(y, 20, 3)).mean()
            torch.testing.assert_close(ours, kind(**options)(z, wanted), rtol=1e-6, atol=0)


def test_probabilities_are_not_scaled_to_sum_one():
    """Torch's value of such rows is another one: they are refused beyond the rounding of their dtype."""
    y = torch.tensor([[0.3, 0.7], [0.25, 0.75]], dtype=torch.float64)
    loss = resolve_loss("cross_entropy")
    for dtype, off in ((torch.float64, 1e-8), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        assert loss.prepare(y.to(dtype), 2, 2).sum(1).tolist() == [1.0, 1.0]
        bad = y.clone()
        bad[1] *= 1 + off
        with pytest.raises(ValueError, match=r"targets: row 1 .*divide each row by its sum"):
            loss.prepare(bad.to(dtype), 2, 2)


class _Twice(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


class _Same(nn.MSELoss):
    pass


def _with(module, change):
    change(module)
    return module


def _halved(module, arguments, value):
    return value / 2


ALTERED = {
    "weight": (
        lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
        ValueError,
        "weight=None; got weight=a Tensor",
    ),
    "weight set later": (
        lambda: _with(nn.BCEWithLogitsLoss(), lambda m: setattr(m, "weight", torch.ones(3))),
        ValueError,
        "weight=None",
    ),
    "pos_weight": (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "pos_weight=None"),
    "sum": (lambda: nn.MSELoss(reduction="sum"), ValueError, "reduction='mean'; got reduction='sum'"),
    "none": (lambda: nn.HuberLoss(reduction="none"), ValueError, "reduction"),
    "reduction set later": (
        lambda: _with(nn.MSELoss(), lambda m: setattr(m, "reduction", "sum")),
        ValueError,
        "reduction",
    ),
    "beta": (lambda: nn.SmoothL1Loss(beta=0.5), ValueError, "beta=1.0; got beta=0.5 .*HuberLoss"),
    "smoothing": (
        lambda: _with(nn.CrossEntropyLoss(), lambda m: setattr(m, "label_smoothing", 1.1)),
        ValueError,
        "label_smoothing",
    ),
    "an argument of later": (
        lambda: _with(nn.CrossEntropyLoss(), lambda m: setattr(m, "size_average", False)),
        ValueError,
        "size_average",
    ),
    "subclass": (_Twice, TypeError, "_Twice, a subclass"),
    "bare subclass": (_Same, TypeError, "_Same, a subclass"),
    "class": (lambda: nn.MSELoss, TypeError, "the class MSELoss, not an instance"),
    "forward patched": (
        lambda: _with(nn.MSELoss(), lambda m: setattr(m, "forward", lambda z, y: (z - y).abs().mean())),
        ValueError,
        "forward is replaced",
    ),
    "call patched": (
        lambda: _with(nn.MSELoss(), lambda m: setattr(m, "_call_impl", lambda z, y: (z - y).abs().mean())),
        ValueError,
        "_call_impl is replaced",
    ),
    "forward hook": (
        lambda: _with(nn.MSELoss(), lambda m: m.register_forward_hook(_halved)),
        ValueError,
        "forward_hooks",
    ),
    "pre-hook": (
        lambda: _with(nn.MSELoss(), lambda m: m.register_forward_pre_hook(lambda module, arguments: None)),
        ValueError,
        "forward_pre_hooks",
    ),
    "compiled in place": (lambda: _with(nn.MSELoss(), lambda m: m.compile()), ValueError, "compiled"),
    "compiled": (lambda: torch.compile(nn.MSELoss()), TypeError, "OptimizedModule"),
    "in a sequence": (lambda: nn.Sequential(nn.MSELoss()), TypeError, "Sequential"),
    "function": (lambda: F.mse_loss, TypeError, "function"),
    "other": (nn.CosineEmbeddingLoss, TypeError, "convex in the outputs"),
    "number": (lambda: 3, TypeError, "got int"),
    "name": (lambda: "hinge", ValueError, "expected one of"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_other_losses_are_refused(name):
    make, error, words = ALTERED[name]
    with pytest.raises(error, match=f"^loss: .*{words}"):
        resolve_loss(make())


@pytest.mark.parametrize("which", ["forward_hook", "forward_pre_hook"])
def test_hooks_of_all_modules_are_seen(which):
    handle = getattr(nn.modules.module, f"register_module_{which}")(lambda *arguments: None)
    try:
        with pytest.raises(ValueError, match=f"loss: .*global {which}s"):
            resolve_loss(nn.MSELoss())
    finally:
        handle.remove()
    assert resolve_loss(nn.MSELoss()).name == "mse"


def test_a_patched_class_is_seen(monkeypatch):
    monkeypatch.setattr(nn.MSELoss, "forward", lambda self, z, y: (z - y).abs().mean())
    with pytest.raises(ValueError, match="forward of its class is replaced"):
        resolve_loss(nn.MSELoss())


def test_options_are_read_at_the_call():
    module = nn.CrossEntropyLoss()
    module.label_smoothing, module.ignore_index = 0.2, 1
    loss = resolve_loss(module)
    assert (loss.label_smoothing, loss.ignore_index) == (0.2, 1)
    huber = nn.HuberLoss(delta=3.0)
    huber.delta = 0.5
    assert resolve_loss(huber).delta == 0.5
    assert resolve_loss(nn.SmoothL1Loss()).delta == 1.0
    assert "delta=0.5" in repr(resolve_loss(huber))  # what a checkpoint knows a problem by
    assert resolve_loss("BCE-with-logits").name == "bce_with_logits"


def _net(c, squeeze=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, c), *([nn.Flatten(0)] if squeeze else []))


def _certify(model, x, y, loss):
    return gcfast.certify(model, (x, y), loss=loss)


def _solve(model, x, y, loss):
    return gcfast.solve_head(model, (x, y), loss=loss)


def _trainability(model, x, y, loss):
    return gcfast.trainability(model, x, y, loss)


CALLS = [_certify, _solve, _trainability]
X = torch.randn((12, 4), generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


@pytest.mark.parametrize("call", CALLS)
def test_ignored_labels_are_refused_where_the_targets_bear_them(call):
    for index, labels in ((0, LABELS), (-100, torch.where(LABELS == 0, -100, LABELS))):
        with pytest.raises(
            ValueError, match=rf"targets: label {index} of sample 0 is the loss's ignore_index"
        ):
            call(_net(3), X, labels, nn.CrossEntropyLoss(ignore_index=index))
    found = call(_net(3), X, LABELS, nn.CrossEntropyLoss(ignore_index=5))
    if call is not _solve:
        expected = float(F.cross_entropy(_net(3)(X).detach(), LABELS))
        assert found.loss == pytest.approx(expected, rel=1e-5)


def test_features_alone_tell_their_outputs_by_the_loss():
    h = torch.randn((12, 30), generator=torch.Generator().manual_seed(2))
    ints = torch.arange(12) - 3
    for loss, y, c in (("mse", ints, 1), ("mse", ints[:, None], 1), ("bce_with_logits", LABELS > 0, 1)):
        assert gcfast.solve_head(h, y, loss=loss).weight.shape == (c, 30)
    with pytest.raises(ValueError, match="targets: label -100 of sample 3 is the loss's ignore_index"):
        gcfast.solve_head(h, torch.where(torch.arange(12) == 3, -100, LABELS))
    for y in (torch.tensor(3), torch.tensor(3.0)):
        for loss in ("mse", "cross_entropy"):
            with pytest.raises(ValueError, match=r"targets: expected one row per sample"):
                gcfast.solve_head(h, y, loss=loss)
    for y in (LABELS.to_sparse(), LABELS + 1j):
        with pytest.raises(TypeError, match=r"targets: expected (a dense tensor of|real) numbers"):
            gcfast.solve_head(h, y)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss()], ids=repr
)
def test_what_torch_broadcasts_is_refused(call, loss):
    y = torch.rand(12, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"targets: expected shape \(12, 1\).*got \(12,\)"):
        call(_net(1), X, y, loss)
    assert call(_net(1), X, y[:, None], loss).loss >= 0
    if call is not _trainability:  # which wants outputs (n, C)
        with pytest.raises(ValueError, match=r"targets: expected shape \(12,\).*got \(12, 1\)"):
            call(_net(1, squeeze=True), X, y[:, None], loss)
        assert call(_net(1, squeeze=True), X, y, loss).loss >= 0


class _Grid(nn.Sequential):
    """Outputs (n, 2, 3)."""

    def forward(self, x):
        return super().forward(x).unflatten(1, (2, 3))


def test_outputs_of_more_axes_are_those_of_torch():
    """Elementwise losses take them; cross-entropy would take the first axis for the classes."""
    y = torch.rand((12, 2, 3), generator=torch.Generator().manual_seed(3))
    for loss in (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.HuberLoss()):
        net = _Grid(*_net(6))
        assert gcfast.certify(net, (X, y), loss=loss).loss == pytest.approx(loss(net(X), y).item(), rel=1e-5)
        with pytest.raises(ValueError, match=r"targets: expected shape \(12, 2, 3\).*got \(12, 3, 2\)"):
            gcfast.certify(net, (X, y.mT), loss=loss)
    for net, labels in ((_Grid(*_net(6)), LABELS), (_Grid(*_net(6)), y), (_net(1, squeeze=True), LABELS)):
        with pytest.raises(ValueError, match=r"loss: cross-entropy is of outputs \(n, C\)"):
            gcfast.certify(net, (X, labels), loss="cross_entropy")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["subclass", "weight", "sum", "forward hook", "forward patched", "compiled"])
def test_every_call_refuses_other_losses(call, name):
    make, error, words = ALTERED[name]
    with pytest.raises(error, match=words):
        call(_net(3), X, LABELS, make())


class _Weighted(gcfast.ConvexLoss):
    """``nn.CrossEntropyLoss(weight=...)``, and samples left out: what the refusals send a user to."""

    def __init__(self, weight, ignore_index=-100):
        self.weight, self.ignore_index = weight.double(), ignore_index

    def prepare(self, y, n, c):
        kept = y != self.ignore_index
        label = torch.where(kept, y, 0)
        share = torch.where(kept, self.weight[label], 0.0)
        return torch.stack([label.double(), share / share.mean()], 1)

    def value(self, z, y):
        return y[:, 1] * F.cross_entropy(z, y[:, 0].long(), reduction="none")

    def infimum(self, y):
        return torch.zeros(len(y), dtype=torch.float64)


class _Positive(gcfast.ConvexLoss):
    """``nn.BCEWithLogitsLoss(pos_weight=...)``, likewise."""

    def __init__(self, pos_weight):
        self.pos_weight = pos_weight.double()

    def value(self, z, y):
        loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=self.pos_weight, reduction="none")
        return loss.mean(1)

    def infimum(self, y):
        a, b = 1 - y, self.pos_weight * y
        return -(torch.xlogy(a, a / (a + b)) + torch.xlogy(b, b / (a + b))).mean(1)


WEIGHT = torch.tensor([1.0, 2.0, 5.0])
SOFT = torch.rand((12, 3), generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize(
    ("own", "theirs", "y"),
    [
        (_Weighted(WEIGHT), nn.CrossEntropyLoss(weight=WEIGHT.double()), LABELS),
        (_Weighted(WEIGHT, 1), nn.CrossEntropyLoss(weight=WEIGHT.double(), ignore_index=1), LABELS),
        (_Positive(WEIGHT), nn.BCEWithLogitsLoss(pos_weight=WEIGHT.double()), SOFT),
    ],
    ids=["weight", "ignore_index", "pos_weight"],
)
def test_weights_by_a_loss_of_the_users_own(own, theirs, y):
    model, x = _net(3).double(), X.double()
    expected = float(theirs(model(x), y).detach())
    assert gcfast.certify(model, (x, y), loss=own).loss == pytest.approx(expected, rel=1e-12)
    found = gcfast.solve_head(model, (x, y), loss=own, target_gap=1e-3)
    assert found.converged and float(theirs(model(x), y).detach()) == pytest.approx(found.loss, rel=1e-9)
