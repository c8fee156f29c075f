"""What LayerJacobians refuses, in words that say where, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from jacobian_cases import REFUSED, Fn, Read, rand
from torch import nn
from torch.nn.utils import parametrizations

import gcfast
from gcfast import LayerJacobians


def mlp(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2)).double()


def function(call, /, **parts):
    torch.manual_seed(0)
    return Fn(call, **(parts or {"f": nn.Linear(3, 2)})).double()


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.a(x) + self.b(x) if bool((x[:, 0] < 5).all()) else self.a(x).tanh() * 2


class HardBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 2).double()

    def forward(self, x):
        return self.f(x.view(4, 6))


class Aside(nn.Module):
    """A layer that is not used, one under no_grad, one detached."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.shut, self.cut = (nn.Linear(3, 3).double() for _ in range(4))

    def forward(self, x):
        with torch.no_grad():
            y = self.shut(x)
        return self.used(x) + y + self.cut(x).detach()


def _frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


X = rand(4, 3)
NOTHING = {"layers": None}
MODELS = {
    "batch norm, training": (lambda: mlp(nn.BatchNorm1d(4)), X, {}, ValueError, r"layer '1' \(BatchNorm1d\)"),
    "batch norm without statistics": (
        lambda: mlp(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        X,
        {},
        ValueError,
        "'1'.*no running statistics",
    ),
    "dropout": (lambda: mlp(nn.Dropout(0.1)), X, {}, ValueError, r"layer '1' \(Dropout\).*eval"),
    "attention's dropout": (
        lambda: function(lambda x, a: a(x, x, x)[0][:, 0], a=nn.MultiheadAttention(4, 2, dropout=0.1)),
        rand(4, 3, 4),
        {},
        ValueError,
        "layer 'a'.*at random",
    ),
    "functional dropout": (
        lambda: function(lambda x, f: F.dropout(f(x), 0.5, True)),
        X,
        {},
        ValueError,
        "random numbers",
    ),
    "mean of the batch": (
        lambda: function(lambda x, f: f(x - x.mean(0))),
        X,
        {},
        ValueError,
        "depends on the other samples",
    ),
    "difference to the first sample": (
        lambda: function(lambda x, f: f(x - x[:1])),
        X,
        {},
        ValueError,
        "depends on the other samples",
    ),
    "functional statistics of the batch": (
        lambda: function(lambda x, f: F.batch_norm(f(x).mT, None, None, training=True).sum(2)),
        rand(4, 2, 3),
        {},
        ValueError,
        "statistics of the batch.*BatchNorm",
    ),
    "no gradient": (
        lambda: mlp().requires_grad_(False),
        X,
        {},
        ValueError,
        "no parameter with requires_grad",
    ),
    "frozen layer": (_frozen, X, {"layers": "0"}, ValueError, r"'0.weight' has requires_grad=False"),
    "unused": (Aside, X, {}, ValueError, r"'idle.weight' \(and 5 more"),
    "under no_grad": (Aside, X, {"layers": "shut"}, ValueError, "depends on none|'shut.weight'"),
    "detached": (Aside, X, {"layers": ["used", "cut"]}, ValueError, r"'cut.weight'.*no part in the output"),
    "no_grad alone": (
        lambda: function(lambda x, f: f(x).detach()),
        X,
        {},
        ValueError,
        "depends on none of its parameters",
    ),
    "vector output": (lambda: function(lambda x, f: f(x)[:, 0]), X, {}, ValueError, r"\(1, C\); got \(1,\)"),
    "3-d output": (
        lambda: function(lambda x, f: f(x).unsqueeze(2)),
        X,
        {},
        ValueError,
        r"\(n, C\).*\(1, 2, 1\)",
    ),
    "no output": (lambda: function(lambda x, f: f(x)[:, :0]), X, {}, ValueError, "at least one output"),
    "tuple output": (lambda: function(lambda x, f: (f(x), x)), X, {}, TypeError, "one tensor.*tuple"),
    "integer output": (
        lambda: function(lambda x, f: f(x).argmax(1, keepdim=True)),
        X,
        {},
        TypeError,
        "int64",
    ),
    "output of other rows": (
        lambda: function(lambda x, f: f(x).repeat(2, 1)),
        X,
        {},
        ValueError,
        r"\(2, 2\)",
    ),
    "nan in outputs": (
        lambda: function(lambda x, f: f(x).sub(1e6).log()),
        X,
        {},
        ValueError,
        "NaN or an infinity",
    ),
    "half": (lambda: mlp().half(), X.half(), {}, TypeError, "float32 or float64; got float16"),
    "two dtypes": (
        lambda: nn.Sequential(mlp(), nn.Linear(2, 2)),
        X,
        {},
        TypeError,
        "one dtype.*float32, float64",
    ),
    "unknown layer": (mlp, X, {"layers": "3"}, ValueError, "'3' names no layer.*0, 1"),
    "unknown class": (mlp, X, {"layers": nn.Conv2d}, ValueError, "Conv2d"),
    "layers of a wrong type": (mlp, X, {"layers": [3]}, TypeError, "names, patterns or classes.*int"),
    "no module": (lambda: torch.sin, X, {}, TypeError, "model: expected a torch.nn.Module"),
    "max_bytes 0": (mlp, X, {"max_bytes": 0}, ValueError, "max_bytes"),
    "max_bytes text": (mlp, X, {"max_bytes": "1G"}, ValueError, "max_bytes.*'1G'"),
    "nan in x": (
        mlp,
        X.clone().index_fill_(0, torch.tensor(2), float("nan")),
        {},
        ValueError,
        "x must be finite",
    ),
    "empty x": (mlp, X[:0], {}, ValueError, r"x must hold at least one sample.*\(0, 3\)"),
    "scalar x": (mlp, torch.tensor(1.0), {}, ValueError, "x must have a first dimension"),
    "uneven x": (mlp, (X, X[:3]), {}, ValueError, "got 4 and 3 rows"),
    "x of no tensor": (mlp, [1.0], {}, TypeError, "x must be a tensor"),
    "divided gradient": (
        lambda: nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True)).double(),
        torch.tensor([1, 2]),
        {},
        ValueError,
        "'0'.*scale_grad_by_freq",
    ),
    "hard-coded batch": (HardBatch, rand(4, 6), {}, ValueError, "x: the model cannot be run.*shape|invalid"),
}


@pytest.mark.parametrize("name", MODELS)
def test_refused_by_name(name):
    make, x, options, kind, words = MODELS[name]
    with pytest.raises(kind, match=words):
        LayerJacobians(make(), x, **options)


def test_changed_in_place():
    def net(x, f, g):
        z = f(x)
        y = g(z)
        z.mul_(2)
        return y

    model = function(net, f=nn.Linear(3, 4), g=nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"in.?place"):
        LayerJacobians(model, X).gram()
    # an input that needs no gradient is noticed by the layer's own operator
    model = function(lambda x, f: (f(x), x.mul_(2))[0])
    with pytest.raises(RuntimeError, match=r"layer 'f'.*changed in\s+place"):
        LayerJacobians(model, X).gram()


def test_another_course_for_other_samples():
    x = torch.cat([X, 9 + X])
    jac = LayerJacobians(Branch(), x[:4])
    with pytest.raises(RuntimeError, match=r"samples 0 to 3.*must not depend on the values"):
        jac.gram(other=x[4:])


@pytest.mark.parametrize("name", REFUSED)
def test_samples_that_do_not_stay_in_order(name):
    words = "switch checkpointing off" if name == "checkpointed" else "layer '0.[fg]'.*gathers rows"
    model, x = REFUSED[name]()
    jac = LayerJacobians(model, x)
    for product in (jac.gram, jac.diag, lambda: jac.sketch(2)):
        with pytest.raises(RuntimeError, match=words):
            product()


def test_reentrant_checkpoint_hides_parameters():
    from torch.utils.checkpoint import checkpoint

    model = function(
        lambda x, f, g: checkpoint(f, g(x), use_reentrant=True), f=nn.Linear(2, 2), g=nn.Linear(3, 2)
    )
    with pytest.raises((ValueError, RuntimeError), match=r"'f.weight'|checkpoint"):
        LayerJacobians(model, X)


BAD_CALLS = {
    "v short": (lambda j: j.jvp(rand(3)), ValueError, r"v must have shape \(26,\)"),
    "v float32": (lambda j: j.jvp(torch.zeros(26)), TypeError, "v must have the dtype.*float64"),
    "v unknown": (lambda j: j.jvp({"w": rand(3)}), ValueError, "'w' is no parameter.*0.weight"),
    "v part": (lambda j: j.jvp({"0.bias": rand(3)}), ValueError, r"v\['0.bias'\] must have shape \(4,\)"),
    "v part float32": (lambda j: j.jvp({"0.bias": torch.zeros(4)}), TypeError, r"v\['0.bias'\].*float64"),
    "v list": (lambda j: j.jvp([1.0]), TypeError, "v must be a tensor or a dict.*list"),
    "u shape": (lambda j: j.vjp(rand(2, 4)), ValueError, r"u must have shape \(4, 2\) or \(8,\)"),
    "u dtype": (lambda j: j.vjp(torch.zeros(4, 2)), TypeError, "u must have the dtype"),
    "u list": (lambda j: j.matvec([1.0]), TypeError, "must be a tensor; got list"),
    "k zero": (lambda j: j.sketch(0), ValueError, "k: expected a positive int; got 0"),
    "k real": (lambda j: j.sketch(2.0), TypeError, "k: expected a positive int"),
    "k bool": (lambda j: j.sketch(True), TypeError, "k: expected a positive int"),
    "method": (
        lambda j: j.sketch(2, method="srht"),
        ValueError,
        "method: expected one of 'gaussian', 'sparse'; got 'srht'",
    ),
    "gram's layer": (lambda j: j.gram("2"), ValueError, "'2' names no layer"),
    "gram's part": (lambda j: j.gram("0.bias"), ValueError, "'0.bias' is a part of layer '0'"),
    "other nan": (lambda j: j.gram(other=X * float("nan")), ValueError, "other must be finite"),
    "other empty": (lambda j: j.gram(other=X[:0]), ValueError, "other must hold at least one"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_calls_refused_by_name(name):
    call, kind, words = BAD_CALLS[name]
    with pytest.raises(kind, match=words):
        call(LayerJacobians(mlp(), X))


def test_too_little_memory():
    jac = LayerJacobians(mlp(), X, max_bytes=50)
    with pytest.raises(MemoryError, match=r"one sample and one output need [\d,]+ bytes.*allows 50.*layers="):
        jac.gram()


def _state(model, x):
    return (
        {name: v.clone() for name, v in model.state_dict().items()},
        {name: m.training for name, m in model.named_modules()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        {name: p.requires_grad for name, p in model.named_parameters()},
        x.clone(),
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(12, 4)),
        gcfast.WideLayer(4, 6),
        nn.Linear(6, 2),
    ).double()
    model.eval()
    model[3].train()  # a flag that is not to be tidied up
    model.register_forward_hook(lambda *_: None)
    x = rand(4, 2, 4, 4)
    model(x).sum().backward()
    before = _state(model, x)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            jac = LayerJacobians(model, x)
            jac.gram(per_layer=True), jac.gram(other=x[:2], trace=True), jac.diag(), jac.plan()
            jac.sketch(3), jac.sketch(3, method="sparse")
            u = jac.jvp(torch.ones(jac.shape[1], dtype=torch.float64))
            jac.vjp(u), jac.matvec(u)
    for bad in (lambda: jac.gram(other=x[:, :1]), lambda: jac.gram(other=x[:, :, :1])):
        with pytest.raises(ValueError, match="x: the model cannot be run"):
            bad()
    assert all(_same(a, b) for a, b in zip(before, _state(model, x)))


def test_inside_no_grad_and_inference_of_the_caller():
    model, x = mlp(nn.Tanh()), X
    k = LayerJacobians(model, x).gram()
    with torch.no_grad():
        jac = LayerJacobians(model, x)
        assert torch.equal(jac.gram(), k) and not jac.jvp(torch.ones(26, dtype=torch.float64)).requires_grad
    assert not k.requires_grad and not jac.vjp(rand(4, 2))["0.weight"].requires_grad


def test_autocast_is_not_silently_taken():
    model, x = mlp(nn.Tanh()).float(), X.float()
    true = LayerJacobians(copy.deepcopy(model).double(), X).gram()
    with torch.autocast("cpu", torch.bfloat16):
        try:
            found = LayerJacobians(model, x).gram()
        except (TypeError, ValueError, RuntimeError) as error:
            assert "dtype" in str(error) or "bfloat16" in str(error)
            return
    assert found.dtype == torch.float32 and float((found - true).abs().max()) < 1e-4 * float(true.max())


def test_the_fallback_names_its_layer_once(caplog):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), Read()).double()
    with caplog.at_level(logging.INFO, "gcfast"):
        jac = LayerJacobians(model, X)
        jac.gram(), jac.gram(), jac.diag()
    lines = [r.getMessage() for r in caplog.records if "sample by sample" in r.getMessage()]
    assert len(lines) == 1 and "layer '0.parametrizations.weight'" in lines[0] and "original0" in lines[0]
    caplog.clear()
    with caplog.at_level(logging.INFO, "gcfast"):
        LayerJacobians(mlp(), X).gram()
    assert not caplog.records
