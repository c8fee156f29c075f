"""Activation functions and their derivatives as differentiable, compilable ops on every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcfast import reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.arguments import as_rows
from gcfast.ops.registration import Derivative, operator, save

# The order of Act in csrc/core/activations.h.
ACTIVATION_CODES = {name: i for i, name in enumerate(reference.ACTIVATIONS)}


def run_activation(
    backend: str,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    beta: float,
    order: int,
    grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(grad *) act^(order)(x + bias) on a named backend, into `out` if given (which may be x or grad)."""
    if backend == "reference":
        value = reference.activation(x, bias, activation=activation, beta=beta, order=order, grad=grad)
        return value if out is None else out.copy_(value)
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return result
    rows = as_rows(x)
    # Only a row-strided `out` can be written in place; any other layout goes through a temporary.
    in_place = result.is_contiguous() or (result.dim() == 2 and result.stride(1) == 1)
    target = as_rows(result) if in_place else torch.empty_like(rows, memory_format=torch.contiguous_format)
    upstream = None if grad is None else as_rows(grad)
    shift = None if bias is None else bias.contiguous()
    if backend == "cpu":
        _run_cpu(rows, shift, upstream, target, ACTIVATION_CODES[activation], order, beta)
    elif backend == "cuda":
        _run_cuda(rows, shift, upstream, target, ACTIVATION_CODES[activation], order, beta)
    elif backend == "triton":
        _run_triton(rows, shift, upstream, target, ACTIVATION_CODES[activation], order, beta)
    else:
        raise AssertionError(f"activation has no kernel on backend {backend!r}")
    if not in_place:
        result.copy_(target.view(result.shape))
    return result


def _arguments(
    x: Tensor, bias: Tensor | None, grad: Tensor | None, out: Tensor, kind: int, order: int, beta: float
) -> tuple[Any, ...]:
    """What the C++ and the CUDA kernels take alike: pointers (0: absent), sizes and strides in elements."""
    pointers = (0 if t is None else t.data_ptr() for t in (x, bias, grad, out))
    strides = (0 if t is None else t.stride(0) for t in (x, grad, out))
    return (*pointers, *x.shape, *strides, kind, order, beta)


def _run_cpu(x: Tensor, *rest: Any) -> None:
    assert native.cpu is not None
    kernel = native.cpu.activation_f64 if x.dtype == torch.float64 else native.cpu.activation_f32
    kernel(*_arguments(x, *rest), torch.get_num_threads())


def _run_cuda(x: Tensor, *rest: Any) -> None:
    """On the device of the tensors, whichever is current, and on that device's current stream."""
    assert native.cuda is not None
    kernel = native.cuda.activation_f64 if x.dtype == torch.float64 else native.cuda.activation_f32
    kernel(*_arguments(x, *rest), x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


def _run_triton(
    x: Tensor, bias: Tensor | None, grad: Tensor | None, out: Tensor, kind: int, order: int, beta: float
) -> None:
    from gcfast.triton_kernels.activation import activation

    activation(x, bias, grad, out, kind, order, beta)


def _check_bias(x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int) -> None:
    arguments.is_float("x", x)
    arguments.is_activation(activation, beta, order)
    if bias is not None:
        arguments.matches("bias", bias, "x", x)
        if x.dim() == 0:
            raise ValueError("bias needs an x with at least one dimension; got an x without dimensions")
        arguments.has_shape("bias", bias, x.shape[-1:], "the last dimension of x")


def _check_grad(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int
) -> None:
    _check_bias(x, bias, activation, beta, order)
    arguments.matches("grad", grad, "x", x)
    arguments.has_shape("grad", grad, x.shape, "as x")


def _check_out(x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int, out: Tensor) -> None:
    _check_bias(x, bias, activation, beta, order)
    arguments.matches("out", out, "x", x)
    arguments.has_shape("out", out, x.shape, "as x")


def _like_x(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _next_order(activation: str, order: int) -> int:
    if order >= 2:
        raise RuntimeError(
            f"the third derivative of {activation} is not implemented: "
            "gcfast.ops.activation can be differentiated up to order 2 in all"
        )
    return order + 1


def _sum_to_bias(g: Tensor) -> Tensor:
    return g.sum_to_size(g.shape[-1:])


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.activation, ctx.beta, ctx.order = inputs
    save(ctx, x, bias)


def _moved(x: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """The tangent of x + bias."""
    if bias is None:
        return x
    return bias.expand_as(like) if x is None else x + bias


def _backward_activation(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx = activation_grad_op(g, x, bias, ctx.activation, ctx.beta, _next_order(ctx.activation, ctx.order))
    db = _sum_to_bias(dx) if ctx.needs_input_grad[1] else None
    return dx, db


def _forward_activation(
    ctx: Any, saved: Any, tx: Tensor | None, tbias: Tensor | None, *settings: None
) -> Tensor | None:
    x, bias = saved
    moved = _moved(tx, tbias, x)
    order = _next_order(ctx.activation, ctx.order)
    return None if moved is None else activation_grad_op(moved, x, bias, ctx.activation, ctx.beta, order)


def _setup_activation_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, bias, ctx.activation, ctx.beta, ctx.order = inputs
    save(ctx, grad, x, bias)


def _backward_activation_grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, bias = ctx.saved_tensors
    need_grad, need_x, need_bias = ctx.needs_input_grad[:3]
    dgrad = activation_grad_op(g, x, bias, ctx.activation, ctx.beta, ctx.order) if need_grad else None
    dx = None
    if need_x or need_bias:
        order = _next_order(ctx.activation, ctx.order)
        dx = activation_grad_op(g * grad, x, bias, ctx.activation, ctx.beta, order)
    db = _sum_to_bias(dx) if need_bias and dx is not None else None
    return dgrad, dx, db


def _forward_activation_grad(
    ctx: Any, saved: Any, tgrad: Tensor | None, tx: Tensor | None, tbias: Tensor | None, *settings: None
) -> Tensor | None:
    grad, x, bias = saved
    moved, found = _moved(tx, tbias, x), None
    if moved is not None:
        order = _next_order(ctx.activation, ctx.order)
        found = activation_grad_op(moved * grad, x, bias, ctx.activation, ctx.beta, order)
    if tgrad is not None:
        part = activation_grad_op(tgrad, x, bias, ctx.activation, ctx.beta, ctx.order)
        found = part if found is None else found + part
    return found


@operator(
    "activation",
    _check_bias,
    _like_x,
    derivative=Derivative(_setup_activation, _backward_activation, _forward_activation),
    rows=("x",),
    any_axes=True,
)
def activation_op(x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int) -> Tensor:
    return run_activation(dispatch.choose("activation", x), x, bias, activation, beta, order)


@operator(
    "activation_grad",
    _check_grad,
    lambda grad, *rest: _like_x(grad),
    derivative=Derivative(_setup_activation_grad, _backward_activation_grad, _forward_activation_grad),
    rows=("grad", "x"),
    any_axes=True,
)
def activation_grad_op(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int
) -> Tensor:
    """grad * act^(order)(x + bias)."""
    return run_activation(dispatch.choose("activation", x), x, bias, activation, beta, order, grad)


@operator(
    "activation_out",
    _check_out,
    lambda *given: None,
    mutates=("out",),
    in_place=("x",),
    refusal="out= cannot be differentiated: leave it out, detach {name}, or work under torch.no_grad()",
)
def activation_out_op(
    x: Tensor, bias: Tensor | None, activation: str, beta: float, order: int, out: Tensor
) -> None:
    run_activation(dispatch.choose("activation", x), x, bias, activation, beta, order, None, out)


def activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    order: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """act(x + bias), or its first or second derivative there.

    Args:
        x: any shape and strides; float32 and float64 run on every backend, bfloat16 and float16 on triton (in
            float32, rounded once) and the reference.
        bias: shape ``x.shape[-1:]``, added along the last dimension.
        activation: softplus (log(1 + exp(beta x)) / beta, without a threshold), sigmoid, tanh, gelu (by erf),
            gelu_tanh, silu or relu (derivative 0 at 0).
        beta: softplus's sharpness, > 0; the others take 1.0 only.
        order: 0, 1 or 2. Gradients work as long as ``order`` and the number of differentiations add up to at
            most 2; one more raises.
        out: written and returned; may be `x`. Not differentiable: an error if a gradient would be needed.

    Returns:
        x's shape and dtype, contiguous (or `out`).

    Accuracy on the cpu, cuda and triton backends: within 4 ulp over the whole range, denormal results
    included (of the sum of the magnitudes of its terms where a derivative of gelu, gelu_tanh or silu crosses
    zero; within 4.5 on a CPU without FMA).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if out is None:
        return activation_op(x, bias, activation, beta, order)
    activation_out_op(x, bias, activation, beta, order, out)
    return out
