"""The head of a model: the last affine layer, an `nn.Linear` whose output is the model's output.

Phase two trains the head alone, and is convex only if the model is affine in it: a model of which this cannot
be said is refused, by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.model.agreement import first_difference
from gcfast.model.analytic_tables import names
from gcfast.model.tracing import (
    ModuleCall,
    Trace,
    call_arguments,
    output_tensors,
    same_memory,
    share_memory,
    trace,
    unwrap,
)


class HeadError(ValueError):
    """The model has no head in the sense of this package; the message says why."""


class AmbiguousHeadError(HeadError):
    """The head cannot be told from the structure of the model alone."""


@dataclass(frozen=True)
class Head:
    """The last affine layer of a model. A head without bias has `bias` None."""

    name: str
    module: nn.Linear

    @property
    def in_features(self) -> int:
        """Width m of the layer below."""
        return self.module.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number of outputs C."""
        return self.module.weight.shape[0]

    @property
    def weight(self) -> nn.Parameter:
        """The (C, m) weight."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The (C,) bias, None where the layer has none."""
        return cast("nn.Parameter | None", self.module.bias)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, where there is one, bias."""
        return [p for p in (self.weight, self.bias) if p is not None]

    def difference(self, h: Tensor, output: Tensor, first: int = 0) -> str | None:
        """The sample for which the output (k, C) is not W h + b to rounding; None: it is for all of h (k, m).

        ``first`` is the number of the first of the k samples.
        """
        row = first_difference(self.formula, h, output, self.weight, self.bias)
        return (
            None if row is None else f"for sample {first + row} the output is not W h + b of the head {self}"
        )

    def formula(self, h: Tensor) -> Tensor:
        """W h + b in the dtype of h, whatever hooks and subclasses would make of it."""
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return nn.functional.linear(h, self.weight.to(h.dtype), bias)

    def __str__(self) -> str:
        return _describe(self.name, self.module)


@ordinary()
def find_head(model: nn.Module, inputs: Any = None, head: Head | nn.Module | str | None = None) -> Head:
    """Find the head of `model`, or raise `HeadError` saying why it has none.

    With `inputs` (a tensor, a tuple or list of positional arguments, or a dict of keyword arguments) one
    forward pass is observed, in evaluation mode and without gradients; training flags, buffers, torch's
    random state and the inputs themselves are left as they were. The head is the last `nn.Linear` applied.
    It must be applied once, to a (batch, m) tensor; its output must be the model's output (up to a view or a
    copy); and its parameters must belong to it alone.

    Without `inputs` the structure decides where it is unambiguous: one single `nn.Linear`, or an
    `nn.Sequential` that ends in one. `head`, a module or its qualified name, says which layer is meant; it
    must satisfy the same conditions, of which only the static ones can be checked without `inputs`.

    `torch.compile`, `DataParallel` and `DistributedDataParallel` are looked through; names are those inside.

    >>> find_head(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).name
    '2'
    """
    model = unwrap(model)
    if inputs is None:
        found = _by_name(model, head) if head is not None else _by_structure(model)
        _check_static(model, found)
        return found
    args, kwargs = call_arguments(inputs)
    with errors.blaming("inputs"):
        return observe_head(model, args, kwargs, head)


def observe_head(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    head: Head | nn.Module | str | None = None,
) -> Head:
    """`find_head` with the arguments of the forward pass spelt out."""
    model = unwrap(model)
    chosen = _by_name(model, head) if head is not None else None
    if chosen is not None:
        _check_static(model, chosen)
    else:
        _linears(model)  # a model without any is refused before it is run
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise HeadError(
            f"model: {lazy[0]!r} is not initialised yet (a lazy module): run one forward pass first"
        )
    return head_of_trace(model, trace(model, args, kwargs), chosen)


def head_of_trace(model: nn.Module, record: Trace, chosen: Head | None = None) -> Head:
    """The head of an observed forward pass, all conditions checked."""
    calls = [c for c in record.calls if isinstance(c.module, nn.Linear)]
    if not calls:
        raise HeadError(
            "no nn.Linear was applied in the forward pass, so the model has no head" + _quantised_hint(model)
        )
    call = calls[-1]
    if chosen is not None:
        own = [c for c in calls if c.module is chosen.module]
        if not own:
            raise HeadError(f"the head {chosen} was not applied in the forward pass")
        call = own[-1]
    found = chosen or Head(call.name, call.module)  # type: ignore[arg-type]
    _check_static(model, found)
    times = sum(c.module is found.module for c in calls)
    if times != 1:
        raise HeadError(f"the head {found} is applied {times} times in one forward pass, not once")
    x = call.input
    if not isinstance(x, Tensor) or x.dim() != 2:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        letters = "(B, T, m)" if isinstance(x, Tensor) and x.dim() == 3 else "non-2-d"
        raise HeadError(
            f"the head {found} receives a {letters} tensor, of shape {shape}; "
            "it must receive (batch, m), one row a sample"
        )
    if not call.plain:
        raise HeadError(
            f"the head {found} does not compute x Wᵀ + b with its own weight and bias "
            f"({type(found.module).__name__} changes them, or a hook changes its output)"
        )
    _check_used_once(record, call, found)
    _check_output(record, call, found)
    return found


def _check_used_once(record: Trace, call: ModuleCall, head: Head) -> None:
    """No operator before the head may take its parameters: the features would depend on the head."""
    for op in record.ops[: call.start]:
        for key, parameter in head.module.named_parameters():
            if op.takes(parameter):
                raise HeadError(
                    f"the features depend on the head {head}: its {key} is also used by {op.op} "
                    f"in {describe_module(op.module)}"
                )


# views and copies: they keep every value
VIEW_OPS = names(
    """
    view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten alias detach clone contiguous
    _to_copy copy_ lift_fresh t transpose permute slice select expand empty empty_like new_empty
    empty_strided split unbind _local_scalar_dense
    """
)


def _check_output(record: Trace, call: ModuleCall, head: Head) -> None:
    """The model's output must be what the head gave, up to a view or a copy."""
    later = [op for op in record.ops[call.end :] if op.op.split(".")[1] not in VIEW_OPS]
    names = list(dict.fromkeys(f"{op.op} in {describe_module(op.module)}" for op in later))
    check_output(head, output_tensors(record.output), call.output, call.version, names)


def check_output(
    head: Head, outputs: list[Tensor], own: Tensor, version: int, later: list[str], mode: str = ""
) -> None:
    """Raise unless the only tensor of `outputs` is the head's output `own`, which had `version` when it came.

    `later` names what was applied afterwards. Equal values alone prove little (a ReLU keeps positive
    logits), so they count only where nothing but views and copies came after.
    """
    if len(outputs) != 1:
        raise HeadError(
            f"the model's output{mode} is not the output of its head {head} alone: "
            f"it holds {len(outputs)} tensors"
        )
    out = outputs[0]
    if not out.is_floating_point():
        raise HeadError(f"the model's output{mode} is {out.dtype}, where its head {head} gave {own.dtype}")
    if own._version == version and same_memory(out, own):
        return
    if not later and out.numel() == own.numel() and own._version == version:
        values = out.detach().reshape(-1).to(own.dtype)
        if torch.equal(
            values.nan_to_num(), own.detach().reshape(-1).to(out.dtype).to(own.dtype).nan_to_num()
        ):
            return
    came = "after it came " + ", ".join(later[:4]) if later else "its values are changed afterwards"
    raise HeadError(
        f"the model's output{mode} is not affine in the head: {came} (the last nn.Linear applied is {head})"
    )


def describe_module(name: str) -> str:
    """A module by name, for messages."""
    return repr(name) if name else "the model's own forward"


def _describe(name: str, module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight) and weight.dim() == 2:
        return f"{name!r} ({weight.shape[1]}→{weight.shape[0]})"
    return f"{name!r} ({type(module).__name__})"


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """All nn.Linear of the model but the output projections of attention, which are not called as modules."""
    attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in attention]
    if not found:
        raise HeadError("the model holds no nn.Linear, so it has no head" + _quantised_hint(model))
    return found


def _quantised_hint(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if "Linear" in type(module).__name__ and "quantized" in type(module).__module__:
            return f"; {name!r} is a quantised {type(module).__name__}, which cannot be trained"
    return ""


def _by_name(model: nn.Module, head: Head | nn.Module | str) -> Head:
    if isinstance(head, Head):
        head = head.module
    for name, module in model.named_modules():
        if module is head or (isinstance(head, str) and name == head):
            if not isinstance(module, nn.Linear):
                raise HeadError(f"head={name!r} is a {type(module).__name__}; it must be an nn.Linear")
            return Head(name, module)
    given = repr(head) if isinstance(head, str) else f"the given {type(head).__name__}"
    raise HeadError(f"head: {given} is not a module of the model; candidates: {_candidates(model)}")


def _candidates(model: nn.Module) -> str:
    return ", ".join(_describe(n, m) for n, m in _linears(model))


def _by_structure(model: nn.Module) -> Head:
    if isinstance(model, nn.Sequential):
        found = _last_of_sequential(model, "")
        if found is not None:
            return found
    linears = _linears(model)
    if len(linears) == 1:
        return Head(*linears[0])
    raise AmbiguousHeadError(
        f"the head cannot be told from the structure of {type(model).__name__}; "
        f"candidates: {_candidates(model)}. Pass inputs=…, so that one forward pass tells, "
        "or head=…, a module or one of these names"
    )


_INERT = (nn.Identity, nn.Flatten, nn.Unflatten)


def _last_of_sequential(model: nn.Sequential, prefix: str) -> Head | None:
    """The nn.Linear an nn.Sequential ends in; None if it ends in something that must be looked into."""
    for key, child in reversed(list(model._modules.items())):
        name = f"{prefix}{key}"
        if child is None or isinstance(child, _INERT):
            continue
        if isinstance(child, nn.Linear):
            return Head(name, child)
        if isinstance(child, nn.Sequential):
            if len(child):
                return _last_of_sequential(child, name + ".")
            continue
        if next(child.parameters(), None) is None:
            _linears(model)
            raise HeadError(
                f"the model's output is not affine in the head: after the last nn.Linear comes {name!r}, "
                f"{type(child).__name__}"
            )
        return None
    return None


def _check_static(model: nn.Module, head: Head) -> None:
    """What can be said of a head without running the model."""
    module = head.module
    owned = {"weight": module._parameters.get("weight"), "bias": module._parameters.get("bias")}
    for key, value in owned.items():
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise HeadError(
                f"model: the head {head.name!r} is lazy: its {key} has no values; run a forward pass first"
            )
    weight = owned["weight"]
    if weight is None or (owned["bias"] is None and module.bias is not None):
        raise HeadError(
            f"the head {head.name!r} computes its weight or bias from other parameters (a parametrisation "
            "such as weight_norm), so the model is not affine in its parameters"
        )
    if not weight.is_floating_point() or "quantized" in type(module).__module__:
        raise HeadError(f"the head {head.name!r} is quantised ({type(module).__name__}, {weight.dtype})")
    bias = owned["bias"]
    if torch._debug_has_internal_overlap(weight) == 1 or (bias is not None and share_memory(weight, bias)):
        raise HeadError(
            f"model: the head {head.name!r} has numbers of its weight and bias in memory together, so that "
            "they cannot be chosen freely; give it parameters of their own, as by .clone()"
        )
    _check_tied(model, head)


def _check_tied(model: nn.Module, head: Head) -> None:
    own = {key: p for key, p in head.module._parameters.items() if p is not None}
    for prefix, other in model.named_modules():
        if other is head.module:
            continue
        for key, p in other._parameters.items():
            if p is None or isinstance(p, nn.parameter.UninitializedParameter):
                continue
            for mine, q in own.items():
                if p is q or share_memory(p, q):
                    theirs = f"{prefix}.{key}" if prefix else key
                    raise HeadError(
                        f"tied weights: {head.name + '.' + mine!r} of the head is also {theirs!r}; "
                        "phase two cannot train the head while the rest stays frozen"
                    )
