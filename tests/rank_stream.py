"""A stream of matrices made to deceive, through every route that proves a rank, judged in exact arithmetic.

It comes in blocks of about a thousand, each drawn from its own seed: as many sizes in each octave from 2 to
300 rows and two of 500 rows and more, all families of rank_cases.py, both dtypes, any layout. A rank modulo a
prime is never above the true one, so what it allows needs no other judge; what it does not allow is judged by
an elimination in whole numbers. No verdict rests on floats.

    python tests/rank_stream.py upward 0 2 8      two blocks of eight sizes each, rounding upward, as JSON
    python tests/rank_stream.py - 0 10 50         ten thousand: "proved" is what proofs/proved.json has
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import itertools
import json
import math
import platform
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from unittest import mock

import torch
from rank_cases import (
    STREAMED,
    Family,
    Spectrum,
    by_a_denormal,
    combination,
    exact_rank,
    gaussian,
    ldexp,
    mixed_scales,
    of_denormals,
    product,
    rank_one_update,
    ranks_mod_prime,
    shifted,
)
from torch import Tensor, nn

from gcfast import Certificate, WideFeatures, certify, matrix_rank, ops
from gcfast.ops import rank as rank_ops
from gcfast.proofs import prove_full_rank

BATCH, SIZES, LARGEST = 20, 50, 2  # a block: matrices of one size, sizes, and those of 500 rows and more
PER_BLOCK = BATCH * SIZES + LARGEST
EASY = 1e10  # of full rank with a condition number up to this: to be proved


class Group(NamedTuple):
    """Matrices of one family and size, and where the stream has them."""

    family: str
    matrices: Tensor
    place: str


class Statement(NamedTuple):
    """What a route says of one matrix: bounds of its rank and of its extreme singular values."""

    lower: int
    upper: int
    least: float = 0.0
    largest: float = math.inf


def groups(
    block: int,
    *,
    sizes: int = SIZES,
    batch: int = BATCH,
    largest: int = LARGEST,
    rows: tuple[int, int] = (2, 300),
    wider: bool = False,
    families: Sequence[Family] = STREAMED,
) -> Iterator[Group]:
    """The block's matrices, the same everywhere but for the last bits of what libraries compute."""
    rng = random.Random(block)
    low, high = rows
    shapes = [(round(low * (high / low) ** ((k + rng.random()) / sizes)), batch) for k in range(sizes)]
    shapes += [(rng.randint(500, 640), largest)] * bool(largest)
    chosen = rng.sample(tuple(families) * (len(shapes) // len(families) + 1), len(shapes))
    for k, ((n, count), family) in enumerate(zip(shapes, chosen)):
        generator = torch.Generator().manual_seed(1_000_003 * block + k)
        dtype = rng.choice((torch.float32, torch.float64))
        beyond = (0, 1, rng.randint(0, n), rng.randint(0, n), -rng.randint(0, n // 2))
        m = n + (rng.randint(n // 2, n) if wider else rng.choice(beyond))
        a = family(generator, count, n, max(m, 2), dtype)
        yield Group(family.__name__, _laid_out(a, rng.randrange(3)), f"block {block}, group {k}")


def at_risk(block: int, state: str | None = None) -> Iterator[Group]:
    """What a state does most harm to: denormals, or long sums that cancel; products that underflow in any."""
    families: tuple[Family, ...]
    if state is None:
        families = (shifted(product, -540, -150), shifted(gaussian, -540, -150))
        return groups(block, sizes=4, batch=2, rows=(8, 330), largest=0, families=families)
    if state == FLUSH:
        families = (of_denormals, by_a_denormal, mixed_scales)
        return groups(block, sizes=9, rows=(2, 40), largest=0, families=families)
    families = (product, combination, rank_one_update)
    return groups(block, sizes=3, batch=4, rows=(100, 200), largest=0, families=families, wider=True)


def _laid_out(a: Tensor, kind: int) -> Tensor:
    """The same numbers: by rows, by columns, or among NaNs that no one may look at."""
    if kind < 2:
        return a if kind == 0 else a.mT.contiguous().mT
    batch, n, m = a.shape
    room = torch.full((batch, n + 1, 2 * m + 3), math.nan, dtype=a.dtype)
    return room[:, 1:, 2 : 2 + 2 * m : 2].copy_(a)


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[:, :1])], 1)


def short(a: Tensor) -> Tensor:
    return a if len(a) <= a.shape[1] else a.mT


def wide(a: Tensor) -> WideFeatures:
    """|a|, or a plus a number that makes all positive: never stored, but evaluated without rounding."""
    top = 2.0 ** math.ceil(math.log2(float(a.abs().max()) or 1.0))
    shift = top if 1e-30 < top < 1e30 and len(a) % 2 else 0.0
    z = a.clone() if shift else a.abs()
    m = a.shape[1]
    layer = (torch.eye(m, dtype=a.dtype), torch.full((m,), shift, dtype=a.dtype))
    return WideFeatures(z, layer, activation="relu")


def _certified(c: Certificate) -> Statement:
    n = c.n
    lower = n if c.status == "holds" else c.rank_lower or 0
    largest = math.inf if c.sigma_max_upper is None else c.sigma_max_upper
    return Statement(lower, n - (c.status == "fails"), c.sigma_min_lower or 0.0, largest)


def by_matrix_rank(a: Tensor) -> list[Statement]:
    found = matrix_rank(a, atol=0.0, rtol=0.0)
    lower = torch.maximum(found.lower, matrix_rank(a).lower)  # whose tolerance is above zero
    columns = (lower, found.upper, found.sigma_min_lower, found.sigma_max_upper)
    return [Statement(*row) for row in zip(*(column.tolist() for column in columns))]


def by_certify(x: Tensor, sharp: bool) -> Statement:
    return _certified(certify(x, sharp=sharp))


def by_model(x: Tensor, sharp: bool) -> Statement:
    head = nn.Linear(x.shape[1], 1, bias=False, dtype=x.dtype)
    return _certified(certify(nn.Sequential(nn.Identity(), head), x, sharp=sharp))


def by_proof(x: Tensor, sharp: bool) -> Statement:
    proof = prove_full_rank(x, ones=False, sharp=sharp)
    n = len(x)
    return Statement(n if proof.proved else 0, n, proof.sigma_min_lower, proof.sigma_max_upper)


def by_large(x: Tensor, sharp: bool) -> Statement:
    """The way of matrices that no kernel takes, for small ones too."""
    with mock.patch.object(rank_ops, "CPU_LIMIT", 0):
        return by_matrix_rank(x[None])[0]


def by_svd(x: Tensor, sharp: bool) -> Statement:
    with ops.backend("reference"):
        return by_matrix_rank(x[None])[0]


def by_wide(features: WideFeatures, sharp: bool) -> Statement:
    return _certified(certify(features, sharp=sharp))


# how a route of one matrix is called, and the matrix that it speaks of
ROUTES: dict[str, tuple[Callable[[Any, bool], Statement], Callable[[Tensor], Tensor]]] = {
    "matrix_rank, large": (by_large, short),
    "matrix_rank, reference": (by_svd, short),
    "certify": (by_certify, with_ones),
    "certify, no ones": (by_model, lambda x: x),
    "prove_full_rank": (by_proof, lambda x: x),
    "WideFeatures": (by_wide, lambda x: with_ones(wide(x).panel(0, x.shape[1]))),
}

FLUSH, WORKERS = "denormals flushed", "upward in workers only"
MODES = {"upward": (0x800, 0x400000), "downward": (0x400, 0x800000), "toward zero": (0xC00, 0xC00000)}
SURROUNDINGS = (FLUSH, *MODES, WORKERS)


def _set_processor(name: str | None) -> None:
    """The arithmetic of this thread, and of those that it starts; None: the ordinary one."""
    torch.set_flush_denormal(name == FLUSH)
    mode = MODES.get("upward" if name == WORKERS else name or "", (0, 0))
    ctypes.CDLL(ctypes.util.find_library("m")).fesetround(mode[platform.machine() != "x86_64"])


@contextmanager
def surroundings(name: str | None) -> Iterator[None]:
    """Two threads in a state of the processor: both, or the one that torch and the kernels start."""
    if name is None:
        yield
        return
    _set_processor(name)
    torch.set_num_threads(2)
    try:
        if name == WORKERS:
            a = torch.eye(64, dtype=torch.float64)
            for call in (lambda: a.expand(64, 64, 64) @ a, lambda: matrix_rank(a[:8, :8].expand(256, 8, 8))):
                with suppress(RuntimeError):
                    call()  # starts the threads
            _set_processor(None)
        yield
    finally:
        torch.set_num_threads(1)
        _set_processor(None)


def _said(
    state: str | None, count: int, call: Callable[..., Any], *arguments: object
) -> list[Statement | str | None]:
    """What a call states; None of each where it refuses the state of the processor by name; or its error."""
    try:
        said = call(*arguments)
    except Exception as error:
        names_it = any(word in str(error).lower() for word in ("rounding", "denormal", "flush", "underflow"))
        refused = state is not None and isinstance(error, RuntimeError) and names_it
        return [None if refused else repr(error)] * count
    return [said] if isinstance(said, Statement) else said


class Judge:
    """What is true of one matrix: exact where that takes work, and only then.

    ``best``: the rank that is called full, min(n, m) for matrix_rank and n for a proof about the rows.
    """

    def __init__(self, a: Tensor, modular: int, best: int) -> None:
        self.a, self.modular, self.best = a, modular, best

    @functools.cached_property
    def rank(self) -> int:
        return self.modular if self.full else exact_rank(self.a)

    @property
    def full(self) -> bool:
        return self.modular == self.best

    def wrong(self, said: Statement, *, exactly: bool) -> str:
        """What is false of a statement ("": nothing); without ``exactly`` the prime is trusted."""
        if said.lower > self.modular and (not exactly or said.lower > self.rank):
            return f"rank >= {said.lower}; it is {self.rank if exactly else self.modular}"
        if said.upper < self.modular:
            return f"rank <= {said.upper}; it is {self.modular} at least"
        if max(self.a.shape) <= 9 and (said.least > 0 or said.largest < math.inf):
            spectrum = Spectrum(self.a)
            if spectrum.signs(said.least)[0]:
                return f"sigma_min >= {said.least}, which is above it"
            if said.largest < math.inf and spectrum.above(said.largest):
                return f"sigma_max <= {said.largest}, which is below it"
        return ""

    def easy(self, said: Statement) -> bool:
        """Of full rank, and the condition number at most EASY, by what was proved or by an SVD."""
        if not self.full:
            return False
        if said.least > 0 and said.largest <= EASY * said.least:
            return True
        if said.lower == self.best:
            return False
        top = math.frexp(float(self.a.abs().max()))[1]
        values = torch.linalg.svdvals(ldexp(self.a.double(), -top))
        return bool(values[0] <= EASY * values[-1])


class Tally:
    """Counts by route and by family, what was proved of full rank as bits in order, and what is false."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.proved: list[bool] = []
        self.false: list[str] = []

    def add(self, route: str, group: Group, judge: Judge, said: Statement | str | None) -> None:
        """``said``: None where the route refused, a text where it failed.

        A test with five false statements has failed: what comes after need not be judged at such a price.
        """
        count: Counter[str] = Counter({"full" if judge.full else "deficient": 1})
        proved = judge.full and isinstance(said, Statement) and said.lower == judge.best
        if said is None:
            count["refused"] = 1
        elif wrong := said if isinstance(said, str) else judge.wrong(said, exactly=len(self.false) < 5):
            count["false"] = 1
            a = judge.a
            self.false.append(f"{route}, {group.place}, {group.family} {tuple(a.shape)} {a.dtype}: {wrong}")
        elif judge.full and isinstance(said, Statement):
            easy = judge.easy(said)
            count += Counter(proved=proved, easy=easy, easy_proved=easy and proved)
        self.proved.append(proved)
        for key in (route, group.family):
            self.counts.setdefault(key, Counter()).update(count)

    def as_json(self) -> dict[str, Any]:
        bits = int("1" + "".join(str(int(p)) for p in self.proved), 2)
        return {"counts": self.counts, "proved": f"{bits:x}", "false": self.false}


def judged(matrices: Iterable[Group], state: str | None = None, calls: int = 1) -> Tally:
    """What every route says of these in a state of the processor, judged in the ordinary one.

    The routes of one matrix take turns, so many calls a group.
    """
    tally, turn = Tally(), 0
    for group in matrices:
        a = group.matrices
        judges = [Judge(x, r, min(x.shape)) for x, r in zip(a, ranks_mod_prime(a))]
        with surroundings(state):
            said = _said(state, len(a), by_matrix_rank, a)
        for judge, statement in zip(judges, said):
            tally.add("matrix_rank", group, judge, statement)
        for _ in range(calls):
            k = turn % len(a)
            route = list(ROUTES)[turn // 2 % len(ROUTES)]
            call, speaks_of = ROUTES[route]
            subject = speaks_of(a[k])
            judge = Judge(subject, ranks_mod_prime(subject[None])[0], len(subject))
            given = wide(a[k]) if call is by_wide else a[k]
            with surroundings(state):
                (statement,) = _said(state, 1, call, given, turn % 2 == 0)
            tally.add(route, group, judge, statement)
            turn += 1
    return tally


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, first, end, sizes = sys.argv[1], *map(int, sys.argv[2:])
    tallies = []
    for block in range(first, end):
        if name in SURROUNDINGS:
            stream = itertools.chain(at_risk(block, name), groups(block, sizes=sizes, largest=0))
            tallies.append(judged(stream, name, 6).as_json())
        else:
            tallies.append(judged(groups(block, sizes=sizes)).as_json())
    print(json.dumps(tallies))
