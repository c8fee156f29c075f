"""WideLayer: scale and spread of its features at any width, autograd, compilation, autocast."""

from __future__ import annotations

import copy

import pytest
import torch

from gcfast import ops, reference
from gcfast.wide import WideLayer


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


def test_repr_state_and_errors():
    layer = WideLayer(3, 5, beta=2.0)
    assert repr(layer) == "WideLayer(3, 5, activation='softplus', beta=2)"
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    with pytest.raises(ValueError, match="m must be at least 1; got 0"):
        WideLayer(3, 0)
    with pytest.raises(ValueError, match="activation must be one of"):
        WideLayer(3, 5, activation="swish")
