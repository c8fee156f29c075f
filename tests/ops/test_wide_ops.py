"""The ops of the wide layer on every backend, against float64: errors, ragged and extreme inputs, memory."""

from __future__ import annotations

import sys

import children
import pytest
import torch
from conftest import TARGETS
from torch import Tensor

from gcfast import ops, reference
from gcfast.ops import dispatch, native

TRITON_TARGETS = [p for p in TARGETS if p.values[0][0] == "triton"]
OPS = ("wide_forward", "wide_head_grad", "wide_backward", "wide_gram_product")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layer(n, m, d, c, dtype=torch.float32, scale=1.0, device="cpu"):
    """z, weight, bias, residual, head_weight, head_bias; pre-activations of size `scale`."""
    shapes = ((n, d), (m, d), (m,), (n, c), (c, m), (c,))
    z, w, b, r, h, hb = (torch.randn(s, dtype=torch.float64) for s in shapes)
    tensors = (z * scale, w / max(d, 1) ** 0.5, b, r, h, hb)
    return tuple(t.to(dtype).to(device) for t in tensors)


def run(op: str, args: tuple[Tensor, ...], f, **options) -> list[Tensor]:
    """The results of an op by gcfast.ops or by gcfast.reference."""
    z, w, b, r, h, hb = args
    if op == "wide_forward":
        return [f.wide_forward(z, w, b, h, hb, **options)]
    if op == "wide_head_grad":
        return [f.wide_head_grad(z, w, b, r, **options)]
    if op == "wide_gram_product":
        return [f.wide_gram_product(z, w, b, r, **options)]
    if f is reference:
        return [*reference.wide_backward(r, z, w, b, h, **options), r.sum(0)]
    leaves = [t.clone().requires_grad_() for t in (z, w, b, h, hb)]
    return list(torch.autograd.grad(ops.wide_forward(*leaves, **options), leaves, r))


def scales(op: str, args: tuple[Tensor, ...]) -> list[Tensor]:
    """What rounding errors are relative to: the sums of the absolute terms, those of pre-activations too."""
    z, w, b, r, h, hb = (t.double().abs() for t in args)
    pre = z @ w.mT + b + 1  # bounds every activation, and with it what an error of the pre-activation does
    if op == "wide_forward":
        return [pre @ h.mT + hb]
    if op == "wide_head_grad":
        return [r.mT @ pre]
    if op == "wide_gram_product":
        return [pre @ (pre.mT @ r)]
    slope = (r @ h) * pre  # the derivative is bounded, but its argument has pre's error
    return [slope @ w, slope.mT @ z, slope.sum(0), r.mT @ pre, r.sum(0)]


def errors(op, args, got, options) -> list[float]:
    truth = run(op, tuple(t.double() for t in args), reference, **options)
    pairs = zip(got, truth, scales(op, args))
    return [float(((g.double() - t).abs() / s.clamp(min=1e-300)).max()) for g, t, s in pairs]


def check(op, args, *, margin=4.0, precision=None, **options):
    """No worse than eager torch in the same dtype, plus `margin` roundings of the sum of absolute terms."""
    extra = {} if precision is None else {"precision": precision}
    got = run(op, args, ops, **options, **extra)
    dtype = args[0].dtype
    assert all(g.dtype == dtype and g.device == args[0].device for g in got)
    ours = errors(op, args, got, options)
    eager = errors(op, args, run(op, args, reference, **options), options)
    for i, (a, b) in enumerate(zip(ours, eager)):
        assert a <= b + margin * torch.finfo(dtype).eps, f"{op}, result {i}: {a:.2e}, eager {b:.2e}"


def serves(op: str, target) -> None:
    if ("wide_forward" if op == "wide_backward" else op) not in dispatch._KERNELS[target.backend]:
        pytest.skip(f"{op} has no kernel on {target.backend}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors_are_no_worse_than_those_of_eager_torch(op, dtype, target):
    serves(op, target)
    check(op, layer(70, 150, 33, 10, dtype, device=target.device))


SIZES = [(1, 1, 1, 1), (5, 7, 3, 2), (48, 64, 16, 16), (49, 65, 17, 17), (97, 3, 40, 5), (3, 130, 600, 1)]


@pytest.mark.parametrize("n, m, d, c", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_ragged_sizes(op, n, m, d, c, target, poison):
    serves(op, target)
    check(op, layer(n, m, d, c, device=target.device))


def test_more_rows_than_the_backward_pass_takes_at_a_time():
    """On the CPU the shares of dz are added after each 2,048 rows, and the other gradients go on."""
    check("wide_backward", layer(2100, 70, 5, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [3, 20])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TRITON_TARGETS, indirect=True)
def test_several_panels(op, c, dtype, target, monkeypatch):
    """On a GPU, where they stay in the second-level cache: here of 128 columns."""
    from gcfast.triton_kernels import _wide

    monkeypatch.setattr(_wide, "PANEL_BYTES", 1)
    check(op, layer(20, 300, 9, c, dtype, device=target.device))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_activation(op, activation, target):
    serves(op, target)
    check(op, layer(20, 40, 5, 3, torch.float64, device=target.device), activation=activation)


@pytest.mark.parametrize("op", OPS)
def test_sharp_softplus(op, target):
    serves(op, target)
    check(op, layer(20, 40, 5, 3, device=target.device), beta=20.0)


@pytest.mark.parametrize("scale", [1e4, 1e-39, 0.0])
@pytest.mark.parametrize("op", OPS)
def test_extreme_pre_activations(op, scale, target):
    serves(op, target)
    args = list(layer(20, 70, 8, 3, scale=scale, device=target.device))
    args[2] = args[2] * (scale or 1.0)
    check(op, tuple(args))


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op, target):
    serves(op, target)
    z, w, b, r, h, hb = layer(31, 50, 9, 4, device=target.device)
    gap = lambda t: torch.cat([t, t.new_full((len(t), 3), float("nan"))], 1)[:, : t.shape[1]]  # noqa: E731
    turned = lambda t: t.mT.contiguous().mT  # noqa: E731
    spread = lambda t: t.repeat_interleave(2)[::2]  # noqa: E731
    plain = run(op, (z, w, b, r, h, hb), ops)
    others = (
        (gap(z), gap(w), b, gap(r), gap(h), hb),
        (turned(z), turned(w), spread(b), turned(r), turned(h), spread(hb)),
    )
    for args in others:
        for got, want in zip(run(op, args, ops), plain):
            torch.testing.assert_close(got, want)
    row = z[:1].expand(31, 9)  # repeated without a copy
    same = run(op, (row.contiguous(), w, b, r, h, hb), ops)
    for got, want in zip(run(op, (row, w, b, r, h, hb), ops), same):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n, m, d, c", [(0, 5, 3, 2), (4, 0, 3, 2), (4, 5, 0, 2), (4, 5, 3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_a_size_of_zero(op, n, m, d, c, target):
    serves(op, target)
    args = layer(n, m, d, c, device=target.device)
    for got, want in zip(run(op, args, ops), run(op, args, reference)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity_are_not_lost(op, target):
    serves(op, target)
    for bad in (float("nan"), float("inf")):
        args = layer(50, 70, 8, 3, device=target.device)
        args[0][17, 3] = bad
        got, want = run(op, args, ops), run(op, args, reference)
        for g, t in zip(got, want):
            assert torch.equal(g.isfinite(), t.isfinite())


@pytest.mark.parametrize("op", ["wide_head_grad", "wide_gram_product"])
def test_an_infinite_unit_makes_no_nan_of_rows_that_are_not_there(op, target):
    """Tiles reach beyond the last row; infinity times the zeros there must not come in."""
    serves(op, target)
    z, w, b, r, h, hb = layer(5, 7, 3, 2, device=target.device)
    b[2] = float("inf")
    got, want = (run(op, (z, w, b, r.abs(), h, hb), f)[0] for f in (ops, reference))
    assert torch.equal(got.isinf(), want.isinf()) and want.isinf().any() and not got.isnan().any()


def test_library_products_are_as_exact_as_asked():
    """Panels meet torch's own products, which the user may have allowed TF32."""
    from gcfast.ops.wide_calls import library_products

    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        for precision, inside in (("ieee", "ieee"), ("tf32x3", "ieee"), ("tf32", "tf32"), ("bf16", "tf32")):
            with library_products(precision):
                assert switch.fp32_precision == inside
            assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("op", OPS)
def test_bf16_where_it_is_allowed(op, target):
    """Operands of the product with weight are off by 2^-8 at most, and pre-activations by what that makes."""
    serves(op, target)
    args = layer(100, 150, 64, 10, device=target.device)
    got = run(op, args, ops, precision="bf16")
    for error in errors(op, args, got, {}):
        assert error <= 2.0**-8
    if target.backend == "cpu" and native.cpu is not None and native.cpu.wide_bf16():
        assert not torch.equal(got[0], run(op, args, ops, precision="ieee")[0])
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # what torch is allowed, we are
        try:
            assert torch.equal(run(op, args, ops)[0], got[0])
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("op", ["wide_forward", "wide_head_grad", "wide_gram_product"])
def test_no_bit_depends_on_the_threads(op):
    args = layer(1000, 333, 20, 7)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(op, args, ops)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panel(dtype, target):
    serves("wide_panel", target)
    z, w, b, *_ = layer(100, 150, 33, 1, dtype, device=target.device)
    got = ops.wide_panel(z, w, b, activation="softplus", beta=2.0)
    want = reference.wide_features(z.double(), w.double(), b.double(), beta=2.0)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    if target.backend != "reference":
        for rows, columns in ((slice(0, 1), slice(149, 150)), (slice(37, 99), slice(13, 100))):
            part = ops.wide_panel(z[rows], w[columns], b[columns], activation="softplus", beta=2.0)
            assert torch.equal(part, got[rows, columns])
    out = torch.full((100, 160), float("nan"), dtype=torch.float64, device=target.device)
    assert ops.wide_panel(z, w, b, beta=2.0, out=out[:, 3:153]).data_ptr() == out[:, 3:].data_ptr()
    assert torch.equal(out[:, 3:153], got) and out[:, :3].isnan().all() and out[:, 153:].isnan().all()


def test_opcheck():
    z, w, b, r, *_ = layer(9, 12, 4, 3)
    for op in ("wide_head_grad", "wide_gram_product"):
        torch.library.opcheck(getattr(torch.ops.gcfast, op).default, (z, w, b, r, "softplus", 1.0, None))
    double = (z.double(), w.double(), b.double(), "softplus", 1.0, torch.empty(9, 12, dtype=torch.float64))
    torch.library.opcheck(torch.ops.gcfast.wide_panel_out.default, double)


MESSAGES = [
    (lambda z, w, b, r: ops.wide_head_grad(z[0], w, b, r), ValueError, r"z must have shape \(n, d\)"),
    (lambda z, w, b, r: ops.wide_head_grad(z, w, b, r[1:]), ValueError, r"residual must have shape \(9, C\)"),
    (lambda z, w, b, r: ops.wide_gram_product(z, w, b, r.double()), TypeError, "r must have the dtype of z"),
    (lambda z, w, b, r: ops.wide_gram_product(z, w[:, 1:], b, r), ValueError, "weight must have shape"),
    (lambda z, w, b, r: ops.wide_gram_product(z, w, b, r, precision="fp8"), ValueError, "precision must be"),
    (
        lambda z, w, b, r: ops.wide_head_grad(*(t.double() for t in (z, w, b, r)), precision="bf16"),
        ValueError,
        "float64 takes None or 'ieee' only",
    ),
    (lambda z, w, b, r: ops.wide_head_grad(z, w, b, r, activation="swish"), ValueError, "activation must"),
    (lambda z, w, b, r: ops.wide_head_grad(z, w, b.requires_grad_(), r), RuntimeError, "detach bias"),
    (lambda z, w, b, r: ops.wide_panel(z, w, b, out=torch.empty(9, 12)), TypeError, "out must be float64"),
    (
        lambda z, w, b, r: ops.wide_panel(z, w, b, out=torch.empty(12, 9, dtype=torch.float64).mT),
        ValueError,
        "unit column stride",
    ),
]


@pytest.mark.parametrize("call, kind, message", MESSAGES, ids=[m for *_, m in MESSAGES])
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call(*layer(9, 12, 4, 3)[:4])


MEMORY = """
import sys, torch
from gcfast import ops
torch.manual_seed(0)
n, m, d, c = 4000, 8800, 128, 10
z, w, b, r, h = torch.randn(n, d), torch.randn(m, d), torch.randn(m), torch.randn(n, c), torch.randn(c, m)
call = dict(
    forward=lambda k: ops.wide_forward(z[:k], w, b, h),
    stored=lambda k: ops.wide_features(z[:k], w, b),
    head_grad=lambda k: ops.wide_head_grad(z[:k], w, b, r[:k]),
    gram_product=lambda k: ops.wide_gram_product(z[:k], w, b, r[:k]),
    backward=lambda k: torch.autograd.grad(ops.wide_forward(z[:k], wr, b, h), wr, r[:k]),
)[sys.argv[1]]
wr = w.clone().requires_grad_()
call(60)
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
call(n)
print((peak() - before) / (n * m * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "op, low, high",
    [
        ("stored", 0.9, 2.2),  # what the others save
        ("forward", 0, 0.02),
        ("head_grad", 0, 0.02),
        ("gram_product", 0, 0.02),
        ("backward", 0, 0.06),  # a gradient of weight's size, 0.03, among it
    ],
)
def test_memory_as_a_share_of_the_features(op, low, high, tmp_path):
    # Elsewhere than in the source tree, which would shadow the installed package.
    done = children.run([sys.executable, "-c", MEMORY, op], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert low <= float(done.stdout) <= high
