"""Products with the wide layer's features, made tile by tile: head gradient, Gram product, panels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gcfast import reference
from gcfast.ops import arguments, native
from gcfast.ops.activations import ACTIVATION_CODES
from gcfast.ops.arguments import as_rows
from gcfast.ops.registration import operator
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


def wide_head_grad(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """residual^T Phi with Phi = act(z weight^T + bias), never stored: the gradient of a linear head's weight.

    Args:
        z: (n, d); weight: (m, d); bias: (m,); residual: (n, C), the gradient of the loss in the outputs; all
            of one dtype and device, any strides. The head bias's gradient is ``residual.sum(0)``.
        activation, beta, precision: as in :func:`wide_forward`.

    Returns:
        (C, m), as ``nn.Linear(m, C).weight.grad``. Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    found: Tensor = wide_head_grad_op(z, weight, bias, residual, activation, beta, precision)
    return found


def wide_gram_product(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """Phi (Phi^T r) with Phi = act(z weight^T + bias), never stored and computed once: K r for K = Phi Phi^T.

    The inner step of matrix-free solves. With a column of ones in Phi add ``r.sum(0)`` to every row.

    Args:
        z: (n, d); weight: (m, d); bias: (m,); r: (n, C); all of one dtype and device, any strides.
        activation, beta, precision: as in :func:`wide_forward`.

    Returns:
        (n, C). Memory: a panel of Phi, n by 64 columns (on a GPU some tens of megabytes). Not
        differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    found: Tensor = wide_gram_product_op(z, weight, bias, r, activation, beta, precision)
    return found


def wide_panel(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """act(z weight^T + bias) in float64, for the columns of the wide layer that are given.

    Args:
        z: (n, d); weight: (w, d); bias: (w,); of one floating dtype and device, any strides; cast to
            float64, which is exact.
        activation, beta: as in :func:`activation`.
        out: (n, w) float64 with a unit column stride, written and returned.

    Returns:
        (n, w) float64. Except on the reference backend an element depends on its row of z, its row of weight
        and its bias alone, bit for bit, whatever other rows and columns are computed with it, on however many
        threads: panels that are computed again, or cut elsewhere, are of one matrix. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    if out is None:
        arguments.wide_matrices(z, weight, bias)  # which give its shape
        out = torch.empty(z.shape[0], weight.shape[0], dtype=torch.float64, device=z.device)
    wide_panel_out_op(z, weight, bias, activation, beta, out)
    return out


def _check_with_right_hand_sides(
    name: str,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    right_hand_sides: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> None:
    arguments.wide_right_hand_sides(z, weight, bias, name, right_hand_sides)
    arguments.wide_settings(z, activation, beta, precision)


def _check_panel(z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, out: Tensor) -> None:
    arguments.wide_matrices(z, weight, bias)
    arguments.is_activation(activation, beta)
    arguments.is_float64("out", out, "z", z)
    shape = (z.shape[0], weight.shape[0])
    arguments.has_shape("out", out, shape, "n from z, w from weight")
    if out.stride(1) != 1 and shape[1] > 1:
        raise ValueError(f"out must have a unit column stride; got strides {tuple(out.stride())}")


def _with_right_hand_sides(
    op: str,
    shape: tuple[int, int],
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    right_hand_sides: Tensor,
    activation: str,
    beta: float,
    precision: str | None,
) -> Tensor:
    """An op on the layer and right-hand sides (n, C), with a result of `shape`, on the chosen backend."""
    precision = chosen_precision(precision, z)
    backend = chosen_backend(op, z, weight, right_hand_sides)
    if backend == "reference":
        out: Tensor = getattr(reference, op)(
            z, weight, bias, right_hand_sides, activation=activation, beta=beta
        )
    elif backend == "triton":
        with library_products(precision):
            out = triton(op)(z, weight, bias, right_hand_sides, ACTIVATION_CODES[activation], beta, precision)
    else:
        x, w, b, r = working(z, weight, bias, right_hand_sides)
        assert x is not None and w is not None and b is not None and r is not None
        out = torch.empty(shape, dtype=x.dtype, device="cpu")
        layer = layer_arguments(x, w, b, activation, beta, uses_bf16(z, precision))
        cpu(op, x.dtype)(*layer, r.data_ptr(), out.data_ptr(), r.shape[1], r.stride(0))
    return out.to(z.dtype)


@operator(
    "wide_head_grad",
    partial(_check_with_right_hand_sides, "residual"),
    lambda z, weight, bias, residual, *rest: z.new_empty(residual.shape[1], weight.shape[0]),
)
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
    return _with_right_hand_sides(
        "wide_head_grad", shape, z, weight, bias, residual, activation, beta, precision
    )


@operator(
    "wide_gram_product",
    partial(_check_with_right_hand_sides, "r"),
    lambda z, weight, bias, r, *rest: z.new_empty(r.shape),
)
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
    return _with_right_hand_sides("wide_gram_product", shape, z, weight, bias, r, activation, beta, precision)


@operator("wide_panel_out", _check_panel, lambda *given: None, mutates=("out",))
def wide_panel_out_op(
    z: Tensor, weight: Tensor, bias: Tensor, activation: str, beta: float, out: Tensor
) -> None:
    """Phi (n, m) into out, float64 with a unit column stride."""
    z, weight, bias = z.double(), weight.double(), bias.double()
    backend = chosen_backend("wide_panel", z, weight)
    if backend == "reference" or out.numel() == 0:
        out.copy_(reference.wide_features(z, weight, bias, activation=activation, beta=beta))
    elif backend == "triton":
        triton("wide_panel")(z, weight, bias, ACTIVATION_CODES[activation], beta, out)
    else:
        x, w, b = as_rows(z), as_rows(weight), bias.contiguous()
        if backend == "cpu":
            cpu("wide_panel", x.dtype)(
                *layer_arguments(x, w, b, activation, beta), out.data_ptr(), out.stride(0)
            )
            return
        assert native.cuda is not None
        pointers = (x.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr())
        strides = (x.stride(0), w.stride(0), out.stride(0))
        native.cuda.wide_panel_f64(
            *(*pointers, x.shape[0], w.shape[0], x.shape[1], *strides, ACTIVATION_CODES[activation], beta),
            *(x.device.index, torch.cuda.current_stream(x.device).cuda_stream),
        )
