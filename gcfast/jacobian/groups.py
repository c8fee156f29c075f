"""Parameters grouped by layer, with the uses that each group has in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast.jacobian.factors import Size
from gcfast.jacobian.graph import Graph
from gcfast.jacobian.sites import View


@dataclass(frozen=True)
class Use:
    """A parameter at a site (by number), as what, and the shape of the view that was taken."""

    site: int
    role: str
    view: View
    shape: tuple[int, ...]


@dataclass
class Group:
    """Parameters whose part of the Jacobian is one factor."""

    layer: str
    parameters: tuple[str, ...]
    uses: tuple[Use, ...]
    form: str  # outer, lookup, rows, sum, or samples (by torch.func, sample by sample)
    bias: bool = False
    numel: int = 0
    size: Size | None = None  # of an outer and a lookup
    kept: int = 0  # bytes of a factor that is stored, a sample and output,
    shared: int = 0  # and a sample
    moved: int = 0  # bytes of scratch, a sample and output,
    spread: int = 0  # and a sample


@dataclass(frozen=True)
class Tile:
    """Samples and outputs [first, last)."""

    i: int
    j: int
    c: int
    e: int

    @property
    def n(self) -> int:
        return self.j - self.i

    @property
    def outputs(self) -> int:
        return self.e - self.c


def _alike(graph: Graph, part: Sequence[Use]) -> bool:
    """Whether all are the weight of one kind of linear operator, so that positions can follow each other."""
    kinds = set()
    for use in part:
        site = graph.sites[use.site]
        if use.role != "weight" or site.kind not in ("linear", "convolution") or not use.view.injective:
            return False
        geometry = (
            (site.node._saved_groups, site.node._saved_transposed) if site.kind == "convolution" else ()
        )
        kinds.add((site.kind, use.view.steps_names, use.shape, geometry))
    return len(kinds) == 1 and (len(part) == 1 or part[0].view.plain)


def _is_scale(graph: Graph, part: Sequence[Use]) -> bool:
    """Whether it is the weight of one normalisation."""
    site = graph.sites[part[0].site]
    return len(part) == 1 and site.kind == "norm" and part[0].role == "weight" and part[0].view.injective


def _view_shape(view: View, p: Tensor) -> tuple[int, ...]:
    if view.whole:
        return tuple(p.shape)
    return tuple(reversed(p.shape)) if view.transposed else tuple(view.index(p.shape).shape)


def _parts(uses: Sequence[Use], p: Tensor) -> list[tuple[Use, ...]]:
    """The uses of a parameter by what shares elements of it: gradients add up before anything is squared."""
    if len(uses) == 1 or any(use.view.plain for use in uses):
        return [tuple(uses)]
    parts: list[tuple[Tensor, tuple[Use, ...]]] = []
    for use in uses:
        mask = torch.zeros(p.numel() + 1, dtype=torch.bool)
        mask[use.view.index(p.shape).flatten()] = True  # a constant's -1 is the last one
        mask[-1] = False
        meet = [part for part in parts if bool((part[0] & mask).any())]
        parts = [part for part in parts if all(part is not other for other in meet)]
        members: tuple[Use, ...] = ()
        for other, found in meet:
            mask, members = mask | other, members + found
        parts.append((mask, (*members, use)))
    return [tuple(sorted(members, key=lambda use: use.site)) for _, members in parts]
