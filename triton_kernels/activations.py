"""Activations and their first two derivatives on a tile in registers, for every kernel that needs them.

The mathematics of csrc/core/activations.h, in fp32 and fp64 (narrower types are cast to fp32 by the caller),
on the elementary functions of ``_math``. What carries the accuracy (tests/ops/test_activation.py: within
4 ulp everywhere, denormal results included):

* exp(t) = (1 + q) s 2^-64 (2^-512 in fp64) with a power of two s. A factor f enters as (f q + f) s 2^-64: one
  rounding for 1 + q and f together, and one where a denormal result is formed.
* Products inside an exponent are carried as hi + lo: one ulp of t is |t| ulps of exp(t).
* Denominators are polynomials in y = exp(-|t|), carried as hi + lo too, and there is one quotient a value: an
  approximate reciprocal and a correction by its exact remainder leave half an ulp.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"
from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ._math import (
    exp_parts,
    exp_times,
    exp_value,
    log1p_unit,
    one_minus_exp,
    polynomial,
    product_error,
    quotient,
)

# (a + 4) erfcx(a / sqrt(2)) / 2 in u = (a - 4)/(a + 4), the density's tail: no rounding of a / sqrt(2)
_TAIL_32 = tl.constexpr(
    (-5.188017604e-5, -2.326310772e-4, 1.705670802e-4, 1.645552089e-3, -3.488950607e-3, -7.545274108e-3,
     0.06039746097, -0.1865212885, 0.3871373724, -0.6078966587, 0.7552851306)
)  # fmt: skip
_TAIL_64 = tl.constexpr(
    (-7.24547937033790985e-10, -2.5168191619926508e-9, 1.91813946836078413e-9, 1.96040493990377268e-8,
     1.32707869739611057e-8, -8.53898597427761187e-8, -1.54946042464582715e-7, 2.71793439788748867e-7,
     1.02153742618240522e-6, -6.29693516039342578e-7, -5.92016487909155337e-6, 7.16666373663619845e-7,
     0.0000351446834211625441, -1.90825875793517962e-6, -0.000231094934664636102, 0.000133344312488674937,
     0.00163081845753126692, -0.00347969236740357266, -0.00754018896672323833, 0.060396574890937138,
     -0.186521857959657347, 0.387137400742214529, -0.607896641971892107, 0.755285130415751493)
)  # fmt: skip

INV_SQRT_2PI = tl.constexpr(0.3989422804014326779399461)


@triton.jit
def clamped(a, TOP: tl.constexpr):
    """min(a, TOP), NaN kept."""
    return tl.where(a > TOP, TOP, a)


@triton.jit
def magnitude(x):
    """|x| up to where exp(-|x|) is 0, NaN kept."""
    top: tl.constexpr = 800.0 if x.dtype == tl.float64 else 120.0
    return clamped(tl.abs(x), top)


@triton.jit
def with_sign(v, x):
    """The sign of x on a value v >= 0."""
    if x.dtype == tl.float64:
        sign = x.to(tl.int64, bitcast=True) & -0x8000000000000000
        return (v.to(tl.int64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (v.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def one_plus(y):
    """1 + y as hi + lo, 0 <= y <= 1."""
    hi = 1.0 + y
    return hi, y - (hi - 1.0)


@triton.jit
def one_plus_squared(y):
    inner = 2.0 + y
    hi = y * inner + 1.0
    return hi, product_error(y, inner, hi - 1.0)


@triton.jit
def one_plus_cubed(y):
    inner = y * (y + 3.0) + 3.0
    hi = y * inner + 1.0
    return hi, product_error(y, inner, hi - 1.0)


@triton.jit
def _logistic_slope(q, s, POWER: tl.constexpr):
    """POWER y / (1 + y)^2."""
    hi, lo = one_plus_squared(exp_value(q, s))
    return quotient(exp_value(q, s, POWER), hi, lo)


@triton.jit
def _logistic_bend(q, s, POWER: tl.constexpr):
    """POWER y (1 - y) / (1 + y)^3."""
    hi, lo = one_plus_cubed(exp_value(q, s))
    return exp_times(quotient(one_minus_exp(q, s), hi, lo), q, s, POWER)


@triton.jit
def _logistic(x, q, s):
    y = exp_value(q, s)
    hi, lo = one_plus(y)
    return quotient(tl.where(x < 0.0, y, 1.0), hi, lo)


@triton.jit
def _softplus_scaled(x, beta_hi, beta_lo, beta_inv, ORDER: tl.constexpr):
    floor: tl.constexpr = -800.0 if x.dtype == tl.float64 else -120.0
    beta = tl.full(x.shape, beta_hi, x.dtype)
    a = -tl.abs(x)
    t = a * beta
    below = t < floor  # and there, where the product may have overflowed, exp(t) is 0 whatever multiplies it
    tail = tl.where(below, 0.0, product_error(a, beta, t) + a * beta_lo)
    q, s = exp_parts(tl.where(below, floor, t), tail)
    s = tl.where(below, 0.0, s)
    if ORDER == 0:
        y = exp_value(q, s)
        # below 1e-18 y may be denormal while y / beta is not
        low = tl.where(
            y < 1e-18, exp_times(tl.full(x.shape, beta_inv, x.dtype), q, s), log1p_unit(y) * beta_inv
        )
        return tl.maximum(x, 0.0) + low
    elif ORDER == 1:
        return _logistic(x, q, s)
    else:
        hi, lo = one_plus_squared(exp_value(q, s))
        return quotient(exp_times(beta, q, s), hi, lo)


@triton.jit
def softplus(x, ORDER: tl.constexpr):
    """log(1 + exp(x))."""
    q, s = exp_parts(-magnitude(x))
    if ORDER == 0:
        return tl.maximum(x, 0.0) + log1p_unit(exp_value(q, s))
    elif ORDER == 1:
        return _logistic(x, q, s)
    else:
        return _logistic_slope(q, s, 1.0)


@triton.jit
def sigmoid(x, ORDER: tl.constexpr):
    if ORDER < 2:
        return softplus(x, ORDER + 1)
    else:
        q, s = exp_parts(-magnitude(x))
        return with_sign(_logistic_bend(q, s, 1.0), -x)


@triton.jit
def tanh(x, ORDER: tl.constexpr):
    q, s = exp_parts(-magnitude(2.0 * x))
    if ORDER == 0:
        hi, lo = one_plus(exp_value(q, s))
        return with_sign(quotient(one_minus_exp(q, s), hi, lo), x)
    elif ORDER == 1:
        return _logistic_slope(q, s, 4.0)
    else:
        return with_sign(_logistic_bend(q, s, 8.0), -x)


@triton.jit
def _gated(x, a, q, s, adv, advdv, bend, ORDER: tl.constexpr):
    """x sigmoid(v(x)) for odd v, a = |x| clamped to where exp(-|v|) is 0, exp(-|v|) in parts q and s.

    adv = a v', advdv = a v'^2, bend = 2 v' + x v''.
    """
    y = exp_value(q, s)
    negative = x < 0.0
    if ORDER == 0:
        hi, lo = one_plus(y)
        f = quotient(tl.where(negative, -a, a), hi, lo)
        return tl.where(negative, exp_times(f, q, s), tl.where(x > a, x, f))
    elif ORDER == 1:
        hi, lo = one_plus_squared(y)
        f = quotient((1.0 + y) + tl.where(negative, -adv, y * adv), hi, lo)
        return tl.where(negative, exp_times(f, q, s), f)
    else:
        hi, lo = one_plus_cubed(y)
        return exp_times(quotient((bend * y + bend) - advdv * one_minus_exp(q, s), hi, lo), q, s)


@triton.jit
def silu(x, ORDER: tl.constexpr):
    a = magnitude(x)
    q, s = exp_parts(-a)
    return _gated(x, a, q, s, a, a, 2.0, ORDER)


@triton.jit
def gelu_tanh(x, ORDER: tl.constexpr):
    """x sigmoid(v), v = x (A + B x^2), A = 2 sqrt(2/pi), B = 0.044715 A, in twice the precision.

    A's upper part is 4 (fp64: 6) bits short, so that subtracting A from A + B x^2 and from v' = A + 3 B x^2
    is exact, and with it the error of these sums.
    """
    if x.dtype == tl.float64:
        A: tl.constexpr = 1.595769121605727
        A_LO: tl.constexpr = 3.675065195634423e-15
        B: tl.constexpr = 0.07135481627260025
        B_LO: tl.constexpr = -6.175149918155315e-19
        B3: tl.constexpr = 0.21406444881780073
        B3_LO: tl.constexpr = 1.2025242832367862e-17
        a = clamped(tl.abs(x), 22.0)
    else:
        A: tl.constexpr = 1.5957698822021484
        A_LO: tl.constexpr = -7.605964356116601e-07
        B: tl.constexpr = 0.07135481387376785
        B_LO: tl.constexpr = 2.3988324659995897e-09
        B3: tl.constexpr = 0.21406444907188416
        B3_LO: tl.constexpr = -2.540834209696641e-10
        a = clamped(tl.abs(x), 11.5)
    square = a * a
    square_lo = product_error(a, a, square)
    b = tl.full(x.shape, B, x.dtype)
    p = square * B + A
    p_lo = product_error(square, b, p - A) + (square_lo * B + (square * B_LO + A_LO))
    v = a * p
    v_lo = product_error(a, p, v) + a * p_lo
    q, s = exp_parts(-v, -v_lo)
    b3 = tl.full(x.shape, B3, x.dtype)
    sum = square * B3 + A
    sum_lo = product_error(square, b3, sum - A) + (square_lo * B3 + (square * B3_LO + A_LO))
    dv = sum + sum_lo
    dv_lo = sum_lo - (dv - sum)
    adv = a * dv
    adv_lo = product_error(a, dv, adv) + a * dv_lo
    advdv = adv * dv + (adv * dv_lo + adv_lo * dv)
    return _gated(x, a, q, s, adv, advdv, 2.0 * dv + square * (6.0 * B), ORDER)


@triton.jit
def gelu(x, ORDER: tl.constexpr):
    """x Phi(x), Phi the normal distribution function: for x < 0 exp(-x^2/2) tail(|x|)."""
    top: tl.constexpr = 39.4 if x.dtype == tl.float64 else 14.8
    a = clamped(tl.abs(x), top)
    half = -0.5 * a
    t = a * half
    t_lo = product_error(a, half, t)
    q, s = exp_parts(t, t_lo)
    if ORDER == 2:
        return exp_times(((2.0 + 2.0 * t) + 2.0 * t_lo) * INV_SQRT_2PI, q, s)
    else:
        hi = a + 4.0
        lo = a - (hi - 4.0)
        u = quotient(a - 4.0, hi, lo)
        if x.dtype == tl.float64:
            tail = quotient(polynomial(u, _TAIL_64), hi, lo)
        else:
            tail = quotient(polynomial(u, _TAIL_32), hi, lo)
        if ORDER == 0:
            v = exp_times(a * tail, q, s)
            return tl.where(x < 0.0, -v, x - v)
        else:
            v = exp_times(tail - a * INV_SQRT_2PI, q, s)
            return tl.where(x < 0.0, v, 1.0 - v)


@triton.jit
def relu(x, ORDER: tl.constexpr):
    nan_or_zero = tl.where(x == x, 0.0, x)
    if ORDER == 0:
        return tl.where(x < 0.0, 0.0, x)
    elif ORDER == 1:
        return tl.where(x > 0.0, 1.0, nan_or_zero)
    else:
        return nan_or_zero


def scale_arguments(beta: float, dtype: torch.dtype) -> tuple[float | int, float, float | int]:
    """What a launcher passes for beta_hi, beta_lo and beta_inv; a kernel reads them through `scale`.

    Triton makes an fp32 of every Python float, so an fp64 kernel is given the bits, as integers.
    """
    if dtype == torch.float64:
        beta_bits, inverse_bits = struct.unpack("=qq", struct.pack("=dd", beta, 1.0 / beta))
        return beta_bits, 0.0, inverse_bits
    single = struct.Struct("=f")
    (hi,) = single.unpack(single.pack(beta))
    return hi, beta - hi, 1.0 / beta


@triton.jit
def scale(beta_hi, beta_lo, beta_inv, precision: tl.constexpr):
    """beta_hi, beta_lo and beta_inv as `activate` takes them."""
    if precision == tl.float64:
        return beta_hi.to(tl.float64, bitcast=True), beta_lo, beta_inv.to(tl.float64, bitcast=True)
    else:
        return beta_hi, beta_lo, beta_inv


@triton.jit
def activate(x, beta_hi, beta_lo, beta_inv, ACT: tl.constexpr, ORDER: tl.constexpr, SCALED: tl.constexpr):
    """act^(ORDER)(x) of an fp32 or fp64 tile. ACT is an index into gcfast.reference.ACTIVATIONS.

    SCALED: softplus with beta = beta_hi + beta_lo and beta_inv = 1 / beta, scalars of x's precision that come
    from `scale`; otherwise beta is 1 and they are not read.
    """
    tl.static_assert(x.dtype == tl.float32 or x.dtype == tl.float64, "cast to fp32 first")
    if ACT == 0:
        if SCALED:
            return _softplus_scaled(x, beta_hi, beta_lo, beta_inv, ORDER)
        else:
            return softplus(x, ORDER)
    elif ACT == 1:
        return sigmoid(x, ORDER)
    elif ACT == 2:
        return tanh(x, ORDER)
    elif ACT == 3:
        return gelu(x, ORDER)
    elif ACT == 4:
        return gelu_tanh(x, ORDER)
    elif ACT == 5:
        return silu(x, ORDER)
    else:
        return relu(x, ORDER)
