"""What certify and solve_head would do at a size, counted before any work: bytes, operations, time."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import errors, ops
from gcfast.ambient import ordinary
from gcfast.features import (
    Features,
    Source,
    WideFeatures,
    checked,
    second_reading_seconds,
    source_of,
    streams,
)
from gcfast.losses import BCEWithLogits, ConvexLoss, CrossEntropy, resolve_loss
from gcfast.model import alteration, find_head, keeping_random_state
from gcfast.nn import WideLayer
from gcfast.proofs import Tiles, exact_products, proof_bytes, proof_flops
from gcfast.solve import gram_forms
from gcfast.solve.gram_forms import GramForm, Rates, Sizes
from gcfast.solve.plan_report import Plan, Sharding, Stage, duration, size
from gcfast.storage import allowed_bytes

# Not measured by gcfast: nominal figures of the card, of which half is assumed to be reached.
NOMINAL = {"h100": Rates(f32=3.0e13, f64=3.0e13, memory=2.4e12)}


@ordinary()
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
    fixed: bool = False,
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
        fixed: as for ``certify``. Without it a second reading of data that are no tensors is a stage of its
            own, whose time is judged by their first batches, read for half a second.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    devices = errors.is_count("devices", devices)
    if rates is not None and not isinstance(rates, str):
        errors.is_a("rates", rates, Rates, "gcfast.Rates, 'h100' or None")
    convex = resolve_loss(loss)
    device = torch.device("cpu")
    hard = isinstance(convex, CrossEntropy) and not convex.label_smoothing
    stages: list[Stage] = []
    if model_or_features is None:
        for name, value in (("n", n), ("m", m), ("c", c), ("d", 1 if d is None else d)):
            if value is None:
                raise ValueError(f"{name}: expected a positive int, where no model is given; got None")
            errors.is_count(name, value)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype; got {errors.came(dtype)}")
        assert n is not None and m is not None and c is not None
        sizes = Sizes(int(n), int(m), int(c), None if d is None else int(d), dtype, device)
    elif any(value is not None for value in (n, m, d, c)):
        raise ValueError("n, m, d, c: give sizes or a model with its data, not both")
    elif isinstance(model_or_features, nn.Module):
        if data is None:
            raise ValueError("data: a model needs its training set")
        with keeping_random_state(model_or_features):  # a DataLoader draws a seed for every pass
            source = source_of(data, fixed)
            sizes = _sizes_of_model(model_or_features, source, max_bytes)
            if source.kind == "read twice":
                stages.append(_second_reading(source, sizes.n))
    else:
        sizes, real = _sizes(model_or_features, data, convex)
        hard = hard and not real
    if isinstance(rates, str):
        if rates not in NOMINAL:
            raise ValueError(f"rates: expected one of {sorted(NOMINAL)}, Rates or None; got {rates!r}")
        rates = NOMINAL[rates]
    found = rates or measured(sizes.device)
    room = allowed_bytes(max_bytes, sizes.device)
    attained = not hard and not isinstance(convex, BCEWithLogits)  # as far as sizes tell
    stages += [_certify(sizes, room, found), _solve(sizes, hard, attained, room, found, rates)]
    sharded = _sharding(sizes, devices, found) if devices > 1 else None
    return Plan(sizes.n, sizes.m, sizes.d, sizes.c, room, found, stages, sharded)


def _sizes_of_model(model: nn.Module, source: Source, max_bytes: int | None) -> Sizes:
    head = find_head(model)
    if source.n is None:
        raise ValueError("data: expected data that say how many samples they have")
    weight = head.module.weight
    wide = [layer for layer in model.modules() if type(layer) is WideLayer]
    d = None
    plain = wide and alteration(wide[-1]) is None
    if plain and wide[-1].m == head.in_features and streams(source.n, weight, max_bytes):
        d = wide[-1].d
    return Sizes(source.n, head.in_features, head.out_features, d, weight.dtype, weight.device)


def _sizes(source: Any, data: Any, loss: ConvexLoss) -> tuple[Sizes, bool]:
    """Sizes, and whether the targets are known to be real numbers."""
    features = checked(source)
    width = features.d if isinstance(features, WideFeatures) else None
    c = loss.output_count(data) if isinstance(data, Tensor) else 10
    real = isinstance(data, Tensor) and data.is_floating_point()
    return Sizes(features.n, features.m, c, width, features.dtype, features.device), real


def _second_reading(source: Source, n: int) -> Stage:
    """certify, solve_head and FeatureCache each read what is no tensor once more, without the model."""
    form = f"data read once more, {n:,} samples compared by 64-bit digests"
    return Stage("data", form, 16 * n, 0.0, second_reading_seconds(source, n), True)


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
    text = f"n x n in memory: {size(inside)}"
    fits = outside <= room and s.device.type == "cpu"
    form = f"lower triangles of n x n on disk, {size(3 * 8 * Tiles.count(s.n))}"
    return Stage("certify", form, outside, flops, 2.0 * seconds, fits, [text])


def _solve(
    s: Sizes, hard: bool, attained: bool, room: int | None, rates: Rates, given: Rates | None
) -> Stage:
    """``given``: rates of another machine, which choose the form too; here solve_head's own rates do."""
    timed = {o.name: o for o in gram_forms.options(s, hard, attained, room, rates)}
    found = [timed[o.name] for o in gram_forms.options(s, hard, attained, room, given)]
    best = found[0]
    fits = room is None or best.bytes <= room
    others = [f"{o.name}: {_reason(o, best, room)}" for o in found[1:]]
    flops = best.seconds * rates.flops(best.dtype)
    return Stage("solve", best.name, best.bytes, flops, best.seconds, fits, others)


def _reason(o: GramForm, best: GramForm, room: int | None) -> str:
    if room is not None and o.bytes > room:
        return f"{size(o.bytes)} do not fit"
    return f"{duration(o.seconds)}, {size(o.bytes)}"


def _sharding(s: Sizes, p: int, rates: Rates) -> Sharding:
    rows, ring = -(-s.n // p), (p - 1) / p
    if s.d is None:
        raise ValueError("devices: sharding is planned for features recomputed from Z (n, d), and d is None")
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
            a = torch.linspace(0, 1, k * k, dtype=dtype, device=device).view(k, k)
            out = torch.zeros_like(a)
            found.append(clock(lambda a=a, out=out: ops.add_product(out, a, a.mT), 2.0 * k**3))
        x = torch.zeros(1 << 24, dtype=torch.float32, device=device)
        memory = clock(lambda: x.add_(1.0), 2.0 * x.numel() * 4)
    return Rates(found[0], found[1], memory)
