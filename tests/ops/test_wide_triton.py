"""The wide layer's fused kernels with sums split over programs, as on a device of several multiprocessors.

The number of these is pretended; everything else is what the launchers do. With one, which is what the
interpreter has, these kernels and the other launchers are tested through the ops in test_wide_ops.py.
"""

from __future__ import annotations

import pytest
import torch
from conftest import NEEDS_INTERPRETER
from torch import Tensor

from gcfast import reference

pytestmark = NEEDS_INTERPRETER

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def kernels(monkeypatch):
    """The two launchers as on a device of three multiprocessors: both kernels split their sums."""
    pytest.importorskip("triton")
    from gcfast.triton_kernels import wide_forward, wide_head_grad

    for module in (wide_forward, wide_head_grad):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(module, "panel", None)  # whoever falls back to panels fails
    return wide_forward.wide_forward, wide_head_grad.wide_head_grad


def check(
    kernels, n, m, d, c, dtype=torch.float32, precision="ieee", kind=0, beta=1.0, scale=1.0, turn=False
):
    """Errors against float64, relative to the sums of absolute terms, no more than 4 roundings over eager's.

    With float32 by way of bf16: 2^-7 of those sums, for both factors of both products.
    """
    shapes = ((n, d), (m, d), (m,), (c, m), (c,), (n, c))
    z, w, b, h, hb, r = (torch.randn(s, dtype=torch.float64) for s in shapes)
    layer = [t.to(dtype) for t in (z * scale, w / d**0.5, b, h, hb, r)]
    if turn:  # column-major, and a vector with gaps
        layer = [t.mT.contiguous().mT if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in layer]
    z, w, b, h, hb, r = layer
    wide = [t.double() for t in layer]
    options = {"activation": reference.ACTIVATIONS[kind], "beta": beta}
    pre = wide[0].abs() @ wide[1].abs().mT + wide[2].abs() + 1

    def error(x: Tensor, truth: Tensor, size: Tensor) -> float:
        assert x.shape == truth.shape and x.dtype == dtype and x.isfinite().all()
        return float(((x.double() - truth).abs() / size).max())

    forward, head_grad = kernels
    phi, true_phi = reference.wide_features(z, w, b, **options), reference.wide_features(*wide[:3], **options)
    results = (
        (
            forward(z, w, b, h, hb, kind, beta, precision),
            torch.nn.functional.linear(phi, h, hb),
            true_phi @ wide[3].mT + wide[4],
            pre @ wide[3].abs().mT + wide[4].abs(),
        ),
        (
            head_grad(z, w, b, r, kind, beta, precision),
            r.mT @ phi,
            wide[5].mT @ true_phi,
            wide[5].abs().mT @ pre,
        ),
    )
    margin = 2.0**-7 if precision == "bf16" and dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, eager, truth, size in results:
        assert error(got, truth, size) <= error(eager, truth, size) + margin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(kernels, dtype, poison):
    check(kernels, 140, 150, 33, 10, dtype)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_every_precision(kernels, precision, poison):
    check(kernels, 140, 150, 70, 10, precision=precision, beta=2.0)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 7, 3, 2), (64, 64, 32, 16), (129, 65, 17, 16), (300, 3, 40, 3)], ids=str
)
def test_ragged_sizes(kernels, sizes, poison):
    check(kernels, *sizes)


@pytest.mark.parametrize("kind", range(7), ids=lambda k: reference.ACTIVATIONS[k])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_activation(kernels, kind, dtype):
    check(kernels, 20, 70, 9, 3, dtype, kind=kind)


@pytest.mark.parametrize("scale", [1e4, 1e-39, 0.0])
def test_extreme_pre_activations(kernels, scale):
    check(kernels, 20, 70, 9, 3, scale=scale)


def test_any_strides(kernels):
    check(kernels, 70, 90, 9, 3, turn=True)
