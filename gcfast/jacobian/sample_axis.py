"""Which axis of each tensor is the batch dimension, by exact zeros of a probe and never by a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gcfast.jacobian.graph import Graph
from gcfast.jacobian.sites import Layout, Site, shape_of


def _allowed(
    site: Site, shape: tuple[int, ...], parameters: Mapping[str, Tensor]
) -> Callable[[Layout], bool]:
    """Which layouts a site's arithmetic can serve."""
    if site.kind in ("linear", "lookup", "shift"):
        return lambda layout: layout.axis < len(shape) - 1
    if site.kind == "convolution":
        return lambda layout: layout.axis == 0
    if site.kind == "norm":
        normalized = getattr(site.node, "_saved_normalized_shape", None)
        before = 1 if normalized is None else len(shape) - len(normalized)
        return lambda layout: layout.axis < before
    view = next(iter(site.roles.values()))
    size = tuple(view.index(parameters[view.parameter].shape).shape)
    size = (1,) * (len(shape) - len(size)) + size
    if site.kind == "share":  # a repeated axis may hold all of the parameter's own for each sample
        return lambda layout: size[layout.axis] == 1 or layout.outer
    return lambda layout: size[layout.axis] == 1


def _candidates(shape: tuple[int, ...], n: int) -> Iterator[Layout]:
    for axis, size in enumerate(shape):
        if size % n == 0 and size > 0:
            yield Layout(axis, True)
            if size > n:
                yield Layout(axis, False)


def layouts_scaling_with_n(
    found: Sequence[set[Layout]], graph: Graph, n: int, other: Graph, m: int
) -> list[set[Layout]]:
    """Those layouts of ``graph``, of n samples, whose axis is m / n as long in ``other``, of m samples: where
    an operator's output is made of parameters alone, zeros can look like samples."""
    return [
        {at for at in layouts if shape_of(a.where)[at.axis] * m == shape_of(b.where)[at.axis] * n}
        for layouts, a, b in zip(found, graph.sites, other.sites)
    ]


def positions_with_gradient(site: Site, g: Tensor) -> tuple[Tensor, Tensor] | None:
    """A linear operator's positions that cotangents (c, ...) of n = c samples reach, and the others.

    None: all or none. A head that reads one token leaves the last block's others without cotangents.
    """
    if site.kind != "linear" or site.layout is None:
        return None
    g = site.layout.arrange(g, len(g), 1)
    live = (g != 0).reshape(*g.shape[:2], -1, g.shape[-1]).any(3).any(1).any(0)
    return (
        (live.nonzero()[:, 0], (~live).nonzero()[:, 0]) if bool(live.any()) and not bool(live.all()) else None
    )


def infer_sample_axis(
    graph: Graph, cotangents: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> list[set[Layout]]:
    """The layouts that each site's cotangents admit: those of sample i vanish wherever another one lies.

    ``cotangents``: of each site, (n, ...), the i-th of an output that is sample i's alone, n >= 2. An empty
    set: there is no axis of samples, or several samples share the operator's output. More than one: the zeros
    do not tell.
    """
    found = []
    for site, g in zip(graph.sites, cotangents):
        n, shape = len(g), tuple(g.shape[1:])
        allowed = _allowed(site, shape, parameters)
        layouts = {layout for layout in _candidates(shape, n) if allowed(layout)}
        present = g != 0
        for layout in list(layouts):
            by_sample = layout.arrange(present, n, 1).flatten(2).any(2)  # (samples, cotangents)
            if bool((by_sample & ~torch.eye(n, dtype=torch.bool, device=g.device)).any()):
                layouts.discard(layout)
        found.append(layouts)
    return found
