"""Every public function refuses what it cannot take by an error that names the argument; none hangs.

Each argument of a call that works is replaced in turn by every kind of wrong value. What comes is a result,
where the value is one of the right kind after all, or an error of the kinds that are promised.
"""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gcfast
from gcfast import ops

SECONDS = 20  # no refusal takes so long
N, D, M, C = 6, 4, 9, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(len(shape)), dtype=dtype)


def labels() -> torch.Tensor:
    return torch.arange(N) % C


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), gcfast.WideLayer(5, M), nn.Linear(M, C)).double()


def frozen() -> nn.Module:
    model = network().requires_grad_(False)
    model[-1].requires_grad_(True)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return normal(N, D), labels()


def layer() -> dict[str, Any]:
    return {"z": normal(N, D), "weight": normal(M, D), "bias": normal(M)}


@functools.cache
def jacobians() -> gcfast.LayerJacobians:
    return gcfast.LayerJacobians(network(), normal(N, D), layers="3")


@functools.cache
def cache() -> gcfast.FeatureCache:
    return gcfast.FeatureCache(frozen(), data())


@functools.cache
def certificate() -> gcfast.Certificate:
    return gcfast.certify(network(), data(), loss="cross_entropy")


def two_phase(**changes: Any) -> gcfast.TwoPhase:
    model = network()
    return gcfast.TwoPhase(torch.optim.SGD(model.parameters(), lr=0.1), model, **changes)


def two_phase_arguments() -> dict[str, Any]:
    opt = two_phase(switch_step=3)
    rest = {"switch_step": 3, "head": None, "perturbation": 1e-3, "generator": None, "seed": None}
    return {"base": opt.base, "model": opt.model, **rest}


# name -> (function, the arguments of a call that works, made anew for each call)
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "certify": (
        gcfast.certify,
        lambda: {
            "model_or_features": network(),
            "data": data(),
            "loss": "cross_entropy",
            "head": None,
            "route": None,
            "sharp": None,
            "max_bytes": None,
            "callback": None,
            "checkpoint": None,
            "checkpoint_seconds": 60.0,
        },
    ),
    "certify, features": (
        gcfast.certify,
        lambda: {"model_or_features": normal(N, M), "data": labels(), "loss": "cross_entropy"},
    ),
    "solve_head": (
        gcfast.solve_head,
        lambda: {
            "model_or_features": network(),
            "data_or_targets": data(),
            "loss": "cross_entropy",
            "start": None,
            "target_gap": 1e-2,
            "method": "nearest",
            "weight_decay": 0.0,
            "max_bytes": None,
            "callback": None,
            "head": None,
            "max_iterations": None,
            "generator": None,
            "checkpoint": None,
            "checkpoint_seconds": 60.0,
        },
    ),
    "solve_head, features": (
        gcfast.solve_head,
        lambda: {
            "model_or_features": normal(N, M),
            "data_or_targets": labels(),
            "target_gap": 1e-2,
            "start": (torch.zeros(C, M).double(), torch.zeros(C).double()),
        },
    ),
    "solve_head, gd": (
        gcfast.solve_head,
        lambda: {
            "model_or_features": normal(N, M),
            "data_or_targets": labels(),
            "method": "gd",
            "target_gap": 0.5,
            "weight_decay": 0.0,
            "max_iterations": 3,
        },
    ),
    "solve_head, sgd": (
        gcfast.solve_head,
        lambda: {
            "model_or_features": normal(N, M),
            "data_or_targets": labels(),
            "method": "sgd",
            "target_gap": 0.5,
            "max_iterations": 2,
            "generator": generator(),
        },
    ),
    "plan": (
        gcfast.plan,
        lambda: {
            "model_or_features": network(),
            "data": data(),
            "loss": "cross_entropy",
            "dtype": torch.float32,
            "max_bytes": None,
            "devices": 1,
            "rates": "h100",
        },
    ),
    "plan, sizes": (
        gcfast.plan,
        lambda: {"n": 10, "m": 20, "d": 5, "c": 3, "devices": 2, "rates": gcfast.Rates(1.0, 1.0, 1.0)},
    ),
    "Rates": (gcfast.Rates, lambda: {"f32": 1.0, "f64": 1.0, "memory": 1.0}),
    "matrix_rank": (gcfast.matrix_rank, lambda: {"A": normal(2, 4, 5), "atol": 0.0, "rtol": None}),
    "wide_gram": (gcfast.wide_gram, lambda: {**layer(), "activation": "tanh", "beta": 1.0, "ones": False}),
    "wide_forward": (
        gcfast.wide_forward,
        lambda: {
            **layer(),
            "head_weight": normal(C, M),
            "head_bias": normal(C),
            "activation": "softplus",
            "beta": 1.0,
            "precision": None,
        },
    ),
    "wide_head_grad": (
        gcfast.wide_head_grad,
        lambda: {
            **layer(),
            "residual": normal(N, C),
            "activation": "softplus",
            "beta": 1.0,
            "precision": None,
        },
    ),
    "wide_gram_product": (
        gcfast.wide_gram_product,
        lambda: {**layer(), "r": normal(N, C), "activation": "softplus", "beta": 1.0, "precision": None},
    ),
    "softmax_residual": (
        gcfast.softmax_residual,
        lambda: {"logits": normal(N, C), "target": labels(), "label_smoothing": 0.0, "check_target": True},
    ),
    "softmax_curvature": (gcfast.softmax_curvature, lambda: {"logits": normal(N, C), "v": normal(N, C)}),
    "activation": (
        ops.activation,
        lambda: {
            "x": normal(N, M),
            "bias": normal(M),
            "activation": "tanh",
            "beta": 1.0,
            "order": 0,
            "out": torch.zeros(N, M).double(),
        },
    ),
    "wide_features": (ops.wide_features, lambda: {**layer(), "out": torch.zeros(N, M).double()}),
    "wide_panel": (ops.wide_panel, lambda: {**layer(), "out": torch.zeros(N, M).double()}),
    "abs_products": (ops.abs_products, lambda: {"a": normal(N, M), "left": normal(N), "right": normal(M)}),
    "gram_error_bound": (ops.gram_error_bound, lambda: {"h": normal(N, M)}),
    "gram_product": (ops.gram_product, lambda: {"gram": torch.eye(N).double(), "x": normal(N, C)}),
    "add_product": (
        ops.add_product,
        lambda: {
            "out": torch.zeros(N, N).double(),
            "a": normal(N, M),
            "b": normal(M, N),
            "alpha": 1.0,
            "inner": 4,
            "lower": False,
        },
    ),
    "batched_rank": (
        ops.batched_rank,
        lambda: {
            "a": normal(2, 4, 5),
            "atol": torch.zeros(2).double(),
            "rtol": torch.zeros(2).double(),
            "check_tolerance": True,
        },
    ),
    "jacobian_gram": (
        ops.jacobian_gram,
        lambda: {
            "out": torch.zeros(N, N).double(),
            "g": normal(N, 1, 2, D),
            "h": normal(N, 1, 2, D),
            "scale": torch.ones(1, 2 * N, 2 * N).double(),
            "ends": None,
            "lower": False,
        },
    ),
    "WideLayer": (
        gcfast.WideLayer,
        lambda: {"d": D, "m": M, "activation": "tanh", "beta": 1.0, "device": None, "dtype": None},
    ),
    "WideHead": (gcfast.WideHead, lambda: {"wide": gcfast.WideLayer(D, M), "head": nn.Linear(M, C)}),
    "WideFeatures": (
        gcfast.WideFeatures,
        lambda: {"z": normal(N, D), "layer": (normal(M, D), normal(M)), "activation": "tanh", "beta": 1.0},
    ),
    "FeatureCache": (
        gcfast.FeatureCache,
        lambda: {
            "model": frozen(),
            "data": data(),
            "head": None,
            "store": "auto",
            "device": None,
            "max_bytes": None,
        },
    ),
    "FeatureCache.batches": (
        lambda **changes: list(cache().batches(**changes)),
        lambda: {"batch_size": 4, "generator": None, "shuffle": True, "drop_last": False},
    ),
    "FeatureCache.check": (
        lambda **changes: cache().check(**changes),
        lambda: {"model": None},
    ),
    "find_head": (gcfast.find_head, lambda: {"model": network(), "inputs": normal(2, D), "head": None}),
    "widen": (
        gcfast.widen,
        lambda: {
            "model": nn.Sequential(nn.Linear(D, C)),
            "n_samples": N,
            "width": 9,
            "activation": "tanh",
            "beta": 1.0,
            "inputs": normal(2, D, dtype=torch.float32),
            "head": None,
            "generator": None,
        },
    ),
    "TwoPhase": (
        gcfast.TwoPhase,
        two_phase_arguments,
    ),
    "TwoPhase.load_state_dict": (
        lambda **changes: two_phase(switch_step=3).load_state_dict(**changes),
        lambda: {"state_dict": two_phase(switch_step=3).state_dict()},
    ),
    "TwoPhase.add_param_group": (
        lambda **changes: two_phase(switch_step=3).add_param_group(**changes),
        lambda: {"param_group": {"params": []}},
    ),
    "LayerJacobians": (
        gcfast.LayerJacobians,
        lambda: {"model": network(), "x": normal(N, D), "layers": None, "max_bytes": None},
    ),
    "LayerJacobians.jvp": (
        lambda v: jacobians().jvp(v),
        lambda: {"v": {"3.weight": normal(C, M), "3.bias": normal(C)}},
    ),
    "LayerJacobians.vjp": (
        lambda u: jacobians().vjp(u),
        lambda: {"u": normal(N, C)},
    ),
    "LayerJacobians.sketch": (
        lambda **changes: jacobians().sketch(**changes),
        lambda: {"k": 2, "seed": 0, "method": "gaussian", "layers": None},
    ),
    "LayerJacobians.gram": (
        lambda **changes: jacobians().gram(**changes),
        lambda: {"layers": None, "other": None, "per_layer": False, "trace": False},
    ),
    "LayerJacobians.diag": (
        lambda **changes: jacobians().diag(**changes),
        lambda: {"layers": None, "per_layer": False},
    ),
    "LayerJacobians.matvec": (lambda v: jacobians().matvec(v), lambda: {"v": normal(N, C)}),
    "TwoPhase.step": (lambda closure: two_phase(switch_step=3).step(closure), lambda: {"closure": None}),
    "reset_parameters": (gcfast.WideLayer(D, M).reset_parameters, lambda: {"generator": None}),
    "trainability": (
        gcfast.trainability,
        lambda: {
            "model": network(),
            "x": normal(N, D),
            "y": labels(),
            "loss": "cross_entropy",
            "layers": None,
            "dtype": torch.float64,
            "max_bytes": None,
        },
    ),
    "backend": (lambda **changes: gcfast.backend(**changes).__enter__(), lambda: {"name": "reference"}),
    "last_backend": (ops.last_backend, lambda: {"op": "activation"}),
    "steps_to": (lambda **changes: certificate().steps_to(**changes), lambda: {"eps": 1e-3}),
}

# what a message may call the argument
ALSO = {
    "model_or_features": "model|features|z|targets|start",
    "data_or_targets": "data|targets|inputs",
    "data": "data|targets|inputs",
    "n_samples": "n_samples|width",
    "state_dict": "state_dict|the state",
    "param_group": r"param_group|param_groups\[1\]",
    "base": r"base|param_groups",
    "model": r"model|param_groups|data|x",
    "inputs": "inputs|head",
    "layer": "layer|weight|bias|z",
    "x": "x|model",
    "y": "y|targets",
    "start": "start|weight|bias",
    "z": "z|out",
    "gram": "gram|x",
    "other": "other|x",
}


def cut_storage() -> torch.Tensor:
    """What is left is less than the tensor is."""
    value = torch.zeros(N, M).double()
    value.untyped_storage().resize_(8)
    return value


class WithoutRepr:
    def __repr__(self) -> str:
        raise RuntimeError("nobody needs this in a message")


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "seven": lambda: 7,
    "huge": lambda: 10**30,
    "beyond floats": lambda: 10**400,
    "half": lambda: 0.5,
    "minus half": lambda: -0.5,
    "tiny": lambda: 5e-324,
    "1e308": lambda: 1e308,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "complex": lambda: 1j,
    "numpy int": lambda: np.int64(3),
    "numpy float": lambda: np.float64(0.5),
    "string": lambda: "nonsense",
    "empty string": lambda: "",
    "bytes": lambda: b"x",
    "list": lambda: [],
    "list of numbers": lambda: [1, 2],
    "tuple": lambda: (),
    "pair": lambda: (1, 2),
    "dict": dict,
    "set": set,
    "object": object,
    "class": lambda: int,
    "function": lambda: lambda *args, **kwargs: None,
    "iterator": lambda: iter([1, 2]),
    "module": lambda: nn.Linear(2, 2),
    "loss module": lambda: nn.L1Loss(),
    "layer": lambda: gcfast.WideLayer(3, 5),
    "loader": lambda: DataLoader(TensorDataset(torch.zeros(3, 2)), batch_size=2),
    "dataset": lambda: TensorDataset(torch.zeros(3, 2), torch.zeros(3)),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
    "generator": generator,
    "dtype": lambda: torch.float16,
    "device": lambda: torch.device("cpu"),
    "meta device": lambda: torch.device("meta"),
    "array": lambda: np.zeros((2, 3)),
    "array of objects": lambda: np.array([None, "x"]),
    "scalar tensor": lambda: torch.tensor(1.0),
    "vector": lambda: torch.zeros(3),
    "matrix": lambda: torch.zeros(2, 3),
    "cube": lambda: torch.zeros(2, 3, 4),
    "no rows": lambda: torch.zeros(0, 4).double(),
    "no columns": lambda: torch.zeros(N, 0).double(),
    "long": lambda: torch.zeros(N, M, dtype=torch.long),
    "bool tensor": lambda: torch.zeros(N, M, dtype=torch.bool),
    "complex tensor": lambda: torch.zeros(N, M, dtype=torch.complex128),
    "half tensor": lambda: torch.zeros(N, M, dtype=torch.float16),
    "nan tensor": lambda: torch.full((N, M), float("nan")).double(),
    "meta tensor": lambda: torch.zeros(N, M, device="meta").double(),
    "sparse tensor": lambda: torch.eye(N).to_sparse().double(),
    "gradient": lambda: torch.zeros(N, M, dtype=torch.float64, requires_grad=True),
    "expanded": lambda: torch.zeros(1, M, dtype=torch.float64).expand(N, M),
    "cut storage": cut_storage,
    "negated view": lambda: torch.zeros(N, M, dtype=torch.complex128).conj().imag,
    "nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)]),
    "float8": lambda: torch.zeros(N, M).to(torch.float8_e4m3fn),
    "uint64": lambda: torch.zeros(N, dtype=torch.uint64),
    "no features, no rows": lambda: torch.zeros(0, 0).double(),
    "numpy int of a byte": lambda: np.uint8(3),
    "array of another byte order": lambda: np.zeros((N, M), dtype=">f8"),
    "array turned over": lambda: np.zeros((N, M))[::-1],
    "long doubles": lambda: np.zeros((N, M), dtype=np.longdouble),
    "masked array": lambda: np.ma.masked_array(np.zeros((N, M)), mask=np.ones((N, M))),
    "pair of a number": lambda: (normal(N, D), 3),
    "no units": lambda: nn.Sequential(nn.Linear(D, 0), nn.Tanh(), nn.Linear(0, C)).double(),
    "module without parameters": nn.Tanh,
    "lazy module": lambda: nn.LazyLinear(3),
    "meta module": lambda: nn.Linear(D, C, device="meta"),
    "path with a zero byte": lambda: "a\0b",
    "without a repr": lambda: WithoutRepr(),
    "2^61": lambda: 2**61,
}

# what can be called is right for these, and an error of its own is its own
FUNCTIONS = ("callback", "closure")
PROMISED = ("the cache is stale", "cannot be differentiated")  # RuntimeErrors by their docstrings
REFUSALS = (TypeError, ValueError, MemoryError, RuntimeError)


class Hangs(BaseException):
    """The call took too long."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise Hangs(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(call: Callable[..., Any], arguments: dict[str, Any], name: str) -> str | None:
    """What is wrong with the way in which the call takes its arguments, of which ``name`` is wrong."""
    try:
        with at_most(SECONDS):
            call(**arguments)
    except REFUSALS as error:
        named = re.search(rf"(?<![\w.])({ALSO.get(name, re.escape(name))})(?!\w)", str(error))
        if named and (type(error) is not RuntimeError or any(words in str(error) for words in PROMISED)):
            return None
        return f"{type(error).__name__}: {str(error)[:160]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    return None


def faults(name: str) -> list[str]:
    call, valid = CALLS[name]
    found = []
    for argument in valid():
        for kind, make in WRONG.items():
            if argument in FUNCTIONS and callable(make()):
                continue
            # torch cannot print it into the message of its own, and leaves vmap unusable when that fails
            if kind == "cut storage" and not isinstance(valid()[argument], torch.Tensor):
                continue
            what = fault(call, {**valid(), argument: make()}, argument)
            if what is not None:
                found.append(f"{name}({argument}={kind}): {what}")
    return found


@pytest.mark.parametrize("name", CALLS)
def test_the_call_works(name):
    call, valid = CALLS[name]
    call(**valid())


@pytest.mark.parametrize("name", CALLS)
def test_wrong_values_are_refused_by_name(name):
    found = faults(name)
    assert not found, "\n".join(found)
