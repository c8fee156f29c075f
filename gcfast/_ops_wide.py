"""The torch.library op wide_forward: row chunks of features in one reused buffer, in backward too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gcfast import _dispatch
from gcfast._ops_activation import run_activation

_CHUNK_BYTES = 8 << 20  # a chunk of features stays near the cores' caches between the two products


def chunk_rows(n: int, m: int, itemsize: int) -> int:
    """Rows a chunk: enough for an efficient product, few enough that n x m is never stored."""
    return max(1, min(n, max(64, _CHUNK_BYTES // max(1, m * itemsize))))


def _chunks(n: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


@torch.library.custom_op("gcfast::wide_forward", mutates_args=())
def wide_forward_op(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    beta: float,
) -> Tensor:
    """z (n, d) to (n, C)."""
    backend = _dispatch.choose("wide_forward", z)
    n, m = z.shape[0], weight.shape[0]
    out = z.new_empty(n, head_weight.shape[0])
    step = chunk_rows(n, m, z.element_size())
    buffer = z.new_empty(step if n else 0, m)
    for rows in _chunks(n, step):
        phi = buffer[: rows.stop - rows.start]
        torch.mm(z[rows], weight.t(), out=phi)
        run_activation(backend, phi, bias, activation, beta, 0, None, phi)
        if head_bias is None:
            torch.mm(phi, head_weight.t(), out=out[rows])
        else:
            torch.addmm(head_bias, phi, head_weight.t(), out=out[rows])
    return out


@torch.library.custom_op("gcfast::wide_backward", mutates_args=())
def wide_backward_op(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    activation: str,
    beta: float,
    need_z: bool,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, weight, bias and head_weight; the ones not needed are empty."""
    backend = _dispatch.choose("wide_forward", z)
    n, m = z.shape[0], weight.shape[0]
    dz = z.new_zeros(z.shape) if need_z else z.new_empty(0)
    dweight = z.new_zeros(weight.shape) if need_hidden else z.new_empty(0)
    dbias = z.new_zeros(m) if need_hidden else z.new_empty(0)
    dhead = z.new_zeros(head_weight.shape) if need_head else z.new_empty(0)
    step = chunk_rows(n, m, z.element_size())
    below = need_z or need_hidden
    pre_buffer = z.new_empty(step if n else 0, m)
    phi_buffer = torch.empty_like(pre_buffer)
    for rows in _chunks(n, step):
        pre, phi = pre_buffer[: rows.stop - rows.start], phi_buffer[: rows.stop - rows.start]
        torch.mm(z[rows], weight.t(), out=pre)
        if need_head:
            run_activation(backend, pre, bias, activation, beta, 0, None, phi)
            dhead.addmm_(g[rows].t(), phi)
        if below:
            torch.mm(g[rows], head_weight, out=phi)  # the gradient of the features, over the features
            run_activation(backend, pre, bias, activation, beta, 1, phi, phi)
        if need_z:
            torch.mm(phi, weight, out=dz[rows])
        if need_hidden:
            dweight.addmm_(phi.t(), z[rows])
            dbias += phi.sum(dim=0)
    return dz, dweight, dbias, dhead


@wide_forward_op.register_fake
def _(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    activation: str,
    beta: float,
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, head_weight, _, ctx.activation, ctx.beta = inputs
    ctx.save_for_backward(z, weight, bias, head_weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, bias, head_weight = ctx.saved_tensors
    need_z, need_weight, need_bias, need_head, need_head_bias = ctx.needs_input_grad[:5]
    dz, dweight, dbias, dhead = wide_backward_op(
        g, z, weight, bias, head_weight, ctx.activation, ctx.beta, need_z, need_weight or need_bias, need_head
    )
    return (
        dz if need_z else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dhead if need_head else None,
        g.sum(dim=0) if need_head_bias else None,
        None,
        None,
    )


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "gcfast.ops.wide_forward can be differentiated once; for second derivatives compose "
        "gcfast.ops.wide_features with torch.nn.functional.linear"
    )


wide_forward_op.register_autograd(_backward, setup_context=_setup)
wide_backward_op.register_autograd(_no_second)
