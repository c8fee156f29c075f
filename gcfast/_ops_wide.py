"""The torch.library ops of the wide layer: features are made tile by tile, in the backward pass too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gcfast import _dispatch, _native, reference
from gcfast._ops_activation import _KINDS
from gcfast._rows import as_rows

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


def _backend(op: str, *tensors: Tensor) -> str:
    """The backend of a call; the reference where a size is zero, which no kernel is asked to serve."""
    backend = _dispatch.choose(op, tensors[0])
    return backend if all(t.numel() for t in tensors) else "reference"


def _working(*tensors: Tensor | None) -> list[Tensor | None]:
    """What the CPU's kernels take: half precision in float32, unit column strides."""
    wide = [t.float() if t is not None and t.dtype in _HALF else t for t in tensors]
    return [t if t is None else as_rows(t) if t.dim() == 2 else t.contiguous() for t in wide]


def _cpu(name: str, dtype: torch.dtype) -> Any:
    assert _native.cpu is not None
    return getattr(_native.cpu, f"{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def _layer(
    z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, bf16: bool = False
) -> tuple[Any, ...]:
    """What every CPU kernel of the wide layer takes first."""
    pointers = (z.data_ptr(), weight.data_ptr(), bias.data_ptr())
    sizes = (*z.shape, weight.shape[0], z.stride(0), weight.stride(0))
    return (*pointers, *sizes, _KINDS[activation], beta, bf16, torch.get_num_threads())


def _bf16(z: Tensor, precision: str) -> bool:
    return precision == "bf16" or z.dtype == torch.bfloat16


def _triton(name: str) -> Any:
    return getattr(importlib.import_module(f"gcfast.triton_kernels.{name}"), name)


@contextmanager
def _library_products(precision: str) -> Iterator[None]:
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


@torch.library.custom_op("gcfast::wide_forward", mutates_args=())
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
    backend = _backend("wide_forward", z, weight, head_weight)
    if backend == "reference":
        return reference.wide_forward(
            z, weight, bias, head_weight, head_bias, activation=activation, beta=beta
        )
    if backend == "triton":
        layer = (z, weight, bias, head_weight, head_bias, _KINDS[activation], beta, precision)
        with _library_products(precision):
            out: Tensor = _triton("wide_forward")(*layer)
        return out
    x, w, b, h, hb = _working(z, weight, bias, head_weight, head_bias)
    assert x is not None and w is not None and b is not None and h is not None
    out = torch.empty(x.shape[0], h.shape[0], dtype=x.dtype)
    arguments = _layer(x, w, b, activation, beta, _bf16(z, precision))
    head = (h.data_ptr(), 0 if hb is None else hb.data_ptr(), out.data_ptr(), h.shape[0], h.stride(0))
    _cpu("wide_forward", x.dtype)(*arguments, *head)
    return out.to(z.dtype)


@torch.library.custom_op("gcfast::wide_backward", mutates_args=())
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
    backend = _backend("wide_forward", z, weight, head_weight)
    needs = (need_z, need_hidden, need_hidden, need_head)
    if backend == "reference":
        grads = reference.wide_backward(g, z, weight, bias, head_weight, activation=activation, beta=beta)
        dz, dw, db, dh = (x if need else z.new_empty(0) for x, need in zip(grads, needs))
        return dz, dw, db, dh
    if backend == "triton":
        layer = (z, weight, bias, head_weight, _KINDS[activation], beta, precision)
        with _library_products(precision):
            dz, dw, db, dh = _triton("wide_backward")(g, *layer, need_z, need_hidden, need_head)
        return dz, dw, db, dh
    u, x, w, b, h = _working(g, z, weight, bias, head_weight)
    assert u is not None and x is not None and w is not None and b is not None and h is not None
    shapes = (x.shape, w.shape, b.shape, h.shape)
    outs = [torch.empty(s if need else 0, dtype=x.dtype) for s, need in zip(shapes, needs)]
    pointers = (o.data_ptr() if need else 0 for o, need in zip(outs, needs))
    _cpu("wide_backward", x.dtype)(
        *_layer(x, w, b, activation, beta, _bf16(z, precision)),
        *(u.data_ptr(), h.data_ptr(), *pointers, h.shape[0], u.stride(0), h.stride(0)),
    )
    dz, dw, db, dh = (o.to(z.dtype) for o in outs)
    return dz, dw, db, dh


def _with_sides(
    op: str,
    shape: tuple[int, int],
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    sides: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    """An op on the layer and `sides` (n, C), with a result of `shape`, on the backend chosen for it."""
    precision = chosen_precision(precision, z)
    backend = _backend(op, z, weight, sides)
    if backend == "reference":
        out: Tensor = getattr(reference, op)(z, weight, bias, sides, activation=activation, beta=beta)
    elif backend == "triton":
        with _library_products(precision):
            out = _triton(op)(z, weight, bias, sides, _KINDS[activation], beta, precision)
    else:
        x, w, b, r = _working(z, weight, bias, sides)
        assert x is not None and w is not None and b is not None and r is not None
        out = torch.empty(shape, dtype=x.dtype)
        layer = _layer(x, w, b, activation, beta, _bf16(z, precision))
        _cpu(op, x.dtype)(*layer, r.data_ptr(), out.data_ptr(), r.shape[1], r.stride(0))
    return out.to(z.dtype)


@torch.library.custom_op("gcfast::wide_head_grad", mutates_args=())
def wide_head_grad_op(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    """residual^T Phi (C, m) for residual (n, C)."""
    shape = (residual.shape[1], weight.shape[0])
    return _with_sides("wide_head_grad", shape, z, weight, bias, residual, activation, beta, precision)


@torch.library.custom_op("gcfast::wide_gram_product", mutates_args=())
def wide_gram_product_op(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    """Phi (Phi^T r) (n, C) for r (n, C)."""
    shape = (z.shape[0], r.shape[1])
    return _with_sides("wide_gram_product", shape, z, weight, bias, r, activation, beta, precision)


@torch.library.custom_op("gcfast::wide_panel_out", mutates_args=("out",))
def wide_panel_out_op(
    z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, out: Tensor
) -> None:
    """Phi (n, m) into out; all float64, out with a unit column stride."""
    backend = _backend("wide_panel", z, weight)
    if backend == "reference" or out.numel() == 0:
        out.copy_(reference.wide_features(z, weight, bias, activation=activation, beta=beta))
    elif backend == "triton":
        _triton("wide_panel")(z, weight, bias, _KINDS[activation], beta, out)
    else:
        x, w, b = as_rows(z), as_rows(weight), bias.contiguous()
        if backend == "cpu":
            _cpu("wide_panel", x.dtype)(*_layer(x, w, b, activation, beta), out.data_ptr(), out.stride(0))
            return
        assert _native.cuda is not None
        pointers = (x.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr())
        strides = (x.stride(0), w.stride(0), out.stride(0))
        _native.cuda.wide_panel_f64(
            *(*pointers, x.shape[0], w.shape[0], x.shape[1], *strides, _KINDS[activation], beta),
            *(x.device.index, torch.cuda.current_stream(x.device).cuda_stream),
        )


@wide_forward_op.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    return z.new_empty(z.shape[0], head_weight.shape[0])


@wide_backward_op.register_fake
def _(
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
        z.new_empty(z.shape) if need_z else z.new_empty(0),
        z.new_empty(weight.shape) if need_hidden else z.new_empty(0),
        z.new_empty(weight.shape[0]) if need_hidden else z.new_empty(0),
        z.new_empty(head_weight.shape) if need_head else z.new_empty(0),
    )


@wide_head_grad_op.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    return z.new_empty(residual.shape[1], weight.shape[0])


@wide_gram_product_op.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    return z.new_empty(r.shape)


@wide_panel_out_op.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, out: Tensor) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, head_weight, _, ctx.activation, ctx.beta, ctx.precision = inputs
    ctx.save_for_backward(z, weight, bias, head_weight)


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
        None,
        None,
        None,
    )


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "gcfast.ops.wide_forward can be differentiated once; for second derivatives set fused = False on the "
        "gcfast.WideHead, or compose gcfast.ops.wide_features with torch.nn.functional.linear"
    )


wide_forward_op.register_autograd(_backward, setup_context=_setup)
wide_backward_op.register_autograd(_no_second)
