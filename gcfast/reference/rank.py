"""The rank of each matrix of a batch with bounds, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    u, s, vh = _svd(x)

    def size(t: Tensor) -> Tensor:  # an upper bound of the Frobenius norm
        return torch.linalg.matrix_norm(t) * (1 + _gamma(n * m + 8))

    identity = torch.eye(n, dtype=torch.float64, device=a.device)
    us = u * s.unsqueeze(-2)
    size_us, size_v = size(us), size(vh)
    # 2^-500 covers every underflow, those of the norms' squares too
    error = size(x - us @ vh) + _gamma(n + 4) * (size_us * size_v + size(x)) + 2.0**-500
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
    lower = (below > tolerance(above[:, 0]) * (1 + 1e-15) + 2.0**-500).sum(-1)
    upper = (above > tolerance(below[:, 0]) * (1 - 1e-15)).sum(-1)
    tiny = 2.0**-1022
    least, largest = _ldexp(below[:, -1], -exponent), _ldexp(above[:, 0], -exponent)
    least = torch.where(least < tiny, 0.0, least)
    largest = torch.where(zero_matrix, 0.0, largest.clamp(min=tiny))
    return rank, lower, torch.where(zero_matrix, 0, upper), least, largest


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of a batch (B, n, m), n <= m; where LAPACK does not converge, by the factor R of A^T = Q R.

    Where that does not converge either they are those of zeros, whose bounds hold as any others do.
    """
    try:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u, s, vh
    except torch.linalg.LinAlgError:
        if len(x) > 1:  # one matrix is enough for the error
            u, s, vh = map(torch.cat, zip(*map(_svd, x.split(1))))
            return u, s, vh
    q, r = torch.linalg.qr(x.mT)
    try:
        u, s, vh = torch.linalg.svd(r.mT)
    except torch.linalg.LinAlgError:
        u = vh = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None]
        s = x.new_zeros(x.shape[:2])
    return u, s, vh @ q.mT


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, one exponent a matrix; in steps, since 2^1074 is no float64."""
    exponent = exponent.reshape(-1, *[1] * (x.dim() - 1))
    third = torch.div(exponent, 3, rounding_mode="trunc")
    for part in (third, third, exponent - 2 * third):
        x = x * torch.exp2(part.to(torch.float64))
    return x
