"""Checks of arguments before any kernel runs: errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcfast import errors, reference

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")  # of float32 products, the most exact first


def _short(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def is_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATS:
        wanted = (
            "float32, float64, bfloat16 or float16" if value.dtype.is_floating_point else "a floating dtype"
        )
        raise TypeError(f"{name} must have {wanted}; got {_short(value.dtype)}")
    is_strided(name, value)


def is_strided(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else f"layout {_short(value.layout)}"
        way_out = "to_padded_tensor(0)" if value.is_nested else "to_dense()"
        raise TypeError(f"{name} must be a strided tensor; got {layout}: {name}.{way_out}")


def has_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}); got {tuple(value.shape)}")


def matches(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as `other`."""
    is_float(name, value)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {_short(other.dtype)}; got {_short(value.dtype)}"
        )
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def is_float64(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """float64 and on the device of `other`."""
    is_float(name, value)
    if value.dtype != torch.float64:
        raise TypeError(f"{name} must be float64; got {_short(value.dtype)}")
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def is_added_to(out: Tensor, shape: str) -> None:
    """A matrix of float32 or float64 that an op may add to."""
    is_float("out", out)
    if out.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"out must be float32 or float64; got {_short(out.dtype)}")
    if out.dim() != 2:
        raise ValueError(f"out must have shape {shape}; got {tuple(out.shape)}")


def is_matrix(name: str, value: Tensor) -> None:
    is_float(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (n, m); got {tuple(value.shape)}")


def is_activation(activation: Any, beta: Any, order: Any = 0) -> None:
    if not isinstance(activation, str) or activation not in reference.ACTIVATIONS:
        got = errors.came(activation)
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {got}")
    if not 0 < errors.as_real(beta) < math.inf:
        raise ValueError(f"beta must be a finite number > 0; got {errors.came(beta)}")
    if beta != 1.0 and activation != "softplus":
        raise ValueError(
            f"beta is softplus's sharpness: activation {activation} takes beta=1.0 only; got {beta!r}"
        )
    if type(order) not in (int, torch.SymInt) or order not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2 (the derivative's order); got {errors.came(order)}")


def is_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def is_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value!r}")
    if value >= 1 << 63:
        raise ValueError(f"{name} must be below 2^63; got {value!r}")


def smoothing(label_smoothing: float) -> None:
    is_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing!r}")


def is_logits(logits: Tensor) -> None:
    is_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (n, C) with C >= 1; got {tuple(logits.shape)}")


def logits_and_target(logits: Tensor, target: Tensor) -> None:
    is_logits(logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    is_strided("target", target)
    if target.dtype == torch.int64:
        has_shape("target", target, logits.shape[:1], "one class index a row of logits")
        if target.device != logits.device:
            raise ValueError(f"target must be on the device of logits, {logits.device}; got {target.device}")
    elif target.dtype.is_floating_point:
        has_shape("target", target, logits.shape, "class probabilities, as logits")
        matches("target", target, "logits", logits)
    else:
        raise TypeError(
            f"target must hold int64 class indices or floating probabilities; got {_short(target.dtype)}"
        )


def target_values(target: Tensor, c: int) -> None:
    """Labels in [0, c), or probability rows: non-negative and summing to one. Reads the data."""
    if target.numel() == 0:
        return
    if not target.is_floating_point():
        low, high = torch.aminmax(target)
        if int(low) < 0 or int(high) >= c:
            index = int(((target < 0) | (target >= c)).nonzero()[0])
            got = int(target[index])
            raise ValueError(f"target must hold labels in [0, {c}); got {got} at index {index}")
        return
    low = target.amin(dim=1)
    off = (target.sum(dim=1) - 1).abs()
    tolerance = max(1e-4, 4 * math.sqrt(c) * torch.finfo(target.dtype).eps)
    bad = ~((low >= 0) & (off <= tolerance))  # also true for NaN
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"target must hold probabilities that are >= 0 and sum to 1 in each row; "
            f"row {index} has minimum {float(low[index])} and sum {float(target[index].sum())}"
        )


def wide(z: Tensor, weight: Tensor, bias: Tensor) -> None:
    is_float("z", z)
    if z.dim() < 1:
        raise ValueError("z must have shape (..., d); got a tensor without dimensions")
    matches("weight", weight, "z", z)
    if weight.dim() != 2 or weight.shape[1] != z.shape[-1]:
        raise ValueError(f"weight must have shape (m, {z.shape[-1]}), d from z; got {tuple(weight.shape)}")
    matches("bias", bias, "z", z)
    has_shape("bias", bias, weight.shape[:1], "m from weight")


def wide_head(z: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
    matches("head_weight", head_weight, "z", z)
    m = weight.shape[0]
    if head_weight.dim() != 2 or head_weight.shape[1] != m:
        got = tuple(head_weight.shape)
        raise ValueError(f"head_weight must have shape (C, {m}), m from weight; got {got}")
    if head_bias is not None:
        matches("head_bias", head_bias, "z", z)
        has_shape("head_bias", head_bias, head_weight.shape[:1], "C from head_weight")


def wide_matrices(z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """z (n, d), weight (m, d) and bias (m,)."""
    wide(z, weight, bias)
    if z.dim() != 2:
        raise ValueError(f"z must have shape (n, d); got {tuple(z.shape)}")


def wide_right_hand_sides(z: Tensor, weight: Tensor, bias: Tensor, name: str, sides: Tensor) -> None:
    """The layer, and right-hand sides (n, C)."""
    wide_matrices(z, weight, bias)
    matches(name, sides, "z", z)
    if sides.dim() != 2 or sides.shape[0] != z.shape[0]:
        raise ValueError(f"{name} must have shape ({z.shape[0]}, C), n from z; got {tuple(sides.shape)}")


def wide_settings(z: Tensor, activation: str, beta: float, value: str | None) -> None:
    is_activation(activation, beta)
    precision(value, z.dtype)


def wide_rows(op: str, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """z (n, d), weight and bias of a function on the wide layer that has no gradient."""
    wide_matrices(z, weight, bias)
    for name, value in (("z", z), ("weight", weight), ("bias", bias)):
        if (torch.is_grad_enabled() and value.requires_grad) or errors.transformed(value, batched=False):
            raise RuntimeError(f"{op} cannot be differentiated: detach {name}, or work under torch.no_grad()")


def precision(value: str | None, dtype: torch.dtype) -> None:
    if value is None:
        return
    if not isinstance(value, str) or value not in PRECISIONS:
        got = errors.came(value)
        raise ValueError(f"precision must be None or one of {', '.join(PRECISIONS)}; got {got}")
    if value != "ieee" and dtype != torch.float32:
        raise ValueError(
            f"precision says how float32 products may be made: {_short(dtype)} takes None or 'ieee' only; "
            f"got {value!r}"
        )


def as_rows(x: Tensor) -> Tensor:
    """A 2-d view with unit column stride, or such a copy."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]) if x.dim() else x.view(1, 1)
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.contiguous().view(-1, x.shape[-1])
