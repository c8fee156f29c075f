"""The float64 column panel producer, called on raw pointers, against float64 torch."""

from __future__ import annotations

import conftest
import pytest
import torch

from gcfast import reference
from gcfast.ops import native

pytestmark = conftest.NEEDS_GPU
KINDS = {name: i for i, name in enumerate(reference.ACTIVATIONS)}


def panel(z, weight, bias, activation, beta=1.0, out=None):
    assert native.cuda is not None
    n, d = z.shape
    w = weight.shape[0]
    out = torch.full((n, w), float("nan"), dtype=torch.float64, device=z.device) if out is None else out
    stream = torch.cuda.current_stream(z.device).cuda_stream
    pointers = (z.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    strides = (z.stride(0), weight.stride(0), out.stride(0))
    native.cuda.wide_panel_f64(*pointers, n, w, d, *strides, KINDS[activation], beta, z.device.index, stream)
    return out


def inputs(n, w, d, pad=0):
    generator = torch.Generator("cuda").manual_seed(n + 7 * w + 11 * d)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, device="cuda", generator=generator)

    return draw(n, d + pad)[:, :d], draw(w, d + pad)[:, :d], draw(w)


def expected(z, weight, bias, activation, beta=1.0):
    return reference.activation(z @ weight.T, bias, activation=activation, beta=beta, order=0)


def close(got, want, z, weight):
    # activations have slopes below 1.2; the product's error is at most d u |z| |w|
    size = z.abs() @ weight.abs().T
    bound = 4 * (z.shape[1] + 4) * 2.0**-53 * (size + want.abs() + 1)
    assert bool(((got - want).abs() <= bound).all())


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation):
    z, weight, bias = inputs(200, 150, 40)
    close(panel(z, weight, bias, activation), expected(z, weight, bias, activation), z, weight)


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (127, 129, 15), (129, 127, 17), (300, 1024, 64), (130, 3, 513)])
def test_shapes_and_strides(shape, pad):
    z, weight, bias = inputs(*shape, pad)
    close(panel(z, weight, bias, "softplus"), expected(z, weight, bias, "softplus"), z, weight)


def test_beta_and_no_bias():
    z, weight, _ = inputs(150, 140, 33)
    close(panel(z, weight, None, "softplus", 3.0), expected(z, weight, None, "softplus", 3.0), z, weight)


@pytest.mark.parametrize("columns", [61, 62])
def test_writes_nothing_else(columns):
    z, weight, bias = inputs(130, columns, 20)
    whole = torch.full((132, 64), -7.0, dtype=torch.float64, device="cuda")
    panel(z, weight, bias, "relu", out=whole[1:131, 1 : columns + 1])
    close(whole[1:131, 1 : columns + 1], expected(z, weight, bias, "relu"), z, weight)
    whole[1:131, 1 : columns + 1] = -7.0
    assert bool((whole == -7.0).all())


def test_an_element_does_not_depend_on_its_place():
    z, weight, bias = inputs(300, 280, 77)
    whole = panel(z, weight, bias, "softplus")
    for i, j, n, w in ((1, 1, 299, 279), (5, 9, 1, 1), (130, 64, 129, 130), (17, 131, 64, 7)):
        part = panel(z[i : i + n], weight[j : j + w], bias[j : j + w], "softplus")
        assert torch.equal(part, whole[i : i + n, j : j + w])
    turn = torch.randperm(300, device="cuda"), torch.randperm(280, device="cuda")
    turned = panel(z[turn[0]], weight[turn[1]], bias[turn[1]], "softplus")
    assert torch.equal(turned, whole[turn[0]][:, turn[1]])
    # zeros appended to k are what the kernel pads with
    longer = [torch.nn.functional.pad(t, (0, 5)) for t in (z, weight)]
    assert torch.equal(panel(*longer, bias, "softplus"), whole)
