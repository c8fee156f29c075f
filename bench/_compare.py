"""Candidates timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: best, median, quartile spread; ratios to the first one, round by round.

    On a machine that does other work as well the best time says most: ratios of medians carry its noise.
    """

    name: str
    best: float
    median: float
    spread: float
    speedup: float
    speedup_low: float
    speedup_high: float
    best_speedup: float


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, mid, high = statistics.quantiles(values, n=4)
    return low, mid, high


def compare(
    candidates: dict[str, Callable[[], object]], *, repeats: int = 25, warmup: int = 3
) -> list[Timing]:
    """Time the candidates alternately. Ratios are taken round by round against the first candidate."""
    for f in candidates.values():
        for _ in range(warmup):
            f()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, f in candidates.items():
            start = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(candidates))]
    out = []
    for name, times in seconds.items():
        low, median, high = _quartiles(times)
        r_low, ratio, r_high = _quartiles([a / b for a, b in zip(first, times)])
        best_ratio = min(first) / min(times)
        out.append(Timing(name, min(times), median, high - low, ratio, r_low, r_high, best_ratio))
    return out


@cache
def copy_bandwidth(nbytes: int = 1 << 28) -> float:
    """Bytes read and written a second by torch's own copy of a large tensor."""
    a = torch.ones(nbytes // 4)
    b = torch.empty_like(a)
    best = min(t.best for t in compare({"copy": lambda: b.copy_(a)}, repeats=9))
    return 2 * nbytes / best


@cache
def matmul_peak(dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP a second of torch's square product."""
    a, b, c = (torch.randn(n, n, dtype=dtype) for _ in range(3))
    best = min(t.best for t in compare({"mm": lambda: torch.mm(a, b, out=c)}, repeats=7))
    return 2 * n**3 / best


def show(title: str, timings: list[Timing], limit_seconds: float | None = None, limit: str = "") -> None:
    """A table; `limit_seconds` is the least time the work can take, as counted from `limit`."""
    print(f"\n{title}")
    if limit_seconds is not None:
        print(f"  limit: {limit_seconds * 1e3:.3f} ms ({limit})")
    times = f"{'best':>12}{'median':>12}{'spread':>12}"
    print(f"  {'candidate':<20}{times}{'speedup':>10}{'quartiles':>14}{'best':>8}{'of limit':>10}")
    for t in timings:
        share = f"{limit_seconds / t.best:9.0%}" if limit_seconds is not None else "        -"
        quartiles = f"{t.speedup_low:.2f}-{t.speedup_high:.2f}"
        times = f"{t.best * 1e3:>9.3f} ms{t.median * 1e3:>9.3f} ms{t.spread * 1e3:>9.3f} ms"
        print(f"  {t.name:<20}{times}{t.speedup:>9.2f}x{quartiles:>14}{t.best_speedup:>7.2f}x {share}")
