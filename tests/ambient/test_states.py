"""Every public call gives under every ambient state of torch what it gives without, or names the state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.eager_transforms import grad_increment_nesting

import gcfast

N, D, M, C = 12, 4, 20, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def labels() -> Tensor:
    return torch.arange(N, device="cpu", dtype=torch.int64) % C


def network() -> nn.Module:
    """Made under no state at all: what a user has trained elsewhere."""
    model = nn.Sequential(
        nn.Linear(D, 5, device="cpu", dtype=torch.float32),
        nn.Tanh(),
        gcfast.WideLayer(5, M, device="cpu", dtype=torch.float32),
        nn.Linear(M, C, device="cpu", dtype=torch.float32),
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i) / p.shape[-1] ** 0.5)
    return model


def frozen() -> nn.Module:
    model = network().requires_grad_(False)
    model[-1].requires_grad_(True)
    return model


def data() -> tuple[Tensor, Tensor]:
    return normal(N, D, seed=9), labels()


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return normal(N, D, dtype=dtype), normal(M, D, seed=1, dtype=dtype), normal(M, seed=2, dtype=dtype)


def certificate(found: gcfast.Certificate) -> dict[str, Any]:
    return {**found.to_dict(), "assumptions": [a.name for a in found.assumptions]}


def solution(found: gcfast.HeadSolution) -> tuple[Any, ...]:
    return found.weight, found.bias, found.loss, found.gap, found.converged


def cached(model: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    cache = gcfast.FeatureCache(model, given)
    generator = torch.Generator("cpu").manual_seed(0)
    batches = [z.clone() for z, _ in cache.batches(5, generator=generator)]
    with torch.autocast("cpu", enabled=False):  # the head is the user's to call
        return cache.features, cache.targets, cache.head(cache.features), batches


def switched(model: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """The switch, through a checkpoint; steps are the caller's own, who asks for their gradients."""
    opt = gcfast.TwoPhase(torch.optim.SGD(model.parameters(), lr=0.1), model, None, seed=0)
    opt.switch()
    other = network()
    again = gcfast.TwoPhase(torch.optim.SGD(other.parameters(), lr=0.1), other, None)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(opt.state_dict())
    trained = [p.requires_grad for p in other.parameters()]
    return *(p.detach().clone() for p in other.parameters()), trained, again.phase


def jacobians(model: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    j = gcfast.LayerJacobians(model, given[0])
    return j.gram(), j.diag(), j.sketch(2), j.vjp(normal(N, C))["3.weight"]


def widened(model: nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    base = nn.Sequential(nn.Linear(D, C, device="cpu", dtype=torch.float32))
    generator = torch.Generator("cpu").manual_seed(3)
    return tuple(p.detach().clone() for p in gcfast.widen(base, N, generator=generator).parameters())


Call = Callable[[nn.Module, tuple[Tensor, Tensor]], Any]
# name -> (what is called, the model it is given)
CALLS: dict[str, tuple[Call, Callable[[], nn.Module]]] = {
    "certify": (lambda m, d: certificate(gcfast.certify(m, d, loss="cross_entropy")), network),
    "certify, theorem": (lambda m, d: certificate(gcfast.certify(m, d, route="theorem")), network),
    "certify, features": (lambda m, d: certificate(gcfast.certify(normal(N, M))), network),
    "certify, made anew": (
        lambda m, d: certificate(gcfast.certify(gcfast.WideFeatures(layer()[0], layer()[1:]))),
        network,
    ),
    "solve_head": (lambda m, d: solution(gcfast.solve_head(m, d, target_gap=1e-3)), network),
    "solve_head, mse": (
        lambda m, d: solution(gcfast.solve_head(normal(N, M), normal(N, 2), loss="mse", method="exact")),
        network,
    ),
    "solve_head, sgd": (
        lambda m, d: solution(gcfast.solve_head(m, d, method="sgd", max_iterations=3, target_gap=0.1)),
        network,
    ),
    "plan": (lambda m, d: str(gcfast.plan(m, d, rates="h100", max_bytes=10**9)), network),
    "FeatureCache": (cached, frozen),
    "TwoPhase": (switched, network),
    "find_head": (lambda m, d: gcfast.find_head(m, d[0]).name, network),
    "widen": (widened, network),
    "LayerJacobians": (jacobians, network),
    "trainability": (lambda m, d: gcfast.trainability(m, *d).to_dict(), network),
    "matrix_rank": (lambda m, d: tuple(vars(gcfast.matrix_rank(normal(3, 5, 7))).values()), network),
    "matrix_rank, large": (lambda m, d: tuple(vars(gcfast.matrix_rank(normal(300, 310))).values()), network),
    "wide_gram": (lambda m, d: tuple(gcfast.wide_gram(*layer())), network),
    "wide_forward": (lambda m, d: gcfast.wide_forward(*layer(), normal(C, M)), network),
    "softmax_residual": (lambda m, d: gcfast.softmax_residual(normal(N, C), labels()), network),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # whatever is made without a device on it is of no use
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def reduced_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# name -> (the state, whether results are the same to the bit, words of an error that names the state)
STATES: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[Any]], bool, str]] = {
    "no_grad": (torch.no_grad, True, "no_grad"),
    "inference_mode": (torch.inference_mode, True, "inference_mode"),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), False, "autocast"),
    "default dtype float64": (lambda: default_dtype(torch.float64), True, "default dtype"),
    "default dtype bfloat16": (lambda: default_dtype(torch.bfloat16), True, "default dtype"),
    "default dtype float16": (lambda: default_dtype(torch.float16), True, "default dtype"),
    "default device": (default_device, True, "default device"),
    "deterministic": (deterministic, True, "deterministic"),
    "torch.func": (grad_increment_nesting, True, "torch.func"),
    "reduced products": (reduced_products, False, "precision"),
}


def plain(value: Any) -> list[Any]:
    """Numbers and tensors of a result, in order, without what a clock says."""
    if isinstance(value, dict):
        return [x for k, v in value.items() if k not in ("reason",) for x in plain(v)]
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in plain(v)]
    return [value]


def assert_same(found: Any, expected: Any, exact: bool, own_dtype: bool) -> None:
    for a, b in zip(plain(found), plain(expected), strict=True):
        if isinstance(a, Tensor):
            assert a.device == b.device and (a.dtype == b.dtype or own_dtype)
            if exact:
                assert torch.equal(a, b) or bool((a.isnan() & b.isnan()).any())
            else:
                torch.testing.assert_close(a.to(b.dtype), b, rtol=0.1, atol=0.05)
        elif isinstance(a, float) and not exact:
            assert a == pytest.approx(b, rel=0.5, abs=0.1)
        else:
            assert a == b or a != a


DRAWS = ("TwoPhase", "widen")  # whose models are made within


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_same_in_every_state(name, state):
    call, make = CALLS[name]
    expected = call(make(), data())
    enter, exact, words = STATES[state]
    model, given = make(), data()  # made outside, as by somebody who evaluates a trained model
    torch.manual_seed(0)
    before = torch.get_rng_state()
    try:
        with enter():
            found = call(model, given)
            assert torch.equal(torch.get_rng_state(), before) or name in DRAWS
    except (TypeError, ValueError, RuntimeError) as error:
        assert words in str(error), error
        return
    # products are cast by autocast as those of nn.Linear are
    assert_same(found, expected, exact, own_dtype=name == "wide_forward" and state == "autocast")


def test_a_model_with_an_autocast_of_its_own_is_served():
    """As libraries for mixed precision prepare it: half precision inside, float32 outside."""

    def prepared(model):
        whole = model.forward

        def forward(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return whole(*args).float()

        model.forward = forward
        return model

    assert gcfast.find_head(prepared(network()), data()[0]).name == "3"
    cert = gcfast.certify(prepared(network()), data(), loss="cross_entropy")
    assert cert.status == "holds" and cert.route == "direct"
    model = prepared(network())
    assert "forward of the model is replaced" in gcfast.certify(model, data(), route="theorem").reason
    solution = gcfast.solve_head(model, data(), target_gap=1e-3)
    assert solution.converged and solution.weight.dtype == torch.float32
    assert torch.equal(model[3].weight, solution.weight)
    cache = gcfast.FeatureCache(prepared(frozen()), data())
    torch.testing.assert_close(
        cache.head(cache.features), prepared(frozen())(data()[0]), rtol=0.05, atol=0.05
    )
    assert gcfast.LayerJacobians(prepared(network()), data()[0]).gram().isfinite().all()
    with pytest.raises(ValueError, match="x: the model cannot be run on this"):
        gcfast.trainability(prepared(network()), *data())  # a copy in float64, whose forward is the old one's
