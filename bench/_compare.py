"""Candidates timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import _record
import torch

from gcfast.ops import dispatch

DEVICE = "GCFAST_BENCH_DEVICE"
SMALLEST = "GCFAST_BENCH_SMALLEST"
Size = TypeVar("Size")


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: best, median, quartile spread; ratios to the first one, round by round.

    On a machine that does other work as well the best time says most: ratios of medians carry its noise.
    ``ratios`` has (lower quartile, median, upper quartile) against every candidate. ``peak_bytes`` is the
    memory of a call beyond its inputs (CUDA only), ``backends`` what each op of gcfast ran on.
    """

    name: str
    best: float
    median: float
    spread: float
    speedup: float
    speedup_low: float
    speedup_high: float
    best_speedup: float
    rounds: int = 0
    device: str = "cpu"
    ratios: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    backends: Mapping[str, str] = field(default_factory=dict)


def bench_device() -> torch.device:
    """Where benchmarks run: GCFAST_BENCH_DEVICE (pytest's --device sets it), else the GPU if there is one."""
    name = os.environ.get(DEVICE, "").strip() or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"{DEVICE} must be cpu or cuda; got {name!r}")
    return torch.device(name)


def only_smallest() -> bool:
    """Whether everything is run once at its smallest size (pytest's --smallest): nothing is measured then."""
    return bool(os.environ.get(SMALLEST, "").strip())


def sized(usual: Size, *, smallest: Size) -> Size:
    """A benchmark's size, or the one that runs where ``--smallest`` is given."""
    return smallest if only_smallest() else usual


class _HostClock:
    def time(self, f: Callable[[], object]) -> Callable[[], float]:
        start = time.perf_counter()
        f()
        seconds = time.perf_counter() - start
        return lambda: seconds

    def settle(self) -> None:
        pass

    def peak_bytes(self, f: Callable[[], object]) -> int | None:
        return None


class _EventClock:
    """CUDA events on the current stream, read after a round, so that the host runs ahead of short kernels.

    The scratch buffer is twice the L2 cache: writing it drives every input out, reading it makes the lines
    left behind clean, so that the call timed does not pay for writing them back.
    """

    def __init__(self, device: torch.device, flush_l2: bool) -> None:
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size if flush_l2 else 0
        self.scratch = torch.empty(2 * size // 4, dtype=torch.float32, device=device)

    def time(self, f: Callable[[], object]) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if len(self.scratch):
            self.scratch.zero_()
            self.scratch.sum()
        start.record()
        f()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self, f: Callable[[], object]) -> int | None:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        f()
        return torch.cuda.max_memory_allocated(self.device) - before


def _where(value: object) -> torch.device | None:
    """The device of a tensor, or of the first one in a tuple or list."""
    if isinstance(value, torch.Tensor):
        return value.device
    return next((d for v in value if (d := _where(v))), None) if isinstance(value, (tuple, list)) else None


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 3:
        return min(values), statistics.median(values), max(values)
    low, mid, high = statistics.quantiles(values, n=4)
    return low, mid, high


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 25,
    warmup: int = 3,
    device: torch.device | str | None = None,
    flush_l2: bool = True,
    once: Collection[str] = (),
    scale: Mapping[str, float] | None = None,
) -> list[Timing]:
    """Time the candidates alternately. Ratios are taken round by round against the first candidate.

    `device` says whose clock counts; by default it is where the first candidate's result lives, or else
    :func:`bench_device`. On a GPU the L2 cache is flushed before every timed call. Candidates named in `once`
    run in the first round only, without warm-up; with ``--smallest`` all do. `scale` names candidates that do
    a part of the work, with the factor from its time to that of the whole.
    """
    if only_smallest():
        repeats, warmup = 1, 0
    value: object = None
    for name, f in reversed(candidates.items()):  # the first one last, for its result
        for _ in range(0 if name in once else warmup):
            value = f()
    device = torch.device(device) if device is not None else _where(value) or bench_device()
    del value
    clock = _EventClock(device, flush_l2) if device.type == "cuda" else _HostClock()
    peaks = {name: None if name in once else clock.peak_bytes(f) for name, f in candidates.items()}
    clock.settle()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ran: dict[str, dict[str, str]] = {}
    for round_ in range(repeats):
        pending = {}
        for name, f in candidates.items():
            if round_ == 0 or name not in once:
                dispatch._last.clear()
                pending[name] = clock.time(f)
                ran[name] = dict(dispatch._last)
        clock.settle()
        for name, read in pending.items():
            seconds[name].append(read() * (scale or {}).get(name, 1.0))
    first = next(iter(candidates))
    out = []
    for name, times in seconds.items():
        low, median, high = _quartiles(times)
        ratios = {other: _quartiles([a / b for a, b in zip(seconds[other], times)]) for other in candidates}
        r_low, ratio, r_high = ratios[first]
        out.append(
            Timing(
                name=name,
                best=min(times),
                median=median,
                spread=high - low,
                speedup=ratio,
                speedup_low=r_low,
                speedup_high=r_high,
                best_speedup=min(seconds[first]) / min(times),
                rounds=len(times),
                device=device.type,
                ratios=ratios,
                peak_bytes=peaks[name],
                backends=ran[name],
            )
        )
    return out


def with_compiled(
    candidates: dict[str, Callable[[], object]],
    f: Callable[..., object],
    step: Callable[[Callable[..., object]], Callable[[], object]],
) -> dict[str, Callable[[], object]]:
    """The candidates and step(torch.compile(f)); without it, and a line that says why, where it fails."""
    compiled = step(torch.compile(f, backend=sized("inductor", smallest="eager")))  # which compiles no C++
    try:
        compiled()
    except Exception as error:  # a peer that cannot run here must not take the comparison along
        reason = str(error).strip().splitlines() or [""]
        print(f"\ntorch.compile is left out: {type(error).__name__}: {reason[0]}")
        return candidates
    return {**candidates, "torch.compile": compiled}


def on_backend(backend: str, call: Callable[[], object]) -> Callable[[], Any]:
    """`call` with a backend of gcfast forced."""

    def forced() -> Any:
        with dispatch.backend(backend):
            return call()

    return forced


def copy_bandwidth(nbytes: int | None = None, *, device: torch.device | str | None = None) -> float:
    """Bytes read and written a second by torch's own copy of a large tensor."""
    where = torch.device(device) if device is not None else bench_device()
    usual = sized(1 << 30 if where.type == "cuda" else 1 << 28, smallest=1 << 16)
    return _copy_bandwidth(nbytes or usual, where)


@cache
def _copy_bandwidth(nbytes: int, device: torch.device) -> float:
    a = torch.rand(nbytes // 4, device=device)
    b = torch.empty_like(a)
    (copy,) = compare({"copy": lambda: b.copy_(a)}, repeats=9, device=device, flush_l2=False)
    _record.ceiling(device.type, "copy", 2 * nbytes / copy.best)
    return 2 * nbytes / copy.best


def matmul_peak(
    dtype: torch.dtype,
    n: int | None = None,
    *,
    device: torch.device | str | None = None,
    tf32: bool = False,
) -> float:
    """FLOP a second of torch's square product; float32 by IEEE rules, or with TF32 inputs."""
    where = torch.device(device) if device is not None else bench_device()
    usual = sized(8192 if where.type == "cuda" else 2048, smallest=64)
    return _matmul_peak(dtype, n or usual, where, tf32)


@cache
def _matmul_peak(dtype: torch.dtype, n: int, device: torch.device, tf32: bool) -> float:
    a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        (mm,) = compare({"mm": lambda: torch.mm(a, b, out=c)}, repeats=7, device=device, flush_l2=False)
    finally:
        matmul.fp32_precision = before
    name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    _record.ceiling(device.type, f"matmul {name}", 2 * n**3 / mm.best)
    return 2 * n**3 / mm.best


def show(
    title: str,
    timings: list[Timing],
    limit_seconds: float | None = None,
    limit: str = "",
    *,
    op: str | None = None,
    size: str | None = None,
    dtype: torch.dtype | str | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """A table, and its record; `limit_seconds` is the least time the work can take, as counted from `limit`.

    Op, size and dtype are read off the title ("softplus, 1048576 elements, torch.float32") unless given;
    `extra` adds figures of a candidate other than times. GCFAST_BENCH_OUT names the file of the record.
    """
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
    guess = _record.from_title(title)
    rounds = {t.name: t.rounds for t in timings}
    _record.append(
        {
            "op": guess[0] if op is None else op,
            "size": guess[1] if size is None else size,
            "dtype": guess[2] if dtype is None else str(dtype).removeprefix("torch."),
            "device": timings[0].device,
            "limit": limit,
            "limit_seconds": limit_seconds,
            "candidates": [_entry(t, rounds, limit_seconds, (extra or {}).get(t.name, {})) for t in timings],
        }
    )


def _entry(
    t: Timing, rounds: Mapping[str, int], limit_seconds: float | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """A candidate in the record. A ratio is [lower quartile, median, upper]: no quartiles under 3 rounds."""
    ratios = {
        other: list(q) if min(t.rounds, rounds[other]) >= 3 else [None, q[1], None]
        for other, q in t.ratios.items()
        if other != t.name
    }
    return {
        "name": t.name,
        "best": t.best,
        "median": t.median,
        "spread": t.spread,
        "rounds": t.rounds,
        "ratios": ratios,
        "of_limit": None if limit_seconds is None else limit_seconds / t.best,
        "peak_bytes": t.peak_bytes,
        "backends": dict(t.backends),
        **({"extra": dict(extra)} if extra else {}),
    }
