"""The torch.library ops of the softmax: loss, residual, conjugate term and curvature product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcfast import _dispatch, _native, _validate, reference
from gcfast._rows import as_rows


@torch.library.custom_op("gcfast::softmax_residual", mutates_args=())
def softmax_residual_op(
    logits: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    _validate.target_values(target, logits.shape[1])
    if _dispatch.choose("softmax_residual", logits) == "reference":
        return reference.softmax_residual(logits, target, label_smoothing=label_smoothing)
    assert _native.cpu is not None
    n, c = logits.shape
    loss, neg_entropy = logits.new_empty(n), logits.new_empty(n)
    residual = logits.new_empty(n, c)
    if n == 0:
        return loss, residual, neg_entropy
    rows = as_rows(logits)
    soft = target.is_floating_point()
    wanted = as_rows(target) if soft else target.contiguous()
    double = logits.dtype == torch.float64
    kernel = _native.cpu.softmax_residual_f64 if double else _native.cpu.softmax_residual_f32
    kernel(
        rows.data_ptr(),
        0 if soft else wanted.data_ptr(),
        wanted.data_ptr() if soft else 0,
        loss.data_ptr(),
        residual.data_ptr(),
        neg_entropy.data_ptr(),
        n,
        c,
        rows.stride(0),
        wanted.stride(0) if soft else 0,
        label_smoothing,
        torch.get_num_threads(),
    )
    return loss, residual, neg_entropy


@softmax_residual_op.register_fake
def _(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    n, c = logits.shape
    return logits.new_empty(n), logits.new_empty(n, c), logits.new_empty(n)


def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])


def _backward_softmax(
    ctx: Any, g_loss: Tensor | None, g_residual: Tensor | None, g_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, residual = ctx.saved_tensors
    dlogits = None if g_loss is None else g_loss.unsqueeze(-1) * residual
    if g_residual is not None or g_entropy is not None:
        log_p = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        pull = torch.zeros_like(p) if g_residual is None else g_residual
        if g_entropy is not None:
            pull = pull + g_entropy.unsqueeze(-1) * log_p.clamp(min=torch.finfo(log_p.dtype).min)
        rest = p * (pull - (p * pull).sum(dim=-1, keepdim=True))
        dlogits = rest if dlogits is None else dlogits + rest
    return dlogits, None, None


softmax_residual_op.register_autograd(_backward_softmax, setup_context=_setup_softmax)
