"""Softmax cross-entropy in one pass: loss, residual p - y, conjugate term and curvature product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcfast import errors, reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.arguments import as_rows
from gcfast.ops.registration import Derivative, operator, save

_CLAMP = -1e4  # exp of it is 0 in any dtype, and 0 * _CLAMP is no NaN


def _check_residual(
    logits: Tensor, target: Tensor, label_smoothing: float, check_target: bool = True
) -> None:
    arguments.logits_and_target(logits, target)
    arguments.smoothing(label_smoothing)
    errors.is_flag("check_target", check_target)


def _check_curvature(logits: Tensor, v: Tensor) -> None:
    arguments.is_logits(logits)
    arguments.matches("v", v, "logits", logits)
    arguments.has_shape("v", v, logits.shape, "as logits")


def _residual_results(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, c = logits.shape
    return logits.new_empty(n), logits.new_empty(n, c), logits.new_empty(n)


def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    save(ctx, inputs[0], output[1])


def _backward_softmax(
    ctx: Any, g_loss: Tensor | None, g_residual: Tensor | None, g_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    """residual has the Jacobian S = diag(p) - p p^T, sum p log p the gradient S log p = S (f - max f)."""
    logits, residual = ctx.saved_tensors
    dlogits = None if g_loss is None else g_loss.unsqueeze(-1) * residual
    pull = g_residual
    if g_entropy is not None:
        part = g_entropy.unsqueeze(-1) * _logits_less_their_maximum(logits)
        pull = part if pull is None else pull + part
    if pull is not None:
        rest = softmax_curvature_op(logits, pull)
        dlogits = rest if dlogits is None else dlogits + rest
    return (dlogits,)


def _forward_softmax(
    ctx: Any, saved: Any, tangent: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same formulas: the Jacobian of the residual is symmetric."""
    if tangent is None:
        return None, None, None
    logits, residual = saved
    moved = softmax_curvature_op(logits, tangent)
    entropy = (moved * _logits_less_their_maximum(logits)).sum(dim=-1)
    return (residual * tangent).sum(dim=-1), moved, entropy


def _logits_less_their_maximum(logits: Tensor) -> Tensor:
    top = logits.detach().amax(dim=-1, keepdim=True)  # a constant in a row changes nothing
    return (logits - top).clamp(min=_CLAMP)


def _setup_curvature(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    save(ctx, *inputs)


def _third(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The derivative in the logits of S a along b, or of S b along a: S ((a - p.a)(b - p.b)).

    That is S (a b - (p.b) a - (p.a) b) with a multiple of the ones vector added, which S maps to zero; both
    factors are formed from differences to the first maximum, as the op's own.
    """
    k = logits.detach().argmax(dim=-1, keepdim=True)
    p = torch.softmax(logits, dim=-1)

    def centred(x: Tensor) -> Tensor:
        x = x - x.gather(-1, k)
        return x - (p * x).sum(dim=-1, keepdim=True)

    return softmax_curvature_op(logits, centred(a) * centred(b))


def _backward_curvature(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """In v: S g, S being symmetric."""
    logits, v = ctx.saved_tensors
    need_logits, need_v = ctx.needs_input_grad[:2]
    dv = softmax_curvature_op(logits, g) if need_v else None
    return _third(logits, g, v) if need_logits else None, dv


def _forward_curvature(ctx: Any, saved: Any, tlogits: Tensor | None, tv: Tensor | None) -> Tensor | None:
    logits, v = saved
    found = None if tv is None else softmax_curvature_op(logits, tv)
    if tlogits is not None:
        part = _third(logits, tlogits, v)
        found = part if found is None else found + part
    return found


@operator(
    "softmax_residual",
    _check_residual,
    _residual_results,
    derivative=Derivative(_setup_softmax, _backward_softmax, _forward_softmax, constant=("target",)),
    rows=("logits", "target"),
)
def softmax_residual_op(
    logits: Tensor, target: Tensor, label_smoothing: float, check_target: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    if check_target:
        arguments.target_values(target, logits.shape[1])
    backend = dispatch.choose("softmax_residual", logits)
    if backend == "reference":
        return reference.softmax_residual(logits, target, label_smoothing=label_smoothing)
    n, c = logits.shape
    loss, residual, neg_entropy = _residual_results(logits)
    if n == 0:
        return loss, residual, neg_entropy
    rows = as_rows(logits)
    soft = target.is_floating_point()
    wanted = as_rows(target) if soft else target.contiguous()
    if backend == "triton":
        from gcfast.triton_kernels.softmax_residual import softmax_residual as launch

        launch(rows, wanted, label_smoothing, loss, residual, neg_entropy)
        return loss, residual, neg_entropy
    assert native.cpu is not None
    double = logits.dtype == torch.float64
    kernel = native.cpu.softmax_residual_f64 if double else native.cpu.softmax_residual_f32
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


@operator(
    "softmax_curvature",
    _check_curvature,
    lambda logits, v: logits.new_empty(logits.shape),
    derivative=Derivative(_setup_curvature, _backward_curvature, _forward_curvature),
    rows=("logits", "v"),
)
def softmax_curvature_op(logits: Tensor, v: Tensor) -> Tensor:
    """(diag(p) - p p^T) v a row."""
    backend = dispatch.choose("softmax_curvature", logits)
    if backend == "reference":
        return reference.softmax_curvature(logits, v)
    n, c = logits.shape
    out = logits.new_empty(n, c)
    if n == 0:
        return out
    rows, vectors = as_rows(logits), as_rows(v)
    if backend == "triton":
        from gcfast.triton_kernels.softmax_residual import softmax_curvature as launch

        launch(rows, vectors, out)
        return out
    assert native.cpu is not None
    double = logits.dtype == torch.float64
    kernel = native.cpu.softmax_curvature_f64 if double else native.cpu.softmax_curvature_f32
    strides, threads = (rows.stride(0), vectors.stride(0)), torch.get_num_threads()
    kernel(rows.data_ptr(), vectors.data_ptr(), out.data_ptr(), n, c, *strides, threads)
    return out


def softmax_residual(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, check_target: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, its residual and its conjugate term, per row, in one pass.

    Args:
        logits: (n, C), C >= 1, any strides.
        target: int64 class indices (n,), or probabilities (n, C) of logits' dtype whose rows sum to one.
        label_smoothing: in [0, 1); the targets are q = (1 - label_smoothing) y + label_smoothing / C.
        check_target: whether the values of `target` are checked. That costs a pass over it and, on the GPU,
            a synchronisation, which is not allowed while a CUDA graph is captured. Without the check a label
            outside [0, C) gives NaN in all three outputs of its row, and rows of probabilities are taken as
            they are; no memory outside the arguments is read.

    Returns:
        loss (n,), as ``torch.nn.functional.cross_entropy(..., reduction="none")``; residual (n, C), p - q
        with p = softmax(logits), the gradient of the loss; neg_entropy (n,), sum p log p, the conjugate of
        log-sum-exp at p. All have small relative error where they are tiny. A row with a NaN or an
        infinite maximum gives NaN; a logit of -inf is a class of probability zero, and 0 log 0 = 0.

    All three outputs can be differentiated in `logits`; `target` must not require a gradient.

    Raises:
        TypeError, ValueError: naming the argument; a label out of range with its index and value.
    """
    found: tuple[Tensor, Tensor, Tensor] = softmax_residual_op(logits, target, label_smoothing, check_target)
    return found


def softmax_curvature(logits: Tensor, v: Tensor) -> Tensor:
    """The curvature of cross-entropy times a vector, per row: (diag(p) - p p^T) v with p = softmax(logits).

    Args:
        logits: (n, C), C >= 1, any strides.
        v: (n, C), of logits' dtype and device, any strides.

    Returns:
        (n, C), contiguous: with k the first maximum of the row, w_c = v_c - v_k and mu the sum of p_c w_c
        over c != k, it is p_c (w_c - mu) for c != k and -p_k mu at k. Nothing cancels where p is nearly
        one-hot, so the small numbers there keep their relative accuracy. A row of logits with a NaN or an
        infinite maximum gives NaN; a logit of -inf is a class of probability zero.

    Symmetric and linear in `v`; differentiable any number of times in both arguments.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    found: Tensor = softmax_curvature_op(logits, v)
    return found
