"""A pretended accelerator: tensors that say they live on device "pretend:0" and compute on the CPU.

It finds what only a GPU would: operands on two devices, a factory that forgot ``device=``, a generator or
an index on the wrong side. Mixing devices raises as on hardware; a CPU tensor without dimensions may join in,
and CPU indices may index. Kernels cannot run on such a tensor (it has no memory to point at).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Module(_DummyBackendModule):
    """torch.pretend: what torch asks a device module for."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


_setup_privateuseone_for_python_backend("pretend", _Module())
DEVICE = torch.device("pretend", 0)
_CROSSING = {"_to_copy", "copy_", "_copy_from", "is_pinned", "_pin_memory"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class Pretend(torch.Tensor):
    """A CPU tensor behind the device pretend:0."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return f"Pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One op: refuse mixed devices, compute on the CPU, wrap what belongs on the device."""
    flat = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
    name = func.overloadpacket.__name__
    there = [t for t in flat if isinstance(t, Pretend)]
    if there and name not in _CROSSING:
        strict = tree_flatten(args[0])[0] if name in _INDEXED else flat
        for t in strict:
            if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) and t.dim():
                raise RuntimeError(
                    f"{name}: expected all tensors on one device, found pretend:0 and {t.device} "
                    f"(shape {tuple(t.shape)})"
                )
    device = kwargs.get("device")
    on_device = bool(there)
    if name == "copy_":
        on_device = isinstance(args[0], Pretend)
    if device is not None:
        on_device = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if on_device and generator is not None and generator.device.type != DEVICE.type:
        raise RuntimeError(f"{name}: expected a generator of the device, found one on {generator.device}")
    args, kwargs = tree_map_only(Pretend, lambda t: t.inner, (args, kwargs))
    out = func(*args, **kwargs)
    if not on_device:
        return out
    known = {id(t.inner): t for t in there}  # an in-place op returns its argument
    wrapped = tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else Pretend(t), out)
    if torch.Tag.inplace_view in func.tags:
        with torch._C._DisableTorchDispatch():
            func(there[0], *args[1:], **kwargs)  # once more, for the shape of the outer tensor
    return wrapped


# torch.tensor(data, device=...) goes past every mode, to these kernels of the backend.
_library = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> Pretend:
    return Pretend(torch.empty(size, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    to = target.inner if isinstance(target, Pretend) else target
    to.copy_(source.inner if isinstance(source, Pretend) else source)
    return target


_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")


class _Mode(TorchDispatchMode):
    """Sees the factories, which have no tensor among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device exists for the block."""
    with _Mode():
        yield DEVICE
