"""Every op in plain PyTorch: the specification of the kernels, and a backend of its own.

Any floating dtype, any device. Half and bfloat16 inputs are computed in float32 and rounded once. This module
imports neither Triton nor the compiled modules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("softplus", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "relu")

_A = 2.0 * math.sqrt(2.0 / math.pi)  # gelu_tanh(x) = x * sigmoid(A x + B x^3)
_B = 0.044715 * _A


def _logistic(t: Tensor) -> Tensor:
    """sigmoid, with its relative accuracy kept down to denormal results (torch.sigmoid gives 0 there)."""
    e = torch.exp(-t.abs())
    return torch.where(t < 0, e, torch.ones_like(e)) / (1 + e)


def _softplus(x: Tensor, beta: float, order: int) -> Tensor:
    t = x * beta
    if order == 0:
        # not F.softplus: its threshold of 20 is an error of 2e-9
        low = torch.log1p(torch.exp(-t.abs())) / beta
        return x.clamp(min=0) + low
    if order == 1:
        return _logistic(t)
    return beta * _logistic(t) * _logistic(-t)


def _sigmoid(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return _logistic(x)
    slope = _logistic(x) * _logistic(-x)
    return slope if order == 1 else -slope * torch.tanh(0.5 * x)


def _tanh(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return torch.tanh(x)
    slope = 4 * _logistic(2 * x) * _logistic(-2 * x)
    return slope if order == 1 else -2 * torch.tanh(x) * slope


def _gated(x: Tensor, v: Tensor, dv: Tensor | float, ddv: Tensor | float, limit: float, order: int) -> Tensor:
    """x * sigmoid(v(x)) and its derivatives; beyond `limit` the sigmoid is 0 or 1 to all digits."""
    s, r = _logistic(v), _logistic(-v)
    near = x.clamp(-limit, limit)
    if order == 0:
        return x.clamp(min=-limit) * s
    if order == 1:
        return s + near * s * r * dv
    return s * r * (2 * dv + near * ddv - near * dv * dv * torch.tanh(0.5 * v))


def _silu(x: Tensor, order: int) -> Tensor:
    return _gated(x, x, 1.0, 0.0, 2000.0, order)


def _gelu_tanh(x: Tensor, order: int) -> Tensor:
    near = x.clamp(-40.0, 40.0)
    v = near * (_A + _B * near * near)
    return _gated(x, v, _A + 3 * _B * near * near, 6 * _B * near, 40.0, order)


def _gelu(x: Tensor, order: int) -> Tensor:
    near = x.clamp(-200.0, 200.0)
    if order == 0:
        return x.clamp(min=-200.0) * (0.5 * torch.erfc(-near * math.sqrt(0.5)))
    density = torch.exp(-0.5 * near * near) / math.sqrt(2 * math.pi)
    if order == 1:
        return 0.5 * torch.erfc(-near * math.sqrt(0.5)) + near * density
    return density * (2 - near * near)


def _relu(x: Tensor, order: int) -> Tensor:
    if order == 0:
        return x.clamp(min=0)
    nan_or_zero = torch.where(x.isnan(), x, torch.zeros_like(x))
    return nan_or_zero if order == 2 else torch.where(x > 0, torch.ones_like(x), nan_or_zero)


_FUNCTIONS = {
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu": _relu,
}


def _working(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    order: int = 0,
    grad: Tensor | None = None,
) -> Tensor:
    """grad * act^(order)(x + bias), `bias` along the last dimension, `grad` of x's shape; both optional.

    softplus is log(1 + exp(beta x)) / beta; the others take no beta. relu's first derivative at 0 is 0.
    """
    work = _working(x)
    if bias is not None:
        work = work + _working(bias)
    out = _softplus(work, beta, order) if activation == "softplus" else _FUNCTIONS[activation](work, order)
    if grad is not None:
        out = out * _working(grad)
    return out.to(x.dtype)


_activation = activation  # below, `activation` is also a parameter's name


def softmax_residual(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of logits (n, C): cross-entropy (n,), p - q (n, C), sum p log p (n,), with p = softmax(logits).

    `target` holds class indices (n,) or probabilities (n, C); q = (1 - s) y + s/C, s = label_smoothing.
    With k the first maximum and S the sum of exp(f_c - f_k) over c != k, all three come from log1p(S) and
    from sums of terms of one sign, so they keep their relative accuracy when they are tiny. 0 log 0 = 0.
    Nothing is read back from the device: a label outside [0, C) gives NaN in all three.
    """
    work = _working(logits)
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
        y = _working(target)
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
    work = _working(logits)
    top, k = work.max(dim=-1, keepdim=True)
    e = torch.exp(work - top)
    inverse = 1.0 / (1.0 + e.scatter(-1, k, 0.0).sum(dim=-1, keepdim=True) + (top - top))
    p = e * inverse
    w = _working(v)
    w = w - w.gather(-1, k)  # 0 at k
    return (p * (w - (p * w).sum(dim=-1, keepdim=True))).to(logits.dtype)


def wide_features(
    z: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "softplus", beta: float = 1.0
) -> Tensor:
    """act(z weight^T + bias): z (..., d), weight (m, d), bias (m,) to (..., m)."""
    return _activation(z @ weight.mT, bias, activation=activation, beta=beta)


def wide_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> Tensor:
    """act(z weight^T + bias) head_weight^T + head_bias: (..., C), with head_weight (C, m)."""
    return torch.nn.functional.linear(
        wide_features(z, weight, bias, activation=activation, beta=beta), head_weight, head_bias
    )


def wide_head_grad(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> Tensor:
    """residual^T act(z weight^T + bias): (C, m), with z (n, d) and residual (n, C)."""
    return residual.mT @ wide_features(z, weight, bias, activation=activation, beta=beta)


def wide_backward(
    g: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of wide_forward in z, weight, bias and head_weight; g (n, C): that of its output."""
    pre = z @ weight.mT
    slope = _activation(pre, bias, activation=activation, beta=beta, order=1, grad=g @ head_weight)
    phi = _activation(pre, bias, activation=activation, beta=beta)
    return slope @ weight, slope.mT @ z, slope.sum(dim=0), g.mT @ phi


def wide_gram_product(
    z: Tensor, weight: Tensor, bias: Tensor, r: Tensor, *, activation: str = "softplus", beta: float = 1.0
) -> Tensor:
    """Phi (Phi^T r) with Phi = act(z weight^T + bias): (n, C), with z (n, d) and r (n, C)."""
    phi = wide_features(z, weight, bias, activation=activation, beta=beta)
    return phi @ (phi.mT @ r)


def gram_product(gram: Tensor, x: Tensor) -> Tensor:
    """gram x for symmetric gram (n, n) and x (n, c)."""
    return gram @ x


def add_product(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, inner: int = 128, lower: bool = False
) -> None:
    """out += alpha a b, by slices of length `inner`, each rounded by itself; alpha is 1 or -1.

    Tiles, so that on a CPU one and its scratch stay in cache. `lower`: on and below the diagonal only.
    """
    rows, columns = (1024, 256) if out.device.type == "cpu" else (4096, 2048)
    (r, c), k = out.shape, a.shape[1]
    scratch = out.new_empty(min(rows, r) * min(columns, c))
    for j0 in range(0, c, columns):
        j1 = min(j0 + columns, c)
        starts = [j0, *range(j1, r, rows)] if lower else range(0, r, rows)
        for i0 in starts:
            diagonal = lower and i0 == j0
            i1 = j1 if diagonal else min(i0 + rows, r)
            tile = out[i0:i1, j0:j1]
            sums = tile.clone() if diagonal else tile
            part = scratch[: sums.numel()].view(sums.shape)
            for s in range(0, k, inner):
                torch.mm(a[i0:i1, s : s + inner], b[s : s + inner, j0:j1], out=part)
                sums.add_(part, alpha=alpha)
            if diagonal:
                tile.copy_(torch.where(torch.ones_like(tile, dtype=torch.bool).tril_(), sums, tile))


_ROOM = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements of a tile of products


def jacobian_gram(
    out: Tensor,
    g: Tensor,
    h: Tensor,
    scale: Tensor,
    *,
    ends: Sequence[int] | None = None,
    lower: bool = False,
) -> None:
    """out[(i, c), (j, e)] += sum_{l,t,s} scale[l, (i, t), (j, s)] sum_{o in l} g[i, c, t, o] h[j, e, s, o].

    g (n, C, T, R), h (n2, C2, T2, R), scale (L, n T, n2 T2); `lower`: on and below the diagonal only. A block
    of samples a side and a position t at a time, with as many positions s as the scratch has room for.
    """
    (n, c, t, r), (n2, c2, t2, _) = g.shape, h.shape
    room = _ROOM["cpu" if out.device.type == "cpu" else "cuda"]
    side = max(1, math.isqrt(room // (c * c2)))
    together = max(1, room // (min(side, n) * c * min(side, n2) * c2))  # positions s
    scales = scale.view(-1, n, t, n2, t2)
    layers = list(zip(scales, (0, *(ends or (r,))), ends or (r,)))
    for i0, j0 in itertools.product(range(0, n, side), range(0, n2, side)):
        if lower and j0 > i0:
            continue
        i, j = slice(i0, min(i0 + side, n)), slice(j0, min(j0 + side, n2))
        tile = out[i.start * c : i.stop * c, j.start * c2 : j.stop * c2]
        sums = torch.zeros_like(tile)
        for (layer, begin, end), s0, p in itertools.product(layers, range(0, t2, together), range(t)):
            s = slice(s0, s0 + together)
            part = g[i, :, p, begin:end].flatten(0, 1) @ h[j, :, s, begin:end].flatten(0, 2).mT
            part = part.view(i.stop - i0, c, tile.shape[1], -1)
            weights = layer[i, p, j, s].repeat_interleave(c2, 1).unsqueeze(1)
            if part.shape[-1] == 1:
                sums.view(part.shape).addcmul_(part, weights)
            else:
                sums += part.mul_(weights).sum(-1).view(sums.shape)
        if lower and i0 == j0:
            keep = torch.ones_like(tile, dtype=torch.bool).tril_()
            tile.copy_(torch.where(keep, tile + sums, tile))
        else:
            tile += sums


_GRADIENTS = {"cpu": 1 << 21, "cuda": 1 << 23}  # elements of J at a time: they stay in cache


def gradient_gram(
    out: Tensor, g: Tensor, a: Tensor, h: Tensor | None = None, b: Tensor | None = None
) -> None:
    """out[(i, c), (j, e)] += sum_{r,s} J[(i, c), (r, s)] J'[(j, e), (r, s)]; without h J' = J, lower half.

    J[(i, c), (r, s)] = sum_t g[i, c, t, r] a[i, t, s] of g (n, C, T, R) and a (n, T, S), J' of h and b. Rows
    r of the weight are taken in blocks.
    """
    factors = [(g, a)] if h is None or b is None else [(g, a), (h, b)]
    r, s = g.shape[3], a.shape[2]
    room = _GRADIENTS["cpu" if out.device.type == "cpu" else "cuda"]
    step = max(1, room // (s * sum(x.shape[0] * x.shape[1] for x, _ in factors)))
    sums = torch.zeros_like(out)
    for r0 in range(0, r, step):
        made = []
        for x, y in factors:
            rows = x[..., r0 : r0 + step].transpose(2, 3)  # (n, C, rows, T)
            made.append(torch.bmm(rows.flatten(1, 2), y).view(x.shape[0] * x.shape[1], -1))
        sums.addmm_(made[0], made[-1].mT)
    keep = torch.ones_like(out, dtype=torch.bool)
    out.copy_(torch.where(keep.tril_() if h is None else keep, out + sums, out))


_BLOCK = 1 << 18  # elements of |a| in float64 at a time


def abs_products(a: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(|a| right, left |a|) in float64: a (n, m), left (n,), right (m,), non-negative, ones by default.

    Products and sums element by element: a BLAS may skip a weight of zero, and with it a NaN.
    """
    if a.stride(0) < a.stride(1):
        columns, rows = abs_products(a.mT, right, left)
        return rows, columns
    n, m = a.shape
    rows, columns = (torch.zeros(k, dtype=torch.float64, device=a.device) for k in (n, m))
    step = max(1, _BLOCK // max(1, m))
    for i in range(0, n, step):
        block = a[i : i + step].to(torch.float64).abs()
        rows[i : i + step] = (block if right is None else block * right).sum(1)
        columns += (block if left is None else block * left[i : i + step, None]).sum(0)
    return rows, columns


def gram_error_bound(h: Tensor) -> Tensor:
    """The row sums of |h| |h|^T (n,), as |h| (|h|^T 1), in float64."""
    return abs_products(h, right=abs_products(h)[1])[0]


def _gamma(k: int) -> float:
    """k u / (1 - k u) in float64, and a little more."""
    return 1.01 * k * 2.0**-53


def batched_rank(a: Tensor, atol: Tensor, rtol: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How many singular values of each matrix exceed max(atol, rtol sigma_max), with proved bounds.

    Args:
        a: (B, n, m), finite; atol, rtol: (B,) float64, >= 0.

    Returns:
        rank, lower, upper (int64), sigma_min_lower, sigma_max_upper (float64), each (B,). The estimate is
        the SVD's in float64, U S V^T. The bounds hold for the stored numbers, rounding included, whatever the
        SVD has done: sigma_i(U S V^T) lies within sqrt(1 +- |U^T U - I|) sqrt(1 +- |V^T V - I|) of S_i
        (Ostrowski), and |sigma_i(A) - sigma_i(U S V^T)| <= |A - U S V^T| (Weyl); norms are bounded by
        Frobenius's, products by |fl(AB) - AB| <= gamma_k |A||B|.
    """
    batch, n, m = a.shape
    if min(a.shape) == 0:
        none = torch.zeros(batch, dtype=torch.int64, device=a.device)
        zero = torch.zeros(batch, dtype=torch.float64, device=a.device)
        return none, none.clone(), none.clone(), zero + math.inf, zero
    x = a.to(torch.float64)
    x = x.mT if n > m else x
    n, m = min(n, m), max(n, m)
    top = x.abs().amax((1, 2))
    zero_matrix = top == 0  # of the entries: an SVD is not trusted with that either
    exponent = -torch.frexp(top)[1]  # to entries below 1, in two steps for the extreme ones
    x, atol = (_ldexp(t, exponent) for t in (x, atol))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)

    def size(t: Tensor) -> Tensor:  # an upper bound of the Frobenius norm
        return torch.linalg.matrix_norm(t) * (1 + _gamma(n * m + 8))

    identity = torch.eye(n, dtype=torch.float64, device=a.device)
    us = u * s.unsqueeze(-2)
    size_us, size_v = size(us), size(vh)
    # 2^-900 covers every underflow
    error = size(x - us @ vh) + _gamma(n + 4) * (size_us * size_v + size(x)) + 2.0**-900
    off_u = size(u.mT @ u - identity) + _gamma(n + 2) * size(u) ** 2
    off_v = size(vh @ vh.mT - identity) + _gamma(m + 2) * size_v**2
    shrink = ((1 - off_u).clamp(min=0) * (1 - off_v).clamp(min=0)).sqrt()
    stretch = ((1 + off_u) * (1 + off_v)).sqrt()
    below = (s * shrink.unsqueeze(-1) * (1 - 1e-14) - error.unsqueeze(-1)).clamp(min=0) * (1 - 1e-14)
    above = (s * stretch.unsqueeze(-1) + error.unsqueeze(-1)) * (1 + 1e-14)

    def tolerance(sigma_max: Tensor) -> Tensor:
        return torch.maximum(atol, rtol * sigma_max).unsqueeze(-1)

    rank = (s > tolerance(s[:, 0])).sum(-1)
    # the atol of a scaled matrix may have been rounded where it is denormal
    lower = (below > tolerance(above[:, 0]) * (1 + 1e-15) + 2.0**-900).sum(-1)
    upper = (above > tolerance(below[:, 0]) * (1 - 1e-15)).sum(-1)
    tiny = 2.0**-1022
    least, largest = _ldexp(below[:, -1], -exponent), _ldexp(above[:, 0], -exponent)
    least = torch.where(least < tiny, 0.0, least)
    largest = torch.where(zero_matrix, 0.0, largest.clamp(min=tiny))
    return rank, lower, torch.where(zero_matrix, 0, upper), least, largest


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, one exponent a matrix; in steps, since 2^1074 is no float64."""
    exponent = exponent.reshape(-1, *[1] * (x.dim() - 1))
    third = torch.div(exponent, 3, rounding_mode="trunc")
    for part in (third, third, exponent - 2 * third):
        x = x * torch.exp2(part.to(torch.float64))
    return x
