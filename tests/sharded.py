"""Devices in a ring, simulated: collectives that count what each device sends, and the sharded algorithms."""

from __future__ import annotations

import torch

import gcfast
from gcfast import ops
from gcfast.proofs.rounding import tiling


class Ring:
    """``p`` devices; every message is a slice handed to the next one, and counted."""

    def __init__(self, p: int):
        self.p, self.sent = p, [0] * p

    def _send(self, source: int, part: torch.Tensor) -> torch.Tensor:
        self.sent[source] += part.numel() * part.element_size()
        return part.clone()

    def all_reduce(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sum of one tensor a device, on each: reduce-scatter, then all-gather, of p chunks."""
        p = self.p
        chunks = [list(part.flatten().chunk(p)) for part in parts]
        assert all(len(c) == p for c in chunks)
        for step in range(p - 1):
            moving = [self._send(i, chunks[i][(i - step) % p]) for i in range(p)]
            for i in range(p):
                at = (i - step) % p
                chunks[(i + 1) % p][at] = chunks[(i + 1) % p][at] + moving[i]
        for step in range(p - 1):
            moving = [self._send(i, chunks[i][(i + 1 - step) % p]) for i in range(p)]
            for i in range(p):
                chunks[(i + 1) % p][(i + 1 - step) % p] = moving[i]
        return [torch.cat(c).view(parts[0].shape) for c in chunks]

    def all_gather(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        p = self.p
        have = [{i: parts[i]} for i in range(p)]
        for step in range(p - 1):
            moving = [self._send(i, have[i][(i - step) % p]) for i in range(p)]
            for i in range(p):
                have[(i + 1) % p][(i - step) % p] = moving[i]
        return [torch.cat([have[i][k] for k in range(p)]) for i in range(p)]

    def broadcast(self, source: int, part: torch.Tensor) -> list[torch.Tensor]:
        """All but the last device of the ring pass it on."""
        out = [part] * self.p
        for k in range(self.p - 1):
            at = (source + k) % self.p
            out[(at + 1) % self.p] = self._send(at, out[at])
        return out


def gram_product(ring: Ring, blocks: list[gcfast.WideFeatures], sides: list[torch.Tensor]) -> torch.Tensor:
    """K r for K = [Phi, 1] [Phi, 1]^T, rows of Z and of r on the devices."""
    local = [
        torch.cat([h.transposed_times(r), r.sum(0)[:, None]], 1) for h, r in zip(blocks, sides, strict=True)
    ]
    sums = ring.all_reduce(local)
    return torch.cat([h.times(u[:, :-1]) + u[:, -1] for h, u in zip(blocks, sums, strict=True)])


def gram(ring: Ring, blocks: list[gcfast.WideFeatures]) -> list[dict[tuple[int, int], torch.Tensor]]:
    """The lower tiles of Phi Phi^T in float64, column j on device j mod p."""
    whole = ring.all_gather([h.z for h in blocks])
    owned: list[dict[tuple[int, int], torch.Tensor]] = []
    for device, z in enumerate(whole):
        h = gcfast.WideFeatures(z, (blocks[0].weight, blocks[0].bias), **blocks[0].settings)
        phi, spans = h.panel(0, h.m), tiling(z.device).spans(h.n)
        tiles = {}
        for j in range(device, len(spans), ring.p):
            for i in range(j, len(spans)):
                tiles[i, j] = torch.zeros((len(phi[spans[i]]), len(phi[spans[j]])), dtype=torch.float64)
                ops.add_product(tiles[i, j], phi[spans[i]], phi[spans[j]].mT, lower=i == j)
        owned.append(tiles)
    return owned


def cholesky(ring: Ring, owned: list[dict[tuple[int, int], torch.Tensor]], count: int) -> None:
    """In place, right-looking: every finished column of tiles goes round, and each device updates its own."""
    for j in range(count):
        mine = owned[j % ring.p]
        factor = torch.linalg.cholesky(mine[j, j].tril() + mine[j, j].tril(-1).mT)
        mine[j, j] = factor
        for i in range(j + 1, count):
            mine[i, j] = torch.linalg.solve_triangular(factor.mT, mine[i, j], upper=True, left=False)
        columns = {i: ring.broadcast(j % ring.p, mine[i, j]) for i in range(j, count)}
        for device, tiles in enumerate(owned):
            for i, k in tiles:
                if k > j:
                    tiles[i, k] = tiles[i, k] - columns[i][device] @ columns[k][device].mT
