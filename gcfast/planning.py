"""What certify and solve_head would do at a size, counted before any work: bytes, operations, time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import _choice, ops
from gcfast._choice import Option, Rates, Sizes
from gcfast._products import exact_products
from gcfast._rank_proof import proof_bytes, proof_flops
from gcfast._tiles import Tiles
from gcfast.features import checked, sample_count
from gcfast.losses import ConvexLoss, CrossEntropy, output_count, resolve_loss
from gcfast.model.head import find_head
from gcfast.sources import Features, WideFeatures
from gcfast.storage.memory import limit

# Not measured by gcfast: nominal figures of the card, of which half is assumed to be reached.
NOMINAL = {"h100": Rates(f32=3.0e13, f64=3.0e13, memory=2.4e12)}


@dataclass(frozen=True)
class Stage:
    """One step of the work: what is held, in bytes beyond the features; seconds by the rates of the plan."""

    name: str
    form: str
    bytes: int
    flops: float
    seconds: float
    fits: bool
    rejected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Sizes, the memory allowed, and the stages; ``str()`` is a table.

    ``sharded``: for several devices, what each of them holds and sends (:class:`Sharding`), else None.
    """

    n: int
    m: int
    d: int | None
    c: int
    room: int | None
    rates: Rates
    stages: list[Stage]
    sharded: Sharding | None = None

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def __str__(self) -> str:
        layer = f"recomputed from {self.d} inputs" if self.d is not None else "stored"
        lines = [
            f"n = {self.n:,} samples, m = {self.m:,} features ({layer}), C = {self.c:,}; "
            f"memory allowed {_size(self.room) if self.room is not None else 'unknown'}"
        ]
        for s in self.stages:
            verdict = "" if s.fits else "  DOES NOT FIT"
            lines.append(
                f"  {s.name:<8} {s.form:<58} {_size(s.bytes):>9} {s.flops / 1e12:>10.3g} TFLOP "
                f"{_duration(s.seconds):>9}{verdict}"
            )
            lines += [f"           not {text}" for text in s.rejected]
        r = self.rates
        lines.append(
            f"  by {r.f32 / 1e9:,.0f} GFLOP/s in float32, {r.f64 / 1e9:,.0f} in float64, "
            f"{r.memory / 1e9:,.0f} GB/s; times are of that order, not promises"
        )
        if self.sharded is not None:
            lines.append(str(self.sharded))
        return "\n".join(lines)


@dataclass(frozen=True)
class Sharding:
    """n samples over ``devices``: rows of Z, all-reduces of (m + 1) x C, columns of tiles of n x n in turn.

    A device keeps ``rows`` rows of Z and of everything (n, C), and makes the features of these rows anew. K r
    = Phi (Phi^T r) needs one all-reduce, of Phi^T r; the Gram one all-gather, of Z; a Cholesky factor a
    broadcast of every column of tiles. Bytes are those that one device sends, in rings: of x bytes an
    all-reduce sends 2 (p - 1) / p x, an all-gather (p - 1) / p x, a broadcast x.
    """

    devices: int
    rows: int
    held_solve: int
    held_certify: int
    product_bytes: float  # for one product with K
    gram_bytes: float
    factor_bytes: float
    product_seconds: float  # of arithmetic, as all of these
    gram_seconds: float
    factor_seconds: float

    def __str__(self) -> str:
        return "\n".join(
            (
                f"  over {self.devices} devices, {self.rows:,} rows of Z each; a device holds "
                f"{_size(self.held_solve)} to solve, {_size(self.held_certify)} to certify, and sends",
                f"    {_size(self.product_bytes)} for a product with K ({_duration(self.product_seconds)} of "
                "arithmetic),",
                f"    {_size(self.gram_bytes)} for the Gram ({_duration(self.gram_seconds)}),",
                f"    {_size(self.factor_bytes)} for a Cholesky factor ({_duration(self.factor_seconds)})",
            )
        )


def plan(
    model_or_features: nn.Module | Tensor | Features | Any = None,
    data: Any = None,
    *,
    n: int | None = None,
    m: int | None = None,
    d: int | None = None,
    c: int | None = None,
    loss: str | nn.Module | ConvexLoss = "cross_entropy",
    dtype: torch.dtype = torch.float32,
    max_bytes: int | None = None,
    devices: int = 1,
    rates: Rates | str | None = None,
) -> Plan:
    """Count what ``certify`` and ``solve_head`` would hold and do, before any work; print it.

    Args:
        model_or_features, data: as for ``certify``; or sizes instead of them:
        n, m, d, c: samples, features, inputs of the wide layer (None: features are stored), outputs.
        loss: cross-entropy of class labels lets a working set do.
        dtype: of the features, where sizes are given.
        max_bytes: memory allowed a device (default: what is free here).
        devices: over which a sharded run would be spread, see :class:`Sharding`.
        rates: :class:`gcfast.Rates`, "h100" (nominal), or None: measured here, in half a second.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    convex = resolve_loss(loss)
    device = torch.device("cpu")
    hard = isinstance(convex, CrossEntropy) and not convex.label_smoothing
    if model_or_features is None:
        for name, value in (("n", n), ("m", m), ("c", c), ("devices", devices)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive int, where no model is given; got {value!r}")
        assert n is not None and m is not None and c is not None
        sizes = Sizes(n, m, c, d, dtype, device)
    elif any(value is not None for value in (n, m, d, c)):
        raise ValueError("n, m, d, c: give sizes or a model with its data, not both")
    else:
        sizes, real = _sizes(model_or_features, data, max_bytes)
        hard = hard and not real
    if isinstance(rates, str):
        if rates not in NOMINAL:
            raise ValueError(f"rates: expected one of {sorted(NOMINAL)}, Rates or None; got {rates!r}")
        rates = NOMINAL[rates]
    found = rates or measured(sizes.device)
    room = limit(max_bytes, sizes.device)
    attained = not hard and convex.name != "bce_with_logits"  # as far as sizes tell
    stages = [_certify(sizes, room, found), _solve(sizes, hard, attained, room, found, rates)]
    sharded = _sharding(sizes, devices, found) if devices > 1 else None
    return Plan(sizes.n, sizes.m, sizes.d, sizes.c, room, found, stages, sharded)


def _sizes(source: Any, data: Any, max_bytes: int | None) -> tuple[Sizes, bool]:
    """Sizes, and whether the targets are known to be real numbers."""
    if isinstance(source, nn.Module):
        from gcfast.features import loader_of, streams
        from gcfast.nn import WideLayer

        if data is None:
            raise ValueError("data: a model needs its training set")
        head = find_head(source)
        loader = loader_of(data)
        n = sample_count(loader)
        if n is None:
            raise ValueError("data: expected data that say how many samples they have")
        weight = head.module.weight
        wide = [layer for layer in source.modules() if type(layer) is WideLayer]
        d = None
        if wide and wide[-1].m == head.in_features and streams(n, weight, max_bytes):
            d = wide[-1].d
        return Sizes(n, head.in_features, head.out_features, d, weight.dtype, weight.device), False
    features = checked(source)
    width = features.d if isinstance(features, WideFeatures) else None
    c = output_count(data) if isinstance(data, Tensor) else 10
    real = isinstance(data, Tensor) and data.is_floating_point()
    return Sizes(features.n, features.m, c, width, features.dtype, features.device), real


def _certify(s: Sizes, room: int | None, rates: Rates) -> Stage:
    inside = proof_bytes(s.n, s.m)
    outside = proof_bytes(s.n, s.m, disk=True)
    flops = proof_flops(s.n, s.m)
    panels = 4.0 * 2.0 * s.n * s.m * (s.d or 0)
    seconds = flops / rates.f64 + panels / rates.f64
    if s.n > s.m + 1:
        return Stage("certify", f"rank n = {s.n:,} needs m >= n - 1: fails at once", 0, 0.0, 0.0, True)
    if room is None or inside <= room:
        return Stage("certify", "lower triangles of n x n in memory", inside, flops, seconds, True)
    text = f"n x n in memory: {_size(inside)}"
    fits = outside <= room and s.device.type == "cpu"
    form = f"lower triangles of n x n on disk, {_size(3 * 8 * Tiles.count(s.n))}"
    return Stage("certify", form, outside, flops, 2.0 * seconds, fits, [text])


def _solve(
    s: Sizes, hard: bool, attained: bool, room: int | None, rates: Rates, given: Rates | None
) -> Stage:
    """``given``: rates of another machine, which choose the form too; here solve_head's own rates do."""
    timed = {o.name: o for o in _choice.options(s, hard, attained, room, rates)}
    found = [timed[o.name] for o in _choice.options(s, hard, attained, room, given)]
    best = found[0]
    fits = room is None or best.bytes <= room
    others = [f"{o.name}: {_reason(o, best, room)}" for o in found[1:]]
    flops = best.seconds * rates.flops(best.dtype)
    return Stage("solve", best.name, best.bytes, flops, best.seconds, fits, others)


def _reason(o: Option, best: Option, room: int | None) -> str:
    if room is not None and o.bytes > room:
        return f"{_size(o.bytes)} do not fit"
    return f"{_duration(o.seconds)}, {_size(o.bytes)}"


def _sharding(s: Sizes, p: int, rates: Rates) -> Sharding:
    rows, ring = -(-s.n // p), (p - 1) / p
    if s.d is None:
        raise ValueError("d: sharding is planned for features recomputed from Z (n, d); got None")
    triangle = 8.0 * Tiles.count(s.n, s.device)
    work = 2.0 * rows * s.m * s.d + 4.0 * rows * s.m * s.c
    # some dozens of (n, C) in float64, as on one device; Z; the reduced (m + 1) x C
    held = 24 * 8 * rows * s.c + 12 * (rows + s.m) * s.d + 2 * 4 * (s.m + 1) * s.c
    return Sharding(
        devices=p,
        rows=rows,
        held_solve=held,
        held_certify=int(3 * triangle / p) + 4 * s.n * s.d + 6 * 8 * 1024 * rows,
        product_bytes=2.0 * ring * 4.0 * (s.m + 1) * s.c,
        gram_bytes=ring * 4.0 * s.n * s.d,
        factor_bytes=triangle,
        product_seconds=work / rates.f32,
        gram_seconds=1.0 * s.n * s.n * s.m / p / rates.f64,
        factor_seconds=s.n**3 / 3.0 / p / rates.f64,
    )


@cache
def measured(device: torch.device) -> Rates:
    """Rates of this machine, by the products that the work is made of: half a second, once."""

    def clock(work: Any, count: float) -> float:
        work()
        best = 0.0
        for _ in range(3):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, count / (time.perf_counter() - began))
        return best

    k = 768 if device.type == "cpu" else 4096
    with exact_products():
        found = []
        for dtype in (torch.float32, torch.float64):
            a = torch.rand((k, k), dtype=dtype, device=device)
            out = torch.zeros_like(a)
            found.append(clock(lambda a=a, out=out: ops.add_product(out, a, a.mT), 2.0 * k**3))
        x = torch.zeros(1 << 24, dtype=torch.float32, device=device)
        memory = clock(lambda: x.add_(1.0), 2.0 * x.numel() * 4)
    return Rates(found[0], found[1], memory)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.3g} h"
