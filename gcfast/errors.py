"""Errors a user can mend: checks of plain arguments, by name, and optional packages asked for by name."""

from __future__ import annotations

import contextlib
import importlib
import math
import numbers
import os
import sys
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to change."""


_INSTALL_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow"}


def import_optional(module: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        package = _INSTALL_NAMES.get(top, top)
        missing = error.name is None or error.name.split(".")[0] == top
        # An installed package that fails on import is a different trouble, and is told as such.
        detail = "it is not installed" if missing else f"importing it failed: {error}"
        raise UserError(f"{purpose} needs {package}, and {detail}: pip install 'gcfast[cli]'") from error


def came(value: Any) -> str:
    """What came, for a message: a number or a word as it is, everything else by its type."""
    plain = isinstance(value, (str, bytes, numbers.Number, type(None), torch.dtype, torch.device))
    text = repr(value) if plain else ""
    return text if plain and len(text) <= 80 else type(value).__name__


def is_a(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """An instance of ``kind``, which a message calls ``expected``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}; got {came(value)}")


def is_module(name: str, value: Any) -> None:
    """A model, or a part of one."""
    is_a(name, value, nn.Module, "a torch.nn.Module")


def is_flag(name: str, value: Any) -> None:
    """True or False."""
    is_a(name, value, bool, "True or False")


def is_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {came(value)}")


def is_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number, of at least ``least``, that torch can take: as an int, for those of numpy overflow."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not least <= value < 2**63:
        above = "a positive int" if least == 1 else f"an int of at least {least}"
        raise (ValueError if whole else TypeError)(f"{name}: expected {above}; got {came(value)}")
    return int(value)


def as_real(value: Any) -> float:
    """A real number as a float, infinite where it is beyond those; NaN for what is none, truth values too."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        return math.nan
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return float(value)


def is_number(name: str, value: Any, least: float = -math.inf, *, above: float | None = None) -> None:
    """A finite real number >= ``least``, or > ``above``; 0-d tensors are not numbers."""
    # comparisons, for torch.compile does not follow math.isfinite; they are false for a NaN
    x = as_real(value)
    inside = least <= x < math.inf and x > (-math.inf if above is None else above)
    if not inside:
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least > -math.inf else ""
        raise (TypeError if x != x and not isinstance(value, float) else ValueError)(
            f"{name}: expected a finite number{bound}; got {came(value)}"
        )


def lies_in_memory(value: torch.Tensor) -> bool:
    """Whether the storage reaches as far as the tensor does: ``resize_`` may have freed it, or a part."""
    kind = type(value)  # the numbers of a wrapper lie in others' storages
    if kind is not torch.Tensor and kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__"):
        return True
    size = value.element_size()
    try:
        room = value.untyped_storage().nbytes() - value.storage_offset() * size
    except NotImplementedError:  # batched by vmap
        return True
    if value.is_contiguous():
        return bool(value.nbytes <= room)
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride()))
    return 0 in value.shape or bool((last + 1) * size <= room)


def transformed(value: torch.Tensor, batched: bool = True) -> str:
    """What torch does with the tensor behind a function's back, differentiating it or, if that counts, vmap.

    A result that no formula links to it would have a derivative of zero there, without a word.
    """
    found = ""
    if torch.compiler.is_compiling():  # which does not follow what is asked for here
        return found
    while _is_wrapped(value):
        if torch._C._functorch.is_batchedtensor(value):
            found = "batched by torch.func.vmap" if batched else ""
        elif value.requires_grad or _has_tangent(value):
            return "differentiated by torch.func"
        value = torch._C._functorch.get_unwrapped(value)
    return "differentiated in forward mode" if _has_tangent(value) else found


def _has_tangent(value: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def is_dense(name: str, value: torch.Tensor, *, traced: bool = False) -> None:
    """A tensor whose numbers lie in memory, one by one, for a call that is not differentiated.

    ``traced``: the call is an operator's, which ``torch.func.vmap`` and FakeTensorMode know.
    """
    compiling = torch.compiler.is_compiling()  # which follows little of what is asked for here
    if not compiling and nn.parameter.is_lazy(value):
        raise TypeError(
            f"{name}: expected a tensor with numbers; got a parameter that is not initialised yet"
        )
    mode = not (compiling or traced) and torch._C._get_dispatch_mode(_FAKE) is not None
    fake = mode or (not traced and isinstance(value, FakeTensor))
    odd = value.is_nested or value.is_quantized or value.layout is not torch.strided
    if odd or fake or value.is_meta:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(
            f"{name}: expected a dense tensor of numbers; got one that is {layout}, {value.dtype}, "
            f"{'fake (FakeTensorMode)' if fake else f'on {value.device}'}"
        )
    if compiling:
        return
    what = transformed(value, not traced)
    if what:
        raise TypeError(
            f"{name}: expected a plain tensor; got one that is {what}, which nothing here follows: call this "
            "outside of that"
        )
    if not lies_in_memory(value):
        raise ValueError(
            f"{name}: expected a tensor with memory of its own; got one of shape {tuple(value.shape)} whose "
            f"storage was resized to {value.untyped_storage().nbytes()} bytes"
        )


def is_checkpoint(path: Any, seconds: Any) -> None:
    """``checkpoint``, a path or None, and ``checkpoint_seconds``."""
    if path is not None:
        is_a("checkpoint", path, (str, os.PathLike), "a path")
        if "\0" in os.fspath(path):
            raise ValueError("checkpoint: expected a path; got one with a zero byte")
    is_number("checkpoint_seconds", seconds, 0)


def is_generator(name: str, value: Any) -> None:
    """A torch.Generator, or None."""
    if value is not None:
        is_a(name, value, torch.Generator, "a torch.Generator")


def is_function(name: str, value: Any) -> None:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function; got {came(value)}")


def as_device(name: str, value: Any) -> torch.device:
    """The device that a user names, if torch has it here."""
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: expected a device of this machine; got {came(value)} ({reason})"
        ) from error
    return device


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
    """While the model runs on inputs of a user: what torch says of them becomes an error that names them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: the model cannot be run on this ({what})") from error
