"""The ops as PyTorch sees them: registration, gradients, compilation, validation, dispatch."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading

import children
import pytest
import torch
from conftest import ANALYTIC
from torch.autograd import gradcheck, gradgradcheck

import gcfast.ops as ops
from gcfast import reference
from gcfast.ops import dispatch

F64 = torch.float64


def wide_args(n=5, d=3, m=7, c=2, dtype=F64, grad=False):
    shapes = [(n, d), (m, d), (m,), (c, m), (c,)]
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize("rows", [(4, 6), (6,), (0, 6)])
def test_opcheck(rows):
    x, b = torch.randn(rows, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.gcfast.activation.default, (x, b, "softplus", 2.0, 0))
    torch.library.opcheck(torch.ops.gcfast.activation.default, (x, None, "gelu", 1.0, 1))
    torch.library.opcheck(torch.ops.gcfast.activation_grad.default, (torch.randn(rows), x, b, "tanh", 1.0, 1))
    torch.library.opcheck(
        torch.ops.gcfast.activation_out.default, (x.detach(), b.detach(), "silu", 1.0, 0, torch.empty(rows))
    )


def test_opcheck_softmax_and_wide():
    f, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 2])
    torch.library.opcheck(torch.ops.gcfast.softmax_residual.default, (f, y, 0.1))
    torch.library.opcheck(
        torch.ops.gcfast.softmax_residual.default, (f, torch.softmax(torch.randn(4, 5), 1), 0.0)
    )
    torch.library.opcheck(torch.ops.gcfast.softmax_residual.default, (f, y, 0.1, False))
    torch.library.opcheck(
        torch.ops.gcfast.softmax_curvature.default, (f, torch.randn(4, 5, requires_grad=True))
    )
    args = wide_args(dtype=torch.float32, grad=True)
    torch.library.opcheck(torch.ops.gcfast.wide_forward.default, (*args, "softplus", 1.0, None))
    plain = [a.detach() for a in args[:4]]
    settings = ("softplus", 1.0, None, True, True, True)
    torch.library.opcheck(torch.ops.gcfast.wide_backward.default, (torch.randn(5, 2), *plain, *settings))


@pytest.mark.parametrize("name", ANALYTIC)
def test_gradients_of_activation(name):
    beta = 1.7 if name == "softplus" else 1.0
    x, b = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64, requires_grad=True)

    def f(order):
        return lambda x, b: ops.activation(x, b, activation=name, beta=beta, order=order)

    assert gradcheck(f(0), (x, b)) and gradcheck(f(1), (x, b))
    assert gradgradcheck(f(0), (x, b))


def test_third_derivative_is_refused():
    x = torch.randn(3, dtype=F64, requires_grad=True)
    with pytest.raises(RuntimeError, match="third derivative of softplus"):
        ops.activation(x, order=2).sum().backward()


@pytest.mark.parametrize("partial", [0, 1])
def test_each_partial_gradient_of_activation(partial):
    args = [torch.randn(4, 3, dtype=F64), torch.randn(3, dtype=F64)]
    args[partial].requires_grad_()
    ops.activation(*args).sum().backward()
    want = torch.sigmoid(args[0] + args[1]).detach()
    torch.testing.assert_close(args[partial].grad, want if partial == 0 else want.sum(0))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradients_of_softmax_residual(kind):
    f = torch.randn(4, 5, dtype=F64, requires_grad=True)
    y = torch.tensor([0, 4, 2, 2]) if kind == "hard" else torch.softmax(torch.randn(4, 5, dtype=F64), 1)
    for i in range(3):
        assert gradcheck(lambda f, i=i: ops.softmax_residual(f, y, label_smoothing=0.1)[i], f)
    assert gradgradcheck(lambda f: ops.softmax_residual(f, y)[0], f)
    for i in (1, 2):
        assert gradgradcheck(lambda f, i=i: ops.softmax_residual(f, y)[i], f)


def test_gradients_of_softmax_curvature():
    f, v = (torch.randn(4, 5, dtype=F64, requires_grad=True) for _ in range(2))
    assert gradcheck(ops.softmax_curvature, (f, v))
    assert gradgradcheck(ops.softmax_curvature, (f, v))


def test_softmax_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()

    def f(z, y, v):
        loss, residual, entropy = ops.softmax_residual(z, y, check_target=False)
        return (ops.softmax_curvature(z, v) * residual).sum() + (loss * entropy).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        z, v = (torch.randn(n, 3, requires_grad=True) for _ in range(2))
        y = torch.randint(0, 3, (n,))
        got, want = compiled(z, y, v), f(z, y, v)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, (z, v)), torch.autograd.grad(want, (z, v)))


@pytest.mark.parametrize("name", ANALYTIC)
def test_gradients_of_wide_forward(name):
    args = wide_args(grad=True)
    assert gradcheck(lambda *a: ops.wide_forward(*a, activation=name), args)


@pytest.mark.parametrize("partial", range(5))
def test_each_partial_gradient_of_wide_forward(partial):
    args = wide_args(n=9)
    args[partial].requires_grad_()
    g = torch.randn(9, 2, dtype=F64)
    (got,) = torch.autograd.grad((ops.wide_forward(*args) * g).sum(), args[partial])
    (want,) = torch.autograd.grad((reference.wide_forward(*args) * g).sum(), args[partial])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_wide_forward_is_once_differentiable():
    args = wide_args(grad=True)
    (dz,) = torch.autograd.grad(ops.wide_forward(*args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="wide_features"):
        dz.sum().backward()
    assert gradgradcheck(lambda z, w, b: ops.wide_features(z, w, b), args[:3])


def test_compiles_by_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.activation(x, beta=2.0), fullgraph=True, dynamic=True)
    for n in (5, 9):
        x = torch.randn(n, 3)
        torch.testing.assert_close(compiled(x), ops.activation(x, beta=2.0))


def test_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    w, b, v = torch.randn(7, 3), torch.randn(7), torch.randn(4, 7)

    def f(z, y):
        out = ops.wide_forward(ops.activation(z, activation="tanh"), w, b, v)
        return ops.softmax_residual(out, y)[0].mean() + ops.wide_features(z, w, b).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        z, y = torch.randn(n, 3, requires_grad=True), torch.randint(0, 4, (n,))
        got, want = compiled(z, y), f(z, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


@pytest.mark.parametrize("shape", [(6, 3), (3,), (2, 5, 3), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_wide_forward_of_any_batch_shape(shape, dtype, device, poison):
    _, w, b, v, c = (t.to(device) for t in wide_args(dtype=dtype))
    z = torch.randn(shape, dtype=dtype, device=device)
    for head_bias in (c, None):
        got = ops.wide_forward(z, w, b, v, head_bias, beta=2.0)
        torch.testing.assert_close(got, reference.wide_forward(z, w, b, v, head_bias, beta=2.0))
    torch.testing.assert_close(ops.wide_features(z, w, b), reference.wide_features(z, w, b))
    out = torch.empty(*shape[:-1], 7, dtype=dtype, device=device)
    assert ops.wide_features(z, w, b, out=out) is out
    torch.testing.assert_close(out, reference.wide_features(z, w, b))


@pytest.mark.parametrize("n", [1, 2, 63, 65, 200])
def test_wide_forward_over_chunk_borders(n, monkeypatch, poison):
    args = [t.requires_grad_() for t in wide_args(n=n, d=4, m=33, c=3)]
    g = torch.randn(n, 3, dtype=F64)
    got = torch.autograd.grad((ops.wide_forward(*args) * g).sum(), args)
    want = torch.autograd.grad((reference.wide_forward(*args) * g).sum(), args)
    for a, e in zip(got, want):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


BAD = [
    (lambda: ops.activation([1.0]), TypeError, "x must be a tensor; got list"),
    (lambda: ops.activation(torch.tensor([1])), TypeError, "x must have a floating dtype; got int64"),
    (
        lambda: ops.activation(torch.zeros(2), activation="swish"),
        ValueError,
        "one of softplus, sigmoid.*'swish'",
    ),
    (
        lambda: ops.activation(torch.zeros(2), beta=0.0),
        ValueError,
        "beta must be a finite number > 0; got 0.0",
    ),
    (lambda: ops.activation(torch.zeros(2), beta=math.nan), ValueError, "beta.*nan"),
    (
        lambda: ops.activation(torch.zeros(2), activation="tanh", beta=2.0),
        ValueError,
        "tanh takes beta=1.0 only",
    ),
    (lambda: ops.activation(torch.zeros(2), order=3), ValueError, "order must be 0, 1 or 2.*got 3"),
    (
        lambda: ops.activation(torch.zeros(2, 3), torch.zeros(2)),
        ValueError,
        r"bias must have shape \(3,\).*\(2,\)",
    ),
    (
        lambda: ops.activation(torch.zeros(3), torch.zeros(3, dtype=F64)),
        TypeError,
        "bias.*float32; got float64",
    ),
    (lambda: ops.activation(torch.zeros(3), out=torch.zeros(2)), ValueError, r"out must have shape \(3,\)"),
    (
        lambda: ops.activation(torch.zeros(3, requires_grad=True), out=torch.zeros(3)),
        RuntimeError,
        "out= cannot",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(3), torch.zeros(3)),
        ValueError,
        r"logits must have shape \(n, C\)",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(2, 3), torch.tensor([0])),
        ValueError,
        r"target must have shape \(2,\)",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(2, 3), torch.tensor([0, 3])),
        ValueError,
        r"\[0, 3\); got 3 at index 1",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(2, 3), torch.tensor([-100, 0])),
        ValueError,
        "got -100 at index 0",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(2, 3), torch.zeros(2, 3)),
        ValueError,
        "row 0 has minimum 0.0 and sum 0",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(1, 2), torch.tensor([[2.0, -1.0]])),
        ValueError,
        "minimum -1.0",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
        TypeError,
        "got int32",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=1.0),
        ValueError,
        r"label_smoothing must be in \[0, 1\); got 1.0",
    ),
    (
        lambda: ops.softmax_residual(torch.zeros(1, 2), torch.full((1, 2), 0.5, requires_grad=True)),
        ValueError,
        "target must not require a gradient",
    ),
    (
        lambda: ops.softmax_curvature(torch.zeros(2, 3), torch.zeros(2, 2)),
        ValueError,
        r"v must have shape \(2, 3\) \(as logits\); got \(2, 2\)",
    ),
    (
        lambda: ops.softmax_curvature(torch.zeros(2, 3), torch.zeros(2, 3, dtype=F64)),
        TypeError,
        "v must have the dtype of logits, float32; got float64",
    ),
    (
        lambda: ops.wide_forward(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(5), torch.zeros(1, 5)),
        ValueError,
        r"weight must have shape \(m, 3\).*\(5, 4\)",
    ),
    (
        lambda: ops.wide_forward(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(1, 4)),
        ValueError,
        r"head_weight must have shape \(C, 5\).*\(1, 4\)",
    ),
    (
        lambda: ops.wide_features(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4)),
        ValueError,
        r"bias must have shape \(5,\)",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forcing_a_backend():
    x = torch.randn(5)
    for name in ("reference", "cpu"):
        with ops.backend(name):
            ops.activation(x)
            assert ops.last_backend("activation") == name
    with ops.backend("reference"), ops.backend("auto"):
        ops.activation(x)
    assert ops.last_backend("activation") == "cpu"
    with (
        pytest.raises(ValueError, match="must be one of cpu, triton, cuda, reference, auto; got 'gpu'"),
        ops.backend("gpu"),
    ):
        pass
    with pytest.raises(ops.BackendError, match="float32 and float64, got bfloat16"), ops.backend("cpu"):
        ops.activation(x.bfloat16())
    with pytest.raises(ops.BackendError, match="this op has no kernel there"), ops.backend("triton"):
        ops.gram_product(torch.eye(2), torch.eye(2))


def test_forcing_by_environment(monkeypatch):
    monkeypatch.setenv("GCFAST_BACKEND", "reference")
    ops.wide_forward(*wide_args())
    assert ops.last_backend("wide_forward") == "reference"
    with ops.backend("cpu"):
        ops.wide_forward(*wide_args())
    assert ops.last_backend("wide_forward") == "cpu"
    monkeypatch.setenv("GCFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"GCFAST_BACKEND must be one of.*'fast'"):
        ops.activation(torch.randn(3))


def test_forcing_is_per_thread():
    seen = {}

    def other():
        ops.activation(torch.randn(3))
        seen["other"] = ops.last_backend("activation")

    with ops.backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == {"other": "cpu"}


def test_half_goes_to_the_reference_and_says_why(caplog):
    dispatch._logged.clear()
    with caplog.at_level(logging.DEBUG, logger="gcfast"):
        for _ in range(2):
            ops.activation(torch.randn(3).bfloat16())
    assert ops.last_backend("activation") == "reference"
    lines = [r.message for r in caplog.records]
    assert lines == ["activation runs on backend reference (cpu serves float32 and float64, got bfloat16)"]


def test_backends_table():
    table = ops.backends()
    for op in table:
        assert table[op]["cpu"] == "" and table.reason(op, "reference") == ""
    assert table.reason("gram_product", "triton") == "this op has no kernel there"
    if not torch.cuda.is_available():
        assert table.reason("activation", "cuda") != ""
        assert re.search(r"activation +cuda +no: ", repr(table))
    assert "threads" in table.notes["cpu"] and "version" in table.notes["triton"]
    with pytest.raises(ValueError, match="op must be one of"):
        ops.last_backend("softmax")


def test_missing_module_is_told_with_its_fix():
    code = (
        "import sys; sys.modules['gcfast._cpu'] = None\n"
        "import torch, gcfast.ops as ops\n"
        "ops.activation(torch.randn(3)); print(ops.last_backend('activation'))\n"
        "print(ops.backends())\n"
        "try:\n"
        "    with ops.backend('cpu'): ops.activation(torch.randn(3))\n"
        "except ops.BackendError as error: print('refused:', error)\n"
    )
    done = children.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference")
    assert "refused: backend 'cpu' was asked for but cannot run activation" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1 and "pip install" in done.stderr
