"""Recognise the wide layer σ(Qz + c) of the theorem in a model.

The model is run once, in evaluation mode, and left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from gcfast import ops
from gcfast.model.agreement import first_difference
from gcfast.model.analytic_body import trace_to_head
from gcfast.model.analytic_ops import activation_verdict
from gcfast.model.analytic_tables import ACTIVATIONS
from gcfast.model.free_weights import alteration, constraint
from gcfast.model.head import VIEW_OPS, Head, describe_module
from gcfast.model.tracing import (
    ModuleCall,
    OpCall,
    Trace,
    evaluating,
    same_memory,
    unwrap,
)
from gcfast.nn import WideLayer


@dataclass(frozen=True)
class WideLayerFound:
    """The layer σ(Qz + c) whose output enters the head.

    `module` takes z, (n, d), as its input: `FeatureTap(model, found.module)` gives it. `name` is the module
    that applies σ, `linear_name` the one that holds Q (m, d) and, where there are `thresholds`, c (m,); both
    are the same for a `gcfast.WideLayer`.

    `altered`: why the layer may compute something else, or from other weights, than its class says; `caveat`:
    that, or why its weights may not vary freely within the model. Both None where nothing speaks against it.
    """

    name: str
    linear_name: str
    d: int
    m: int
    activation_name: str
    analytic: bool
    polynomial: bool
    module: nn.Module = field(repr=False)
    formula: Callable[[Tensor], Tensor] = field(repr=False)
    thresholds: bool = True
    altered: str | None = None
    caveat: str | None = None

    @property
    def recomputable(self) -> bool:
        """Whether its features may be made anew from z by gcfast's own kernels, in the place of the model."""
        return type(self.module) is WideLayer and self.altered is None

    def difference(self, z: Tensor, h: Tensor, first: int = 0, columns: Tensor | None = None) -> str | None:
        """The sample for which h (k, m), what entered the head, is not σ(Qz + c) to rounding; None: all are.

        z (k, d) entered the layer; ``first`` is the number of the first of the k samples. ``columns``: of Q
        and c, where h (k, len(columns)) has these alone.
        """
        layer: Any = self.module
        with _columns(layer, columns), evaluating(layer):
            steep = self.activation_name in ("exp", "square", "power")
            row = first_difference(self.formula, z, h, layer.weight, layer.bias, steep)
        if row is None:
            return None
        formula = f"{self.activation_name}(Q z{' + c' if self.thresholds else ''}) of {self.name!r}"
        return f"for sample {first + row} what enters the head is not {formula}"

    def narrowed(self, head: Head, columns: Tensor) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the model has these units of the layer alone, and its head the weights for them.

        So a pass shows what the model makes of some columns of the features where all would be too many.
        """
        return _columns(self.module, columns, head.module)


@contextlib.contextmanager
def _columns(layer: nn.Module, columns: Tensor | None, head: nn.Module | None = None) -> Iterator[None]:
    if columns is None:
        yield
        return
    swapped = [(layer, "weight", 0), (layer, "bias", 0), *([] if head is None else [(head, "weight", 1)])]
    kept = [(module, key, module._parameters[key]) for module, key, _ in swapped]
    try:
        for module, key, axis in swapped:
            whole = module._parameters[key]
            if whole is not None:
                part = whole.detach().index_select(axis, columns)
                module._parameters[key] = nn.Parameter(part, requires_grad=False)
        yield
    finally:
        for module, key, whole in kept:
            module._parameters[key] = whole


def wide_activation(
    model: nn.Module, head: Head | nn.Module | str | None, inputs: Any
) -> WideLayerFound | None:
    """The wide layer below the head; None if what enters the head is not σ(Qz + c) with a known σ.

    Q and c are those of an `nn.Linear` or of a `gcfast.WideLayer`; σ may be a module or a function. Nothing
    else may come between Q and the head than views, copies and modules without effect in evaluation mode. An
    `nn.Linear` directly below the head counts as σ = identity, which is a polynomial. What is recognised is
    then recomputed and compared with what entered the head.
    """
    record, call = trace_to_head(model, head, inputs, (nn.Linear, WideLayer))
    below = [c for c in record.calls if c.end <= call.start and c is not call]
    h = call.input
    if not below or not isinstance(below[-1].input, Tensor) or below[-1].input.dim() != 2:
        return None
    layer = below[-1]
    if sum(c.module is layer.module for c in record.calls) > 1:
        return None  # what enters it the second time depends on its weights
    between = [op for op in record.ops[layer.end : call.start] if op.op.split(".")[1] not in VIEW_OPS]
    if isinstance(layer.module, WideLayer):
        if between or not same_memory(layer.output, h):
            return None
        return _of_wide_layer(unwrap(model), layer, record)
    return _of_linear(unwrap(model), layer, between, h, record)


def _of_wide_layer(model: nn.Module, call: ModuleCall, record: Trace) -> WideLayerFound:
    layer = call.module
    assert isinstance(layer, WideLayer)
    verdict, _ = activation_verdict(layer.activation)
    m, d = layer.weight.shape
    altered = alteration(layer)
    return WideLayerFound(
        name=call.name,
        linear_name=call.name,
        d=d,
        m=m,
        activation_name=layer.activation,
        analytic=verdict == "analytic",
        polynomial=False,
        module=layer,
        formula=partial(_wide, layer),
        altered=altered,
        caveat=altered or constraint(model, layer, record),
    )


def _wide(layer: WideLayer, z: Tensor) -> Tensor:
    """What a WideLayer computes, in the dtype of z: a model may use autocast of its own."""
    pre = nn.functional.linear(z, layer.weight.to(z.dtype))
    return ops.activation(pre, layer.bias.to(z.dtype), activation=layer.activation, beta=layer.beta)


# activations that torch computes by several operators
_COMPOSED = {
    nn.Softsign: ("softsign", nn.functional.softsign),
    nn.Tanhshrink: ("tanhshrink", nn.functional.tanhshrink),
}


def _of_linear(
    model: nn.Module, layer: ModuleCall, between: list[OpCall], h: Tensor, record: Trace
) -> WideLayerFound | None:
    linear = layer.module
    assert isinstance(linear, nn.Linear)
    if not layer.plain:
        return None

    def affine(z: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.to(z.dtype)
        return nn.functional.linear(z, linear.weight.to(z.dtype), bias)

    def apply(function: Callable[[Tensor], Any], z: Tensor) -> Tensor:
        out = function(affine(z))
        return out[0] if isinstance(out, tuple) else out

    altered = alteration(linear)
    with evaluating(model):
        if not between:
            name, activation, verdict, formula = layer.name, "identity", "analytic", affine
        else:
            owner = model.get_submodule(between[0].module)
            leaf = owner is not model and next(owner.children(), None) is None
            name = between[0].module
            if leaf and type(owner) in _COMPOSED and {op.module for op in between} == {name}:
                activation, function = _COMPOSED[type(owner)]
                verdict, _ = activation_verdict(activation)
                formula = partial(apply, function)
            elif len(between) == 1:
                op = between[0]
                activation, verdict = _activation_of(op), op.verdict
                if activation not in (*ACTIVATIONS, "power") or op.again is None:
                    return None
                formula = partial(apply, op.again)
                name = name if leaf else f"{activation} in {describe_module(name)}"
            else:
                return None
            if leaf and altered is None:
                altered = alteration(owner)
    m, d = linear.weight.shape
    found = WideLayerFound(
        name=name,
        linear_name=layer.name,
        d=d,
        m=m,
        activation_name=activation,
        analytic=verdict == "analytic",
        polynomial=activation in ("identity", "square", "power"),
        module=linear,
        formula=formula,
        thresholds=linear.bias is not None,
        altered=altered,
        caveat=altered or constraint(model, linear, record),
    )
    return found if found.difference(layer.input, h) is None else None


def _activation_of(op: OpCall) -> str:
    name = op.op.split(".")[1].strip("_")
    if name == "pow":
        return "power" if op.verdict == "analytic" else name  # a whole exponent
    return {"log_sigmoid_forward": "log_sigmoid", "rrelu_with_noise": "rrelu"}.get(name, name)
