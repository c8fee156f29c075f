"""WideLayer: scale and spread of its features at any width, autograd, compilation, autocast."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch

from gcfast import ops, reference
from gcfast.wide import WideHead, WideLayer


@pytest.mark.parametrize("d, m", [(1, 200), (8, 300), (64, 2000), (2048, 500)])
def test_preactivations_are_of_size_one(d, m):
    layer = WideLayer(d, m)
    pre = torch.randn(400, d) @ layer.weight.mT + layer.bias
    assert 1.1 < pre.std() < 1.7  # variance one from the weights, one from the bias
    unit = pre.std(dim=0)
    if d > 1:
        assert pre.abs().max() < 12
        assert unit.min() > 0.4 and unit.max() < 2.5  # none dead, none saturated


@pytest.mark.parametrize("activation", reference.ANALYTIC)
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


@pytest.mark.parametrize("activation", reference.ANALYTIC)
@pytest.mark.parametrize("d, m", [(1, 700), (64, 8800)])
def test_no_unit_is_dead_or_saturated(activation, d, m):
    """Each has a slope of a thousandth or more somewhere among a few samples, at any width."""
    layer = WideLayer(d, m, activation=activation)
    pre = (torch.randn(200, d) @ layer.weight.mT + layer.bias).detach()
    slope = reference.activation(pre, activation=activation, order=1).abs()
    assert float(slope.amax(dim=0).min()) > 1e-3


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


@pytest.mark.parametrize("activation", reference.ANALYTIC)
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
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(dz.sum(), z)
    model.fused = False
    assert torch.autograd.gradgradcheck(model, (z,))


class Half(torch.nn.Module):
    def forward(self, w):
        return w / 2


@pytest.mark.parametrize(
    "change", ["hook", "pre-hook", "backward hook", "global", "adapter", "parametrized", "patched"]
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
    if change in ("adapter", "parametrized"):
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


def test_wide_head_under_autocast():
    model, z = wide_head(), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(z)
        parts = model.head(model.wide(z))
    assert out.dtype == parts.dtype == torch.bfloat16
    torch.testing.assert_close(out, parts, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in [z, *model.parameters()])


def test_wide_head_keeps_its_state(tmp_path):
    model = wide_head()
    assert list(model.state_dict()) == ["wide.weight", "wide.bias", "head.weight", "head.bias"]
    pair = torch.nn.Sequential(OrderedDict(wide=WideLayer(4, 9), head=torch.nn.Linear(9, 3)))
    pair.load_state_dict(model.state_dict())
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
    with pytest.raises(ValueError, match="m must be at least 1; got 0"):
        WideLayer(3, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        WideLayer(3, 5, activation="swish")
