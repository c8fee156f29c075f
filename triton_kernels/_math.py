"""Device functions of the softmax kernels: ports of csrc/core/activations.h, the same polynomials and errors.

float32 and float64, chosen by the argument's dtype. All of it survives the contraction of a * b + c into one
fused operation (hardware) as well as two roundings (the interpreter): what must be exact has no products.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_least(a, low):
    """max(a, low) that keeps a NaN in `a`."""
    return tl.where(a < low, low, a)


@triton.jit
def two_sum(a, b):
    """a + b exactly, as hi + lo (Knuth)."""
    hi = a + b
    t = hi - a
    return hi, (a - (hi - t)) + (b - t)


@triton.jit
def divide(a, b):
    """a / b correctly rounded: Triton's own / is an approximation in float32."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _exp_poly(r):
    """(exp(r) - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2], in two interleaved chains."""
    r2 = r * r
    if r.dtype == tl.float64:
        even = r2 * 2.76202015910315488e-7 + 0.0000248015210578682052
        even = even * r2 + 0.00138888889173670806
        even = even * r2 + 0.0416666666666238205
        even = even * r2 + 0.500000000000000103
        odd = r2 * 2.5100472505694996e-8 + 2.75572682769056962e-6
        odd = odd * r2 + 0.00019841269863171556
        odd = odd * r2 + 0.0083333333333300382
        odd = odd * r2 + 0.166666666666666675
    else:
        even = r2 * 0.00139337307157920825 + 0.0416664641974056923
        even = even * r2 + 0.500000001353872989
        odd = r2 * 0.00019891080463998842 + 0.00833331084464786256
        odd = odd * r2 + 0.16666666681704215
    return even + r * odd


@triton.jit
def exp_parts(hi, lo):
    """exp(hi + lo), hi <= 0, as p * s * down: p, q = p - 1 to full relative precision, s a power of two."""
    if hi.dtype == tl.float64:
        t = at_least(hi, -800.0)
        tail = tl.where(hi > -800.0, lo, 0.0)
        shifted = t * 1.4426950408889634074 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        r = ((t - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10) + tail
        power = ((shifted.to(tl.int64, bitcast=True) << 52) + (1535 << 52)).to(tl.float64, bitcast=True)
        s = tl.where(hi < -800.0, 0.0, power)
    else:
        t = at_least(hi, -120.0)
        tail = tl.where(hi > -120.0, lo, 0.0)
        shifted = t * 1.44269504 + 12582912.0
        n = shifted - 12582912.0
        r = ((t - n * 0.693359375) - n * -2.12194440e-4) + tail
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + (191 << 23)).to(tl.float32, bitcast=True)
        s = tl.where(hi < -120.0, 0.0, power)
    q = r + (r * r) * _exp_poly(r)
    return q + 1.0, q, s


@triton.jit
def exp_nonpositive(hi, lo):
    """exp(hi + lo), hi <= 0: denormal results are rounded once."""
    p, _q, s = exp_parts(hi, lo)
    if hi.dtype == tl.float64:
        return p * s * 7.458340731200207e-155  # 2^-512
    else:
        return p * s * 5.42101086242752217e-20  # 2^-64


@triton.jit
def _log_poly(y):
    """(y - log(1 + y)) / y^2 on [0, 1]."""
    y2 = y * y
    if y.dtype == tl.float64:
        y4 = y2 * y2
        a = y4 * 0.0000229388568184714378 + 0.0127321505282476731
        a = a * y4 + 0.0650401036603685578
        a = a * y4 + 0.0999632434755013683
        a = a * y4 + 0.166666664309783401
        a = a * y4 + 0.5
        b = y4 * -0.00508109047854899415 + -0.0532235224603212144
        b = b * y4 + -0.0907183529253426044
        b = b * y4 + -0.142857097454455445
        b = b * y4 + -0.333333333333324656
        c = y4 * 0.00145692484733291744 + 0.0391250511523394424
        c = c * y4 + 0.0825618541627825036
        c = c * y4 + 0.124999412815076874
        c = c * y4 + 0.249999999998720501
        d = y4 * -0.000265295970542531044 + -0.0246829501916849337
        d = d * y4 + -0.0744481701994222684
        d = d * y4 + -0.111105711428558057
        d = d * y4 + -0.1999999999247163
        return (a + y * b) + y2 * (c + y * d)
    else:
        even = y2 * 0.0171842669824487093 + 0.0913941377401492021
        even = even * y2 + 0.163651528692055351
        even = even * y2 + 0.249967599082639252
        even = even * y2 + 0.499999995222237707
        odd = y2 * -0.00280164199280334992 + -0.0493099734345496944
        odd = odd * y2 + -0.130333642382428156
        odd = odd * y2 + -0.199567079522518358
        odd = odd * y2 + -0.33333237346213987
        return even + y * odd


@triton.jit
def log1p_unit(y):
    """log(1 + y), 0 <= y <= 1."""
    # The constant keeps powers of a tiny y out of the denormal range, and is far below an ulp of 1.
    if y.dtype == tl.float64:
        return y * (1.0 - y * _log_poly(y + 1e-18))
    else:
        return y * (1.0 - y * _log_poly(y + 1e-9))


@triton.jit
def log1p_any(y):
    """log(1 + y), y >= 0: above 1 it is log(1 + 1/y) + log y, the latter by y's exponent."""
    # Constants stand where they are used: the interpreter makes a float32 of one that is given a name.
    safe = at_least(y, 1.0)
    extra = log1p_unit(tl.where(y > 1.0, divide(1.0, safe), y))
    if y.dtype == tl.float64:
        b = safe.to(tl.int64, bitcast=True)
        m = ((b & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)  # in [1, 2)
        k = ((b >> 52) - 1023).to(tl.float64)
        big = k * 6.93147180369123816490e-01 + (
            log1p_unit(m - 1.0) + (extra + k * 1.90821492927058770002e-10)
        )
    else:
        b = safe.to(tl.int32, bitcast=True)
        m = ((b & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
        k = ((b >> 23) - 127).to(tl.float32)
        big = k * 0.693359375 + (log1p_unit(m - 1.0) + (extra + k * -2.12194440e-4))
    return tl.where(y > 1.0, big, tl.where(y == y, extra, y))
