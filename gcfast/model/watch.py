"""Find a model's last layer (head) in its first training forward pass, with what would break phase two."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.model.head import Head, HeadError, check_output, observe_head
from gcfast.model.tracing import output_tensors, unwrap
from gcfast.nn import OutputHook


class Watch:
    """Looks at the first forward pass that records gradients, reports which layer is the head, and is gone.

    The conditions on the head are checked twice: in evaluation mode, by one additional forward pass of the
    same batch with nothing left changed, and on the training pass itself.
    """

    def __init__(
        self, model: nn.Module, given: nn.Module | None, on_head_found: Callable[[Head | HeadError], None]
    ) -> None:
        self.model, self.given = weakref.ref(unwrap(model)), given
        self.on_head_found: weakref.WeakMethod[Callable[[Head | HeadError], None]] | None = (
            weakref.WeakMethod(on_head_found)
        )
        roots = {id(m): m for m in (model, unwrap(model))}.values()
        self.handles = [m.register_forward_pre_hook(self.before, with_kwargs=True) for m in roots]

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch.inert()

    def __reduce__(self) -> tuple[Callable[[], Watch], tuple[()]]:
        return Watch.inert, ()

    @classmethod
    def inert(cls) -> Watch:
        """A watch that does nothing, to stand in hooks that were copied."""
        self = cls.__new__(cls)
        self.given, self.on_head_found, self.handles = None, None, []
        return self

    @property
    def active(self) -> bool:
        """Whether the first forward pass is still to come."""
        return self.on_head_found is not None

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.on_head_found = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass of the model."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.on_head_found is None:
            return
        on_head_found, model = self.on_head_found(), self.model()
        self.remove()
        if on_head_found is None or model is None:
            return
        with _reporting(on_head_found):
            head = observe_head(model, args, kwargs, self.given)
        on_head_found(head)
        if not isinstance(module, nn.DataParallel):  # its output is put together from the replicas'
            _check_training_pass(module, head, on_head_found)


@contextlib.contextmanager
def _reporting(on_head_found: Callable[[Head | HeadError], None]) -> Iterator[None]:
    try:
        yield
    except HeadError as error:
        on_head_found(error)
        raise


def _check_training_pass(
    root: nn.Module, head: Head, on_head_found: Callable[[Head | HeadError], None]
) -> None:
    """Have the forward pass that is about to run checked as well: layers may act in training mode alone."""
    seen: list[tuple[Tensor, int]] = []

    def at_head(output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((output, output._version))

    def at_end(module: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        if output is not None and seen:  # else the pass failed, or ran as compiled code
            with _reporting(on_head_found):
                check_output(head, output_tensors(output), *seen[-1], later=[], mode=" in training mode")

    handles = [
        head.module.register_forward_hook(OutputHook(at_head)),
        root.register_forward_hook(at_end, always_call=True),
    ]
