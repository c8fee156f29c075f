"""Memory and operations of a Jacobian Gram by count: the cheaper form per layer, tiles that fit a budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gcfast.jacobian.engine import Engine
from gcfast.jacobian.factors import BLOCK_BYTES, EmbeddingFactor, Factor, OuterFactor, Size
from gcfast.jacobian.groups import Group, Tile

# Operations in the time of a byte: products at some 150 GFLOP/s and memory at some 15 GB/s on two cores, 60
# TFLOP/s of IEEE float32 and 3 TB/s on a GPU.
OPERATIONS_A_BYTE = {"cpu": 10.0, "cuda": 20.0}


@dataclass(frozen=True)
class GroupPlan:
    """A group's Gram: its form, and what both forms would take for one pair of tiles."""

    layer: str
    parameters: tuple[str, ...]
    kind: str
    form: str  # "hadamard" or "rows"
    numel: int
    positions: int
    operations: float  # of the form chosen
    other: float  # of the other one; inf where there is none
    bytes: float  # written and read again, of the form chosen

    @classmethod
    def of(cls, group: Group, a: Factor, b: Factor, lower: bool) -> GroupPlan:
        if isinstance(a, (OuterFactor, EmbeddingFactor)) and isinstance(b, (OuterFactor, EmbeddingFactor)):
            item, device = a.like.element_size(), a.like.device.type
            return choose(group, a.size, b.size, (a.n, a.c), (b.n, b.c), a is b, lower, item, device)
        return _rows_only(group, (a.n, a.c), (b.n, b.c), a is b, lower, a.like.element_size())


def _rows_only(
    group: Group, a: tuple[int, int], b: tuple[int, int], same: bool, lower: bool, item: int
) -> GroupPlan:
    rows_a, rows_b = a[0] * a[1], b[0] * b[1]
    share = 0.5 if lower else 1.0
    operations = 2.0 * rows_a * rows_b * group.numel * share
    moved = 2.0 * (rows_a + (0 if same else rows_b)) * group.numel * item
    return GroupPlan(
        group.layer, group.parameters, group.form, "rows", group.numel, 1, operations, math.inf, moved
    )


def choose(
    group: Group,
    x: Size,
    y: Size,
    a: tuple[int, int],
    b: tuple[int, int],
    same: bool,
    lower: bool,
    item: int,
    device: str,
) -> GroupPlan:
    """The cheaper of two forms for tiles of (n, c) samples and outputs.

    Hadamard: (a a^T) of n T positions, (g g^T) of n c T, their product. Rows: every row of J is made of T
    positions, and rows are multiplied.
    """
    (n, c), (m, e) = a, b
    share = 0.5 if lower else 1.0
    lookup = group.form == "lookup"
    pairs = float(n * x.t) * (m * y.t)
    inner = 1.0 if lookup else 2.0 * x.s
    hadamard = x.q * (pairs * inner + share * pairs * c * e * (2.0 * x.r + 2.0))
    hadamard_bytes = x.q * item * (3.0 * pairs + (n * x.t) * (x.s * 2 + c * x.r * 2))
    width = float(x.q) * x.r * x.s
    make = (n * c * x.t) + (0.0 if same else m * e * y.t)
    rows = 2.0 * (make * (x.q * x.r if lookup else width) + share * n * c * m * e * width)
    rows_bytes = item * (
        2.0 * width * (n * c + (0 if same else m * e)) + 2.0 * x.q * n * x.t * (x.s + c * x.r)
    )
    weight = OPERATIONS_A_BYTE[device]
    first = hadamard + weight * hadamard_bytes <= rows + weight * rows_bytes
    return GroupPlan(
        group.layer,
        group.parameters,
        group.form,
        "hadamard" if first else "rows",
        group.numel,
        x.t,
        hadamard if first else rows,
        rows if first else hadamard,
        hadamard_bytes if first else rows_bytes,
    )


@dataclass(frozen=True)
class JacobianPlan:
    """What a Gram will take; ``str()`` is a table."""

    n: int
    c: int
    groups: tuple[GroupPlan, ...]
    tiles: int
    tile: tuple[int, int]  # samples, outputs
    passes: int  # forward and backward
    bytes: int  # of a tile, at most, beside the Gram
    gram_bytes: int
    room: int | None

    @property
    def operations(self) -> float:
        return sum(group.operations for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "operations": self.operations}

    def __str__(self) -> str:
        wide = max([5, *(len(g.layer) for g in self.groups)])
        lines = [
            f"Gram of {self.n} samples x {self.c} outputs: {self.gram_bytes / 1e6:,.1f} MB; "
            f"{self.tiles} tile{'s' if self.tiles > 1 else ''} of {self.tile[0]} x {self.tile[1]}, "
            f"{self.passes} forward and backward pass{'es' if self.passes > 1 else ''}, "
            f"{self.bytes / 1e6:,.0f} MB beside it"
            + (f" of {self.room / 1e6:,.0f} MB" if self.room is not None else ""),
            f"{'layer':<{wide}} {'kind':<8} {'p':>12} {'T':>6} {'form':<9} {'GFLOP':>9} {'other form':>10} "
            f"{'MB':>8}",
        ]
        for g in self.groups:
            other = "-" if math.isinf(g.other) else f"{g.other / 1e9:.3f}"
            lines.append(
                f"{g.layer:<{wide}} {g.kind:<8} {g.numel:>12,} {g.positions:>6} {g.form:<9} "
                f"{g.operations / 1e9:>9.3f} {other:>10} {g.bytes / 1e6:>8.1f}"
            )
        lines.append(
            f"{'all, a pair of tiles':<{wide}} {self.operations / 1e9:.3f} GFLOP beside backpropagation"
        )
        return "\n".join(lines)


def _needed(engine: Engine, n: int, c: int, stored: bool, grams: int) -> int:
    """Bytes of a tile of n samples and c outputs; ``stored``: and of the factors of another one."""
    item = engine.dtype.itemsize
    moving = max((group.moved for group in engine.groups), default=0)
    spread = max((group.spread for group in engine.groups), default=0)
    kept = sum(group.kept for group in engine.groups)
    shared = sum(group.shared for group in engine.groups)
    cotangents = 6 * engine.largest  # on their way, and what operators make on theirs
    need = (
        n * (engine.saved + 2 * spread)
        + n * c * (cotangents + 2 * moving)
        + 2 * BLOCK_BYTES.get(engine.device.type, 0)
    )
    if stored:
        need += n * shared + n * c * kept + (n * c) ** 2 * item * grams
    return need


def tiles_of(engine: Engine, room: int | None, firm: bool, stored: bool, grams: int = 1) -> list[Tile]:
    """Tiles that fit ``room``: all of it where the user gave it (``firm``), else half of what is free."""
    n, c = engine.n, engine.c
    budget = math.inf if room is None else room if firm else room // 2

    def fits(samples: int, outputs: int) -> bool:
        several = samples < n or outputs < c
        return _needed(engine, samples, outputs, stored and several, grams) <= budget

    samples, outputs = n, c
    while samples > 1 and not fits(samples, outputs):
        samples = (samples + 1) // 2
    while outputs > 1 and not fits(samples, outputs):
        outputs = (outputs + 1) // 2
    if not fits(samples, outputs) and firm:
        raise MemoryError(
            f"one sample and one output need {_needed(engine, 1, 1, stored, grams):,} bytes by count; "
            f"max_bytes allows {room:,}. Way out: a larger max_bytes, or fewer layers at a time (layers=)."
        )
    pieces, parts = math.ceil(n / samples), math.ceil(c / outputs)
    return [
        Tile(n * i // pieces, n * (i + 1) // pieces, c * k // parts, c * (k + 1) // parts)
        for k in range(parts)
        for i in range(pieces)
    ]


def counted(engine: Engine, tiles: list[Tile], room: int | None) -> JacobianPlan:
    """The plan of a Gram of all layers by these tiles."""
    groups = []
    several = len(tiles) > 1
    tile = (max(t.n for t in tiles), max(t.outputs for t in tiles))
    for group in engine.groups:
        sides = (tile, tile, not several, not several, engine.dtype.itemsize)
        if group.size is None:
            groups.append(_rows_only(group, *sides))
        else:
            groups.append(choose(group, group.size, group.size, *sides, engine.device.type))
    return JacobianPlan(
        n=engine.n,
        c=engine.c,
        groups=tuple(groups),
        tiles=len(tiles),
        tile=tile,
        passes=len(tiles) * (len(tiles) + 1) // 2,
        bytes=_needed(engine, *tile, several, 1),
        gram_bytes=(engine.n * engine.c) ** 2 * engine.dtype.itemsize,
        room=room,
    )
