"""The forward and backward pass that gives the Jacobian of every layer, for a tile of samples and outputs.

A group is a layer's parameters that belong together: a weight and its bias, or one parameter that several
operators took. :class:`Engine` runs the model on a probe of two to five samples once, finds the groups, the
axes of the samples and what the tiles will cost; after that a pass hands out one group's
:class:`~gcfast.jacobian.factors.Factor` at a time, as backpropagation reaches it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from gcfast.jacobian.directional import Way, choose_way
from gcfast.jacobian.factors import DenseFactor, Factor
from gcfast.jacobian.forward import (
    SavedBytes,
    and_others,
    checked_finite,
    forward,
    is_close,
    log,
    observable,
    refuse_dependent_samples,
    rows_of,
    sample_count,
    stack_samples,
)
from gcfast.jacobian.graph import Graph
from gcfast.jacobian.group_factors import factor_of_use, group_factor, largest_cotangent, measure_groups
from gcfast.jacobian.groups import Group, Tile, Use, make_groups
from gcfast.jacobian.sample_axis import infer_sample_axis, layouts_scaling_with_n, positions_with_gradient
from gcfast.jacobian.sample_by_sample import SampleBySample
from gcfast.jacobian.sites import Layout, Site, signed


class Engine:
    """The model on its inputs, with what the probe found."""

    def __init__(
        self, model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, str]
    ) -> None:
        """``parameters``: those that count, by name; ``layers``: the layer of each."""
        self.model, self.inputs, self.parameters, self.layers = model, inputs, dict(parameters), layers
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._batched = True
        self._way: Way | None = None
        self._samples = SampleBySample(model, self.parameters, inputs)
        self._views: frozenset[int] = frozenset()
        self._layouts: list[Layout | None] = []
        self._live: list[tuple[Tensor, Tensor] | None] = []
        self._key: tuple[Any, ...] = ()
        self.n = sample_count(inputs)
        self.groups: list[Group] = []
        self._probe()

    def on(self, inputs: Any) -> Engine:
        """The same model on other samples."""
        other = copy.copy(self)
        other.inputs, other.n = inputs, sample_count(inputs)
        other._samples = SampleBySample(self.model, self.parameters, inputs)
        return other

    # --- products with vectors

    def vjp(self, u: Tensor, tile: Tile) -> dict[str, Tensor]:
        """J^T u by parameter, for the samples of a tile."""
        with observable(self.model):
            y = checked_finite(forward(self.model, rows_of(self.inputs, tile.i, tile.j)))
            grads = torch.autograd.grad(y, list(self.parameters.values()), u, materialize_grads=True)
        return dict(zip(self.parameters, grads))

    def jvp(self, direction: Mapping[str, Tensor], tile: Tile) -> Tensor:
        """J v, (n, C), for the samples of a tile, along a direction for every parameter."""
        if self._way is None:
            self._way = choose_way(self.model, self.parameters, rows_of(self.inputs, 0, 1), self._padded)
        return self._way(self.model, self.parameters, direction, rows_of(self.inputs, tile.i, tile.j))

    # --- the probe

    def _probe(self) -> None:
        left: list[set[Layout]] = []
        self.saved = 0
        # Where the zeros of two samples do not tell the axis, those of more may: if cotangents reach only the
        # first of T positions, both orders of samples and positions fit where T is 1 modulo their number.
        for size in (2, 3, 4, 5):
            picked = [rows_of(self.inputs, k % self.n, k % self.n + 1) for k in range(size)]
            if size == 2:  # two alone: one may be what the others depend on
                earlier, *rest = [self._alone(one) for one in picked[: self.n]]
                alone = torch.cat([earlier, *rest]).detach()
            graph, same = self._located(stack_samples(picked), alone, earlier, left)
            if same and all(len(found) == 1 for found in left):
                break
            earlier = graph.output
        self._key = graph.key
        missing = [name for name in self.parameters if name not in graph.seen]
        if missing:
            raise ValueError(
                f"parameter {missing[0]!r}{and_others(missing)} has no part in the output: the forward pass "
                "does not use it, or not by autograd (torch.no_grad(), detach(), .data). Leave it out by "
                "layers= or by requires_grad_(False)"
            )
        self._padded = any(
            node.name() == "EmbeddingBackward0" and signed(node._saved_padding_idx) >= 0
            for node in graph.nodes
        )
        self.groups = make_groups(graph, self.parameters, self.layers)
        measure_groups(self.groups, graph, self.parameters, size, self.dtype)
        self.largest = largest_cotangent(graph) // size * self.dtype.itemsize

    def _alone(self, one: Any) -> Tensor:
        """One sample's output (1, C) with its graph, and the bytes that its forward pass keeps."""
        count = SavedBytes(self.parameters.values())
        with count:
            y = checked_finite(forward(self.model, one, rewriting=True))
        self.saved = count.bytes
        self.c, self.dtype, self.device = y.shape[1], y.dtype, y.device
        if self.c == 0:
            raise ValueError(f"the model must return at least one output; got shape {tuple(y.shape)}")
        return y

    def _located(
        self, batch: Any, alone: Tensor, earlier: Tensor, left: list[set[Layout]]
    ) -> tuple[Graph, bool]:
        """The graph of a pass over a few samples; ``left`` becomes the layouts that each site admits.

        ``earlier``: the output of a pass over fewer, and as a result whether it took the same course.
        """
        y = forward(self.model, batch, rewriting=True)
        graph = Graph(y, self._names, self._views)
        if operator := graph.coupled():
            raise ValueError(
                f"the model takes statistics of the batch ({operator.removesuffix('Backward0')}): one "
                "sample's outputs depend on the others. Call model.eval() first"
            )
        refuse_dependent_samples(y.detach()[: len(alone)], alone)
        n, generator = len(y), torch.Generator("cpu").manual_seed(0)
        u = torch.zeros((n, *y.shape), dtype=y.dtype, device=y.device)
        for i in range(n):
            u[i, i] = torch.randn(self.c, generator=generator, dtype=torch.float64, device="cpu").to(y)
        cotangents = self._cotangents_of_samples(graph, u) if graph.sites else []
        found = infer_sample_axis(graph, cotangents, self.parameters)
        shared = {
            graph.number[site.node]
            for site, layouts in zip(graph.sites, found)
            if not layouts and site.kind in ("share", "lookup")
        }
        if shared:
            # the same for all samples: a view of its parameter, for the operator that brings the samples in
            self._views |= shared
            left.clear()
            return self._located(batch, alone, earlier, left)
        before = Graph(earlier, self._names, self._views)
        if same := before.key == graph.key:
            found = layouts_scaling_with_n(found, graph, n, before, len(earlier))
        left[:] = [a & b for a, b in zip(left, found)] if left else found
        self._layouts = [next(iter(layouts)) if len(layouts) == 1 else None for layouts in left]
        for site, layout, g in zip(graph.sites, self._layouts, cotangents):
            site.layout = layout
            site.live = positions_with_gradient(site, g)
        self._live = [site.live for site in graph.sites]
        return graph, same

    def _cotangents_of_samples(self, graph: Graph, u: Tensor) -> list[Tensor]:
        """Each site's cotangents (n, ...) of u (n, n, C); decides whether vmap can take the backward pass and
        gives what autograd gives."""
        found: dict[int, Tensor] = {}
        with observable(self.model):
            if self._batched:
                plain: dict[int, Tensor] = {}
                graph.cotangents(u[:1], plain.__setitem__, batched=False, keep=True)
                reason = "differs from autograd"
                try:
                    graph.cotangents(u, found.__setitem__, batched=True, keep=True)
                    self._batched = all(is_close(g[0], plain[at][0]) for at, g in found.items())
                except (RuntimeError, NotImplementedError) as error:
                    self._batched, reason = False, f"refuses: {str(error).split('.')[0]}"
                if not self._batched:
                    log.info("LayerJacobians: one backward pass an output, for vmap %s", reason)
            if not self._batched:
                graph.cotangents(u, found.__setitem__, batched=False, keep=True)
        return [found[at] for at in range(len(graph.sites))]

    # --- a pass

    def run(self, tile: Tile, receive: Callable[[int, Factor], None]) -> None:
        """One forward and one backward pass: ``receive`` gets every group's number and factor."""
        batch = rows_of(self.inputs, tile.i, tile.j)
        with observable(self.model):
            y = checked_finite(forward(self.model, batch, rewriting=True))
            graph = Graph(y, self._names, self._views)
            n = tile.n
            if graph.key != self._key and n == 1:
                # strides of size one let torch take another course: the sample twice, and its half of it all
                n = 2
                y = forward(self.model, stack_samples([batch, batch]), rewriting=True)
                graph = Graph(y, self._names, self._views)
            if graph.key != self._key or graph.output.shape[1] != self.c:
                raise RuntimeError(
                    f"the model's forward pass took another course for samples {tile.i} to {tile.j - 1} than "
                    "for the first ones: it must not depend on the values of its input"
                )
            for site, layout, live in zip(graph.sites, self._layouts, self._live):
                site.layout, site.live = layout, live
            u = torch.zeros((tile.outputs, n, self.c), dtype=self.dtype, device=self.device)
            for k in range(tile.outputs):
                u[k, :, tile.c + k] = 1
            mix: Tensor | None = None
            if graph.routed:
                draws = torch.Generator("cpu").manual_seed(1)
                mix = torch.randn((n, tile.outputs), generator=draws, dtype=torch.float64, device="cpu").to(u)
                u = torch.cat([u, u.new_zeros(1, n, self.c)])
                u[-1, :, tile.c : tile.e] = mix
            wanted: dict[int, list[tuple[int, Use]]] = {}
            for number, group in enumerate(self.groups):
                for use in group.uses:
                    wanted.setdefault(use.site, []).append((number, use))
            parts: dict[int, dict[tuple[int, str], Factor]] = {}

            @torch.no_grad()
            def take(at: int, g: Tensor) -> None:
                if mix is not None:
                    self._check_order(graph.sites[at], g, mix)
                    g = g[:-1]
                for number, use in wanted.get(at, []):
                    group, found = self.groups[number], parts.setdefault(number, {})
                    found[use.site, use.role] = factor_of_use(graph, self.parameters, group, use, g, n)
                    if len(found) == len(group.uses):
                        factor = group_factor(group, parts.pop(number))
                        receive(number, factor if n == tile.n else factor.first())

            if graph.sites:
                try:
                    graph.cotangents(u, take, self._batched)
                except CheckpointError as error:
                    raise RuntimeError(
                        "the model recomputes a part of its forward pass (torch.utils.checkpoint), and "
                        "what that saves can be read once only: switch checkpointing off"
                    ) from error
            assert not parts, "a group of parameters was not reached by backpropagation"
            for number, group in enumerate(self.groups):
                if group.form == "samples":
                    receive(number, DenseFactor(self._samples.rows(group.parameters, batch, tile)))

    def _check_order(self, site: Site, g: Tensor, mix: Tensor) -> None:
        """Refuses samples whose cotangents lie elsewhere than the probe's. ``g``: of single outputs and,
        last, those of sample i's outputs weighted by mix[i], which must be the same sums of them."""
        if site.layout is None:
            return
        n = len(mix)
        if g.shape[1 + site.layout.axis] % n == 0:
            g = site.layout.arrange(g, n, 1).flatten(2)
            if is_close((g[:, :-1] * mix.unsqueeze(2)).sum(1), g[:, -1]):
                return
        layer = self.layers[next(iter(site.roles.values())).parameter]
        raise RuntimeError(
            f"layer {layer!r}: the model gathers rows by the values of its input (sorting, masks, routing), "
            "and these samples' rows lie in another order than those of the first ones"
        )
