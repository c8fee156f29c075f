"""The empirical neural tangent kernel K = J J^T, added up over layers, by tiles of samples and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gcfast.jacobian.engine import Engine
from gcfast.jacobian.factors import EmbeddingFactor, Factor, OuterFactor
from gcfast.jacobian.groups import Group, Tile
from gcfast.jacobian.plan import GroupPlan


class GramJob:
    """Adds the factors of tiles to Grams."""

    def __init__(
        self,
        first: Engine,
        second: Engine,
        out: dict[str, Tensor],
        wanted: set[str],
        per_layer: bool,
        trace: bool,
    ) -> None:
        self.first, self.second, self.out = first, second, out
        self.wanted, self.per_layer, self.trace = wanted, per_layer, trace

    def _key(self, group: Group) -> str | None:
        if group.layer not in self.wanted:
            return None
        return group.layer if self.per_layer else ""

    def _view(self, k: Tensor) -> Tensor:
        c = 1 if self.trace else self.first.c
        return k.view(self.first.n, c, self.second.n, c)

    def _blocks(self, a: Tile, b: Tile) -> dict[str, Tensor]:
        """A Gram's block for two tiles: a part of it, or a scratch of which it takes a copy."""
        rows = a.n * (1 if self.trace else a.outputs)
        columns = b.n * (1 if self.trace else b.outputs)
        return {
            key: k if k.shape == (rows, columns) else k.new_zeros(rows, columns)
            for key, k in self.out.items()
        }

    def _store(self, blocks: dict[str, Tensor], a: Tile, b: Tile, symmetric: bool = False) -> None:
        for key, block in blocks.items():
            k = self.out[key]
            if block is k:
                continue
            if self.trace:  # tiles of outputs add up, and of two different ones nothing is asked
                k[a.i : a.j, b.i : b.j] += block
            else:
                part = self._view(k)[a.i : a.j, a.c : a.e, b.i : b.j, b.c : b.e]
                part.copy_(block.view(part.shape))
                if symmetric:  # rows of one sample are next to each other: a block may lie on both sides
                    across = self._view(k)[b.i : b.j, b.c : b.e, a.i : a.j, a.c : a.e]
                    across.copy_(part.permute(2, 3, 0, 1))

    def _add(self, block: Tensor, group: Group, a: Factor, b: Factor, lower: bool) -> None:
        same = a is b
        if self.trace:
            a = a.traced()
            b = a if same else b.traced()
        form = GroupPlan.of(group, a, b, lower).form
        if form == "hadamard" and isinstance(a, (OuterFactor, EmbeddingFactor)):
            a.hadamard(b, block, lower)
        else:
            a.by_rows(b, block, lower)

    def _receiver(
        self,
        blocks: dict[str, Tensor],
        against: dict[int, Factor] | None = None,
        keep: dict[int, Factor] | None = None,
    ) -> Callable[[int, Factor], None]:
        """Multiplies every factor with that of the same group in ``against``, by default with itself."""

        def receive(number: int, factor: Factor) -> None:
            group = self.first.groups[number]
            key = self._key(group)
            if key is not None:
                other = factor if against is None else against[number]
                self._add(blocks[key], group, factor, other, against is None)
                if keep is not None:
                    keep[number] = factor

        return receive

    def _pairs(self, a: Tile, b: Tile) -> bool:
        """Whether a Gram has anything of these tiles: a trace has only equal outputs."""
        return not self.trace or (a.c, a.e) == (b.c, b.e)

    def symmetric(self, tiles: Sequence[Tile]) -> None:
        """On and below the diagonal; a tile's factors are kept while those after it go by."""
        for at, tile in enumerate(tiles):
            later = [b for b in tiles[at + 1 :] if self._pairs(tile, b)]
            stored: dict[int, Factor] = {}
            blocks = self._blocks(tile, tile)
            self.first.run(tile, self._receiver(blocks, keep=stored if later else None))
            self._store(blocks, tile, tile)
            for b in later:
                blocks = self._blocks(b, tile)
                self.first.run(b, self._receiver(blocks, stored))
                self._store(blocks, b, tile, symmetric=True)

    def cross(self, tiles: Sequence[Tile], others: Sequence[Tile]) -> None:
        for b in others:
            stored: dict[int, Factor] = {}
            self.second.run(b, stored.__setitem__)
            for a in (tile for tile in tiles if self._pairs(tile, b)):
                blocks = self._blocks(a, b)
                self.first.run(a, self._receiver(blocks, stored))
                self._store(blocks, a, b)
