"""A group's factor of the Jacobian, summed over the uses of its parameters, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gcfast.jacobian.factors import DenseFactor, EmbeddingFactor, Factor, OuterFactor, joined, scatter
from gcfast.jacobian.graph import Graph
from gcfast.jacobian.groups import Group, Use
from gcfast.jacobian.site_factors import matrix_factor, vector_rows
from gcfast.jacobian.sites import Site, View, shape_of


def factor_of_use(
    graph: Graph, parameters: Mapping[str, Tensor], group: Group, use: Use, g: Tensor, n: int
) -> Factor:
    """What one use adds to its group, from the cotangents (c, ...) of its site."""
    site = graph.sites[use.site]
    view = site.roles[use.role]
    if not view.plain and not _same_view(parameters[view.parameter], view, use.view):
        raise ValueError(
            f"layer {group.layer!r}: another part of {view.parameter!r} is used here than for the first "
            "samples of x: give samples of one shape"
        )
    try:
        return _from_cotangents(parameters[group.parameters[0]], group, use, site, view, g, n)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"layer {group.layer!r}: what {use.view.parameter!r} was applied to has been changed in "
            "place since; its Jacobian needs it. Use the operation's form that makes a new tensor"
        ) from error


def _same_view(p: Tensor, a: View, b: View) -> bool:
    return torch.equal(a.index(p.shape), b.index(p.shape))


def _from_cotangents(p: Tensor, group: Group, use: Use, site: Site, view: View, g: Tensor, n: int) -> Factor:
    if use.role == "weight" and site.kind in ("linear", "convolution", "lookup"):
        part: Factor = matrix_factor(site, g, n, group.bias, view, use.shape)
    else:
        part = DenseFactor(vector_rows(site, use.role, g, n, use.shape, group.bias))
    if group.form != "sum":
        return part
    in_order = view.whole or (view.transposed and isinstance(part, OuterFactor))
    return DenseFactor(scatter(part.rows(), None if in_order else view.index(p.shape), p.numel()))


def group_factor(group: Group, parts: Mapping[tuple[int, str], Factor]) -> Factor:
    """The factor of a group, from those of all its uses by site and role."""
    factors = [parts[use.site, use.role] for use in group.uses]
    if len(factors) == 1:
        return factors[0]
    outer = [f for f in factors if isinstance(f, OuterFactor)]
    return joined(outer) if outer else DenseFactor(torch.stack([f.rows() for f in factors]).sum(0))


def measure_groups(
    groups: Sequence[Group], graph: Graph, parameters: Mapping[str, Tensor], n: int, dtype: torch.dtype
) -> None:
    """Notes in every group its extents and bytes, from the shapes of a pass of n samples."""
    item = dtype.itemsize
    for group in groups:
        group.numel = sum(parameters[name].numel() for name in group.parameters)
        if group.form == "samples":
            group.kept = group.moved = group.numel * item
            continue
        for use in group.uses:
            group.kept += math.prod(shape_of(graph.sites[use.site].where)) // n * item
        factor: Factor | None = None
        if group.form in ("outer", "lookup"):
            parts = {}
            for use in group.uses:
                shape = (1, *shape_of(graph.sites[use.site].where))
                g = torch.empty(shape, dtype=dtype, device="meta")
                parts[use.site, use.role] = factor_of_use(graph, parameters, group, use, g, n)
            factor = group_factor(group, parts)
        if isinstance(factor, (OuterFactor, EmbeddingFactor)):
            group.size = size = factor.size
            group.numel = size.numel
            if isinstance(factor, OuterFactor):
                group.shared = factor.shared // n
                group.spread = size.q * size.s * size.t * item
            group.moved = size.q * size.r * size.t * item
        else:
            group.numel = math.prod(group.uses[0].shape) * (2 if group.bias else 1)
            group.moved = group.numel * item * (1 + len(group.uses))
            group.kept = group.numel * item


def largest_cotangent(graph: Graph) -> int:
    """Elements of the largest cotangent that a backward pass goes through, of all samples and one output."""
    views = {node for site in graph.sites for view in site.roles.values() for node, _ in view.steps}
    passed = [node for node in graph.nodes if node._input_metadata and node not in views]
    return max((math.prod(shape_of((f, 0))) for f in passed if not hasattr(f, "variable")), default=0)
