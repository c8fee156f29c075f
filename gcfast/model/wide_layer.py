"""Recognise the wide layer σ(Qz + c) of the theorem in a model.

The model is run once, in evaluation mode, and left as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.model.analytic_body import trace_to_head
from gcfast.model.analytic_ops import activation_verdict
from gcfast.model.analytic_tables import ACTIVATIONS
from gcfast.model.head import VIEW_OPS, Head, describe_module
from gcfast.model.tracing import (
    ModuleCall,
    OpCall,
    evaluating,
    same_memory,
    unwrap,
)


@dataclass(frozen=True)
class WideLayerFound:
    """The layer σ(Qz + c) whose output enters the head.

    `module` takes z, (n, d), as its input: `FeatureTap(model, found.module)` gives it. `name` is the module
    that applies σ, `linear_name` the one that holds Q (m, d) and c (m,); both are the same for a
    `gcfast.WideLayer`.
    """

    name: str
    linear_name: str
    d: int
    m: int
    activation_name: str
    analytic: bool
    polynomial: bool
    module: nn.Module = field(repr=False)


def _wide_layer_class() -> type[nn.Module] | None:
    try:
        from gcfast.nn import WideLayer
    except ImportError:
        return None
    return WideLayer


def wide_activation(
    model: nn.Module, head: Head | nn.Module | str | None, inputs: Any
) -> WideLayerFound | None:
    """The wide layer below the head; None if what enters the head is not σ(Qz + c) with a known σ.

    Q and c are those of an `nn.Linear` or of a `gcfast.WideLayer`; σ may be a module or a function. Nothing
    else may come between Q and the head than views, copies and modules without effect in evaluation mode. An
    `nn.Linear` directly below the head counts as σ = identity, which is a polynomial. What is recognised is
    then recomputed and compared with what entered the head.
    """
    wide = _wide_layer_class()
    record, call = trace_to_head(model, head, inputs, (nn.Linear, wide) if wide else (nn.Linear,))
    below = [c for c in record.calls if c.end <= call.start and c is not call]
    h = call.input
    if not below or not isinstance(below[-1].input, Tensor) or below[-1].input.dim() != 2:
        return None
    layer = below[-1]
    between = [op for op in record.ops[layer.end : call.start] if op.op.split(".")[1] not in VIEW_OPS]
    if wide is not None and isinstance(layer.module, wide):
        if between or not same_memory(layer.output, h):
            return None
        return _of_wide_layer(layer)
    return _of_linear(unwrap(model), layer, between, h)


def _of_wide_layer(layer: ModuleCall) -> WideLayerFound:
    weight, activation = layer.module.weight, str(layer.module.activation)
    assert isinstance(weight, Tensor)
    verdict, _ = activation_verdict(activation)
    m, d = weight.shape
    polynomial = activation in ("identity", "linear", "square")
    return WideLayerFound(
        layer.name, layer.name, d, m, activation, verdict == "analytic", polynomial, layer.module
    )


# activations that torch computes by several operators
_COMPOSED = {nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink"}


def _of_linear(
    model: nn.Module, layer: ModuleCall, between: list[OpCall], h: Tensor
) -> WideLayerFound | None:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    if not layer.plain:
        return None
    with evaluating(model):
        z = nn.functional.linear(layer.input, linear.weight, linear.bias)
        if not between:
            name, activation, verdict, again = layer.name, "identity", "analytic", z
        else:
            owner = model.get_submodule(between[0].module)
            leaf = owner is not model and next(owner.children(), None) is None
            name = between[0].module
            if leaf and type(owner) in _COMPOSED and {op.module for op in between} == {name}:
                activation = _COMPOSED[type(owner)]
                verdict, _ = activation_verdict(activation)
                again = owner(z)
            elif len(between) == 1:
                op = between[0]
                activation, verdict = _activation_of(op), op.verdict
                if activation not in (*ACTIVATIONS, "power") or op.again is None:
                    return None
                again = op.again(z)
                again = again[0] if isinstance(again, tuple) else again
                name = name if leaf else f"{activation} in {describe_module(name)}"
            else:
                return None
    if again.shape != h.shape or not _close(again, h):
        return None
    m, d = linear.weight.shape
    polynomial = activation in ("identity", "square", "power")
    return WideLayerFound(name, layer.name, d, m, activation, verdict == "analytic", polynomial, linear)


def _activation_of(op: OpCall) -> str:
    name = op.op.split(".")[1].strip("_")
    if name == "pow":
        return "power" if op.verdict == "analytic" else name  # a whole exponent
    return {"log_sigmoid_forward": "log_sigmoid", "rrelu_with_noise": "rrelu"}.get(name, name)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
    eps = 64 * max(_eps(a), _eps(b)) * scale
    return bool(((a - b).abs().nan_to_num() <= eps).all())


def _eps(a: Tensor) -> float:
    return torch.finfo(a.dtype).eps
