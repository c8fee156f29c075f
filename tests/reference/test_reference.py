"""The reference: judged against exact values itself, and free of compiled code."""

from __future__ import annotations

import sys
from pathlib import Path

import children
import exact
import numpy as np
import pytest
import torch

import gcfast
from gcfast import reference

POINTS = [0.0, 1e-12, -0.3, 0.7, -1.9, 3.0, 8.5, -12.0, 25.0, -30.0]


def test_imports_neither_triton_nor_compiled_modules():
    code = (
        "import sys, types, torch\n"
        "before = set(sys.modules)\n"
        "package = sys.modules['gcfast'] = types.ModuleType('gcfast')\n"  # without its own __init__
        "package.__path__ = [sys.argv[1]]\n"
        "from gcfast import reference\n"
        "reference.softmax_residual(torch.randn(3, 4), torch.tensor([0, 1, 2]))\n"
        "new = {m for m in set(sys.modules) - before if m.startswith(('triton', 'gcfast'))}\n"
        "assert 'gcfast.reference.softmax' in new\n"
        "others = sorted(m for m in new - {'gcfast'} if not m.startswith('gcfast.reference'))\n"
        "assert not others, others\n"
        "print('checked', len(before))\n"
    )
    done = children.run([sys.executable, "-c", code, Path(gcfast.__file__).parent])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("checked")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_float64_against_exact(name, order, device):
    x = torch.tensor(POINTS, dtype=torch.float64, device=device)
    got = reference.activation(x, activation=name, order=order).tolist()
    for v, y in zip(POINTS, got):
        want = exact.activation(name, v, order)
        # an exponent rounded to an ulp costs |exponent| ulps: up to v^2/2 for gelu, its cubic for gelu_tanh
        room = 8 + 2 * abs(v) + (v * v if name == "gelu" else 0) + (abs(v) ** 3 if name == "gelu_tanh" else 0)
        assert exact.ulps(y, want, np.float64, exact.terms_of(name, v, order)) <= room, (v, y)


def test_softplus_has_no_threshold():
    x = torch.tensor([20.5], dtype=torch.float64)
    want = float(exact.activation("softplus", 20.5, 0))
    assert reference.activation(x).item() == pytest.approx(want, rel=1e-15)
    assert torch.nn.functional.softplus(x).item() != pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_orders_are_derivatives(name):
    x = torch.tensor([v for v in POINTS if v], dtype=torch.float64, requires_grad=True)
    for order in (0, 1):
        y = reference.activation(x, activation=name, order=order)
        if not y.requires_grad:  # relu's step
            assert name == "relu" and order == 1
            continue
        (slope,) = torch.autograd.grad(y.sum(), x)
        want = reference.activation(x, activation=name, order=order + 1)
        torch.testing.assert_close(slope, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_float32_rounded_once(dtype, device):
    x = torch.randn(200, device=device).to(dtype)
    for name in reference.ACTIVATIONS:
        y = reference.activation(x, activation=name)
        assert y.dtype == dtype
        assert torch.equal(y, reference.activation(x.float(), activation=name).to(dtype))
    loss, residual, entropy = reference.softmax_residual(x.view(20, 10), torch.arange(20, device=device) % 10)
    assert loss.dtype == residual.dtype == entropy.dtype == dtype
    assert residual.float().sum(dim=1).abs().max() < 0.02


def test_softmax_residual_is_the_gradient_of_cross_entropy(device):
    f = torch.randn(30, 7, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.arange(30, device=device) % 7
    want = torch.nn.functional.cross_entropy(f, y, reduction="none", label_smoothing=0.2)
    (slope,) = torch.autograd.grad(want.sum(), f)
    loss, residual, _ = reference.softmax_residual(f.detach(), y, label_smoothing=0.2)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(residual, slope, rtol=1e-13, atol=1e-15)
