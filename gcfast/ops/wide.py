"""The wide layer and its head, whose features are made tile by tile, in the backward pass too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gcfast import errors, reference
from gcfast.ops import arguments, memory
from gcfast.ops.activations import ACTIVATION_CODES, activation_grad_op, activation_op, activation_out_op
from gcfast.ops.registration import Derivative, operator, save
from gcfast.ops.wide_calls import (
    chosen_backend,
    chosen_precision,
    cpu,
    layer_arguments,
    library_products,
    triton,
    uses_bf16,
    working,
)


def _check_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    beta: float,
    precision: str | None,
) -> None:
    arguments.wide_matrices(z, weight, bias)
    arguments.wide_head(z, weight, head_weight, head_bias)
    arguments.wide_settings(z, activation, beta, precision)


def _check_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
    *needs: bool,
) -> None:
    _check_forward(z, weight, bias, head_weight, None, activation, beta, precision)
    arguments.matches("g", g, "z", z)
    arguments.has_shape("g", g, (z.shape[0], head_weight.shape[0]), "n from z, C from head_weight")


def _gradients(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
    need_z: bool,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape if need_z else 0),
        z.new_empty(weight.shape if need_hidden else 0),
        z.new_empty(weight.shape[0] if need_hidden else 0),
        z.new_empty(head_weight.shape if need_head else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, head_weight, _, ctx.activation, ctx.beta, ctx.precision = inputs
    save(ctx, z, weight, bias, head_weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, bias, head_weight = ctx.saved_tensors
    need_z, need_weight, need_bias, need_head, need_head_bias = ctx.needs_input_grad[:5]
    dz = dweight = dbias = dhead = None
    if need_z or need_weight or need_bias or need_head:
        needs = (need_z, need_weight or need_bias, need_head)
        settings = (ctx.activation, ctx.beta, ctx.precision)
        dz, dweight, dbias, dhead = wide_backward_op(g, z, weight, bias, head_weight, *settings, *needs)
    return (
        dz if need_z else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dhead if need_head else None,
        g.sum(dim=0) if need_head_bias else None,
    )


def _forward(ctx: Any, saved: Any, *tangents: Tensor | None) -> Tensor | None:
    """By the two products, one after the other: here the features are stored."""
    z, weight, bias, head_weight = saved
    tz, tweight, tbias, thead, thead_bias = tangents[:5]
    pre, linear = torch.nn.functional.linear(z, weight), torch.nn.functional.linear
    settings = (ctx.activation, ctx.beta)
    moved = [linear(tz, weight)] if tz is not None else []
    moved += [linear(z, tweight)] if tweight is not None else []
    moved += [tbias.expand_as(pre)] if tbias is not None else []
    parts = [linear(activation_grad_op(sum(moved), pre, bias, *settings, 1), head_weight)] if moved else []
    parts += [linear(activation_op(pre, bias, *settings, 0), thead)] if thead is not None else []
    parts += [thead_bias.expand(len(z), -1)] if thead_bias is not None else []
    return sum(parts) if parts else None  # type: ignore[return-value]


def _once(ctx: Any, *of_no_use: Any) -> Any:
    raise RuntimeError(
        "gcfast.ops.wide_forward can be differentiated once; for second derivatives set fused = False on the "
        "gcfast.WideHead, or compose gcfast.ops.wide_features with torch.nn.functional.linear"
    )


@operator(
    "wide_backward",
    _check_backward,
    _gradients,
    derivative=Derivative(lambda ctx, inputs, output: None, _once, _once),
)
def wide_backward_op(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
    need_z: bool,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, weight, bias and head_weight; the ones not needed are empty."""
    precision = chosen_precision(precision, z)
    backend = chosen_backend("wide_forward", z, weight, head_weight)
    needs = (need_z, need_hidden, need_hidden, need_head)
    if backend == "reference":
        grads = reference.wide_backward(g, z, weight, bias, head_weight, activation=activation, beta=beta)
        dz, dw, db, dh = (x if need else z.new_empty(0) for x, need in zip(grads, needs))
        return dz, dw, db, dh
    if backend == "triton":
        layer = (z, weight, bias, head_weight, ACTIVATION_CODES[activation], beta, precision)
        with library_products(precision):
            dz, dw, db, dh = triton("wide_backward")(g, *layer, need_z, need_hidden, need_head)
        return dz, dw, db, dh
    u, x, w, b, h = working(g, z, weight, bias, head_weight)
    assert u is not None and x is not None and w is not None and b is not None and h is not None
    shapes = (x.shape, w.shape, b.shape, h.shape)
    outs = [torch.empty(s if need else 0, dtype=x.dtype, device="cpu") for s, need in zip(shapes, needs)]
    pointers = (o.data_ptr() if need else 0 for o, need in zip(outs, needs))
    cpu("wide_backward", x.dtype)(
        *layer_arguments(x, w, b, activation, beta, uses_bf16(z, precision)),
        *(u.data_ptr(), h.data_ptr(), *pointers, h.shape[0], u.stride(0), h.stride(0)),
    )
    dz, dw, db, dh = (o.to(z.dtype) for o in outs)
    return dz, dw, db, dh


@operator(
    "wide_forward",
    _check_forward,
    lambda z, weight, bias, head_weight, *rest: z.new_empty(z.shape[0], head_weight.shape[0]),
    derivative=Derivative(_setup, _backward, _forward),
    rows=("z",),
)
def wide_forward_op(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    """z (n, d) to (n, C)."""
    precision = chosen_precision(precision, z)
    backend = chosen_backend("wide_forward", z, weight, head_weight)
    if backend == "reference":
        return reference.wide_forward(
            z, weight, bias, head_weight, head_bias, activation=activation, beta=beta
        )
    if backend == "triton":
        layer = (z, weight, bias, head_weight, head_bias, ACTIVATION_CODES[activation], beta, precision)
        with library_products(precision):
            out: Tensor = triton("wide_forward")(*layer)
        return out
    x, w, b, h, hb = working(z, weight, bias, head_weight, head_bias)
    assert x is not None and w is not None and b is not None and h is not None
    out = torch.empty(x.shape[0], h.shape[0], dtype=x.dtype, device="cpu")
    layer = layer_arguments(x, w, b, activation, beta, uses_bf16(z, precision))
    head = (h.data_ptr(), 0 if hb is None else hb.data_ptr(), out.data_ptr(), h.shape[0], h.stride(0))
    cpu("wide_forward", x.dtype)(*layer, *head)
    return out.to(z.dtype)


def wide_features(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """The features act(z weight^T + bias), stored whole: z (..., d), weight (m, d), bias (m,) to (..., m).

    Twice differentiable. With `out` (contiguous, shape (..., m)) nothing else of that size is allocated, and
    no gradient flows.
    """
    arguments.wide(z, weight, bias)
    arguments.is_activation(activation, beta)
    if out is None:
        pre = torch.nn.functional.linear(z, weight)
        return activation_op(pre, bias, activation, float(beta), 0)
    arguments.matches("out", out, "z", z)
    arguments.has_shape("out", out, (*z.shape[:-1], weight.shape[0]), "(..., m)")
    for name, value in (("z", z), ("weight", weight), ("bias", bias), ("out", out)):
        memory.is_there(name, value)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; got strides {tuple(out.stride())}")
    operands = (z, weight, bias, out)
    if (torch.is_grad_enabled() and any(t.requires_grad for t in operands)) or any(
        errors.transformed(t) for t in operands
    ):
        raise RuntimeError(
            "out= cannot be differentiated, nor batched by vmap: leave it out, or work under torch.no_grad()"
        )
    for name, value in (("z", z), ("weight", weight), ("bias", bias)):
        memory.shares_nothing("out", out, name, value)
    torch.mm(z.reshape(-1, z.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]))
    activation_out_op(out, bias, activation, float(beta), 0, out)
    return out


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """What autocast makes of an operand: float64 and what is not floating stay."""
    castable = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if castable else t


def wide_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """act(z weight^T + bias) head_weight^T + head_bias without ever storing the features.

    Args:
        z: (..., d); weight: (m, d); bias: (m,); head_weight: (C, m); head_bias: (C,) or None; all of one
            dtype and device. Half precision is accumulated in float32 and rounded once. Under autocast they
        are cast to its dtype first, as torch casts the operands of a product.
        activation, beta: as in :func:`activation`.
        precision: how products of float32 may be made: "ieee", or, where that is faster on the device at
            hand, "tf32x3" (errors near float32's), "tf32" (10 bits) or "bf16" (operands rounded to 8 bits,
            sums in float32). A processor without such instructions computes as if it were "ieee". None: what
            torch allows its own products (``torch.backends.cuda.matmul.fp32_precision``, on the CPU
            ``torch.backends.mkldnn.matmul.fp32_precision``).

    Returns:
        (..., C). Features exist in tiles only, in the backward pass too, where they are computed again;
        gradients reach all five tensors, once (not twice) differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    kind = z.device.type if isinstance(z, Tensor) else ""
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        operands = (z, weight, bias, head_weight, head_bias)
        z, weight, bias, head_weight, head_bias = (_autocast(t, dtype) for t in operands)
    arguments.is_float("z", z)
    if z.dim() < 1:
        raise ValueError("z must have shape (..., d); got a tensor without dimensions")
    flat = z if z.dim() == 2 else z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    out: Tensor = wide_forward_op(flat, weight, bias, head_weight, head_bias, activation, beta, precision)
    return out if z.dim() == 2 else out.reshape(*z.shape[:-1], out.shape[1])
