"""What a model is made of: its head, what enters the head, and by which operators.

`find_head` names the last affine layer; `FeatureTap` gives the features that enter it;
`analyticity` lists the operators that make these features, with a verdict on each; `wide_activation`
recognises the wide layer σ(Qz + c) of the theorem. All of them run the model in evaluation mode and leave it
as it was.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from gcfast._analytic_ops import ACTIVATIONS, Verdict, activation_verdict
from gcfast._head import COPIES, Head, HeadError, find_head, head_of_trace, place
from gcfast._trace import (
    ModuleCall,
    OpCall,
    Trace,
    call_arguments,
    copy_tensors,
    evaluating,
    keeping_buffers,
    keeping_random_state,
    same_memory,
    trace,
    unwrap,
)


class FeatureTap:
    """Context in which a call gives what enters `module` together with the model's output.

    `module` is a `Head`, a module or its qualified name. Each call runs one forward pass, in evaluation mode
    and without gradients, and returns `(h, output)`; `h` (batch, m) is a copy. Training flags and torch's
    random state are given back after each call, buffers and hooks when the context is left, by an exception
    too. Calls may be mixed with other work, but not with training the model.

    >>> with FeatureTap(model, find_head(model)) as tap:                      # doctest: +SKIP
    ...     features = torch.cat([tap(x)[0] for x, _ in loader])
    """

    def __init__(self, model: nn.Module, module: Head | nn.Module | str) -> None:
        self.model = unwrap(model)
        if isinstance(module, Head):
            module = module.module
        for name, candidate in self.model.named_modules():
            if candidate is module or name == module:
                self.name, self.module = name, candidate
                break
        else:
            raise ValueError(f"module: {module!r} is not a module of the model")
        self._seen: list[Any] = []
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise RuntimeError("this FeatureTap is open already")
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_buffers(self.model))
            handle: RemovableHandle = self.module.register_forward_pre_hook(self._note, with_kwargs=True)
            stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        # a copy, for the model may go on to change it in place
        self._seen.append(x.detach().clone() if isinstance(x, Tensor) else x)

    def __call__(self, inputs: Any) -> tuple[Tensor, Any]:
        """What enters the module, and the model's output, for one batch of `inputs` (as for `find_head`)."""
        if self._stack is None:
            raise RuntimeError(
                "open the FeatureTap first: with FeatureTap(model, module) as tap: tap(inputs)"
            )
        args, kwargs = copy_tensors(call_arguments(inputs))
        try:
            with evaluating(self.model), keeping_random_state(self.model):
                output = self.model(*args, **kwargs)
            seen = self._seen
        finally:
            self._seen = []
        if len(seen) != 1:
            raise HeadError(f"{place(self.name)} is applied {len(seen)} times in one forward pass, not once")
        if not isinstance(seen[0], Tensor) or seen[0].dim() != 2:
            shape = tuple(seen[0].shape) if isinstance(seen[0], Tensor) else type(seen[0]).__name__
            raise HeadError(f"{place(self.name)} receives {shape}; it must receive a (batch, m) tensor")
        return seen[0], output


@dataclass(frozen=True)
class Finding:
    """One operator on the way to the head.

    `module` is the qualified name of the innermost module that applied it, "" for the model's own forward.
    """

    op: str
    module: str
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.op} in {place(self.module)}: {self.verdict} ({self.reason})"


def analyticity(model: nn.Module, head: Head | nn.Module | str | None, inputs: Any) -> list[Finding]:
    """Every operator applied before the head, with a verdict on each: is it real analytic?

    One forward pass is watched at the level of dispatched operators, so that functional calls and in-place
    forms are seen as well as modules. What acts on the data alone, and not on anything computed from a
    weight, is a constant as far as the weights are concerned, and counts as analytic. "ties": analytic
    except on a set such as equal arguments of a maximum, or outside an open domain; "unknown": no rule,
    listed by name. Each pair of operator and module appears once, with the worst verdict it got, in the
    order of the forward pass.

    `head=None` finds the head from the same pass.
    """
    record, call = _trace_to_head(model, head, inputs)
    return _findings(record.ops[: call.start])


_WORSE: dict[Verdict, int] = {"analytic": 0, "ties": 1, "unknown": 2, "not analytic": 3}


def _findings(ops: list[OpCall]) -> list[Finding]:
    found: dict[tuple[str, str], Finding] = {}
    for op in ops:
        old = found.get((op.op, op.module))
        if old is None or _WORSE[op.verdict] > _WORSE[old.verdict]:
            found[op.op, op.module] = Finding(op.op, op.module, op.verdict, op.reason)
    return list(found.values())


def _trace_to_head(
    model: nn.Module,
    head: Head | nn.Module | str | None,
    inputs: Any,
    watch: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> tuple[Trace, ModuleCall]:
    model = unwrap(model)
    chosen = None if head is None else find_head(model, head=head)
    record = trace(model, *call_arguments(inputs), watch=watch)
    found = head_of_trace(model, record, chosen)
    return record, next(c for c in record.calls if c.module is found.module)


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
        from gcfast.wide import WideLayer
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
    record, call = _trace_to_head(model, head, inputs, (nn.Linear, wide) if wide else (nn.Linear,))
    below = [c for c in record.calls if c.end <= call.start and c is not call]
    h = call.input
    if not below or not isinstance(below[-1].input, Tensor) or below[-1].input.dim() != 2:
        return None
    layer = below[-1]
    between = [op for op in record.ops[layer.end : call.start] if op.op.split(".")[1] not in COPIES]
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
                name = name if leaf else f"{activation} in {place(name)}"
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
