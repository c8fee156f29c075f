"""How gcfast's operators come into torch: checked whoever calls them, differentiated or refused, never zero.

An operator's arguments are checked in one place, before its kernel and before its fake kernel, so that
``torch.ops.gcfast.*``, the public functions and ``torch.compile`` meet the same errors. At torch's key
Autograd it is decided what a derivative is: backward and forward mode by the formulas given, or else an error
that names the argument, because torch itself lets the tangents of an operator without a formula vanish.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from gcfast.ops import memory

_LIBRARY = torch.library.Library("gcfast", "FRAGMENT")
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_BELOW_VERSIONS = torch._C._after_ADInplaceOrView_keyset


@dataclass(frozen=True)
class Derivative:
    """``setup(ctx, inputs, output)`` and ``backward(ctx, *grads)`` as ``torch.library.register_autograd`` has
    them, ``forward(ctx, saved, *tangents)`` as ``torch.autograd.Function.jvp``, with the tensors saved; a
    gradient or tangent that is zero is None. ``constant`` names tensors that nothing is differentiated in.
    """

    setup: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    forward: Callable[..., Any]
    constant: Sequence[str] = ()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For both directions."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class Operator:
    """``torch.ops.gcfast.<name>`` and its checks; called with positional arguments."""

    def __init__(
        self,
        name: str,
        kernel: Callable[..., Any],
        check: Callable[..., None],
        result: Callable[..., Any],
        *,
        mutates: Sequence[str] = (),
        in_place: Sequence[str] = (),
        derivative: Derivative | None = None,
        refusal: str = "{op} cannot be differentiated: detach {name}, or work under torch.no_grad()",
        rows: Sequence[str] = (),
        any_axes: bool = False,
    ) -> None:
        self.name, self.check, self.result, self.rows, self.any_axes = name, check, result, rows, any_axes
        self.derivative, self.refusal = derivative, refusal
        self.names = list(inspect.signature(kernel).parameters)
        schema = torch.library.infer_schema(kernel, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.gcfast, name).default
        types = [str(argument.type) for argument in self.overload._schema.arguments]
        tensors = [(i, n) for i, (n, kind) in enumerate(zip(self.names, types)) if "Tensor" in kind]
        self.written = [at for at, n in tensors if n in mutates]
        pairs = [
            (at, i, self.names[at], n, n in in_place) for at in self.written for i, n in tensors if i != at
        ]

        def checked(*args: Any) -> Any:
            check(*args)
            for i, argument in tensors:
                if args[i] is not None:
                    memory.is_there(argument, args[i])
            for at in self.written:
                memory.is_once(self.names[at], args[at])
            for at, i, out, argument, may_be_it in pairs:
                if args[i] is not None:
                    memory.shares_nothing(out, args[at], argument, args[i], may_be_it)
            return kernel(*args)

        def fake(*args: Any) -> Any:
            check(*args)
            return result(*args)

        _LIBRARY.impl(name, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gcfast::{name}", fake, lib=_LIBRARY)
        self._function = None if derivative is None else self._make_function(derivative)
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        if mutates:
            _LIBRARY.impl(name, self._versions, "ADInplaceOrView", with_keyset=True)
            _LIBRARY.impl(name, self._negated, "Negative")
        torch.library.register_vmap(f"gcfast::{name}", self._batched, lib=_LIBRARY)

    def __call__(self, *args: Any) -> Any:
        try:
            return self.overload(*args)
        except RuntimeError as error:
            complaint = self._complaint(args)
            if complaint is None:
                raise
            raise complaint from error

    def _complaint(self, args: tuple[Any, ...]) -> Exception | None:
        """What the checks say of arguments that torch could not even hand over, a list for a tensor."""
        try:
            self.check(*args)
        except (TypeError, ValueError) as complaint:
            return complaint
        return None

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        graded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if graded or (forward_ad._current_level >= 0 and any(map(_has_tangent, args))):
            return self._derived(keyset, graded, args)
        return self._below(keyset, args)

    def _below(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    def _derived(self, keyset: Any, graded: bool, args: tuple[Any, ...]) -> Any:
        for name, value in zip(self.names, args):
            if not (isinstance(value, Tensor) and ((graded and value.requires_grad) or _has_tangent(value))):
                continue
            if self.derivative is None:
                raise RuntimeError(self.refusal.format(op=self.name.removesuffix("_out"), name=name))
            if name in self.derivative.constant:
                raise ValueError(f"{name} must not require a gradient: pass {name}.detach()")
        if not torch._C._are_functorch_transforms_active():
            return self._function.apply(*args, keyset)  # type: ignore[union-attr]
        with enable_single_level_autograd_function():  # torch.func has come down to one of its levels
            return self._function.apply(*args, keyset)  # type: ignore[union-attr]

    def _forward(self, keyset: Any, args: tuple[Any, ...]) -> Any:
        """Inside a function of autograd, which switches derivatives off: for its own level and no other."""
        if not torch._C._are_functorch_transforms_active():
            return self._below(keyset, args)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return self._below(keyset, args)

    def _make_function(self, derivative: Derivative) -> Any:
        class Derived(_SingleLevelFunction):
            @staticmethod
            def forward(*args: Any) -> Any:  # type: ignore[override]
                return self._forward(args[-1], args[:-1])

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                ctx.set_materialize_grads(False)
                ctx.inputs = len(inputs)
                derivative.setup(ctx, inputs[:-1], output)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                if all(g is None for g in grads):
                    return (None,) * ctx.inputs
                found = derivative.backward(ctx, *grads)
                return (*found, *(None,) * (ctx.inputs - len(found)))

            @staticmethod
            def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
                saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
                with forward_ad._set_fwd_grad_enabled(True):  # it is off, for outer levels as well
                    return derivative.forward(ctx, saved, *tangents[:-1])

        Derived.__name__ = f"{self.name}_derivative"
        return Derived

    def _versions(self, keyset: Any, *args: Any) -> Any:
        for at in self.written:
            if isinstance(args[at], Tensor):  # the check says it of what is none
                torch.autograd.graph.increment_version(args[at])
        return self.overload.redispatch(keyset & _BELOW_VERSIONS, *args)

    def _negated(self, *args: Any) -> Any:
        """With a view whose numbers are stored with the other sign: torch's own way asks for an output."""
        for at in self.written:
            if args[at].is_neg():
                raise ValueError(
                    f"{self.names[at]} must be stored with its own sign; got a negated view: pass "
                    f"{self.names[at]}.resolve_neg()"
                )
        return self.overload(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in args))

    def _batched(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Under vmap: all samples at once where they are rows to the operator, else one after the other."""
        args = tuple(a if at is None else a.movedim(at, 0) for a, at in zip(args, in_dims))
        batched = [at is not None for at in in_dims]
        for at in self.written:
            if not batched[at]:
                raise ValueError(
                    f"{self.names[at]} must be batched for {self.name} under vmap: samples would write to one"
                )
        size = info.batch_size
        tensors = [(n, b) for n, a, b in zip(self.names, args, batched) if isinstance(a, Tensor)]
        if self.rows and size and all((name in self.rows) == b for name, b in tensors):
            if self.any_axes:
                return self(*args), 0
            found = self(*(a.flatten(0, 1) if b else a for a, b in zip(args, batched)))
            fold = [t.unflatten(0, (size, -1)) for t in _several(found)]
        elif size:
            samples = [self(*(a[i] if b else a for a, b in zip(args, batched))) for i in range(size)]
            if samples[0] is None:
                return None, None
            found = samples[0]
            fold = [torch.stack(parts) for parts in zip(*map(_several, samples))]
        else:
            empty = (a.new_zeros(a.shape[1:]) if b else a for a, b in zip(args, batched))
            found = self.result(*empty)
            fold = [t.new_empty(0, *t.shape) for t in _several(found)]
        return (fold[0], 0) if isinstance(found, Tensor) else (tuple(fold), (0,) * len(fold))


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _several(found: Any) -> Sequence[Tensor]:
    return (found,) if isinstance(found, Tensor) else found


def operator(name: str, check: Callable[..., None], result: Callable[..., Any], **options: Any) -> Any:
    """Makes an operator of a kernel, a function whose annotations give its schema.

    ``check`` takes the kernel's arguments and raises; ``result`` makes what it returns of them, empty.
    ``mutates`` names what it writes to: memory that is nowhere twice and shared with no other operand but
    those that ``in_place`` names, which may be it. ``rows`` names the operands that a batch of samples can be
    put into as more rows, the others being the same for all; with ``any_axes`` as one axis more.
    """
    return lambda kernel: Operator(name, kernel, check, result, **options)
