"""WideLayer: scale and spread of its features at any width, autograd, compilation, autocast."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import ANALYTIC
from torch.testing._internal.two_tensor import TwoTensor

from gcfast import ops, reference
from gcfast.nn import WideHead, WideLayer


@pytest.mark.parametrize("d, m", [(1, 200), (8, 300), (64, 2000), (2048, 500)])
def test_preactivations_are_of_size_one(d, m):
    layer = WideLayer(d, m)
    pre = torch.randn(400, d) @ layer.weight.mT + layer.bias
    assert 1.1 < pre.std() < 1.7  # variance one from the weights, one from the bias
    unit = pre.std(dim=0)
    if d > 1:
        assert pre.abs().max() < 12
        assert unit.min() > 0.4 and unit.max() < 2.5  # none dead, none saturated


@pytest.mark.parametrize("activation", ANALYTIC)
def test_features_have_full_rank(activation):
    z = torch.randn(60, 5, dtype=torch.float64)
    layer = WideLayer(5, 64, activation=activation, dtype=torch.float64)
    h = torch.cat([layer(z), torch.ones(60, 1, dtype=torch.float64)], dim=1).detach()
    s = torch.linalg.svdvals(h)
    assert s[-1] > 1e-9 * s[0]


def test_one_dimensional_inputs_are_told_apart():
    z = torch.linspace(-2, 2, 12, dtype=torch.float64).unsqueeze(1)
    h = WideLayer(1, 400, beta=20.0, dtype=torch.float64)(z).detach()
    s = torch.linalg.svdvals(h)
    assert s[-1] > 1e-6 * s[0]


def test_generator_and_reset():
    layer = WideLayer(4, 6)
    for _ in range(2):
        layer.reset_parameters(torch.Generator().manual_seed(5))
        first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(first[k], v) for k, v in layer.state_dict().items())
    layer.reset_parameters(torch.Generator().manual_seed(6))
    assert not torch.equal(first["weight"], layer.weight)


@pytest.mark.parametrize("shape", [(7, 4), (4,), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_forward(activation, shape, device):
    layer = WideLayer(4, 9, activation=activation, device=device)
    z = torch.randn(shape, device=device)
    want = reference.wide_features(z, layer.weight, layer.bias, activation=activation)
    torch.testing.assert_close(layer(z), want)
    assert layer(z).shape == (*shape[:-1], 9)


def test_trains_and_double_backward():
    layer = WideLayer(3, 5, beta=2.0, dtype=torch.float64)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda z, *p: torch.func.functional_call(layer, dict(zip(("weight", "bias"), p)), (z,)),
        (z, layer.weight, layer.bias),
    )


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    layer = WideLayer(3, 5)
    z = torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(z), layer(z))


def test_autocast():
    layer = WideLayer(8, 16)
    z = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(z)
    assert h.dtype == torch.bfloat16
    assert ops.last_backend("activation") == "reference"
    torch.testing.assert_close(h.float(), layer(z), rtol=0.05, atol=0.05)
    h.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.bias.grad.abs().min() > 0


def dead_share(layer, n=256):
    """The share of units whose slope is below a thousandth on all of n standard normal samples."""
    z = torch.randn(n, layer.d)
    slope = ops.activation(
        z @ layer.weight.mT, layer.bias, activation=layer.activation, beta=layer.beta, order=1
    )
    return float((slope.abs() < 1e-3).all(dim=0).float().mean())


@pytest.mark.parametrize("activation, beta", [*((a, 1.0) for a in ANALYTIC), ("softplus", 4.0)])
@pytest.mark.parametrize("d, m", [(1, 700), (1, 8800), (8, 8800), (64, 8800), (2048, 500)])
@torch.no_grad()
def test_no_unit_is_dead_or_saturated(activation, beta, d, m):
    assert dead_share(WideLayer(d, m, activation=activation, beta=beta)) == 0


@pytest.mark.parametrize("activation, beta", [("relu", 1.0), ("softplus", 20.0)])
@pytest.mark.parametrize("d, low, high", [(1, 0.05, 0.15), (8, 0, 0.02), (64, 0, 0), (2048, 0, 0)])
@torch.no_grad()
def test_units_with_a_kink_beyond_all_samples(activation, beta, d, low, high):
    """As many as the docstring says; what they are good for is the next test."""
    assert low <= dead_share(WideLayer(d, 2000, activation=activation, beta=beta)) <= high


@pytest.mark.parametrize("activation, beta", [("relu", 1.0), ("softplus", 20.0)])
@torch.no_grad()
def test_data_wider_than_the_standard_normal_are_told_apart(activation, beta):
    z = torch.linspace(-4, 4, 12, dtype=torch.float64).unsqueeze(1)
    layer = WideLayer(1, 400, activation=activation, beta=beta, dtype=torch.float64)
    s = torch.linalg.svdvals(layer(z))
    assert s[-1] > 1e-4 * s[0]
    layer.bias.mul_(layer.weight.norm(dim=1))  # kinks in [-sqrt 3, sqrt 3] alone
    s = torch.linalg.svdvals(layer(z))
    assert s[-1] < 1e-4 * s[0]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("d, least", [(8, 1e-6), (64, 1e-4), (2048, 3e-4)])
@torch.no_grad()
def test_smallest_singular_value_at_ten_per_cent_more_units_than_samples(activation, d, least):
    layer = WideLayer(d, 220, activation=activation, dtype=torch.float64)
    s = torch.linalg.svdvals(layer(torch.randn(200, d, dtype=torch.float64)))
    assert s[-1] > least * s[0]


def wide_head(activation="softplus", dtype=torch.float32, bias=True, device=None):
    options = {"dtype": dtype, "device": device}
    return WideHead(WideLayer(4, 9, activation=activation, **options), torch.nn.Linear(9, 3, bias, **options))


@pytest.mark.parametrize("shape", [(7, 4), (4,), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_wide_head_is_its_two_modules(shape, bias, device):
    model = wide_head(bias=bias, device=device)
    z = torch.randn(shape, device=device, requires_grad=True)
    out, parts = model(z), model.head(model.wide(z))
    torch.testing.assert_close(out, parts)
    g = torch.randn_like(out)
    leaves = [z, *model.parameters()]
    got, want = torch.autograd.grad(out, leaves, g), torch.autograd.grad(parts, leaves, g)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ops.last_backend("wide_forward") is not None
    torch.testing.assert_close(model(z.detach().mT.contiguous().mT) if len(shape) == 2 else out, out)


@pytest.mark.parametrize("activation", ANALYTIC)
def test_gradients_of_wide_head(activation):
    model = wide_head(activation, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    f = lambda z, *p: torch.func.functional_call(model, dict(zip(names, p)), (z,))  # noqa: E731
    assert torch.autograd.gradcheck(f, (z, *model.parameters()))


def test_second_derivatives_need_the_parts():
    model = wide_head(dtype=torch.float64)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (dz,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once; for second derivatives set fused = False"):
        torch.autograd.grad(dz.sum(), z)
    model.fused = False
    assert torch.autograd.gradgradcheck(model, (z,))


class Half(torch.nn.Module):
    def forward(self, w):
        return w / 2


class Halved(torch.nn.Linear):
    """An adapter by inheritance."""

    def forward(self, h):
        return super().forward(h) / 2


@pytest.mark.parametrize(
    "change",
    ["hook", "pre-hook", "backward hook", "global", "adapter", "subclass", "parametrized", "patched"],
)
def test_whoever_watches_or_changes_a_module_is_served(change):
    model, z, seen = wide_head(), torch.randn(5, 4, requires_grad=True), []
    before = model(z)
    note = lambda *args: seen.append(args[0])  # noqa: E731
    handle = None
    if change == "hook":
        model.wide.register_forward_hook(note)
    elif change == "pre-hook":
        model.head.register_forward_pre_hook(note)
    elif change == "backward hook":
        model.wide.register_full_backward_hook(note)
    elif change == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(note)
    elif change == "adapter":
        model.head = torch.nn.Sequential(model.head, Half())
    elif change == "subclass":
        model.head.__class__ = Halved
    elif change == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(model.head, "weight", Half())
    else:
        model.wide.forward = lambda z: seen.append(model.wide) or type(model.wide).forward(model.wide, z)
    try:
        after = model(z)
    finally:
        if handle is not None:
            handle.remove()
    after.sum().backward()
    if change in ("adapter", "subclass", "parametrized"):
        assert not torch.allclose(after, before)
    else:
        torch.testing.assert_close(after, before)
        assert seen


def test_wide_head_compiles_whole_with_any_batch():
    torch._dynamo.reset()
    model = wide_head()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        z = torch.randn(n, 4, requires_grad=True)
        torch.testing.assert_close(compiled(z), model(z))
        compiled(z).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(z).dtype == torch.bfloat16


def test_other_calls_than_the_plain_one_are_kept():
    model, z = wide_head(), torch.randn(5, 4)
    launched = []
    model.head.compile()
    compiled = model.head._call_impl  # torch 2.9 compiles nothing of a layer of its own
    model.head._compiled_call_impl = lambda *args: launched.append(1) or compiled(*args)
    model(z)
    assert launched
    model = wide_head()
    model.head.weight = torch.nn.Parameter(TwoTensor(model.head.weight.data, model.head.weight.data))
    assert type(model(z)) is TwoTensor  # wide_forward takes plain tensors alone


def test_parts_of_a_wide_head_are_sequences():
    model, z = wide_head(), torch.randn(5, 4)
    torch.testing.assert_close(model[:1](z), model.wide(z))
    assert type(model[:1]) is torch.nn.Sequential and model[-1] is model.head
    torch.testing.assert_close(model[:](z), model(z))
    model.append(torch.nn.Tanh())
    torch.testing.assert_close(model(z), torch.tanh(model.head(model.wide(z))))


@pytest.mark.parametrize("activation", ["softplus", "gelu"])
def test_wide_head_is_deterministic(activation, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it where cuBLAS is used
    options = {"device": device}
    model = WideHead(WideLayer(16, 700, activation=activation, **options), torch.nn.Linear(700, 5, **options))
    z = torch.randn(300, 16, device=device, requires_grad=True)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out = model(z)
            runs.append((out, *torch.autograd.grad(out.square().sum(), [z, *model.parameters()])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def largest_allocations(step):
    """Bytes of every allocation of tensor memory in a step, inside the ops as well."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sorted((e.nbytes() for e in events if e.nbytes() > 0), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_size_of_the_features_is_made(dtype):
    n, d, m, c = 320, 256, 8800, 10  # n is not d: the gradient of weight (m, d) is no matter of n
    model = WideHead(WideLayer(d, m), torch.nn.Linear(m, c))
    z = torch.randn(n, d)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(z)
        out.float().square().sum().backward()

    step()
    model.zero_grad()
    of_weight = {4 * m * d, 2 * m * d}  # its gradient, and under autocast its cast
    assert [b for b in largest_allocations(step) if b > 0.1 * n * m * 4 and b not in of_weight] == []
    model.fused = False  # what is looked for is seen where it is
    assert n * m * dtype.itemsize in largest_allocations(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_head_under_autocast(dtype, device):
    model, z = wide_head(device=device), torch.randn(5, 4, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        out = model(z)
        parts = model.head(model.wide(z))
    assert out.dtype == parts.dtype == dtype
    torch.testing.assert_close(out, parts, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in [z, *model.parameters()])


def test_wide_head_keeps_its_state(tmp_path):
    model = wide_head()
    assert list(model.state_dict()) == ["wide.weight", "wide.bias", "head.weight", "head.bias"]
    pair = torch.nn.Sequential(OrderedDict(wide=WideLayer(4, 9), head=torch.nn.Linear(9, 3)))
    pair.load_state_dict(model.state_dict())
    model.load_state_dict(copy.deepcopy(pair).state_dict())
    z = torch.randn(5, 4)
    torch.testing.assert_close(pair(z), model(z))
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(copied(z), model(z))
    assert torch.equal(model(z), model(z))


def test_wide_head_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"wide must be a gcfast.WideLayer; got Linear"):
        WideHead(torch.nn.Linear(4, 9), torch.nn.Linear(9, 3))
    with pytest.raises(TypeError, match=r"head must be an nn.Linear; got WideLayer"):
        WideHead(WideLayer(4, 9), WideLayer(9, 3))
    with pytest.raises(ValueError, match="head must take the 9 features of wide; it takes 8"):
        WideHead(WideLayer(4, 9), torch.nn.Linear(8, 3))


def test_repr_state_and_errors():
    layer = WideLayer(3, 5, beta=2.0)
    assert repr(layer) == "WideLayer(3, 5, activation='softplus', beta=2)"
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert WideLayer(3, 5, device="meta").weight.is_meta  # made first, filled from a checkpoint later
    with pytest.raises(ValueError, match="m: expected a positive int; got 0"):
        WideLayer(3, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        WideLayer(3, 5, activation="swish")
