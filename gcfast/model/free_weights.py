"""What speaks against a layer that does what its class says, with weights that are free, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.model.freeze import Freezer
from gcfast.model.tap import FeatureTap
from gcfast.model.tracing import Trace, span, wrapped
from gcfast.model.watch import Watch
from gcfast.nn import OutputHook, WideLayer

# As torch and gcfast define them: an assignment to the class would change every layer.
_FORWARD: dict[type[nn.Module], Callable[..., Any]] = {c: c.forward for c in (nn.Linear, WideLayer)}
_OURS = (Freezer, Watch, FeatureTap)  # their hooks change no value


def alteration(module: nn.Module) -> str | None:
    """Why calling ``module`` may give something else than its class says; None if nothing speaks for that.

    Pruning, weight and spectral normalisation, parametrisations and adapters all show in one of these: the
    class is another one, a hook is registered, ``forward`` is replaced, or a weight is not a parameter of the
    layer itself. Values cannot tell: a weight that a mask has been multiplied into is what the formula uses.
    """
    kind = type(module)
    layer = isinstance(module, tuple(_FORWARD))
    if layer and kind not in _FORWARD:
        return f"it is a {kind.__name__}, a class of its own, which may compute something else"
    if layer and kind.forward is not _FORWARD[kind]:
        return f"{kind.__name__}.forward is replaced for the whole class"
    if "forward" in vars(module):
        return "its forward is replaced"
    hook = next(_strange_hooks(module), None)
    if hook is not None:
        return f"the {hook} may change what it computes"
    if not layer:  # an activation: what it computes is seen in the operators that it calls
        return None
    beside = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if beside:
        return f"it has {min(beside)!r} beside its weight and bias"
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if value is not None and module._parameters.get(name) is not value:
            return f"its {name} is computed from something else"
        why = None if value is None else _not_free(value)
        if why is not None:
            return f"its {name} {why}"
    return None


def check_wrappers(model: nn.Module) -> None:
    """Raise ValueError where a wrapper that ``unwrap`` looks through may change what the model gives."""
    while (inner := wrapped(model)) is not None:
        hook = next(_strange_hooks(model, of_all=False), None)
        if hook is not None:
            raise ValueError(
                f"model: the {hook} of the {type(model).__name__} around it may change what it gives; give "
                "the module inside, or register the hook on that"
            )
        model = inner


def _strange_hooks(module: nn.Module, of_all: bool = True) -> Iterator[str]:
    """Hooks on the module, or on all modules, that may change what goes in or comes out."""
    for kind in ("forward_pre_hook", "forward_hook"):
        for hook in getattr(module, f"_{kind}s").values():
            ours = isinstance(hook, OutputHook) or isinstance(getattr(hook, "__self__", None), _OURS)
            if not ours:
                yield f"{kind} {getattr(hook, '__qualname__', type(hook).__name__)!r}"
        if of_all and getattr(nn.modules.module, f"_global_{kind}s"):
            yield f"{kind} registered for all modules"


def _not_free(value: Tensor) -> str | None:
    if type(value) is not nn.Parameter:
        return f"is a {type(value).__name__}, not a plain parameter"
    if not value.is_floating_point():
        return f"is {value.dtype}, so that it cannot be drawn from a density"
    if value.layout != torch.strided or torch._debug_has_internal_overlap(value) == 1:
        return "shares numbers within itself"
    return None


def constraint(model: nn.Module, layer: nn.Module, record: Trace) -> str | None:
    """Why the weights of ``layer``, which :func:`alteration` passed, may not vary freely in ``model``.

    ``record`` is a traced pass, in which the layer is applied once. Another use of the weights makes what
    enters the layer depend on them; a hook on a module that holds it may tie, clip or mask them each time.
    """
    for holder, module in model.named_modules():
        if module is layer or layer not in module.modules():
            continue
        where = f"{holder!r}, which holds it," if holder else "the model"
        hook = next(_strange_hooks(module), None)
        if hook is not None:
            return f"the {hook} of {where} may change what it computes"
        if "forward" in vars(module):
            return f"the forward of {where} is replaced"
    call = next(c for c in record.calls if c.module is layer)
    for op in (*record.ops[: call.start], *record.ops[call.end :]):
        for key, parameter in layer._parameters.items():
            if parameter is not None and op.takes(parameter):
                return f"its {key} is also used by {op.op}"
    return _tied(model, layer)


def _tied(model: nn.Module, layer: nn.Module) -> str | None:
    """The name of a parameter or buffer that shares memory with the layer's weights, in words."""
    mine = [(key, *span(p)) for key, p in layer._parameters.items() if p is not None]
    others = [
        (f"{prefix}.{key}" if prefix else key, value)
        for prefix, module in model.named_modules()
        for values in (module._parameters, module._buffers)
        for key, value in values.items()
        if value is not None and not (module is layer and values is module._parameters)
    ]
    for other, value in others:
        start, end = span(value)
        for key, low, high in mine:
            if start < high and low < end:
                return f"its {key} shares memory with {other!r}"
    (_, low, high), *rest = mine
    if rest and rest[0][1] < high and low < rest[0][2]:
        return "its weight and bias share memory"
    return None
