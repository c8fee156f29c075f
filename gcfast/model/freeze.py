"""Freeze all layers below the last one (the head): no gradients, evaluation mode, whatever train() says."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gcfast.model.head import Head
from gcfast.model.tracing import unwrap
from gcfast.model.watch import Watch


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile puts in, so that compiled and plain models agree."""
    return name.replace("_orig_mod.", "")


def hidden_parameters(model: nn.Module, head: Head) -> dict[str, nn.Parameter]:
    """All parameters but those of the head, by name."""
    own = {id(p) for p in head.parameters}
    return {plain_name(n): p for n, p in unwrap(model).named_parameters() if id(p) not in own}


def digest(value: Tensor) -> bytes:
    """128 bits of a tensor's stored bits, dtype and shape."""
    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    bits = dense.reshape(-1).view(torch.uint8)
    found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)};".encode(), digest_size=16)
    found.update(bits.numpy().data)
    return found.digest()


def fingerprint(model: nn.Module, head: Head, buffers: bool = True) -> str:
    """Of the stored bits of all below the head: parameters, and the buffers a state_dict holds."""
    found = hashlib.blake2b(digest_size=16)
    for parameter in hidden_parameters(model, head).values():
        found.update(digest(parameter))
    if buffers:
        for module in unwrap(model).modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found.update(digest(buffer))
    return found.hexdigest()


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


def retrace_compiled() -> None:
    """Have compiled code traced again: it may have been made without the hooks, and would not notice them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _drop_inert(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, (Freezer, Watch)) and not owner.active:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
