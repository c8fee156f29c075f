"""A hook that hands out what enters the head, or the wide layer, during a forward pass."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from gcfast.model.head import Head, HeadError, describe_module
from gcfast.model.tracing import (
    call_arguments,
    copy_tensors,
    evaluating,
    keeping_buffers,
    keeping_random_state,
    unwrap,
)


class FeatureTap:
    """Context in which a call gives what enters some modules together with the model's output.

    A module is a `Head`, a module or its qualified name. Each call runs one forward pass, in evaluation mode
    and without gradients, and returns `(h, ..., output)`; each `h` (batch, m) is a copy. Training flags and
    torch's random state are given back after each call, buffers and hooks when the context is left, by an
    exception too. Calls may be mixed with other work, but not with training the model.

    >>> with FeatureTap(model, find_head(model)) as tap:                      # doctest: +SKIP
    ...     features = torch.cat([tap(x)[0] for x, _ in loader])
    """

    def __init__(self, model: nn.Module, *modules: Head | nn.Module | str) -> None:
        self.model = unwrap(model)
        self._tapped: dict[nn.Module, str] = {}
        for module in modules:
            if isinstance(module, Head):
                module = module.module
            for name, candidate in self.model.named_modules():
                if candidate is module or name == module:
                    self._tapped[candidate] = name
                    break
            else:
                raise ValueError(f"modules: {module!r} is not a module of the model")
        self._seen: dict[nn.Module, list[Any]] = {}
        self._thread = 0  # that makes the call: passes of other threads meet the hooks as well
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise RuntimeError("this FeatureTap is open already")
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_buffers(self.model))
            for module in self._tapped:
                handle: RemovableHandle = module.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._note(module, args, kwargs)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        # a copy, for the model may go on to change it in place
        self._seen[module].append(x.detach().clone() if isinstance(x, Tensor) else x)

    def __call__(self, inputs: Any) -> tuple[Any, ...]:
        """What enters each module, and the model's output, for one batch of `inputs` (as for `find_head`)."""
        if self._stack is None:
            raise RuntimeError(
                "open the FeatureTap first: with FeatureTap(model, module) as tap: tap(inputs)"
            )
        args, kwargs = copy_tensors(call_arguments(inputs))
        self._seen, self._thread = {module: [] for module in self._tapped}, threading.get_ident()
        try:
            with evaluating(self.model), keeping_random_state(self.model):
                output = self.model(*args, **kwargs)
            seen = self._seen
        finally:
            self._seen, self._thread = {}, 0
        return *(_the_only(seen[module], name) for module, name in self._tapped.items()), output


def _the_only(seen: list[Any], name: str) -> Tensor:
    if len(seen) != 1:
        raise HeadError(f"{describe_module(name)} is applied {len(seen)} times in one forward pass, not once")
    if not isinstance(seen[0], Tensor) or seen[0].dim() != 2:
        shape = tuple(seen[0].shape) if isinstance(seen[0], Tensor) else type(seen[0]).__name__
        raise HeadError(f"{describe_module(name)} receives {shape}; it must receive a (batch, m) tensor")
    return seen[0]
