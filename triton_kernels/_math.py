"""Elementary device functions with known errors, fp32 and fp64 by the argument's dtype, for every kernel.

The mathematics of csrc/core/activations.h: no step uses the hardware's exp2, logarithm or division, which
flush denormals or lose digits. Nothing here may be reordered, but contraction of a b + c into one rounding
only helps. The interpreter does not fuse `tl.fma`, hence the two forms of what must be exact; there the
reciprocal is the correctly rounded one, so that the seed of the hardware (inline assembly) is tested on a GPU
only.

Polynomials: Chebyshev interpolation in 60 digits, rewritten in powers, highest first.
"""

# mypy: disable-error-code="no-untyped-def, no-redef"
from __future__ import annotations

import triton
import triton.language as tl

from ._launch import interpreted

# (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2
_EXP_32 = tl.constexpr(
    (1.9891080463998842e-4, 1.39337307157920825e-3, 8.33331084464786256e-3, 0.0416664641974056923,
     0.16666666681704215, 0.500000001353872989)
)  # fmt: skip
_EXP_64 = tl.constexpr(
    (2.5100472505694996e-8, 2.76202015910315488e-7, 2.75572682769056962e-6, 2.48015210578682052e-5,
     1.9841269863171556e-4, 1.38888889173670806e-3, 8.3333333333300382e-3, 0.0416666666666238205,
     0.166666666666666675, 0.500000000000000103)
)  # fmt: skip
# (y - log(1 + y)) / y^2 on [0, 1]
_LOG_32 = tl.constexpr(
    (-0.00280164199280334992, 0.0171842669824487093, -0.0493099734345496944, 0.0913941377401492021,
     -0.130333642382428156, 0.163651528692055351, -0.199567079522518358, 0.249967599082639252,
     -0.33333237346213987, 0.499999995222237707)
)  # fmt: skip
_LOG_64 = tl.constexpr(
    (0.0000229388568184714378, -0.000265295970542531044, 0.00145692484733291744, -0.00508109047854899415,
     0.0127321505282476731, -0.0246829501916849337, 0.0391250511523394424, -0.0532235224603212144,
     0.0650401036603685578, -0.0744481701994222684, 0.0825618541627825036, -0.0907183529253426044,
     0.0999632434755013683, -0.111105711428558057, 0.124999412815076874, -0.142857097454455445,
     0.166666664309783401, -0.1999999999247163, 0.249999999998720501, -0.333333333333324656, 0.5)
)  # fmt: skip


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
def polynomial(x, C: tl.constexpr):
    """Horner's rule: the fewest instructions; other warps and elements fill the pipeline meanwhile."""
    p = x * C[0] + C[1]
    for i in tl.static_range(2, len(C.value)):
        p = p * x + C[i]
    return p


@triton.jit
def upper_half(a):
    """The upper 12 (26) bits of the significand: products of two such are exact."""
    if a.dtype == tl.float64:
        return (a.to(tl.int64, bitcast=True) & -0x8000000).to(tl.float64, bitcast=True)
    else:
        return (a.to(tl.int32, bitcast=True) & -0x1000).to(tl.float32, bitcast=True)


@triton.jit
def product_error(a, b, p):
    """a b - p, exactly, for p = a b rounded; rounded once for any p near a b."""
    if interpreted:
        t = a * b
        ah = upper_half(a)
        bh = upper_half(b)
        al = a - ah
        bl = b - bh
        return (t - p) + (((ah * bh - t) + ah * bl + al * bh) + al * bl)
    else:
        return tl.fma(a, b, -p)


@triton.jit
def quotient(n, hi, lo):
    """n / (hi + lo) to half an ulp and a little, for hi in [1, 2^100]."""
    if interpreted:
        r = 1.0 / hi
    elif hi.dtype == tl.float64:  # 20 bits, then 40
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [hi], tl.float64, True, 1)
        r = tl.fma(tl.fma(-hi, r, 1.0), r, r)
    else:  # 23 bits
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [hi], tl.float32, True, 1)
    q = n * r
    return q - (product_error(q, hi, n) + q * lo) * r


@triton.jit
def exp_parts(hi, lo=None):
    """q and s of exp(hi + lo) = (1 + q) s down, q to full relative precision; hi >= -130 (fp64: -800)."""
    if hi.dtype == tl.float64:
        shifted = hi * 1.4426950408889634074 + 6755399441055744.0  # 1.5 2^52: rounds to an integer, low bits
        n = shifted - 6755399441055744.0
        r = (hi - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        if lo is not None:
            r += lo
        q = r + (polynomial(r, _EXP_64) * r) * r
        s = (shifted.to(tl.int64, bitcast=True) << 52) + 0x5FF0000000000000  # 2^(512 + n)
        return q, s.to(tl.float64, bitcast=True)
    else:
        shifted = hi * 1.44269504 + 12582912.0
        n = shifted - 12582912.0
        r = (hi - n * 0.693359375) - n * -2.12194440e-4
        if lo is not None:
            r += lo
        q = r + (polynomial(r, _EXP_32) * r) * r
        s = (shifted.to(tl.int32, bitcast=True) << 23) + 0x5F800000  # 2^(64 + n)
        return q, s.to(tl.float32, bitcast=True)


@triton.jit
def exp_value(q, s, POWER: tl.constexpr = 1.0):
    """POWER exp(t), a power of two times it."""
    down: tl.constexpr = POWER * (2.0**-512 if q.dtype == tl.float64 else 2.0**-64)
    return (q * s + s) * down


@triton.jit
def exp_times(f, q, s, POWER: tl.constexpr = 1.0):
    """POWER f exp(t)."""
    down: tl.constexpr = POWER * (2.0**-512 if q.dtype == tl.float64 else 2.0**-64)
    return (f * q + f) * s * down


@triton.jit
def one_minus_exp(q, s):
    """1 - exp(t) without cancellation: the power of two is 1 where t is small, and then this is -q."""
    down: tl.constexpr = 2.0**-512 if q.dtype == tl.float64 else 2.0**-64
    power = s * down
    return (1.0 - power) - power * q


@triton.jit
def exp_nonpositive(hi, lo):
    """exp(hi + lo) for any hi <= 0, -inf included: a denormal result is rounded once."""
    floor: tl.constexpr = -800.0 if hi.dtype == tl.float64 else -120.0
    q, s = exp_parts(at_least(hi, floor), tl.where(hi > floor, lo, 0.0))
    return tl.where(hi < floor, 0.0, exp_value(q, s))


@triton.jit
def log1p_unit(y):
    """log(1 + y), 0 <= y <= 1."""
    if y.dtype == tl.float64:
        return y * (1.0 - y * polynomial(y, _LOG_64))
    else:
        return y * (1.0 - y * polynomial(y, _LOG_32))


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
