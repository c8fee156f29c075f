"""Cross-entropy of logits: loss, residual p - y, conjugate term and curvature product, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gcfast.reference.activations import working


def softmax_residual(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of logits (n, C): cross-entropy (n,), p - q (n, C), sum p log p (n,), with p = softmax(logits).

    `target` holds class indices (n,) or probabilities (n, C); q = (1 - s) y + s/C, s = label_smoothing.
    With k the first maximum and S the sum of exp(f_c - f_k) over c != k, all three come from log1p(S) and
    from sums of terms of one sign, so they keep their relative accuracy when they are tiny. 0 log 0 = 0.
    Nothing is read back from the device: a label outside [0, C) gives NaN in all three.
    """
    work = working(logits)
    c = work.shape[-1]
    keep, spread = 1.0 - label_smoothing, label_smoothing / c
    top, k = work.max(dim=-1, keepdim=True)
    a = work - top
    e = torch.exp(a).scatter(-1, k, 0.0)
    s = e.sum(dim=-1, keepdim=True)
    poison = top - top  # an infinite maximum leaves no softmax: NaN
    if not target.is_floating_point():
        inside = (target >= 0) & (target < c)
        poison = torch.where(inside.unsqueeze(-1), poison, math.nan)
    log_sum = torch.log1p(s) + poison
    inverse = 1.0 / (1.0 + s + poison)
    neg_entropy = (e * a.clamp(min=-1e4)).sum(dim=-1, keepdim=True) * inverse - log_sum
    p = e * inverse
    if target.is_floating_point():
        y = working(target)
        q = keep * y + spread
        weighted = torch.where(q == 0, 0.0, q * a).sum(dim=-1, keepdim=True)
        loss = q.sum(dim=-1, keepdim=True) * log_sum - weighted
        one_minus_q = keep * (1.0 - y.gather(-1, k)) + spread * (c - 1)
    else:
        label = target.clamp(0, c - 1).unsqueeze(-1)
        q = torch.full_like(p, spread).scatter(-1, label, keep + spread)
        at_label = a.gather(-1, label)
        loss = log_sum - at_label
        if label_smoothing:
            loss = log_sum - keep * at_label - spread * a.sum(dim=-1, keepdim=True)
        one_minus_q = spread * (c - 1) + keep * (label != k).to(work.dtype)
    residual = (p - q).scatter(-1, k, one_minus_q - s * inverse)
    dtype = logits.dtype
    return loss.squeeze(-1).to(dtype), residual.to(dtype), neg_entropy.squeeze(-1).to(dtype)


def softmax_curvature(logits: Tensor, v: Tensor) -> Tensor:
    """Per row (diag(p) - p p^T) v with p = softmax(logits); logits, v and the result are (n, C).

    With k the first maximum, w_c = v_c - v_k and mu = the sum of p_c w_c over c != k: p_c (w_c - mu) for
    c != k, and -p_k mu, so that nothing near 1 - p_k is formed where p is nearly one-hot.
    """
    work = working(logits)
    top, k = work.max(dim=-1, keepdim=True)
    e = torch.exp(work - top)
    inverse = 1.0 / (1.0 + e.scatter(-1, k, 0.0).sum(dim=-1, keepdim=True) + (top - top))
    p = e * inverse
    w = working(v)
    w = w - w.gather(-1, k)  # 0 at k
    return (p * (w - (p * w).sum(dim=-1, keepdim=True))).to(logits.dtype)
