"""Matrices to be judged by their rank, and their exact ranks and counts of singular values.

Exact means integers of any length (python-flint): a float matrix is a whole one times a power of two. The
number of singular values above a tolerance t is that of positive roots of the characteristic polynomial of
A A^T - t^2 I, all of whose roots are real: then Descartes' rule of signs counts them exactly, multiple ones
and zeros included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

try:
    import flint
except ImportError:  # a machine without a network may lack it: what needs no exact value is tested there, too
    flint = None


def needs_flint() -> None:
    if flint is None:
        pytest.skip("exact ranks need python-flint")


MANTISSA = {torch.float32: 24, torch.float64: 53}


def whole(a: Tensor) -> tuple[list[list[int]], int]:
    """Integers x and an exponent e with a = x 2^e exactly."""
    mantissa, exponent = np.frexp(a.detach().double().cpu().numpy())
    digits = np.ldexp(mantissa, 53).astype(np.int64)
    used = exponent[digits != 0]
    least = int(used.min()) if used.size else 0
    shift = np.where(digits != 0, exponent - least, 0)
    if int(shift.max(initial=0)) < 10:  # most are small: numpy's integers will do
        return (digits << shift).tolist(), least - 53
    rows = zip(digits.tolist(), shift.tolist())
    return [[d << s for d, s in zip(*row)] for row in rows], least - 53


def exact_rank(a: Tensor) -> int:
    needs_flint()
    return flint.fmpz_mat(whole(a)[0]).rank() if a.numel() else 0


class Spectrum:
    """The squares of the min(n, m) singular values, for exact comparisons."""

    def __init__(self, a: Tensor) -> None:
        needs_flint()
        a = a if a.shape[0] <= a.shape[1] else a.mT
        self.n = len(a)
        x, self.exponent = whole(a)
        x = flint.fmpz_mat(x)
        self.gram = x * x.transpose()

    def _signs(self, t: int, at: int) -> tuple[int, int, int]:
        gram, up = self.gram, 2 * self.exponent - at  # gram 2^(2 exponent), t 2^at
        gram, t = (gram * flint.fmpz(1 << up), t) if up >= 0 else (gram, t << -up)
        diagonal = flint.fmpz_mat(self.n, self.n)
        for i in range(self.n):
            diagonal[i, i] = t
        p = [int(c) for c in (gram - diagonal).charpoly().coeffs()]
        signs = [c > 0 for c in p if c]
        above = sum(s != t for s, t in itertools.pairwise(signs))
        equal = next(k for k, c in enumerate(p) if c)
        return self.n - above - equal, equal, above

    def signs(self, tolerance: float) -> tuple[int, int, int]:
        """How many singular values are below, equal to and above a float tolerance >= 0."""
        numerator, denominator = float(tolerance).as_integer_ratio()
        return self._signs(numerator**2, -2 * (denominator.bit_length() - 1))

    def above(self, tolerance: float) -> int:
        return self.signs(tolerance)[2]

    def largest_square(self, bits: int = 100) -> tuple[int, int, int]:
        """lo, hi, e: lo 2^e <= sigma_max^2 < hi 2^e, hi / lo - 1 about 2^-bits; lo = 0 for a zero matrix."""
        trace = sum(int(self.gram[i, i]) for i in range(self.n))
        if trace == 0:
            return 0, 1, 2 * self.exponent - 4000
        down = max(0, bits + 16 - trace.bit_length())
        lo, hi, at = (trace << down) // self.n, (trace << down) + 1, 2 * self.exponent - down
        while hi - lo > max(1, lo >> bits):
            mid = (lo + hi) // 2
            _, equal, above = self._signs(mid, at)
            lo, hi = (mid, hi) if equal + above else (lo, mid)
        return lo, hi, at

    def counts(self, atol: float, rtol: float) -> tuple[int, int]:
        """Bounds of the number above max(atol, rtol sigma_max): equal ones, but for a tie within 2^-100."""
        absolute = self.above(atol)
        if rtol == 0:
            return absolute, absolute
        lo, hi, at = self.largest_square()
        p, q = float(rtol).as_integer_ratio()
        down = 2 * (q.bit_length() - 1)
        least, most = (self._signs(t * p * p, at - down)[2] for t in (hi, lo))
        return min(absolute, least), min(absolute, most)


def integers(generator: torch.Generator, *shape: int, high: int) -> Tensor:
    return torch.randint(-high, high + 1, shape, generator=generator).double()


def _room(dtype: torch.dtype, terms: int, share: float = 1.0) -> int:
    """Factors of at most this size have products, `terms` of them summed, that are exact in dtype."""
    return max(1, int(math.sqrt(share * 2 ** MANTISSA[dtype] / max(1, terms))))


# Of (generator, batch, n, m, dtype): matrices in that dtype, every entry as it is meant. Most are deficient.
Family = Callable[[torch.Generator, int, int, int, torch.dtype], Tensor]


def product(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Of integer factors that leave out one rank, or half of them."""
    r = int(torch.randint(0, 2, (1,), generator=g)) * (min(n, m) // 2) or min(n, m) - 1
    high = _room(dtype, r)
    return (integers(g, batch, n, r, high=high) @ integers(g, batch, r, m, high=high)).to(dtype)


def last_bit(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A product, with one entry in each moved by one unit in the last place: mostly of one rank more."""
    a = product(g, batch, n, m, dtype)
    k = torch.randint(0, n * m, (batch, 1), generator=g)
    flat = a.view(batch, -1)
    old = flat.gather(1, k)
    flat.scatter_(1, k, torch.nextafter(old, torch.full_like(old, math.inf)))
    return a


def combination(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A row that is an integer combination of the others, of mantissas that fill the dtype."""
    bits = MANTISSA[dtype] - 4 - n.bit_length()
    a = torch.randint(-(1 << bits) + 1, 1 << bits, (batch, n, m), generator=g).double()
    c = integers(g, batch, 1, n - 1, high=7)
    a[:, n // 2 : n // 2 + 1] = c @ torch.cat([a[:, : n // 2], a[:, n // 2 + 1 :]], 1)
    return a.to(dtype)


def duplicate(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Two rows that are the same floats."""
    a = torch.randn(batch, n, m, generator=g, dtype=torch.float64).to(dtype)
    a[:, -1] = a[:, 0]
    return a


def one_ulp(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Two rows one unit in the last place apart, in one entry or in all: of full rank in truth."""
    a = duplicate(g, batch, n, m, dtype)
    one = torch.rand(batch, 1, generator=g) < 0.5
    where = (torch.arange(m) == 0) | ~one
    a[:, -1] = torch.where(where, torch.nextafter(a[:, 0], torch.tensor(math.inf, dtype=dtype)), a[:, 0])
    return a


def odd_mantissas(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Rank two or three, odd entries just over half a mantissa long: no square of them is exact."""
    bits = MANTISSA[dtype] // 2
    r = min(n, m) - 1 if min(n, m) < 4 else 3
    base = (1 << bits) + 1 + 2 * torch.randint(0, 1 << (bits - 3), (batch, r, m), generator=g)
    sign = 1 - 2 * torch.randint(0, 2, (batch, r, m), generator=g)
    c = integers(g, batch, n, r, high=31)
    return (c @ (base * sign).double()).to(dtype)


def rank_one_update(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A large rank-one matrix that hides one of rank n - 2."""
    r = max(1, min(n, m) - 2)
    high = _room(dtype, 4 * r, 2.0**-14)
    small = integers(g, batch, n, r, high=high) @ integers(g, batch, r, m, high=high)
    top = _room(dtype, 2)
    return (small + integers(g, batch, n, 1, high=top) @ integers(g, batch, 1, m, high=top)).to(dtype)


def vandermonde(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Powers of integers, nodes twice in some: the exact rank is the number of distinct nodes."""
    powers = min(m, 8)
    high = int(2 ** (MANTISSA[dtype] / max(1, powers - 1)))
    nodes = torch.randint(-min(high, 2 * n), min(high, 2 * n) + 1, (batch, n, 1), generator=g).double()
    a = nodes ** torch.arange(powers, dtype=torch.float64)
    return torch.nn.functional.pad(a, (0, m - powers)).to(dtype)


def biased_sums(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """(1, c, ..., c), (1, -c, ..., -c) and their sum, c^2 near half an ulp: all roundings go one way."""
    places = torch.rand(batch, 2, 1, generator=g, dtype=torch.float64)
    c = (2.0**-53 * (1 + 10 ** (-0.3 - 3 * places[:, 0]) * torch.where(places[:, 1] < 0.5, -1.0, 1.0))).sqrt()
    c = c.expand(batch, m - 1).to(dtype)
    one = torch.ones(batch, 1, dtype=dtype)
    rows = [torch.cat([one, c], 1), torch.cat([one, -c], 1)]
    rows.append(rows[0] + rows[1])
    rows += [torch.zeros_like(rows[0]).index_fill_(1, torch.tensor([k % m]), 1) for k in range(1, n - 2)]
    return torch.stack(rows[:n], 1)


def repeated_columns(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A product of rank n - 1 at most with as few distinct columns, so that roundings add up, not cancel."""
    r = min(n, m) - 1
    bits = MANTISSA[dtype] - 5 - r.bit_length()
    top = torch.randint(1, 1 << bits, (batch, r, r), generator=g).double()
    a = (integers(g, batch, n, r, high=15) @ top).to(dtype)
    return a.repeat(1, 1, -(-m // r))[:, :, :m]


def ldexp(a: Tensor, exponent: int | Tensor) -> Tensor:
    """a 2^exponent; torch 2.9 multiplies by that power, which may overflow where the product does not."""
    return torch.as_tensor(np.ldexp(a.cpu().numpy(), np.asarray(exponent)), device=a.device)


def scaled(family: Family, spread: int) -> Family:
    """Rows and columns of a family times powers of two: the same rank, another difficulty."""

    def of_scale(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
        most = min(spread, 30) if dtype == torch.float32 else spread
        a = family(g, batch, n, m, dtype)
        for shape in ((batch, n, 1), (batch, 1, m)):
            a = ldexp(a, torch.randint(-most, most + 1, shape, generator=g))
        return a

    of_scale.__name__ = f"{family.__name__}, scaled by 2^+-{spread}"
    return of_scale


FAMILIES: tuple[Family, ...] = (
    product,
    last_bit,
    combination,
    duplicate,
    one_ulp,
    odd_mantissas,
    rank_one_update,
    vandermonde,
    biased_sums,
    repeated_columns,
    scaled(product, 12),
    scaled(one_ulp, 40),
    scaled(odd_mantissas, 200),
)


def small_first_pivot(g: torch.Generator, batch: int, n: int, m: int, level: float) -> tuple[Tensor, Tensor]:
    """Matrices and tolerances for which an elimination without pivoting grows, near a singular value.

    One small row over n - 1 large ones that are nearly dependent, by about the tolerance: from 100 to 30,000
    times what rounding, in units of `level`, makes of the Gram. The small row lies among the large ones and
    is about as long as the tolerance, so that the first pivot of A A^T - tol^2 I is nearly zero.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, generator=g, dtype=torch.float64)

    k = n - 1
    values = 1 + torch.rand(batch, k, generator=g, dtype=torch.float64)
    times = 10 ** uniform(2, 4.5)
    values[:, -1:] = (values[:, :-1].square().sum(1, keepdim=True) * level * times).sqrt()
    q = torch.linalg.qr(torch.randn(batch, k, k, generator=g, dtype=torch.float64))[0]
    p = torch.linalg.qr(torch.randn(batch, m, k, generator=g, dtype=torch.float64))[0]
    large = (q * values[:, None]) @ p.mT
    aside = 10 ** uniform(-5, -1.3) * torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    tolerance = torch.linalg.svdvals(large)[:, -1:] * (1 + aside).sqrt()
    # shifts are taken a little beside the tolerance, and beside that by a bound of the errors
    beside = uniform(-1.5, 1.5) * (m + 2 * n + 20) / times
    beside += 0.001 * torch.randint(-1, 2, (batch, 1), generator=g)
    direction = torch.nn.functional.normalize(torch.randn(batch, 1, k - 1, generator=g).double(), dim=-1)
    small = direction @ p[:, :, :-1].mT * (tolerance * (1 + beside).clamp(min=0).sqrt())[..., None]
    return torch.cat([small, large], 1), tolerance[:, 0]


def _uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def tied_rows(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Rows that are others times a power of two, a sign, or the same entries in another order."""
    a = torch.randn(batch, n, m, generator=g, dtype=torch.float64).to(dtype)
    pairs = max(1, n // 8)
    factor = 2.0 ** torch.randint(-3, 4, (batch, pairs, 1), generator=g)
    factor *= 1 - 2 * torch.randint(0, 2, (batch, pairs, 1), generator=g)
    a[:, n - pairs :] = a[:, :pairs] * factor.to(dtype)
    if int(torch.randint(0, 3, (1,), generator=g)) == 0:  # of full rank but by accident
        a[:, n - pairs :] = a[:, :pairs].roll(1, -1)
    return a


def affine(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A row that is another one plus the difference of two: dependent with a column of ones as well."""
    bits = MANTISSA[dtype] - 2
    a = torch.randint(-(1 << bits) + 1, 1 << bits, (batch, n, m), generator=g).double()
    if n < 4:
        a[:, -1] = a[:, 0]
    else:
        a[:, -1] = a[:, 0] + a[:, 1] - a[:, 2]  # below 3 2^(p-2) in size
    return a.to(dtype)


def laplacian(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Weighted differences of unit vectors in a circle, which add up to zero: all but one are independent."""
    a = torch.zeros(batch, n, m, dtype=torch.float64)
    k = min(n, m)
    i = torch.arange(k)
    weight = 1.0 + torch.randint(0, 9, (batch, k), generator=g)
    a[:, i, i] += weight
    a[:, i, (i + 1) % k] -= weight
    return a.to(dtype)


def small_integers(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Entries -1, 0 and 1, or 0 and 1; mostly of full rank where n < m."""
    low = -int(torch.randint(0, 2, (1,), generator=g))
    return torch.randint(low, 2, (batch, n, m), generator=g).to(dtype)


def gaussian(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """As they come: of full rank, and well conditioned."""
    return torch.randn(batch, n, m, generator=g, dtype=torch.float64).to(dtype)


def layer_like(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """What a wide layer with softplus makes of few inputs: positive, a large common mean, ill-conditioned."""
    d = int(torch.randint(2, 33, (1,), generator=g))
    z, q = (torch.randn(batch, k, d, generator=g, dtype=torch.float64) for k in (n, m))
    c = torch.randn(batch, 1, m, generator=g, dtype=torch.float64)
    return torch.nn.functional.softplus(z @ q.mT + c).to(dtype)


def graded(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Of full rank, with condition numbers from 1 to 1e15 in the middle: from plain to nearly deficient."""
    k = min(n, m)
    decades = _uniform(g, 0, 15 if dtype == torch.float64 else 6, batch, 1, 1)
    place = torch.linspace(0, 1, k, dtype=torch.float64)[None, None]
    if int(torch.randint(0, 2, (1,), generator=g)):  # one small value, not a slope
        place = (place == 1).double()
    left, right = (
        torch.randn(batch, *s, generator=g, dtype=torch.float64) / math.sqrt(k) for s in ((n, k), (k, m))
    )
    return ((left * 10 ** (-decades * place)) @ right).to(dtype)


def ill_scaled(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """One column of 1e5 beside others of one, or a mean of 1e4 under all."""
    a = torch.randn(batch, n, m, generator=g, dtype=torch.float64)
    if int(torch.randint(0, 2, (1,), generator=g)):
        a[:, :, 0] *= 1e5
    else:
        a += 1e4
    return a.to(dtype)


def of_denormals(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Products, or small integers, in units of the least number above zero, in all rows or in half."""
    family = product if int(torch.randint(0, 2, (1,), generator=g)) else small_integers
    a = family(g, batch, n, m, dtype)
    least = -1074 if dtype == torch.float64 else -149
    shift = torch.full((batch, n, 1), least)
    if int(torch.randint(0, 2, (1,), generator=g)):
        shift[:, n // 2 :] = 0
    return ldexp(a, shift)


def by_a_denormal(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Two rows of denormals, equal but for one unit in one entry, or equal: under others of one."""
    a = torch.randn(batch, n, m, generator=g, dtype=torch.float64).to(dtype)
    least = -1074 if dtype == torch.float64 else -149
    a[:, -1] = ldexp(torch.randint(1, 9, (batch, m), generator=g).to(dtype), least)
    a[:, 0] = a[:, -1]
    same = torch.rand(batch, 1, generator=g) < 0.5
    one = ldexp(torch.ones(batch, 1, dtype=dtype), least)
    a[:, 0, :1] += torch.where(same, torch.zeros_like(one), one)
    return a


def shifted(family: Family, low: int, high: int) -> Family:
    """A family times one power of two, the exponent between these in float64, a tenth of them in float32."""

    def at_one_scale(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
        least, most = (low, high) if dtype == torch.float64 else (low // 10, high // 10)
        return ldexp(
            family(g, batch, n, m, dtype), torch.randint(least, most + 1, (batch, 1, 1), generator=g)
        )

    at_one_scale.__name__ = f"{family.__name__}, at 2^{low} to 2^{high}"
    return at_one_scale


def mixed_scales(g: torch.Generator, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Products whose rows lie anywhere in the dtype's range."""
    a = product(g, batch, n, m, dtype)
    most = 900 if dtype == torch.float64 else 90
    return ldexp(a, torch.randint(-most, most + 1, (batch, n, 1), generator=g))


STREAMED: tuple[Family, ...] = (
    *FAMILIES,
    tied_rows,
    affine,
    laplacian,
    small_integers,
    gaussian,
    layer_like,
    graded,
    ill_scaled,
    of_denormals,
    by_a_denormal,
    mixed_scales,
    shifted(product, -540, -150),
    shifted(gaussian, -540, -150),
    shifted(product, 150, 950),
    shifted(gaussian, 150, 950),
)

PRIME = 2**31 - 19  # two has a large order here, so that scaling by it makes nothing equal by accident


def ranks_mod_prime(a: Tensor) -> list[int]:
    """Ranks modulo a prime of a batch of float matrices, their rows times powers of two: never too large."""
    needs_flint()
    mantissa, exponent = np.frexp(a.numpy())
    digits = np.ldexp(mantissa, 53).astype(np.int64) % PRIME
    least = np.where(digits != 0, exponent, 10**6).min(-1, keepdims=True)
    powers = np.array([pow(2, k, PRIME) for k in range(2200)])
    whole = digits * powers[np.where(digits != 0, exponent - least, 0)] % PRIME
    return [flint.nmod_mat(*a.shape[1:], x.ravel().tolist(), PRIME).rank() for x in whole]
