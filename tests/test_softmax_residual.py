"""softmax_residual on the C++ and the reference backend: exact values, torch's semantics, hostile rows."""

from __future__ import annotations

import math

import exact
import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64]
CLASSES = [1, 2, 10, 31, 33, 63, 64, 65, 252, 507]
BACKENDS = ["cpu", "reference"]


def targets(n, c, dtype, kind):
    return (
        torch.randint(0, c, (n,)) if kind == "hard" else torch.softmax(torch.randn(n, c, dtype=dtype), dim=1)
    )


def exact_targets(target, row, c, smoothing):
    y = [mp.mpf(0)] * c
    if target.is_floating_point():
        y = [mp.mpf(float(v)) for v in target[row]]
    else:
        y[int(target[row])] = mp.mpf(1)
    return [(1 - mp.mpf(smoothing)) * v + mp.mpf(smoothing) / c for v in y]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.25])  # exact in binary, so that the targets are
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_exact_rows(dtype, kind, smoothing, backend):
    np_dtype = np.float32 if dtype == torch.float32 else np.float64
    eps = float(np.finfo(np_dtype).eps)
    for c, scale in ((1, 1.0), (2, 0.1), (7, 20.0), (70, 3.0)):
        f, y = torch.randn(6, c, dtype=dtype) * scale, targets(6, c, dtype, kind)
        with ops.backend(backend):
            loss, residual, entropy = ops.softmax_residual(f, y, label_smoothing=smoothing)
        for i in range(6):
            q = exact_targets(y, i, c, smoothing)
            want_loss, want_residual, want_entropy = exact.softmax_terms(f[i], q)
            spread = max(1.0, float(f[i].max() - f[i].min())) if backend == "reference" else 1.0
            limit = 12 * eps * spread  # the reference loses an ulp of f_c - max, the kernel does not
            assert abs(loss[i].item() - want_loss) <= limit * abs(want_loss)
            assert abs(entropy[i].item() - want_entropy) <= limit * abs(want_entropy)
            for j in range(c):
                size = abs(want_residual[j]) + (0 if kind == "hard" and not smoothing else q[j])
                assert abs(residual[i, j].item() - want_residual[j]) <= limit * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_losses_keep_relative_accuracy(dtype):
    # One class ahead by `gap`: loss = log(1 + exp(-gap)), residual at the label = -exp(-gap)/(1 + exp(-gap)).
    for gap in (5.0, 20.0, 40.0, 80.0):
        for c in (2, 65):
            f = torch.full((1, c), -math.inf, dtype=dtype)
            f[0, 0], f[0, 1] = 0.0, -gap
            loss, residual, entropy = ops.softmax_residual(f, torch.zeros(1, dtype=torch.int64))
            e = mp.exp(-gap)
            rel = 4 * torch.finfo(dtype).eps
            assert loss.item() == pytest.approx(float(mp.log1p(e)), rel=rel)
            assert residual[0, 0].item() == pytest.approx(float(-e / (1 + e)), rel=rel)
            assert residual[0, 1].item() == pytest.approx(float(e / (1 + e)), rel=rel)
            assert entropy.item() == pytest.approx(float(-gap * e / (1 + e) - mp.log1p(e)), rel=rel)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(dtype, c, kind, smoothing, poison):
    n = 37
    f, y = torch.randn(n, c, dtype=dtype) * 4, targets(n, c, dtype, kind)
    wide = y.double() if kind == "soft" else y
    want = reference.softmax_residual(f.double(), wide, label_smoothing=smoothing)
    got = ops.softmax_residual(f, y, label_smoothing=smoothing)
    assert ops.last_backend("softmax_residual") == "cpu"
    log_p = torch.log_softmax(f, dim=1)
    hot = F.one_hot(y, c).to(dtype) if kind == "hard" else y
    q = (1 - smoothing) * hot + smoothing / c
    eager = (
        F.cross_entropy(f, y, reduction="none", label_smoothing=smoothing),
        log_p.exp() - q,
        (log_p.exp() * log_p).sum(dim=1),
    )
    for g, w, e in zip(got, want, eager):
        slack = 4 * torch.finfo(dtype).eps * float(w.abs().max())
        assert (g - w).abs().max() <= (e - w).abs().max() + slack
    if dtype == torch.float64:
        torch.testing.assert_close(got[0], eager[0], rtol=1e-12, atol=1e-13)


def test_one_hot_probabilities_equal_labels():
    f, y = torch.randn(50, 12, dtype=torch.float64) * 9, torch.randint(0, 12, (50,))
    hard = ops.softmax_residual(f, y, label_smoothing=0.1)
    soft = ops.softmax_residual(f, F.one_hot(y, 12).double(), label_smoothing=0.1)
    for h, s in zip(hard, soft):
        torch.testing.assert_close(h, s, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", [4, 80])
def test_rows_that_are_not_finite(c, backend):
    f = torch.randn(6, c, dtype=torch.float64)
    f[0, 1], f[1, 0], f[2, 2], f[3, 3] = math.nan, math.nan, math.inf, -math.inf
    f[4] = -math.inf
    y = torch.zeros(6, dtype=torch.int64)
    with ops.backend(backend):
        loss, residual, entropy = ops.softmax_residual(f, y)
    for i in (0, 1, 2, 4):
        assert loss[i].isnan() and residual[i].isnan().any() and entropy[i].isnan()
    for i in (3, 5):
        assert loss[i].isfinite() and residual[i].isfinite().all() and entropy[i].isfinite()
    assert residual[3, 3] == 0
    with ops.backend(backend):
        assert ops.softmax_residual(f[3:4], torch.tensor([3]))[0].item() == math.inf


@pytest.mark.parametrize("c", [5, 100])
def test_strides_empty_and_extremes(c):
    store = torch.randn(40, c + 3) * 1e4
    f = store[::2, 1 : c + 1]
    y = torch.randint(0, c, (40,))[::2]
    for g, w in zip(ops.softmax_residual(f, y), ops.softmax_residual(f.contiguous(), y.contiguous())):
        assert torch.equal(g, w) and g.isfinite().all()
    loss, residual, entropy = ops.softmax_residual(store[:0, :c], y[:0])
    assert loss.shape == entropy.shape == (0,) and residual.shape == (0, c)


def test_many_classes_sum_accurately():
    c = 100_000
    f = torch.randn(3, c)
    y = torch.tensor([0, 7, c - 1])
    loss, residual, entropy = ops.softmax_residual(f, y)
    want = reference.softmax_residual(f.double(), y)
    assert ((loss - want[0]).abs() / want[0]).max() < 1e-6
    assert ((entropy - want[2]).abs() / want[2].abs()).max() < 1e-6
    assert (residual - want[1]).abs().max() < 1e-6


def test_threads_do_not_change_the_result():
    f, y = torch.randn(3001, 10), torch.randint(0, 10, (3001,))
    threads = torch.get_num_threads()
    many = ops.softmax_residual(f, y)
    try:
        torch.set_num_threads(1)
        for a, b in zip(many, ops.softmax_residual(f, y)):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
