"""The counted plan of a computation: stages with bytes, operations and seconds, printed."""

from __future__ import annotations

from dataclasses import dataclass, field

from gcfast.solve.gram_forms import Rates


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
            f"memory allowed {size(self.room) if self.room is not None else 'unknown'}"
        ]
        for s in self.stages:
            verdict = "" if s.fits else "  DOES NOT FIT"
            lines.append(
                f"  {s.name:<8} {s.form:<58} {size(s.bytes):>9} {s.flops / 1e12:>10.3g} TFLOP "
                f"{duration(s.seconds):>9}{verdict}"
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
                f"{size(self.held_solve)} to solve, {size(self.held_certify)} to certify, and sends",
                f"    {size(self.product_bytes)} for a product with K ({duration(self.product_seconds)} of "
                "arithmetic),",
                f"    {size(self.gram_bytes)} for the Gram ({duration(self.gram_seconds)}),",
                f"    {size(self.factor_bytes)} for a Cholesky factor ({duration(self.factor_seconds)})",
            )
        )


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.3g} h"
