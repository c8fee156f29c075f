"""Groups of parameters, a weight with its bias, and the form in which each group's Jacobian is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gcfast.jacobian.factors import Size
from gcfast.jacobian.forward import log
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
        mask = torch.zeros(p.numel() + 1, dtype=torch.bool, device="cpu")
        mask[use.view.index(p.shape).flatten()] = True  # a constant's -1 is the last one
        mask[-1] = False
        meet = [part for part in parts if bool((part[0] & mask).any())]
        parts = [part for part in parts if all(part is not other for other in meet)]
        members: tuple[Use, ...] = ()
        for other, found in meet:
            mask, members = mask | other, members + found
        parts.append((mask, (*members, use)))
    return [tuple(sorted(members, key=lambda use: use.site)) for _, members in parts]


def _bias_of(
    graph: Graph,
    layers: Mapping[str, str],
    name: str,
    part: Sequence[Use],
    parts: Mapping[str, Sequence[Sequence[Use]]],
) -> str | None:
    """The bias that the same operators took, and they alone, if it is of the same layer."""
    first = graph.sites[part[0].site]
    view = first.roles.get("bias")
    if view is None or layers[view.parameter] != layers[name] or view.parameter not in parts:
        return None
    if first.kind == "convolution" and first.node._saved_transposed:
        return None
    mine = [(use.site, "bias") for use in part]
    found = [[(use.site, use.role) for use in other] for other in parts[view.parameter]]
    return view.parameter if found == [mine] and view.injective else None


def make_groups(
    graph: Graph, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, str]
) -> list[Group]:
    """The groups of a probe's parameters, in the order of ``parameters``; ``layers``: the layer of each.

    Parameters that an unknown operator took, or whose axis of samples no probe told, are differentiated
    sample by sample, and a line in the log says so.
    """
    groups: list[Group] = []
    unknown = dict(graph.unknown)
    for site in graph.sites:
        if site.layout is None:
            for view in site.roles.values():
                unknown.setdefault(view.parameter, site.node.name().removesuffix("Backward0"))
    uses: dict[str, list[Use]] = {}
    for i, site in enumerate(graph.sites):
        for role, view in site.roles.items():
            if view.parameter not in unknown:
                shape = _view_shape(view, parameters[view.parameter])
                uses.setdefault(view.parameter, []).append(Use(i, role, view, shape))
    parts = {name: _parts(found, parameters[name]) for name, found in uses.items()}
    done: set[tuple[str, int]] = set()
    for name in uses:  # weights first, which take their biases along
        for k, part in enumerate(parts[name]):
            form = "outer" if _alike(graph, part) else "rows" if _is_scale(graph, part) else ""
            if form:
                bias = _bias_of(graph, layers, name, part, parts)
                done |= {(name, k)} if bias is None else {(name, k), (bias, 0)}
                together = (name,) if bias is None else (name, bias)
                groups.append(Group(layers[name], together, part, form, bias is not None))
    for name in uses:
        for k, part in enumerate(parts[name]):
            if (name, k) not in done:
                single = len(part) == 1 and part[0].view.injective
                lookup = single and graph.sites[part[0].site].kind == "lookup"
                form = "lookup" if lookup else "rows" if single else "sum"
                groups.append(Group(layers[name], (name,), part, form))
    by_layer: dict[str, list[str]] = {}
    for name in unknown:
        by_layer.setdefault(layers[name], []).append(name)
    for layer, names in by_layer.items():
        groups.append(Group(layer, tuple(names), (), "samples"))
        log.info(
            "LayerJacobians: layer %r (%s) is differentiated sample by sample by torch.func: what %s "
            "does with it has no form of its own",
            *(layer, ", ".join(names), unknown[names[0]]),
        )
    order = {name: i for i, name in enumerate(parameters)}
    return sorted(groups, key=lambda group: order[group.parameters[0]])
