"""Exact values for the tests: activations and softmax terms in 50 digits, and distances in ulps."""

from __future__ import annotations

import functools
import math

import mpmath as mp
import numpy as np

DIGITS = 50


def _sigmoid(t):
    return 1 / (1 + mp.exp(-t)) if t >= 0 else mp.exp(t) / (1 + mp.exp(t))


def _softplus(x, beta, order):
    t = beta * x
    if order == 0:
        return (mp.log1p(mp.exp(t)) if t < 0 else t + mp.log1p(mp.exp(-t))) / beta
    s, r = _sigmoid(t), _sigmoid(-t)
    return s if order == 1 else beta * s * r


def _gated(x, v, dv, ddv, order):
    s, r = _sigmoid(v), _sigmoid(-v)
    if order == 0:
        return x * s
    if order == 1:
        return s + x * s * r * dv
    return s * r * (2 * dv + x * ddv - x * dv * dv * mp.tanh(v / 2))


@functools.cache
def activation(name: str, x: float, order: int, beta: float = 1.0):
    """The order-th derivative of the activation at the float x, as an mpmath number."""
    with mp.workdps(DIGITS):
        x, beta = mp.mpf(x), mp.mpf(beta)
        if name == "softplus":
            return _softplus(x, beta, order)
        if name == "sigmoid":
            s, r = _sigmoid(x), _sigmoid(-x)
            return (s, s * r, -s * r * mp.tanh(x / 2))[order]
        if name == "tanh":
            slope = 4 * _sigmoid(2 * x) * _sigmoid(-2 * x)
            return (mp.tanh(x), slope, -2 * mp.tanh(x) * slope)[order]
        if name == "gelu":
            density = mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi)
            cdf = mp.erfc(-x / mp.sqrt(2)) / 2
            return (x * cdf, cdf + x * density, density * (2 - x * x))[order]
        if name == "gelu_tanh":
            k = 2 * mp.sqrt(2 / mp.pi)
            c = mp.mpf("0.044715")
            return _gated(x, k * (x + c * x**3), k * (1 + 3 * c * x * x), 6 * k * c * x, order)
        if name == "silu":
            return _gated(x, x, mp.mpf(1), mp.mpf(0), order)
        assert name == "relu"
        return (max(x, mp.mpf(0)), mp.mpf(1 if x > 0 else 0), mp.mpf(0))[order]


def terms_of(name: str, x: float, order: int):
    """Sum of the magnitudes of the terms of a derivative that crosses zero; None where it does not."""
    if order == 0 or name not in ("gelu", "gelu_tanh", "silu"):
        return None
    with mp.workdps(DIGITS):
        x = mp.mpf(x)
        a = abs(x)
        if name == "gelu":
            density = mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi)
            return mp.erfc(-x / mp.sqrt(2)) / 2 + a * density if order == 1 else density * (2 + x * x)
        k, c = (2 * mp.sqrt(2 / mp.pi), mp.mpf("0.044715")) if name == "gelu_tanh" else (mp.mpf(1), mp.mpf(0))
        v, dv, ddv = k * (x + c * x**3), k * (1 + 3 * c * x * x), 6 * k * c * a
        s, r = _sigmoid(v), _sigmoid(-v)
        if order == 1:
            return s + a * s * r * dv
        return s * r * (2 * dv + a * ddv + a * dv * dv * mp.tanh(abs(v) / 2))


def ulp(value, dtype) -> mp.mpf:
    """The spacing of `dtype` at an exact value; the smallest denormal near zero."""
    info = np.finfo(dtype)
    exponent = info.minexp if value == 0 else max(int(mp.floor(mp.log(abs(value), 2))), info.minexp)
    return mp.ldexp(1, exponent - info.nmant)


def ulps(got: float, exact, dtype, scale=None) -> float:
    """|got - exact| in ulps of the exact value, or of `scale` where cancellation makes that meaningless."""
    if not math.isfinite(got):
        return 0.0 if abs(exact) > float(np.finfo(dtype).max) else math.inf
    return float(abs(mp.mpf(got) - exact) / ulp(exact if scale is None else scale, dtype))


def softmax_terms(logits, q):
    """loss, residual and sum p log p of one row of float logits and exact targets q."""
    with mp.workdps(DIGITS + 100):
        f = [mp.mpf(float(v)) for v in logits]
        top = max(f)
        e = [mp.exp(v - top) for v in f]
        total = mp.fsum(e)
        log_total = mp.log(total)
        p = [v / total for v in e]
        loss = mp.fsum(qc * (log_total - (v - top)) for qc, v in zip(q, f))
        entropy = mp.fsum(pc * (v - top - log_total) for pc, v in zip(p, f))
        return loss, [pc - qc for pc, qc in zip(p, q)], entropy


def softmax_curvature(logits, v):
    """(diag(p) - p p^T) v of one row, and per element the sum of the magnitudes of its terms."""
    with mp.workdps(DIGITS + 100):
        f, v = [mp.mpf(float(x)) for x in logits], [mp.mpf(float(x)) for x in v]
        k = f.index(max(f))
        e = [mp.exp(x - f[k]) for x in f]
        p = [x / mp.fsum(e) for x in e]
        w = [x - v[k] for x in v]
        mu = mp.fsum(pc * wc for pc, wc in zip(p, w))
        size = mp.fsum(pc * abs(wc) for pc, wc in zip(p, w))
        return [pc * (wc - mu) for pc, wc in zip(p, w)], [pc * (abs(wc) + size) for pc, wc in zip(p, w)]
