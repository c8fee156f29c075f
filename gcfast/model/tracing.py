"""Trace one forward pass: which modules ran, in which order, and which operators between them.

Analyticity, heads, wide layers and the optimizer draw all they know of a user's model from here. The pass
leaves the model as it was: training flags, buffers, gradients, random-number state and the inputs.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gcfast import errors
from gcfast.model.agreement import first_difference
from gcfast.model.analytic_ops import SignTracker, Verdict, classify

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def wrapped(model: nn.Module) -> nn.Module | None:
    """The module that torch's own wrapper ``model`` passes its inputs on to; None of any other module."""
    if isinstance(model, _PARALLEL) and type(model).forward in [kind.forward for kind in _PARALLEL]:
        return model.module
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return model._orig_mod
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module below torch.compile, DataParallel and DistributedDataParallel."""
    errors.is_module("model", model)
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `inputs` is passed to the model: a tuple or list as positions, a dict as keywords, else alone."""
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (inputs,), {}


def copy_tensors(value: Any) -> Any:
    """`value` with its tensors cloned: a model may change its input in place, the caller's must stay."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is `b` or a view of all of it in the same order."""
    if a is b:
        return True
    return (
        a.numel() == b.numel()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.data_ptr() == b.data_ptr()
        and a.is_contiguous() == b.is_contiguous()
        and (a.is_contiguous() or (a.shape == b.shape and a.stride() == b.stride()))
    )


def span(value: Tensor) -> tuple[int, int]:
    """The addresses between which a dense tensor lies; nothing where it has none."""
    if value.layout != torch.strided or value.device.type == "meta":
        return 0, 0
    try:
        start, shape, stride = value.data_ptr(), value.shape, value.stride()
    except RuntimeError:  # nested, or batched by vmap
        return 0, 0
    if start == 0 or 0 in shape:
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return start, start + (last + 1) * value.element_size()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one dtype have a number in common; columns of one matrix have none."""
    (low, high), (start, end) = span(a), span(b)
    return low < end and start < high and bool(torch.isin(_addresses(a), _addresses(b)).any())


def _addresses(value: Tensor) -> Tensor:
    places = torch.tensor(value.data_ptr(), dtype=torch.int64, device="cpu")
    for length, stride in zip(value.shape, value.stride(), strict=True):
        places = places[..., None] + value.element_size() * stride * torch.arange(length, device="cpu")
    return places


def _accelerators(model: nn.Module) -> tuple[str, list[torch.device]]:
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = min((d.type for d in devices), default="cuda")
    return kind, sorted((d for d in devices if d.type == kind), key=str)


@contextlib.contextmanager
def keeping_random_state(model: nn.Module) -> Iterator[None]:
    """Give torch's random-number generators back as they were, on the CPU and on the model's devices."""
    kind, devices = _accelerators(model)
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients are recorded, and autocast keeps no cast of a weight.

    Older versions of torch took up such a cast again where gradients are recorded, which then never reached
    the weight.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every training flag is what it was.

    Flags are written directly: a user's own `train` method (one that keeps some layers frozen, say) is not
    asked. Code under torch.compile runs eagerly meanwhile, for it would not call the hooks of its submodules.
    """
    flags = [(m, m.training) for m in model.modules()]
    compiles = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    try:
        for m, _ in flags:
            m.training = False
        with without_gradients(), eager:
            yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextlib.contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards every buffer is the tensor it was, with the values it had."""
    kept = [
        (m, name, b, -1 if b.is_inference() else b._version, b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.device.type != "meta"
    ]
    try:
        yield
    finally:
        for m, name, buffer, version, copy in kept:
            m._buffers[name] = buffer
            if buffer.is_inference() or buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


@dataclass
class OpCall:
    """One operator as it reached the dispatcher."""

    op: str
    module: str
    verdict: Verdict
    reason: str
    arguments: frozenset[int]  # id of every tensor argument
    places: tuple[tuple[int, int], ...]  # the addresses between which each of them lies, and each result
    # to apply the operator again, to another first argument; None where a further argument is a tensor
    again: Callable[[Tensor], Any] | None = None

    def takes(self, value: Tensor) -> bool:
        """Whether an argument is this tensor, or it or a result has numbers in its memory."""
        low, high = span(value)
        return id(value) in self.arguments or any(a < high and low < b for a, b in self.places)


@dataclass
class ModuleCall:
    """One call of a watched module; `start` and `end` are positions in `Trace.ops`."""

    name: str
    module: nn.Module
    start: int
    input: Any
    end: int = -1
    output: Any = None
    version: int = 0
    plain: bool = True  # for nn.Linear: the output is x Wᵀ + b indeed


@dataclass
class Trace:
    """What one forward did."""

    ops: list[OpCall] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)  # in the order in which they ended
    output: Any = None


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever holds them."""
    if not isinstance(output, (Tensor, dict, list, tuple)) and hasattr(output, "__dict__"):
        output = vars(output)
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


class _Recorder(TorchDispatchMode):
    """Notes every operator, with the innermost module that was running."""

    def __init__(self, record: Trace, model: nn.Module) -> None:
        super().__init__()
        self.record = record
        self.stack: list[str] = []
        self.muted = False
        self.marks = SignTracker(model.parameters())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.muted:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs, places = frozenset(map(id, tensors)), tuple(map(span, tensors))
        out = func(*args, **kwargs)
        # what it gave as well: a weight may be put there
        places += tuple(span(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        verdict, reason = classify(func, args, kwargs, out, self.marks)
        again = _repeated(func, args, kwargs, verdict)
        module = self.stack[-1] if self.stack else ""
        name = str(func).removesuffix(".default")
        self.record.ops.append(OpCall(name, module, verdict, reason, inputs, places, again))
        return out


def _repeated(func: Any, args: Any, kwargs: Any, verdict: Verdict) -> Callable[[Tensor], Any] | None:
    """The operator as a function of its first argument; None where a further argument is a tensor.

    A softplus that counts as analytic comes without the threshold above which torch's is the identity: where
    that matters, values and formula differ.
    """
    if not args or any(isinstance(t, Tensor) for t in tree_leaves((args[1:], kwargs))):
        return None
    if func is torch.ops.aten.softplus.default and verdict == "analytic":
        return lambda x: func(x, args[1] if len(args) > 1 else kwargs.get("beta", 1), 40)
    return lambda x: func(x, *args[1:], **kwargs)


def _is_plain_linear(module: nn.Linear, x: Any, y: Any) -> bool:
    """Whether `y` is x Wᵀ + b with the module's own parameters; adapted or hooked layers give another y."""
    weight, bias = module.weight, module.bias
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.shape[-1:] != weight.shape[1:]:
        return False
    if y.shape != (*x.shape[:-1], len(weight)):
        return False
    rows, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, len(weight))
    return first_difference(lambda z: nn.functional.linear(z, weight, bias), rows, out, weight, bias) is None


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> Trace:
    """Run `model(*args, **kwargs)` once, quietly, and tell what happened."""
    record = Trace()
    recorder = _Recorder(record, model)
    pending: list[ModuleCall] = []
    handles, thread = [], threading.get_ident()  # passes of other threads meet the hooks as well

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return
        recorder.stack.append(name)
        if isinstance(module, watch):
            x = args[0] if args else next(iter(kwargs.values()), None)
            pending.append(ModuleCall(name, module, len(record.ops), x))

    def after(name: str, module: nn.Module, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        recorder.stack.pop()
        if isinstance(module, watch):
            call = pending.pop()
            call.end, call.output = len(record.ops), output
            call.version = output._version if isinstance(output, Tensor) else 0
            if isinstance(module, nn.Linear):
                recorder.muted = True
                call.plain = _is_plain_linear(module, call.input, output)
                recorder.muted = False
            record.calls.append(call)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks; its operators are seen all the same
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda m, _, out, name=name: after(name, m, out)))
        # the fused transformer layers hide their activation in a flag
        torch.backends.mha.set_fastpath_enabled(False)
        args, kwargs = copy_tensors((args, kwargs))
        with keeping_buffers(model), evaluating(model), keeping_random_state(model), recorder:
            record.output = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    return record
