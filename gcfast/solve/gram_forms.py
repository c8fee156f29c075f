"""Choose the form of K = H1 H1^T for the solver by counting bytes and operations before any work.

Rates are of the order of what a machine does; only their ratios decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gcfast.features import Features, WideFeatures
from gcfast.losses import (
    CrossEntropy,
)
from gcfast.proofs import Tiles
from gcfast.solve.problem import HeadProblem
from gcfast.solve.spectrum import COUPLED
from gcfast.storage import allowed_bytes, check_memory

PRODUCTS = 200  # with K that a path takes, roughly
MOST_WORK = 1e14  # operations for the form that is left where K fails: ten minutes or so


@dataclass(frozen=True)
class Sizes:
    """Of one problem: samples, features, outputs; ``d``: width below the wide layer where H is recomputed."""

    n: int
    m: int
    c: int
    d: int | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Rates:
    """Operations a second of products in float32 and float64, bytes a second of memory."""

    f32: float
    f64: float
    memory: float

    def flops(self, dtype: torch.dtype) -> float:
        return self.f64 if dtype == torch.float64 else self.f32


CPU, GPU = Rates(3e11, 1.5e11, 2e10), Rates(4e13, 4e13, 2.5e12)


@dataclass(frozen=True)
class GramForm:
    """One form: ``bytes`` at its peak beyond the features given, ``seconds`` of order."""

    name: str
    bytes: int
    seconds: float
    dtype: torch.dtype
    form: str  # "set", "dense", "tiles", "free", "spectrum"
    most_rows: int = 0  # of the working set, or of K's rows in the cache


def typical(device: torch.device) -> Rates:
    return CPU if device.type == "cpu" else GPU


def _pass(s: Sizes, rates: Rates, dtype: torch.dtype, sides: int) -> float:
    """Seconds of H^T a and H u."""
    work = 4.0 * s.n * s.m * sides / rates.flops(dtype)
    if s.d is not None:
        return work + 2.0 * s.n * s.m * s.d / rates.flops(dtype)
    # read, and where they are of another dtype written and read again
    moved = s.dtype.itemsize + (0 if s.dtype == dtype else 2 * dtype.itemsize)
    return max(work, 2.0 * s.n * s.m * moved / rates.memory)


def common_bytes(s: Sizes) -> int:
    """Of any form: some dozens of (n, C), and Z in float32 and float64 where features are recomputed."""
    held = 24 * s.n * s.c * 8 + (1 << 26)
    return held + (0 if s.d is None else 12 * (s.n + s.m) * s.d)


def _block_bytes(n: int, rows: int, size: int) -> int:
    """Of the preconditioner: rows of K, and the system of their columns."""
    return size * rows * n + 8 * rows * rows


def rank_of(s: Sizes) -> int:
    """Of the Nystrom preconditioner."""
    return max(1, min(512, s.n // 4))


def options(
    s: Sizes, hard: bool, attained: bool, room: int | None, rates: Rates | None = None
) -> list[GramForm]:
    """Every form, in order of preference among those that fit ``room``, then those that do not.

    ``hard``: cross-entropy of class labels without weight decay, which lets a working set do. ``attained``:
    the loss attains its infimum, so that its curvature does not vanish along the path; float32 would then
    lose all directions of K below 1e-7 |K|, which the path needs, and is not offered.
    """
    rates = rates or typical(s.device)
    common = common_bytes(s)
    left = (1 << 62) if room is None else room - common
    whole: list[GramForm] = []
    own = s.d is None and s.dtype != torch.float32
    if hard and s.n > 1024:
        fixed = 4 * s.n * s.m if own else 0
        row = 0 if s.d is not None else 4 * s.m
        # of S rows: their features where these are stored, their Gram twice while it grows
        most = 0
        if left > fixed:
            most = int(((row * row / 4 + 12.0 * (left - fixed)) ** 0.5 - row / 2) / 12)
        wanted = min(s.n, max(2048, s.n // 4))
        size = fixed + wanted * row + 12 * wanted * wanted
        seconds = 40 * _pass(s, rates, torch.float32, s.c) + wanted**2 * s.m / rates.f32
        name = "K of the samples that matter, float32"
        whole.append(GramForm(name, common + size, seconds, torch.float32, "set", most))
    nystrom = 16 * s.n * rank_of(s)
    panel = 2 * 1024 * s.n
    for dtype, word in ((torch.float64, "float64"), (torch.float32, "float32")):
        if dtype == torch.float32 and attained:
            continue
        size = dtype.itemsize
        # what float32 forms compute is corrected by residuals in float64
        again = 1.0 if dtype == torch.float64 else 2.0
        formed = s.n * s.n * s.m / rates.flops(dtype)
        product = max(s.n * s.n * size / 2 / rates.memory, 2.0 * s.n * s.n * s.c / rates.flops(dtype))
        need = common + nystrom + panel * size
        seconds = formed + again * PRODUCTS * product
        block = _block_bytes(s.n, min(s.n, 4096), size)
        whole.append(GramForm(f"K whole, {word}", need + block + size * s.n**2, seconds, dtype, "dense"))
        block = _block_bytes(s.n, min(s.n, max(1024, s.n // 8)), size)
        half = block + size * Tiles.count(s.n, s.device)
        whole.append(GramForm(f"K, lower half, {word}", need + half, 1.3 * seconds, dtype, "tiles"))
        rows = min(s.n, 2048)
        if room is not None:
            rows = max(256, min(rows, (left - nystrom) // 3 // (size * s.n + 1)))
        # the cache, what is taken from it for a step, and the systems made of that
        free = common + nystrom + 2 * size * rows * s.n + 24 * rows * rows
        # rows of K for the preconditioner are computed as they are needed
        seconds = again * PRODUCTS * _pass(s, rates, dtype, s.c) + 8.0 * rows * s.n * s.m / rates.flops(dtype)
        name = f"K never stored, features {'recomputed' if s.d is not None else 'read'}, {word}"
        whole.append(GramForm(name, free, seconds, dtype, "free", rows))

    # for what K cannot hold: a decomposition, and a Newton system an output
    r = min(s.n, s.m + 1)
    joint = r * s.c if r * (s.c - 1) <= COUPLED else 0
    size = common + 8 * (3 * s.n * (s.m + 1) + (s.c + 8) * r * r) + 16 * joint**2
    work = 20.0 * r * r * max(s.n, s.m) + 60.0 * s.c * r * r * (s.n + r / 3)
    if work < MOST_WORK:
        name = "H by its singular vectors, float64, where K fails"
        whole.append(GramForm(name, size, work / rates.f64, torch.float64, "spectrum"))

    def order(o: GramForm) -> tuple[bool, bool, bool, float]:
        fits = room is None or o.bytes <= room
        # float32 loses the last digits of a hard problem and then costs a second run in float64
        return (
            not fits,
            o.form == "spectrum",
            o.form != "set",
            o.seconds * (1.0 if o.dtype == torch.float64 else 3.0),
        )

    return sorted(whole, key=order)


def sizes_of(features: Features, c: int) -> Sizes:
    d = features.d if isinstance(features, WideFeatures) else None
    return Sizes(features.n, features.m, c, d, features.dtype, features.device)


def forms_for(head_problem: HeadProblem, max_bytes: int | None) -> tuple[list[GramForm], int]:
    """The forms of K that fit, best first, and the bytes of the one for bad scales if it does not, else 0.

    MemoryError where none fits.
    """
    labels = isinstance(head_problem.loss, CrossEntropy) and head_problem.targets.dim() == 1
    hard = labels and not head_problem.weight_decay
    room = allowed_bytes(max_bytes, head_problem.device)
    attained = head_problem.loss.attained(head_problem.targets)
    found = options(sizes_of(head_problem.features, len(head_problem.weight)), hard, attained, room)
    least = min(found, key=lambda o: o.bytes)
    check_memory(
        f"solve_head(method='nearest'), in its smallest form ({least.name}),",
        least.bytes,
        max_bytes,
        head_problem.device,
        "use method='sgd', or fewer samples",
    )
    fit = [o for o in found if room is None or o.bytes <= room]
    return fit, max((o.bytes for o in found if o.form == "spectrum" and o not in fit), default=0)
