"""softmax_residual and softmax_curvature on every backend: exact values, torch's semantics, hostile rows."""

from __future__ import annotations

import math

import exact
import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from conftest import TARGETS

from gcfast import ops, reference

DTYPES = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
CLASSES = [1, 2, 33, 65, 507]  # at the edges of the kernels' blocks, and beyond them
OURS = [t for t in TARGETS if t.values[0][0] in ("cpu", "reference", "triton")]
KERNELS = [t for t in OURS if t.values[0][0] != "reference"]
on = pytest.mark.parametrize("target", OURS, indirect=True)
on_kernels = pytest.mark.parametrize("target", KERNELS, indirect=True)
# What the interpreter cannot show is tested on the GPU, by the same tests: fused multiply-adds, the rounding
# of a bfloat16 store, the layouts (a thread a row, a warp a row), and memory faults.


def labels(n, c, kind, target, dtype=torch.float64):
    if kind == "hard":
        return torch.randint(0, c, (n,), device=target.device)
    return torch.softmax(torch.randn(n, c, dtype=torch.float64), dim=1).to(target.device, dtype)


def logits(n, c, target, dtype=torch.float64, scale=1.0):
    return (torch.randn(n, c, dtype=torch.float64) * scale).to(target.device, dtype)


def denormal(dtype):
    """The spacing of denormal numbers."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def exact_targets(y, row, c, smoothing):
    q = [mp.mpf(0)] * c
    if y.is_floating_point():
        q = [mp.mpf(float(v)) for v in y[row]]
    else:
        q[int(y[row])] = mp.mpf(1)
    return [(1 - mp.mpf(smoothing)) * v + mp.mpf(smoothing) / c for v in q]


@on
@pytest.mark.parametrize("smoothing", [0.0, 0.25])  # exact in binary, so that the targets are
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_exact_rows(dtype, kind, smoothing, target):
    eps = torch.finfo(dtype).eps
    for c, scale in ((1, 1.0), (2, 0.1), (7, 20.0), (70, 3.0)):
        f, y = logits(6, c, target, dtype, scale), labels(6, c, kind, target, dtype)
        loss, residual, entropy = ops.softmax_residual(f, y, label_smoothing=smoothing)
        assert ops.last_backend("softmax_residual") == target.backend
        for i in range(6):
            q = exact_targets(y, i, c, smoothing)
            want_loss, want_residual, want_entropy = exact.softmax_terms(f[i], q)
            spread = max(1.0, float(f[i].max() - f[i].min())) if target.backend == "reference" else 1.0
            limit = 12 * eps * spread  # the reference loses an ulp of f_c - max, the kernels do not
            assert abs(loss[i].item() - want_loss) <= limit * abs(want_loss)
            assert abs(entropy[i].item() - want_entropy) <= limit * abs(want_entropy)
            for j in range(c):
                size = abs(want_residual[j]) + (0 if kind == "hard" and not smoothing else q[j])
                assert abs(residual[i, j].item() - want_residual[j]) <= limit * size + denormal(dtype)


@on
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_losses_keep_relative_accuracy(dtype, target):
    # One class ahead by `gap`: loss = log(1 + exp(-gap)), residual at the label = -exp(-gap)/(1 + exp(-gap)).
    for gap in (5.0, 20.0, 40.0, 80.0):
        for c in (2, 65, 1100):
            f = torch.full((1, c), -math.inf, dtype=dtype, device=target.device)
            f[0, c - 2], f[0, c - 1] = 0.0, -gap
            loss, residual, entropy = ops.softmax_residual(f, torch.tensor([c - 2], device=target.device))
            e = mp.exp(-gap)
            rel = 4 * torch.finfo(dtype).eps
            assert loss.item() == pytest.approx(float(mp.log1p(e)), rel=rel)
            assert residual[0, -2].item() == pytest.approx(float(-e / (1 + e)), rel=rel)
            assert residual[0, -1].item() == pytest.approx(float(e / (1 + e)), rel=rel)
            assert entropy.item() == pytest.approx(float(-gap * e / (1 + e) - mp.log1p(e)), rel=rel)


@pytest.mark.one_in(3)
@on_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_torch(dtype, c, kind, smoothing, target, poison):
    n = 37
    f, y = logits(n, c, target, dtype, 4.0), labels(n, c, kind, target, dtype)
    wide = y.double() if kind == "soft" else y
    want = reference.softmax_residual(f.double(), wide, label_smoothing=smoothing)
    got = ops.softmax_residual(f, y, label_smoothing=smoothing)
    assert ops.last_backend("softmax_residual") == target.backend
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


@on
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("c", [1, 10, 65, 1030])
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_rounded_once(dtype, c, kind, target, poison):
    if target.backend == "cpu":
        with pytest.raises(ops.BackendError, match="serves float32 and float64"):
            ops.softmax_residual(torch.zeros(1, 2, dtype=dtype), torch.tensor([0]))
        return
    f, y = logits(5, c, target, dtype, 4.0), labels(5, c, kind, target, dtype)
    v = logits(5, c, target, dtype)
    wide = y.double() if kind == "soft" else y
    want = (
        *reference.softmax_residual(f.double(), wide, label_smoothing=0.1),
        reference.softmax_curvature(f.double(), v.double()),
    )
    got = (
        *ops.softmax_residual(f, y, label_smoothing=0.1, check_target=False),
        ops.softmax_curvature(f, v),
    )
    # Half an ulp for the rounding, and 12 eps of float32 for the arithmetic, of the size of the terms; the
    # interpreter truncates bfloat16 stores, which is one ulp more than hardware's half.
    ulps = 1.5 if target.interpreted and dtype == torch.bfloat16 else 0.5
    for g, w in zip(got, want):
        assert g.dtype == dtype
        limit = ulps * torch.finfo(dtype).eps * w.abs() + 12 * torch.finfo(torch.float32).eps
        assert bool(((g.double() - w).abs() <= limit).all())


@on
def test_one_hot_probabilities_equal_labels(target):
    f, y = logits(50, 12, target, scale=9.0), labels(50, 12, "hard", target)
    hard = ops.softmax_residual(f, y, label_smoothing=0.1)
    soft = ops.softmax_residual(f, F.one_hot(y, 12).double(), label_smoothing=0.1)
    for h, s in zip(hard, soft):
        torch.testing.assert_close(h, s, rtol=1e-13, atol=1e-16)


@on
@pytest.mark.parametrize("c", [4, 40, 80, 2100])
def test_rows_that_are_not_finite(c, target):
    f = torch.randn(7, c, dtype=torch.float64)
    f[0, 1], f[1, 0], f[2, 2], f[3, 3] = math.nan, math.nan, math.inf, -math.inf
    f[4] = -math.inf
    f[6, : c - 1] = -math.inf  # the only class that is left comes last: a whole chunk of -inf precedes it
    f, y = f.to(target.device), torch.zeros(7, dtype=torch.int64, device=target.device)
    y[6] = c - 1
    loss, residual, entropy = ops.softmax_residual(f, y)
    product = ops.softmax_curvature(f, torch.ones_like(f))
    for i in (0, 1, 2, 4):
        assert loss[i].isnan() and residual[i].isnan().any() and entropy[i].isnan()
        assert product[i].isnan().any()
    for i in (3, 5, 6):
        assert loss[i].isfinite() and residual[i].isfinite().all() and entropy[i].isfinite()
        assert product[i].isfinite().all()
    assert residual[3, 3] == 0
    assert loss[6] == 0 and entropy[6] == 0 and residual[6].eq(0).all() and product[6].eq(0).all()
    label = torch.tensor([3], device=target.device)
    assert ops.softmax_residual(f[3:4], label)[0].item() == math.inf


@on
@pytest.mark.parametrize("c", [5, 100, 1100])
def test_strides_empty_and_extremes(c, target):
    store = logits(40, c + 3, target, torch.float32, 1e4)
    other = logits(40, 2 * c, target, torch.float32)
    f, v, w = store[::2, 1 : c + 1], other[::2, c:], other[::2, ::2]
    y = labels(40, c, "hard", target)[::2]
    for g, want in zip(ops.softmax_residual(f, y), ops.softmax_residual(f.contiguous(), y.contiguous())):
        assert torch.equal(g, want) and g.isfinite().all()
    for u in (v, w):
        assert torch.equal(ops.softmax_curvature(f, u), ops.softmax_curvature(f.contiguous(), u.contiguous()))
    probs = torch.softmax(store, 1)[::2, 1 : c + 1]
    for g, want in zip(
        ops.softmax_residual(f, probs, check_target=False),
        ops.softmax_residual(f.contiguous(), probs.contiguous(), check_target=False),
    ):
        assert torch.equal(g, want)
    one_row = f[:1].expand(3, c)  # row stride 0
    assert torch.equal(ops.softmax_curvature(one_row, v[:3])[0], ops.softmax_curvature(f[:1], v[:1])[0])
    loss, residual, entropy = ops.softmax_residual(store[:0, :c], y[:0])
    assert loss.shape == entropy.shape == (0,) and residual.shape == (0, c)
    assert ops.softmax_curvature(store[:0, :c], store[:0, 3:]).shape == (0, c)


@pytest.mark.one_in(3)
@on
@pytest.mark.parametrize("order", ["random", "rising"])
def test_many_classes_sum_accurately(order, target):
    c = 100_000
    f = logits(2, c, target, torch.float32)
    if order == "rising":  # every chunk of a long row brings a new maximum
        f = f.sort(dim=1).values
    y = torch.tensor([7, c - 1], device=target.device)
    v = logits(2, c, target, torch.float32)
    loss, residual, entropy = ops.softmax_residual(f, y, label_smoothing=0.5)
    want = reference.softmax_residual(f.double(), y, label_smoothing=0.5)
    assert ((loss - want[0]).abs() / want[0]).max() < 1e-6
    assert ((entropy - want[2]).abs() / want[2].abs()).max() < 1e-6
    assert (residual - want[1]).abs().max() < 1e-6
    product = reference.softmax_curvature(f.double(), v.double())
    assert (ops.softmax_curvature(f, v) - product).abs().max() < 1e-6 * product.abs().max()


@pytest.mark.one_in(3)
@on
@pytest.mark.parametrize("c", [3, 20, 70, 300, 1100])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_labels_out_of_range_without_a_check(dtype, c, target, poison):
    if target.backend == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the C++ backend serves float32 and float64")
    f = logits(7, c, target, dtype)
    wild = [-1, c, -(2**63), 2**32, 2**63 - 1]  # 2^32 is 0 in 32 bits
    y = torch.tensor([0, *wild, c - 1], device=target.device)
    good = [0, 6]
    for smoothing in (0.0, 0.1):
        got = ops.softmax_residual(f, y, label_smoothing=smoothing, check_target=False)
        want = ops.softmax_residual(f[good], y[good], label_smoothing=smoothing)
        for g, w in zip(got, want):
            assert g[1:6].isnan().all()
            assert torch.equal(g[good], w)
    with pytest.raises(ValueError, match=r"target must hold labels in \[0, .*got -1 at index 1"):
        ops.softmax_residual(f, y)


@on
@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_against_exact_rows(dtype, target):
    for c, scale in ((1, 1.0), (2, 0.1), (7, 20.0), (40, 1.0), (70, 3.0)):
        f, v = logits(4, c, target, dtype, scale), logits(4, c, target, dtype)
        got = ops.softmax_curvature(f, v)
        assert ops.last_backend("softmax_curvature") == target.backend
        for i in range(4):
            want, size = exact.softmax_curvature(f[i], v[i])
            spread = max(1.0, float(f[i].max() - f[i].min())) if target.backend == "reference" else 1.0
            for j in range(c):
                limit = 12 * torch.finfo(dtype).eps * spread * size[j]
                # a denormal p, rounded, times w - mu
                assert abs(got[i, j].item() - want[j]) <= limit + 4 * denormal(dtype)


@on
@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_of_nearly_one_hot_rows(dtype, target):
    # Two classes are left, p of the second is tiny: S v = p (1 - p) (v_2 - v_1) (-1, 1).
    rel = 8 * torch.finfo(dtype).eps
    for gap in (20.0, 60.0, 80.0):
        for c in (2, 30, 65, 2100):
            f = torch.full((1, c), -math.inf, dtype=dtype, device=target.device)
            f[0, 0], f[0, c - 1] = 3.0, 3.0 - gap
            v = torch.zeros_like(f)
            v[0, 0], v[0, c - 1] = 1.5, -0.75
            got = ops.softmax_curvature(f, v)
            p = 1 / (1 + mp.exp(gap))
            want = float(p * (1 - p) * mp.mpf(-2.25))
            assert got[0, c - 1].item() == pytest.approx(want, rel=rel, abs=0)
            assert got[0, 0].item() == pytest.approx(-want, rel=rel, abs=0)
            assert got[0, 1 : c - 1].eq(0).all()


@on_kernels
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_no_worse_than_torch(dtype, c, target, poison):
    f, v = logits(37, c, target, dtype, 4.0), logits(37, c, target, dtype)
    want = reference.softmax_curvature(f.double(), v.double())
    p = torch.softmax(f, 1)
    eager = p * v - p * (p * v).sum(1, keepdim=True)
    got = ops.softmax_curvature(f, v)
    slack = 4 * torch.finfo(dtype).eps * float(want.abs().max())
    assert (got - want).abs().max() <= (eager - want).abs().max() + slack


@on
def test_curvature_is_the_hessian(target):
    f, v = logits(5, 6, target), logits(5, 6, target)
    y = labels(5, 6, "hard", target)
    _, want = torch.autograd.functional.hvp(lambda f: F.cross_entropy(f, y, reduction="sum"), f, v)
    torch.testing.assert_close(ops.softmax_curvature(f, v), want, rtol=1e-12, atol=1e-14)


@on
def test_gradients_of_residual_and_entropy_keep_tiny_numbers(target):
    # d/df of sum g (p - q) is S g, of sum p log p it is S f; both of the size of p_2 = 1/(1 + exp(40)).
    f = torch.tensor([[40.0, 0.0, -math.inf]], dtype=torch.float64, device=target.device).requires_grad_()
    y = torch.zeros(1, dtype=torch.int64, device=target.device)
    _, residual, entropy = ops.softmax_residual(f, y)
    p = float(1 / (1 + mp.exp(40)))
    (by_residual,) = torch.autograd.grad(residual[0, 1], f, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), f)
    assert by_residual[0].tolist() == pytest.approx([-p, p, 0.0], rel=1e-14, abs=0)
    assert by_entropy[0].tolist() == pytest.approx([40 * p, -40 * p, 0.0], rel=1e-14, abs=0)


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    for c in (10, 300):
        f, y, v = torch.randn(3001, c), torch.randint(0, c, (3001,)), torch.randn(3001, c)
        try:
            torch.set_num_threads(max(2, threads))
            many = (*ops.softmax_residual(f, y), ops.softmax_curvature(f, v))
            torch.set_num_threads(1)
            for a, b in zip(many, (*ops.softmax_residual(f, y), ops.softmax_curvature(f, v))):
                assert torch.equal(a, b)
        finally:
            torch.set_num_threads(threads)


def test_every_launch_is_listed():
    """The configurations that the launcher picks are those that are compiled ahead of time."""
    kernels = pytest.importorskip("gcfast.triton_kernels.softmax_residual")
    listed = kernels.specializations()
    keys = [(s.kernel.__name__, *s.signature.values(), *s.constants.items(), s.launch) for s in listed]
    assert len({repr(key) for key in keys}) == len(listed) < 100
    for dtype in (*DTYPES, *HALVES):
        for c in (1, 16, 17, 64, 65, 507, 1024, 1025, 100_000):
            launch, rows, narrow = kernels._pick(torch.device("cpu"), dtype, c)
            assert any(s.launch == launch and s.constants.get("NARROW", False) == narrow for s in listed)
            assert rows == 0 or launch.blocks["COLS"] >= c
