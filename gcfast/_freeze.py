"""The hooks behind `optim.TwoPhase`: freezing what lies below the head, watching the first forward pass."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gcfast._head import Head, HeadError, check_output, observe_head
from gcfast._trace import OutputHook, output_tensors, unwrap


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts in, so that compiled and plain models agree."""
    return name.replace("_orig_mod.", "")


def hidden_parameters(model: nn.Module, head: Head) -> dict[str, nn.Parameter]:
    """All parameters but those of the head, by name."""
    own = {id(p) for p in head.parameters}
    return {plain_name(n): p for n, p in unwrap(model).named_parameters() if id(p) not in own}


def fingerprint(model: nn.Module, head: Head, buffers: bool = True) -> str:
    """SHA-256 of the stored bits of all below the head: parameters, and the buffers a state_dict holds."""
    digest = hashlib.sha256()

    def add(value: Tensor) -> None:
        digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(bits.numpy().data)

    for parameter in hidden_parameters(model, head).values():
        add(parameter)
    if buffers:
        for module in unwrap(model).modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    add(buffer)
    return digest.hexdigest()


class Freezer:
    """Keeps everything but the head as it is: no gradients, and evaluation mode during every forward pass.

    The flag `training` of a module is the user's: it is lowered when a forward pass begins, of the whole
    model or of a part of it, and given back when it ends. So `model.train()` each epoch does no harm, and
    nothing has to be remembered about it. The hooks hold no reference to the optimizer; copies of them (of a
    copied or pickled model) do nothing.
    """

    def __init__(self, model: nn.Module, head: Head, trainable: Iterable[str]) -> None:
        self.parameters = hidden_parameters(model, head)
        self.trainable = [name for name in trainable if name in self.parameters]
        inner = set(head.module.modules())
        self.modules = [m for m in model.modules() if m not in inner]
        self.flags: list[bool] = []
        self.depth = 0
        self.active = True
        self.handles: list[RemovableHandle] = []
        for module in self.modules:
            _drop_inert(module)
            if not isinstance(module, torch.jit.ScriptModule):
                self.handles.append(module.register_forward_pre_hook(self.enter))
                self.handles.append(module.register_forward_hook(self.leave, always_call=True))
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    @classmethod
    def inert(cls) -> Freezer:
        """A freezer that does nothing, to stand in hooks that were copied."""
        self = cls.__new__(cls)
        self.parameters, self.trainable, self.modules, self.flags, self.handles = {}, [], [], [], []
        self.depth, self.active = 0, False
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Freezer:
        return Freezer.inert()

    def __reduce__(self) -> tuple[Callable[[], Freezer], tuple[()]]:
        return Freezer.inert, ()

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the forward pass of any hidden module."""
        if not self.active:
            return
        if self.depth == 0:
            self.flags = [m.training for m in self.modules]
            for m in self.modules:
                m.training = False
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it, by an exception too."""
        if not self.active or self.depth == 0:
            return
        self.depth -= 1
        if self.depth == 0:
            for m, flag in zip(self.modules, self.flags):
                m.training = flag

    def release(self) -> None:
        """Give the model back: hooks removed, gradients required where they were."""
        self.active = False
        for handle in self.handles:
            handle.remove()
        for name in self.trainable:
            self.parameters[name].requires_grad_(True)


def _drop_inert(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, (Freezer, Watch)) and not owner.active:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


class Watch:
    """Looks at the first forward pass that records gradients, tells which layer is the head, and is gone.

    The conditions on the head are checked twice: in evaluation mode, by one additional forward pass of the
    same batch with nothing left changed, and on the training pass itself.
    """

    def __init__(
        self, model: nn.Module, given: nn.Module | None, tell: Callable[[Head | HeadError], None]
    ) -> None:
        self.model, self.given = weakref.ref(unwrap(model)), given
        self.tell: weakref.WeakMethod[Callable[[Head | HeadError], None]] | None = weakref.WeakMethod(tell)
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
        self.given, self.tell, self.handles = None, None, []
        return self

    @property
    def active(self) -> bool:
        """Whether the first forward pass is still to come."""
        return self.tell is not None

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.tell = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass of the model."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.tell is None:
            return
        tell, model = self.tell(), self.model()
        self.remove()
        if tell is None or model is None:
            return
        with _telling(tell):
            head = observe_head(model, args, kwargs, self.given)
        tell(head)
        if not isinstance(module, nn.DataParallel):  # its output is put together from the replicas'
            _check_training_pass(module, head, tell)


@contextlib.contextmanager
def _telling(tell: Callable[[Head | HeadError], None]) -> Iterator[None]:
    try:
        yield
    except HeadError as error:
        tell(error)
        raise


def _check_training_pass(root: nn.Module, head: Head, tell: Callable[[Head | HeadError], None]) -> None:
    """Have the forward pass that is about to run checked as well: layers may act in training mode alone."""
    seen: list[tuple[Tensor, int]] = []

    def at_head(output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((output, output._version))

    def at_end(module: nn.Module, args: Any, output: Any) -> None:
        for handle in handles:
            handle.remove()
        if output is not None and seen:  # else the pass failed, or ran as compiled code
            with _telling(tell):
                check_output(head, output_tensors(output), *seen[-1], later=[], mode=" in training mode")

    handles = [
        head.module.register_forward_hook(OutputHook(at_head)),
        root.register_forward_hook(at_end, always_call=True),
    ]
