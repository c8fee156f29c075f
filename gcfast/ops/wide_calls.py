"""What the wide layer's ops share: precision, working dtype, and the calls of each backend."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gcfast.ops import dispatch, native
from gcfast.ops.activations import ACTIVATION_CODES
from gcfast.ops.arguments import as_rows

_HALF = (torch.bfloat16, torch.float16)


def chosen_precision(precision: str | None, z: Tensor) -> str:
    """How float32 products may be made: as said, or as torch's own products are allowed to on this device."""
    if precision is not None or z.dtype != torch.float32:
        return precision or "ieee"
    if z.device.type == "cuda":
        allowed = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    else:
        allowed = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "ieee")
    return allowed if allowed in ("tf32", "bf16") else "ieee"


def chosen_backend(op: str, *tensors: Tensor) -> str:
    """The backend of a call; the reference where a size is zero, which no kernel is asked to serve."""
    backend = dispatch.choose(op, tensors[0])
    return backend if all(t.numel() for t in tensors) else "reference"


def working(*tensors: Tensor | None) -> list[Tensor | None]:
    """What the CPU's kernels take: half precision in float32, unit column strides."""
    wide = [t.float() if t is not None and t.dtype in _HALF else t for t in tensors]
    return [t if t is None else as_rows(t) if t.dim() == 2 else t.contiguous() for t in wide]


def cpu(name: str, dtype: torch.dtype) -> Any:
    assert native.cpu is not None
    return getattr(native.cpu, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def layer_arguments(
    z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, bf16: bool = False
) -> tuple[Any, ...]:
    """What every CPU kernel of the wide layer takes first."""
    pointers = (z.data_ptr(), weight.data_ptr(), bias.data_ptr())
    sizes = (*z.shape, weight.shape[0], z.stride(0), weight.stride(0))
    return (*pointers, *sizes, ACTIVATION_CODES[activation], beta, bf16, torch.get_num_threads())


def uses_bf16(z: Tensor, precision: str) -> bool:
    return precision == "bf16" or z.dtype == torch.bfloat16


def triton(name: str) -> Any:
    return getattr(importlib.import_module(f"gcfast.triton_kernels.{name}"), name)


@contextmanager
def library_products(precision: str) -> Iterator[None]:
    """Torch's own float32 products on panels no less exact than what the caller asked for."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    if precision in ("ieee", "tf32x3") and before != "ieee":
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if switch.fp32_precision != before:
            switch.fp32_precision = before
