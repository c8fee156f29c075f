"""What every op promises, whatever backend runs it, and the policy that chooses the backend.

``CALLS`` has one entry an op; an op of ``dispatch.OPS`` that is missing here fails the first test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gcfast import ops
from gcfast.ops import dispatch
from gcfast.ops import rank as _ops_rank

from conftest import Target  # isort: skip


def _on(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).to(device)


def _added(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    ops.add_product(out, a, b, inner=4)
    return out


def _jacobian(out: torch.Tensor, g: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    ops.jacobian_gram(out, g, g, scale, ends=(4, 7))
    return out


def _gradients(out: torch.Tensor, g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    ops.gradient_gram(out, g, a)
    return out


# op -> (differentiable, function, arguments of n rows). Every function calls its op exactly once.
CALLS: dict[str, tuple[bool, Callable, Callable]] = {
    "activation": (True, ops.activation, lambda d, n: (_on(d, n, 6), _on(d, 6))),
    "softmax_residual": (
        True,
        lambda f: ops.softmax_residual(f, torch.arange(len(f), device=f.device) % 5)[0],
        lambda d, n: (_on(d, n, 5),),
    ),
    "softmax_curvature": (True, ops.softmax_curvature, lambda d, n: (_on(d, n, 5), _on(d, n, 5))),
    "gram_error_bound": (False, ops.gram_error_bound, lambda d, n: (_on(d, n, 7),)),
    "wide_forward": (
        True,
        ops.wide_forward,
        lambda d, n: (_on(d, n, 3), _on(d, 8, 3), _on(d, 8), _on(d, 2, 8), _on(d, 2)),
    ),
    "wide_head_grad": (
        False,
        ops.wide_head_grad,
        lambda d, n: (_on(d, n, 3), _on(d, 8, 3), _on(d, 8), _on(d, n, 2)),
    ),
    "wide_gram_product": (
        False,
        ops.wide_gram_product,
        lambda d, n: (_on(d, n, 3), _on(d, 8, 3), _on(d, 8), _on(d, n, 2)),
    ),
    "wide_panel": (False, ops.wide_panel, lambda d, n: (_on(d, n, 3), _on(d, 8, 3), _on(d, 8))),
    "gram_product": (
        False,
        lambda k, x: ops.gram_product(k + k.mT, x),
        lambda d, n: (_on(d, n, n), _on(d, n, 3)),
    ),
    "add_product": (False, _added, lambda d, n: (_on(d, n, 4), _on(d, n, 7), _on(d, 7, 4))),
    "jacobian_gram": (
        False,
        _jacobian,
        lambda d, n: (_on(d, 3 * n, 3 * n), _on(d, n, 3, 2, 7), _on(d, 2, 2 * n, 2 * n)),
    ),
    "gradient_gram": (
        False,
        _gradients,
        lambda d, n: (_on(d, 3 * n, 3 * n), _on(d, n, 3, 2, 7), _on(d, n, 2, 5)),
    ),
    "batched_rank": (
        False,
        lambda a, atol: ops.batched_rank(a, atol, 1e-6 + 0 * atol)[0],
        lambda d, n: (_on(d, n, 5, 3), _on(d, n, dtype=torch.float64).abs()),
    ),
}


def test_every_op_is_here():
    assert set(CALLS) == set(dispatch.OPS)
    for backend, served in dispatch._KERNELS.items():
        assert backend in dispatch.BACKENDS and set(served) <= set(dispatch.OPS)


def supported(op: str, target: Target) -> None:
    if op not in dispatch._KERNELS[target.backend]:
        pytest.skip(f"{op} has no kernel on {target.backend}")


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_backend_asked_for_runs_and_repeats_bit_for_bit(op, target, request):
    supported(op, target)
    _, f, make = CALLS[op]
    args = make(target.device, 9)
    first = f(*args)
    assert dispatch.last_backend(op) == target.backend
    request.getfixturevalue("poison")
    assert torch.equal(f(*args), first)  # whatever lies in fresh memory
    with ops.backend("reference"):
        torch.testing.assert_close(first, f(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_compiles_whole_with_dynamic_shapes(op, target):
    supported(op, target)
    _, f, make = CALLS[op]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 8):
        args = make(target.device, n)
        torch.testing.assert_close(compiled(*args), f(*args))


@pytest.mark.parametrize("op", [op for op, (differentiable, _, _) in CALLS.items() if differentiable])
def test_gradients_are_those_of_the_reference(op, target):
    supported(op, target)
    _, f, make = CALLS[op]
    args = tuple(a.requires_grad_() for a in make(target.device, 4))
    out = f(*args)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), args)
    with ops.backend("reference"):
        want = torch.autograd.grad((f(*args) * weight).sum(), args)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def like(device: str, dtype: torch.dtype, numel: int) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: numel)


@pytest.mark.parametrize(
    "tensor, first",
    [
        (like("cpu", torch.float32, 1 << 20), "cpu"),
        (like("cuda", torch.float64, 1 << 20), "cuda"),
        (like("cuda", torch.float32, 100), "cuda"),
        (like("cuda", torch.float32, 1 << 20), "triton"),
        (like("cuda", torch.bfloat16, 1 << 20), "triton"),
    ],
)
def test_the_policy(tensor, first):
    order = dispatch.preferred("activation", tensor)
    assert order[0] == first and order[-1] == "reference"


def test_the_policy_for_ranks():
    # Triton has no kernel for them.
    assert dispatch.preferred("batched_rank", like("cuda", torch.float32, 1 << 20))[0] == "cuda"
    assert dispatch.preferred("batched_rank", like("cpu", torch.float32, 1 << 20))[0] == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_cuda_kernel_of_ranks_is_given(dtype, monkeypatch):
    """With the CPU kernel in its place: the arguments are its, then scratch memory, a device and a stream."""
    if dispatch.native.cpu is None:
        pytest.skip("needs the CPU kernels")
    seen = []

    def kernel(*args):
        *same, scratch, device, stream = args
        assert scratch and device == 5 and stream == 77
        ctypes.memset(scratch, 0xFF, 8 * (args[1] + 1))  # a number a matrix and one more
        seen.append(getattr(dispatch.native.cpu, f"batched_rank_f{torch.finfo(dtype).bits}")(*same, 1))

    fake = SimpleNamespace(
        batched_rank_limit=lambda device: 8, batched_rank_f32=kernel, batched_rank_f64=kernel
    )
    monkeypatch.setattr(dispatch.native, "cuda", fake)
    monkeypatch.setattr(dispatch, "choose", lambda op, tensor: "cuda")
    monkeypatch.setattr(_ops_rank, "_device_and_stream", lambda a: (5, 77))
    _ops_rank._cuda_limit.cache_clear()
    try:
        a = torch.randn(6, 9, 5, dtype=dtype).mT
        a[2, 0] = a[2, 1]
        a[4] = 0
        zero = torch.zeros(6, dtype=torch.float64)
        rank, lower, upper, least, largest = ops.batched_rank(a, zero, zero + 1e-5)
        assert rank.tolist() == lower.tolist() == upper.tolist() == [5, 5, 4, 5, 0, 5]
        assert bool((least[rank == 5] > 0).all()) and bool((largest[rank > 0] >= least[rank > 0]).all())
        a[3, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="matrix 3 of 6"):
            ops.batched_rank(a, zero, zero + 1e-5)
        assert len(seen) == 2
        large = torch.randn(1, 9, 9, dtype=dtype)  # beyond the limit: no kernel
        assert ops.batched_rank(large, zero[:1], zero[:1] + 1e-9)[0].tolist() == [9] and len(seen) == 2
    finally:
        _ops_rank._cuda_limit.cache_clear()


def test_the_first_usable_backend_runs(monkeypatch):
    """With kernels pretended to be usable or not, the choice follows the policy and the log says why."""
    usable = {"triton", "reference"}
    monkeypatch.setattr(dispatch, "_static_reason", lambda op, b: "" if b in usable else "not built")
    monkeypatch.setattr(dispatch, "_input_reason", lambda op, b, t: "")
    assert dispatch.choose("activation", like("cuda", torch.float64, 10)) == "triton"
    usable.add("cuda")
    assert dispatch.choose("activation", like("cuda", torch.float64, 10)) == "cuda"
    usable -= {"cuda", "triton"}
    assert dispatch.choose("activation", like("cuda", torch.float64, 10)) == "reference"
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="cannot run activation: not built"):
        dispatch.choose("activation", like("cuda", torch.float64, 10))


@pytest.mark.parametrize(
    "archs, capability, served",
    [
        ("80;90a;100", (8, 0), True),
        ("80;90a;100", (8, 9), True),  # machine code of 8.0 runs on 8.9
        ("80;90a;100", (9, 0), True),
        ("80;90a;100", (10, 0), True),
        ("80;90a;100", (12, 0), True),  # from the PTX of the last
        ("80;90a;100", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),  # architecture-specific code serves no other
        ("90a", (8, 0), False),
    ],
)
def test_which_devices_a_cuda_build_serves(archs, capability, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch.native, "cuda_status", lambda: {"archs": archs})
    dispatch._capability_reason.cache_clear()
    try:
        reason = dispatch._capability_reason("cuda", torch.device("cuda", 0))
    finally:
        dispatch._capability_reason.cache_clear()
    assert (reason == "") == served
    if not served:
        assert f"compiled for {archs.replace(';', ', ')}" in reason and "compute capability" in reason
