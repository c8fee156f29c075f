"""Finding the head, tapping features, judging operators, recognising the wide layer, and leaving no trace."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gcfast
from gcfast.model.analytic_body import analyticity
from gcfast.model.analytic_ops import SignTracker, classify
from gcfast.model.head import AmbiguousHeadError, Head, HeadError, find_head
from gcfast.model.tap import FeatureTap
from gcfast.model.wide_layer import wide_activation


def captured(model, module, x):
    with FeatureTap(model, module) as tap:
        return tap(x)


class Net(nn.Module):
    """x -> a -> `between` -> b -> `after`; `b` comes first so that order of registration tells nothing."""

    def __init__(self, between=torch.tanh, after=None, width=8, out=3, bias=True):
        super().__init__()
        self.b = nn.Linear(width, out, bias=bias)
        self.a = nn.Linear(4, width)
        self.between, self.after = between, after

    def forward(self, x):
        out = self.b(self.between(self.a(x)))
        return out if self.after is None else self.after(out)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


# -- find_head


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_the_last_linear_applied(bias):
    model = Net(bias=bias)
    head = find_head(model, X)
    assert (head.name, head.module, head.in_features, head.out_features) == ("b", model.b, 8, 3)
    assert head.parameters == [p for p in (model.b.weight, model.b.bias) if p is not None]
    assert (head.bias is None) == (not bias) and head.weight is model.b.weight
    assert find_head(model, X, head="b") == find_head(model, X, head=model.b) == head
    assert find_head(model, head=head) == head
    assert str(head) == "'b' (8→3)"


def test_inputs_may_be_positional_or_by_name():
    class Two(Net):
        def forward(self, x, scale=1.0):
            return super().forward(x * scale)

    for inputs in (X, (X,), [X, 2.0], {"x": X, "scale": 2.0}):
        assert find_head(Two(), inputs).name == "b"


@pytest.mark.parametrize(
    ("after", "out"),
    [
        (lambda o: o.squeeze(-1), 1),
        (lambda o: o.view(-1), 3),
        (lambda o: o.reshape(5, 1, 3), 3),
        (lambda o: o.clone(), 3),
        (lambda o: o.double(), 3),
        (lambda o: {"logits": o}, 3),
        (lambda o: [o], 3),
        (nn.Identity(), 3),
        (nn.Dropout(0.5), 3),  # nothing in evaluation mode; TwoPhase looks at training mode too
    ],
)
def test_views_and_copies_of_the_output_are_the_output(after, out):
    assert find_head(Net(after=after, out=out), X).name == "b"


def test_an_output_object_with_one_tensor_will_do():
    class Output:
        def __init__(self, logits):
            self.logits, self.loss = logits, None

    assert find_head(Net(after=Output), X).name == "b"


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (nn.Softmax(1), r"not affine in the head: after it came aten._softmax in 'after'"),
        (nn.ReLU(inplace=True), r"after it came aten.relu_ in 'after'"),
        (lambda o: o.abs(), r"after it came aten.abs in the model's own forward"),
        (lambda o: o * 2, r"after it came aten.mul"),
        (lambda o: o.flip(0), r"after it came aten.flip"),
        (lambda o: o.clone().t(), r"its values are changed afterwards"),
        (lambda o: (o, o), r"it holds 2 tensors"),
        (lambda o: o.long(), r"the model's output is torch.int64"),
        (lambda o: o.to(torch.complex64), r"the model's output is torch.complex64"),
        (lambda o: "nothing", r"it holds 0 tensors"),
    ],
)
def test_an_output_that_is_not_the_heads_is_refused(after, message):
    with pytest.raises(HeadError, match=message):
        find_head(Net(after=after), X)


def test_positive_logits_do_not_hide_a_relu():
    model = Net(after=F.relu)
    nn.init.constant_(model.b.bias, 100.0)
    assert torch.equal(model(X), model.b(torch.tanh(model.a(X))))
    with pytest.raises(HeadError, match=r"aten.relu"):
        find_head(model, X)


def test_work_beside_the_output_does_no_harm():
    class Logs(Net):
        def forward(self, x):
            out = super().forward(x)
            self.last = out.argmax(1), out.exp().sum()
            return out

    assert find_head(Logs(), X).name == "b"


def test_the_head_must_receive_rows():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(HeadError, match=r"receives a \(B, T, m\) tensor, of shape \(2, 7, 8\)"):
        find_head(model, torch.randn(2, 7, 4))


def test_the_head_must_be_applied_once():
    class Twice(Net):
        def forward(self, x):
            return self.b(self.a(self.b(torch.tanh(self.a(x)))[:, :4].repeat(1, 2)[:, :4]))

    with pytest.raises(HeadError, match=r"'b' \(8→4\) is applied 2 times"):
        find_head(Twice(out=4), X)


def test_features_that_use_the_heads_weight_are_refused():
    class Sneaky(Net):
        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) + self.b.weight.sum())

    with pytest.raises(HeadError, match=r"features depend on the head 'b'.*weight is also used by aten.sum"):
        find_head(Sneaky(), X)


def test_a_functional_last_layer_is_not_taken_for_another():
    class Functional(Net):
        def forward(self, x):
            return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)

    with pytest.raises(HeadError, match=r"not affine in the head: after it came.*aten.tanh.*'a' \(4→8\)"):
        find_head(Functional(), X)
    with pytest.raises(HeadError, match=r"'b' \(8→3\) was not applied"):
        find_head(Functional(), X, head="b")


def test_tied_weights_are_refused_by_names():
    model = Net(width=4, out=4)
    model.b.weight = model.a.weight
    for inputs in (X, None):
        with pytest.raises(HeadError, match=r"tied weights: 'b.weight' of the head is also 'a.weight'"):
            find_head(model, inputs, head="b")
    embedding = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Linear(6, 10))
    embedding[2].weight = embedding[0].weight
    with pytest.raises(HeadError, match=r"'2.weight' of the head is also '0.weight'"):
        find_head(embedding)
    storage = Net(width=4, out=4)
    storage.b.weight = nn.Parameter(storage.a.weight.data)  # two parameters, one memory
    with pytest.raises(HeadError, match="tied weights"):
        find_head(storage, X)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda v: (v[:1, :8].expand(3, 8), v[:, 8]), "in memory together"),
        (lambda v: (v[:, :8], v[:, 7]), "in memory together"),
        (lambda v: (v[:, 1:], v[:, 0]), None),  # [b, W], whose columns lie among each other
    ],
)
def test_a_heads_numbers_must_be_its_own(parts, message):
    model = Net()
    model.b.weight, model.b.bias = map(nn.Parameter, parts(torch.randn(3, 9)))
    if message is None:
        assert find_head(model, X).name == "b"
    else:
        with pytest.raises(HeadError, match=message):
            find_head(model, X)


def test_a_head_that_is_rows_of_another_weight_is_tied():
    model = Net()
    model.c = nn.Parameter(torch.randn(5, 8))
    model.b.weight = nn.Parameter(model.c.data[2:])
    with pytest.raises(HeadError, match=r"tied weights: 'b.weight' of the head is also 'c'"):
        find_head(model, X)


def test_one_head_under_two_names_is_not_tied():
    model = Net()
    model.alias = model.b
    assert find_head(model, X).module is model.b


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.nn.utils.parametrizations.weight_norm, "computes its weight or bias from other parameters"),
        (torch.nn.utils.parametrizations.spectral_norm, "computes its weight or bias from other parameters"),
        (lambda m: m.register_forward_hook(lambda m, a, out: out * out) and m, "does not compute x Wᵀ"),
    ],
)
def test_a_head_that_is_more_than_its_parameters_is_refused(wrap, message):
    model = Net()
    model.b = wrap(model.b)
    with pytest.raises(HeadError, match=message):
        find_head(model, X)


def test_subclasses_of_linear_are_judged_by_what_they_compute():
    class Plain(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t() + self.bias

    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.weight.norm(), self.bias)

    model = Net()
    model.b = Plain(8, 3)
    assert find_head(model, X).module is model.b
    model.b = Scaled(8, 3)
    with pytest.raises(HeadError, match=r"Scaled changes them"):
        find_head(model, X)


def test_lazy_and_quantised_heads_are_refused_by_name():
    lazy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LazyLinear(3))
    with pytest.raises(HeadError, match=r"the head '2' is lazy"):
        find_head(lazy)
    with pytest.raises(HeadError, match=r"'2.weight' is not initialised yet"):
        find_head(lazy, X)
    assert isinstance(lazy[2], nn.LazyLinear), "looking must not initialise it"

    class Linear8bit(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.weight = nn.Parameter(torch.zeros(3, 8, dtype=torch.int8), requires_grad=False)

    with pytest.raises(HeadError, match=r"'1' is quantised \(Linear8bit, torch.int8\)"):
        find_head(nn.Sequential(nn.Linear(4, 8), Linear8bit()))


def test_by_structure_where_it_is_unambiguous():
    assert find_head(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3))).name == "2"
    nested = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.Identity()), nn.Sequential()
    )
    assert find_head(nested).name == "1.1"

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)  # its out_proj is no candidate
            self.last = nn.Linear(4, 3)

    assert find_head(One()).name == "last"


def test_by_structure_where_it_is_not():
    with pytest.raises(
        AmbiguousHeadError, match=r"Net; candidates: 'b' \(8→3\), 'a' \(4→8\).*inputs=.*head="
    ):
        find_head(Net())
    with pytest.raises(HeadError, match=r"after the last nn.Linear comes '1', Softmax"):
        find_head(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)))
    with pytest.raises(AmbiguousHeadError):
        find_head(nn.Sequential(nn.Linear(4, 4), Net()))


def test_no_linear_and_no_such_head():
    for inputs in (None, torch.randn(1, 3, 8, 8)):
        with pytest.raises(HeadError, match=r"holds no nn.Linear"):
            find_head(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()), inputs)
    with pytest.raises(HeadError, match=r"'c' is not a module of the model; candidates: 'b'"):
        find_head(Net(), head="c")
    with pytest.raises(HeadError, match="the given Linear is not a module of the model"):
        find_head(Net(), head=nn.Linear(8, 3))
    with pytest.raises(HeadError, match=r"head='1' is a Tanh"):
        find_head(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), head="1")


def test_wrappers_are_looked_through():
    model = Net()
    assert find_head(nn.DataParallel(model), X).name == "b"
    assert find_head(torch.compile(model, backend="eager"), X).name == "b"
    model.a = torch.compile(model.a, backend="eager")
    assert find_head(model, X).name == "b"


@pytest.mark.parametrize(
    ("make", "size", "name"),
    [
        ("resnet18", 32, "fc"),
        ("vgg", 32, "classifier.6"),
        ("vit_b_16", 32, "heads.head"),
        ("mobilenet_v3_small", 32, "classifier.3"),
    ],
)
def test_torchvision(make, size, name):
    models = pytest.importorskip("torchvision.models")
    kwargs = {"weights": None, "num_classes": 10}
    if make == "vit_b_16":  # the same classes, small
        model = models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=10)
    elif make == "vgg":
        model = models.VGG(
            nn.Sequential(nn.Conv2d(3, 512, 3, padding=1), nn.ReLU()), num_classes=10, init_weights=False
        )
    else:
        model = getattr(models, make)(**kwargs)
    x = torch.randn(2, 3, size, size)
    head = find_head(model, x)
    assert head.name == name and head.out_features == 10
    h, out = captured(model, head, x)
    torch.testing.assert_close(head.module(h), out)


# -- nothing is left behind


class Stateful(nn.Module):
    """Everything that a forward pass might change: statistics, a counter, random numbers, its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("inplace", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        self.inplace += 1
        x.mul_(2)
        return self.fc(self.drop(self.norm(x)) + 0 * torch.rand(1))


@pytest.mark.parametrize(
    "look", [find_head, lambda m, x: captured(m, "fc", x), lambda m, x: analyticity(m, None, x)]
)
def test_the_model_and_the_inputs_stay_as_they_were(look):
    model = Stateful()
    model.drop.eval()
    model.fc.weight.grad = torch.ones(2, 4)
    flags, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    count, version, x, random = model.count, model.inplace._version, X.clone(), torch.get_rng_state()
    look(model, x)
    assert flags == [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.count is count and version <= model.inplace._version
    assert torch.equal(x, X) and torch.equal(random, torch.get_rng_state())
    assert torch.equal(model.fc.weight.grad, torch.ones(2, 4)) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


Y = torch.tensor([0, 1, 2, 0, 1])
LOOKS = {
    "find_head": lambda m: find_head(m, X),
    "wide_activation": lambda m: wide_activation(m, None, X),
    "certify": lambda m: gcfast.certify(m, (X, Y), loss="cross_entropy"),
    "FeatureCache": lambda m: gcfast.FeatureCache(m, (X, Y)),
    "trainability": lambda m: gcfast.trainability(m, X, Y, loss="cross_entropy"),
    "TwoPhase": lambda m: gcfast.TwoPhase(torch.optim.SGD(m.parameters(), lr=0.1), m, 3),
}


@pytest.mark.parametrize("look", LOOKS)
def test_gradients_under_autocast_are_those_without_a_look(look):
    """torch 2.9 takes up the casts that a pass without gradients kept, which do not lead to the weights."""
    kept, looked = [], []
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3)).eval()
    if look == "FeatureCache":
        model[0].requires_grad_(False)
    model[2].register_forward_pre_hook(
        lambda *_: None if torch.is_grad_enabled() else kept.append(torch.is_autocast_cache_enabled())
    )
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(looking):
        with torch.autocast("cpu", torch.bfloat16):
            if looking:
                looked.append(LOOKS[look](model))  # a TwoPhase that is gone would not look
            assert torch.is_autocast_cache_enabled()
            loss = F.cross_entropy(model(X).float(), Y)
        return torch.autograd.grad(loss, weights)

    want = gradients(looking=False)
    for got, expected in zip(gradients(looking=True), want):
        assert torch.equal(got, expected)
    assert kept and not any(kept)


def test_an_exception_leaves_nothing_behind():
    model = Stateful()
    with pytest.raises(ValueError, match=r"inputs: the model cannot be run on this \(RuntimeError: .*99"):
        find_head(model, torch.randn(3, 99))
    with pytest.raises(RuntimeError):
        captured(model, "fc", torch.randn(3, 99))
    with pytest.raises(ZeroDivisionError), FeatureTap(model, "fc") as tap:
        tap(X)
        _ = 1 / 0
    assert all(m.training for m in model.modules()) and int(model.inplace) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_trace_keeps_no_memory():
    def alive():
        gc.collect()
        return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape == (5, 8)]

    model = Net()
    before = alive()  # of other tests
    find_head(model, X)
    assert len(alive()) == len(before)


# -- FeatureTap


def test_captured_features_are_what_the_head_gets():
    model = Net(after=lambda o: o.squeeze(0))
    h, out = captured(model, find_head(model, X), X)
    assert torch.equal(h, torch.tanh(model.a(X))) and torch.equal(out, model(X))
    assert not h.requires_grad and not out.requires_grad


def test_features_are_a_copy_in_evaluation_mode():
    class Overwrites(Net):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            out = self.b(h)
            h.zero_()
            return out

    model = Overwrites()
    with torch.no_grad():
        expected = torch.tanh(model.a(X))
    assert torch.equal(captured(model, "b", X)[0], expected)
    dropped = Net(between=nn.Dropout(0.9)).train()
    assert torch.equal(captured(dropped, "b", X)[0], dropped.a(X))


def test_many_batches_through_one_tap():
    model = Net()
    calls = []
    model.b.register_forward_pre_hook(lambda m, a: calls.append(m.training))
    with FeatureTap(model, "b") as tap:
        parts = [tap(x)[0] for x in X.split(2)]
        assert model.training and torch.is_grad_enabled(), "between calls everything is the user's"
        with pytest.raises(RuntimeError, match="open already"):
            tap.__enter__()
    assert calls == [False] * 3
    torch.testing.assert_close(torch.cat(parts), torch.tanh(model.a(X)))
    with pytest.raises(RuntimeError, match="open the FeatureTap first"):
        tap(X)
    with FeatureTap(nn.DataParallel(model), model.a) as tap:  # any module, and a context can be opened again
        assert torch.equal(tap(X)[0], X)


def test_a_tap_inside_compiled_code():
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    model = nn.Sequential(torch.compile(body, backend="eager"), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model(X)  # compiled now, without any hook
    h, _ = captured(model, body[2], X)
    torch.testing.assert_close(h, torch.tanh(body[0](X)))


def test_a_tap_refuses_what_has_no_rows():
    with pytest.raises(ValueError, match="'c' is not a module of the model"):
        FeatureTap(Net(), "c")
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with pytest.raises(HeadError, match=r"'1' receives \(2, 5, 8\)"):
        captured(model, "1", torch.randn(2, 5, 4))
    with pytest.raises(HeadError, match="'a' is applied 0 times"):
        captured(_unused(), "a", X)


def _unused():
    class Skips(Net):
        def forward(self, x):
            return self.b(x.repeat(1, 2))

    return Skips()


# -- analyticity


def verdicts(model, x=X):
    return {(f.op.split(".")[1].rstrip("_"), f.module): f.verdict for f in analyticity(model, None, x)}


def worst(between, x=X):
    found = [f for f in analyticity(Net(between=between), None, x) if f.verdict != "analytic"]
    return [(f.verdict, f.op.split(".")[1].rstrip("_")) for f in found]


@pytest.mark.parametrize(
    "between",
    [
        F.softplus, torch.sigmoid, torch.tanh, F.gelu, F.silu, F.mish, F.logsigmoid, torch.exp, torch.sin,
        torch.erf,
        lambda h: F.gelu(h, approximate="tanh"), lambda h: F.softmax(h, 1), lambda h: F.log_softmax(h, 1),
        lambda h: torch.log1p(torch.exp(h)), lambda h: torch.logaddexp(h, -h), lambda h: h * h - h / 3 + h**3,
        lambda h: torch.cat([h[:, :4], h[:, 4:].flip(1)], 1), lambda h: F.layer_norm(h, (8,)),
        lambda h: F.group_norm(h, 2), lambda h: F.avg_pool1d(h[None], 1)[0], lambda h: F.glu(h.repeat(1, 2)),
        lambda h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
        lambda h: h / (h.square().sum() + 1.0).sqrt(),
        lambda h: F.rms_norm(h, (8,), eps=1e-6), lambda h: torch.einsum("ij,kj->ik", h, torch.ones(8, 8)),
        lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
        lambda h: F.interpolate(h[None, None], size=(5, 8), mode="bilinear")[0, 0],
        lambda h: torch.where(torch.arange(8) < 3, h, 2 * h),
        lambda h: h.masked_fill(X[:, :1].abs() > 9, 0.0),
        lambda h: h * X[:, :1].abs().clamp(0, 1).relu(),  # the data alone may be treated in any way
        nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Softplus(beta=3.0),
    ],
)  # fmt: skip
def test_analytic_operators(between):
    assert worst(between) == []


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (F.relu, "relu"), (F.relu_, "relu"), (nn.ReLU(inplace=True), "relu"), (F.leaky_relu, "leaky_relu"),
        (F.relu6, "hardtanh"), (F.hardtanh_, "hardtanh"), (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (F.elu, "elu"), (F.selu, "elu"), (F.celu, "celu"), (lambda h: F.threshold(h, 0.0, 0.0), "threshold"),
        (nn.PReLU(), "_prelu_kernel"), (torch.abs, "abs"), (F.softsign, "abs"), (F.softshrink, "softshrink"),
        (lambda h: h.clamp(min=0), "clamp"), (lambda h: torch.maximum(h, -h), "maximum"),
        (lambda h: torch.minimum(h, -h), "minimum"), (torch.sign, "sign"), (torch.round, "round"),
        (lambda h: h.clamp_min_(0.0), "clamp_min"), (lambda h: F.softplus(h, threshold=2), "softplus"),
        (nn.RReLU(), "rrelu_with_noise"), (F.hardshrink, "hardshrink"),
    ],
)  # fmt: skip
def test_operators_with_kinks(between, expected):
    assert worst(between) == [("not analytic", expected)]


def test_choices_by_computed_masks():
    assert ("not analytic", "gt") in worst(lambda h: torch.where(h > 0, h, 0.1 * h))
    assert ("not analytic", "where") in worst(lambda h: torch.where(h > 0, h, 0.1 * h))
    assert ("not analytic", "masked_fill") in worst(lambda h: h.masked_fill(h < 0, 0.0))
    hidden = [v for v, _ in worst(lambda h: h * (h > 0))]
    assert "not analytic" in hidden


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda h: F.max_pool1d(h[None], 1)[0], "max_pool2d_with_indices"),
        (lambda h: h - h.amax(1, keepdim=True), "amax"),
        (lambda h: h.max(1, keepdim=True)[0] + h, "max"),
        (lambda h: h.sort(1)[0], "sort"),
        (lambda h: h / h.norm(dim=1, keepdim=True), "linalg_vector_norm"),
        (lambda h: torch.log(h), "log"),
        (lambda h: torch.log(torch.exp(h) + h), "log"),  # a positive term does not make a sum positive
        (lambda h: (h + 1.0).sqrt(), "sqrt"),
        (lambda h: 1 / h, "reciprocal"),
        (lambda h: h / h.sum(1, keepdim=True), "div"),
        (lambda h: F.layer_norm(h, (8,), eps=0.0), "native_layer_norm"),
    ],
)
def test_operators_analytic_only_somewhere(between, expected):
    assert ("ties", expected) in worst(between)


def test_unknown_operators_are_listed_by_name():
    @torch.library.custom_op("gcfast_test::strange", mutates_args=())
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    found = [f for f in analyticity(Net(between=strange), None, X) if f.verdict == "unknown"]
    assert [f.op for f in found] == ["gcfast_test.strange"] and "gcfast_test" in found[0].reason
    assert worst(lambda h: h + torch.rand(1))[0][0] == "unknown"
    assert ("unknown", "_local_scalar_dense") in worst(lambda h: h * float(h.sum()))
    batch = nn.BatchNorm1d(8, track_running_stats=False)
    assert [v for v, _ in worst(batch)] == ["unknown"]


def test_memory_used_again_does_not_pass_for_a_weight():
    marks, constant = SignTracker(), torch.zeros(3)
    marks.weighted.add(constant.untyped_storage()._cdata)
    lift = torch.ops.aten.lift_fresh.default
    assert marks.depends(constant)
    classify(lift, (constant,), {}, constant, marks)
    assert not marks.depends(constant)


def test_findings_name_the_module_and_stop_at_the_head():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, h):
            return F.hardtanh(self.act(h))

    model = Net(between=Body())
    found = verdicts(model)
    assert found["relu", "between.act"] == found["hardtanh", "between"] == "not analytic"
    assert found["addmm", "a"] == "analytic" and ("addmm", "b") not in found
    text = [str(f) for f in analyticity(model, "b", X) if f.verdict != "analytic"]
    assert text[0] == "aten.relu in 'between.act': not analytic (relu has a kink at 0)"


def test_one_finding_an_operator_and_module_with_the_worst_verdict():
    assert worst(lambda h: F.softplus(F.softplus(h), threshold=1)) == [("not analytic", "softplus")]


def test_transformer_layers_show_their_activation():
    class Encoder(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation=activation)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.layer(x[:, None]).mean(1))

    assert set(verdicts(Encoder("gelu")).values()) == {"analytic"}
    assert [k[0] for k, v in verdicts(Encoder("relu")).items() if v != "analytic"] == ["relu"]


def test_whole_networks():
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 32, 32)
    found = verdicts(models.resnet18(), x)
    assert {k[0] for k, v in found.items() if v != "analytic"} == {"relu", "max_pool2d_with_indices"}
    assert set(verdicts(models.VisionTransformer(32, 16, 2, 2, 16, 32), x).values()) == {"analytic"}
    # its attention masks are made by comparing constants
    swin = models.SwinTransformer([2, 2], 8, [1, 1], [1, 1], [2, 2])
    assert set(verdicts(swin, torch.randn(1, 3, 16, 16)).values()) == {"analytic"}


# -- the wide layer


@pytest.mark.parametrize(
    ("act", "name", "analytic"),
    [
        (nn.Softplus(), "softplus", True), (nn.Sigmoid(), "sigmoid", True), (nn.Tanh(), "tanh", True),
        (nn.GELU(), "gelu", True), (nn.SiLU(), "silu", True), (nn.Mish(), "mish", True),
        (nn.LogSigmoid(), "log_sigmoid", True), (nn.Tanhshrink(), "tanhshrink", True),
        (nn.ReLU(), "relu", False),
        (nn.ReLU(inplace=True), "relu", False), (nn.LeakyReLU(), "leaky_relu", False),
        (nn.ELU(), "elu", False),
        (nn.ELU(inplace=True), "elu", False), (nn.Softsign(), "softsign", False),
        (nn.Hardswish(), "hardswish", False),
        (nn.Softplus(threshold=1), "softplus", False),
    ],
)  # fmt: skip
def test_the_wide_layer_is_a_linear_and_an_activation(act, name, analytic):
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Tanh(),
        nn.Linear(6, 9),
        act,
        nn.Dropout(),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(9, 2),
    )
    found = wide_activation(model, None, X)
    assert (found.name, found.linear_name, found.d, found.m) == ("3", "2", 6, 9)
    assert (found.activation_name, found.analytic, found.polynomial) == (name, analytic, False)
    z, _ = captured(model, found.module, X)
    torch.testing.assert_close(act(model[2](z.clone())), captured(model, "7", X)[0])


def test_functional_activations_and_polynomials():
    found = wide_activation(Net(between=F.softplus), "b", X)
    assert found.activation_name == "softplus" and found.analytic and "softplus" in found.name
    assert wide_activation(Net(between=torch.tanh_), None, X).activation_name == "tanh"
    linear = wide_activation(Net(between=nn.Identity()), None, X)
    assert linear.activation_name == "identity" and linear.polynomial and linear.analytic
    assert wide_activation(Net(between=torch.square), None, X).polynomial


@pytest.mark.parametrize(
    "between",
    [
        lambda h: torch.tanh(h) + h,
        lambda h: torch.tanh(2 * h),
        lambda h: F.softmax(h, 1),
        lambda h: torch.tanh(h).mul_(2),
        lambda h: torch.tanh(h)[:, torch.arange(7, -1, -1)],
        nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Tanh(), nn.Tanh()),
    ],
)
def test_what_is_not_a_wide_layer(between):
    assert wide_activation(Net(between=between), None, X) is None


def test_features_that_pass_by_the_last_linear_are_not_its_own():
    class Bypass(Net):
        def forward(self, x):
            h = self.between(self.a(x))
            self.side(x)
            return self.b(h)

    model = Bypass()
    model.side = nn.Linear(4, 8)
    assert wide_activation(model, None, X) is None
    conv = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    )
    assert wide_activation(conv, None, X) is None


@pytest.mark.parametrize(
    ("activation", "analytic"), [("softplus", True), ("gelu_tanh", True), ("relu", False)]
)
def test_the_packages_own_wide_layer(activation, analytic):
    WideLayer = pytest.importorskip("gcfast.nn").WideLayer
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), WideLayer(6, 9, activation=activation), nn.Dropout(), nn.Linear(9, 2)
    )
    found = wide_activation(model, None, X)
    assert (found.name, found.linear_name, found.d, found.m) == ("2", "2", 6, 9)
    assert (found.activation_name, found.analytic, found.polynomial) == (activation, analytic, False)
    z, _ = captured(model, found.module, X)
    torch.testing.assert_close(z, torch.tanh(model[0](X)))
    own = [f for f in analyticity(model, None, X) if f.op.startswith("gcfast.")]
    assert [f.verdict for f in own] == ["analytic" if analytic else "not analytic"]
    model.insert(3, nn.Hardtanh())
    assert wide_activation(model, None, X) is None


def test_heads_compare_by_module():
    layer = nn.Linear(3, 2)
    assert Head("x", layer) == Head("x", layer) != Head("x", nn.Linear(3, 2))


@pytest.mark.parametrize("strange", [float("inf"), 1e30, -1e30, float("nan"), 1e-2])
def test_no_value_passes_for_what_a_formula_gives(strange):
    from gcfast.model.agreement import first_difference

    layer, z = nn.Linear(4, 3), 1e2 * torch.randn(5, 4)
    with torch.no_grad():
        layer.weight.mul_(1e2)
        given = layer(z)
    assert first_difference(layer, z, given, layer.weight, layer.bias) is None
    assert first_difference(layer, z, given * (1 + 1e-6), layer.weight, layer.bias) is None
    z[3], given[3] = 0.0, layer.bias.detach()
    given[3, 1] = given[3, 1] + strange
    assert first_difference(layer, z, given, layer.weight, layer.bias) == 3


def test_a_finite_value_does_not_pass_for_an_infinite_one():
    from gcfast.model.agreement import first_difference

    layer, z = nn.Linear(1, 2), torch.tensor([[1.0], [1e3]])
    with torch.no_grad():
        layer.weight.fill_(1.0)
        given = layer(z).exp()
    assert given[1].isinf().all()
    formula = lambda rows: layer(rows).exp()  # noqa: E731
    assert first_difference(formula, z, given, layer.weight, layer.bias, steep=True) is None
    given[1, 0] = 5.0
    assert first_difference(formula, z, given, layer.weight, layer.bias, steep=True) == 1


def test_a_pass_of_another_thread_does_not_disturb():
    """Which meets the hooks that wait for this one's; each thread has its own answer."""

    class Meeting(nn.Module):
        """Has another thread do the same while a pass runs, once for each that is made."""

        def __init__(self, use):
            super().__init__()
            self.wide, self.head = gcfast.WideLayer(4, 30), nn.Linear(30, 2)
            self.main, self.found, self.use = threading.get_ident(), [], use

        def forward(self, x):
            h = self.wide(x)
            if threading.get_ident() == self.main:
                other = threading.Thread(target=lambda: self.found.append(self.use(self)))
                other.start()
                other.join()
            return self.head(h)

    data = (X, torch.arange(len(X)) % 2)
    for use in (
        lambda m: gcfast.certify(m, data).status,
        lambda m: len(gcfast.FeatureCache(m, data)),
        lambda m: tuple(m(X).shape),
    ):
        model = Meeting(use)
        model.wide.requires_grad_(False)
        here = gcfast.certify(model, data).status
        cached = len(gcfast.FeatureCache(model, data))
        assert (here, cached) == ("holds", len(X))
        assert len(model.found) > 4 and len(set(model.found)) == 1
