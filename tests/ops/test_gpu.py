"""What only a GPU shows, for every op and GPU backend: streams, devices, determinism, 2^31 elements."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import children
import conftest
import pytest
import torch
from op_cases import CASES, DTYPES, TOLERANCE, error

from gcfast import ops, reference
from gcfast.ops import dispatch, native

pytestmark = conftest.NEEDS_GPU
PAIRS = [
    pytest.param(case, backend, id=f"{i}-{case.op}-{backend}")
    for i, case in enumerate(CASES)
    for backend in case.backends
]
everything = pytest.mark.parametrize("case, backend", PAIRS)
CUDA = torch.device("cuda")


def checked(case, backend, args, dtype):
    with ops.backend(backend):
        got = case.run(args)
    assert ops.last_backend(case.op) == backend
    for g, w in zip(got, case.expected(args)):
        assert error(g, w) <= TOLERANCE[dtype]
    return got


@everything
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_on_the_current_stream(case, backend, dtype):
    # The inputs are written late on a side stream, by which a launch on another stream would have read NaN.
    args = case.make(257, 129, dtype, CUDA)
    checked(case, backend, args, dtype)  # compiled, and its memory allocated, before the race
    late = [torch.full_like(a, float("nan")) if a.is_floating_point() else a.clone() for a in args]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), ops.backend(backend):
        torch.cuda._sleep(200_000_000)
        for a, b in zip(late, args):
            a.copy_(b)
        got = case.run(tuple(late))
    stream.synchronize()
    for g, w in zip(got, case.expected(args)):
        assert error(g, w) <= TOLERANCE[dtype]


@everything
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_choose_the_device(case, backend, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        got = checked(case, backend, case.make(33, 65, dtype, other), dtype)
        assert all(g.device == other for g in got) and torch.cuda.current_device() == 0


@everything
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(case, backend, dtype):
    args = case.make(507, 252, dtype, CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        with ops.backend(backend):
            first = case.run(args)
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(first, case.run(args)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_a_value_does_not_depend_on_its_place(name, dtype, backend):
    # Tiles are computed again in backward passes: any cut, any alignment must give the same bits.
    values = torch.linspace(-30, 30, 97, dtype=dtype, device=CUDA)
    for order in range(3):
        with ops.backend(backend):
            whole = ops.activation(values.expand(331, 97).contiguous(), activation=name, order=order)
            shifted = ops.activation(values[1:], activation=name, order=order)
            one = torch.cat([ops.activation(v, activation=name, order=order) for v in values.split(1)])
        assert torch.equal(whole, one.expand(331, 97)) and torch.equal(shifted, one[1:])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(2**31 + 5,), (3, 2**30)])
def test_more_elements_than_32_bits_count(shape, backend):
    need = 3 * 4 * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    x = torch.zeros(shape, device=CUDA)
    ends = torch.tensor([1.0, -2.0, 3.0], device=CUDA)
    x.view(-1)[-3:] = ends
    with ops.backend(backend):
        y = ops.activation(x, out=x)
        want = ops.activation(ends)
    assert torch.equal(y.view(-1)[-3:], want)
    assert y.view(-1)[:-3].aminmax() == (y.view(-1)[0], y.view(-1)[0])


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_far_apart(backend):
    stride = 2**30 + 3
    if torch.cuda.mem_get_info()[0] < 13 * stride:
        pytest.skip("needs 13 GiB of free GPU memory")
    store = torch.empty(2 * stride + 40, device=CUDA)
    x = store.as_strided((3, 33), (stride, 1))
    x.copy_(torch.randn(3, 33))
    with ops.backend(backend):
        torch.testing.assert_close(ops.activation(x), reference.activation(x))


@pytest.mark.parametrize("shape", [(3, 5, 33), (3, 33, 40)])  # a warp, and a block
@pytest.mark.parametrize("far", [0, 1, 2])
def test_matrices_rows_and_columns_far_apart(shape, far):
    strides = [33 * 40, 40, 1]
    strides[far] = 2**31 // (shape[far] - 1) + 3
    need = 4 * (sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1)
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    a = torch.empty(need // 4, device=CUDA).as_strided(shape, strides)
    a.copy_(torch.randn(shape))
    a[1, -1] = a[1, 0]
    zero = torch.zeros(3, dtype=torch.float64, device=CUDA)
    with ops.backend("cuda"):
        rank, lower, upper, *_ = ops.batched_rank(a, zero, zero + 1e-5)
    n = shape[1]
    assert rank.tolist() == lower.tolist() == upper.tolist() == [n, n - 1, n]


def test_matrices_of_every_size_up_to_the_limit():
    limit = native.cuda.batched_rank_limit(torch.cuda.current_device())
    assert limit >= 96
    for n in (1, 8, 31, 32, 33, 64, 65, 104, limit - 1, limit):
        for dtype in DTYPES:
            a = torch.randint(-9, 10, (5, n, n + 3), device=CUDA).to(dtype)
            a[1, -1] = a[1, 0]
            a[2] = 0
            a[3] *= 1e-30 if dtype == torch.float32 else 1e-250
            zero = torch.zeros(5, dtype=torch.float64, device=CUDA)
            rtol = zero + n * torch.finfo(dtype).eps
            with ops.backend("cuda"):
                got = ops.batched_rank(a, zero, rtol)
            with ops.backend("cpu"):
                want = ops.batched_rank(a.cpu(), zero.cpu(), rtol.cpu())
            assert torch.equal(got[0].cpu(), want[0]), (n, dtype)
            torch.testing.assert_close(got[3].cpu(), want[3], rtol=0.5, atol=0)
            torch.testing.assert_close(got[4].cpu(), want[4], rtol=1e-3, atol=0)


def test_wrong_architecture_is_named(monkeypatch):
    status = {**native.cuda_status(), "archs": "52;60a"}
    monkeypatch.setattr(native, "cuda_status", lambda: status)
    dispatch._capability_reason.cache_clear()
    try:
        with (
            ops.backend("cuda"),
            pytest.raises(ops.BackendError, match=r"was compiled for 52, 60a .* compute capability"),
        ):
            ops.activation(torch.randn(3, device=CUDA))
    finally:
        dispatch._capability_reason.cache_clear()


def test_a_failing_cuda_call_is_named():
    assert native.cuda is not None
    count = torch.cuda.device_count()
    x = torch.zeros(4, device=CUDA)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(device\) failed: cudaErrorInvalidDevice"):
        native.cuda.activation_f32(x.data_ptr(), 0, 0, x.data_ptr(), 1, 4, 4, 0, 4, 0, 0, 1.0, count, 0)
    with ops.backend("cuda"):  # and leaves nothing behind
        torch.testing.assert_close(ops.activation(x), reference.activation(x))


def test_sanitizer_program():
    program = Path(__file__).resolve().parents[2] / "tools" / "sanitize.py"
    if not program.is_file():
        pytest.skip("needs the source tree")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = children.run([sys.executable, program], env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton: done" in done.stdout and "cuda: done" in done.stdout
