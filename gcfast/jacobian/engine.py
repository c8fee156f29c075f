"""One pass over a tile of samples and outputs: what every group of parameters has of the Jacobian there.

A group is a layer's parameters that belong together: a weight and its bias, or one parameter that several
operators took. :class:`Engine` runs the model on a probe of two to five samples once, finds the groups, the
axes of the samples and what the tiles will cost; after that a pass hands out one group's
:class:`~gcfast.jacobian.factors.Factor` at a time, as backpropagation reaches it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointError

from gcfast.jacobian.eval_norm import Rewriting
from gcfast.jacobian.factors import Factor, Lookup, Outer, Rows, joined, scatter
from gcfast.jacobian.forward import _close, _compare, _observable, _others, _SavedBytes, _stack, log, rows_of
from gcfast.jacobian.graph import Graph
from gcfast.jacobian.groups import Group, Tile, Use, _alike, _is_scale, _parts, _view_shape
from gcfast.jacobian.sample_axis import growing, live_positions, locate
from gcfast.jacobian.site_factors import matrix_factor, vector_rows
from gcfast.jacobian.sites import Layout, Site, View, _signed, shape_of
from gcfast.model import call_arguments, copy_tensors


class Engine:
    """The model on its inputs, with what the probe found."""

    def __init__(
        self, model: nn.Module, inputs: Any, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, str]
    ) -> None:
        """``parameters``: those that count, by name; ``layers``: the layer of each."""
        self.model, self.inputs, self.parameters, self.layers = model, inputs, dict(parameters), layers
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._batched = True
        self._push: Callable[[Mapping[str, Tensor], Any], Tensor] | None = None
        # whether torch.func serves parameters that need it, by their names and the number of outputs
        self._functional: dict[tuple[tuple[str, ...], int], bool] = {}
        self._views: frozenset[int] = frozenset()
        self._layouts: list[Layout | None] = []
        self._live: list[tuple[Tensor, Tensor] | None] = []
        self._key: tuple[Any, ...] = ()
        self.n = len(next(v for v in tree_leaves(inputs) if isinstance(v, Tensor)))
        self.groups: list[Group] = []
        self._probe()

    # --- forward passes

    def forward(self, inputs: Any, rewriting: bool = False) -> Tensor:
        """The output (n, C), checked; ``rewriting``: for a backward pass to intermediate edges alone."""
        args, kwargs = call_arguments(copy_tensors(inputs))  # the model may change them in place
        with _observable(self.model), Rewriting() if rewriting else contextlib.nullcontext():
            y = self.model(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(f"the model must return one tensor (n, C); got {type(y).__name__}")
        samples = len(next(v for v in tree_leaves(inputs) if isinstance(v, Tensor)))
        if y.dim() != 2 or len(y) != samples:
            raise ValueError(
                f"the model must return outputs of shape (n, C), here ({samples}, C); got {tuple(y.shape)}"
            )
        if not y.is_floating_point():
            raise TypeError(f"the model's outputs must be floating; got {y.dtype}")
        if y.grad_fn is None:
            raise ValueError(
                "the model's output depends on none of its parameters by autograd: was it computed under "
                "torch.no_grad(), or detached?"
            )
        return y

    def _checked(self, y: Tensor) -> Tensor:
        if not bool(y.detach().isfinite().all()):
            raise ValueError("the model's output holds a NaN or an infinity: its Jacobian is not defined")
        return y

    def on(self, inputs: Any) -> Engine:
        """The same model on other samples."""
        other = copy.copy(self)
        other._functional = {}
        other.inputs, other.n = inputs, len(next(v for v in tree_leaves(inputs) if isinstance(v, Tensor)))
        return other

    # --- products with vectors

    def pull(self, u: Tensor, tile: Tile) -> dict[str, Tensor]:
        """J^T u by parameter, for the samples of a tile."""
        with _observable(self.model):
            y = self._checked(self.forward(rows_of(self.inputs, tile.i, tile.j)))
            grads = torch.autograd.grad(y, list(self.parameters.values()), u, materialize_grads=True)
        return dict(zip(self.parameters, grads))

    def push(self, direction: Mapping[str, Tensor], tile: Tile) -> Tensor:
        """J v, (n, C), for the samples of a tile, along a direction for every parameter."""
        if self._push is None:
            self._push = self._choose_push()
        return self._push(direction, rows_of(self.inputs, tile.i, tile.j))

    def _choose_push(self) -> Callable[[Mapping[str, Tensor], Any], Tensor]:
        """The first way that agrees with rows of J on a sample: operators may lack a forward derivative, some
        without a word, or a derivative of the backward one."""
        one = rows_of(self.inputs, 0, 1)
        generator = torch.Generator().manual_seed(2)
        draw = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            for name, p in self.parameters.items()
        }
        truth = self._push_by_rows(draw, one)
        # the row of an embedding's padding_idx has a forward derivative and no gradient
        ways = (self._push_transposed,) if self._padded else (self._push_forward, self._push_transposed)
        for way in ways:
            try:
                if _close(way(draw, one), truth):
                    return way
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                log.debug("LayerJacobians: %s refused: %s", way.__name__, error)
        log.info(
            "LayerJacobians: jvp goes row by row: an operator has neither a forward nor a second derivative"
        )
        return self._push_by_rows

    def _push_forward(self, direction: Mapping[str, Tensor], batch: Any) -> Tensor:
        args, kwargs = call_arguments(copy_tensors(batch))
        parameters = {name: self.parameters[name].detach() for name in direction}

        def outputs(p: dict[str, Tensor]) -> Tensor:
            y: Tensor = torch.func.functional_call(self.model, p, args, kwargs)
            return y

        with _observable(self.model):
            along: Tensor = torch.func.jvp(outputs, (parameters,), (dict(direction),))[1]
        return along.detach()

    def _push_transposed(self, direction: Mapping[str, Tensor], batch: Any) -> Tensor:
        """<J^T u, v> is linear in u: its gradient is J v."""
        with _observable(self.model):
            y = self.forward(batch)
            u = torch.zeros_like(y, requires_grad=True)
            parameters = [self.parameters[name] for name in direction]
            grads = torch.autograd.grad(y, parameters, u, create_graph=True, allow_unused=True)
            along = torch.stack([(g * v).sum() for g, v in zip(grads, direction.values()) if g is not None])
            return torch.autograd.grad(along.sum(), u)[0].detach()

    def _push_by_rows(self, direction: Mapping[str, Tensor], batch: Any) -> Tensor:
        v = torch.cat([part.flatten() for part in direction.values()])
        n = len(next(x for x in tree_leaves(batch) if isinstance(x, Tensor)))
        tile = Tile(0, n, 0, self.c)
        return torch.stack(
            [self._by_row(list(direction), rows_of(batch, i, i + 1), tile) @ v for i in range(n)]
        )

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
            graph, same = self._located(_stack(picked), alone, earlier, left)
            if same and all(len(found) == 1 for found in left):
                break
            earlier = graph.output
        self._key = graph.key
        missing = [name for name in self.parameters if name not in graph.seen]
        if missing:
            raise ValueError(
                f"parameter {missing[0]!r}{_others(missing)} has no part in the output: the forward pass "
                "does not use it, or not by autograd (torch.no_grad(), detach(), .data). Leave it out by "
                "layers= or by requires_grad_(False)"
            )
        self._padded = any(
            node.name() == "EmbeddingBackward0" and _signed(node._saved_padding_idx) >= 0
            for node in graph.nodes
        )
        self._make_groups(graph)
        self._measure(graph, size)

    def _alone(self, one: Any) -> Tensor:
        """One sample's output (1, C) with its graph, and the bytes that its forward pass keeps."""
        count = _SavedBytes(self.parameters.values())
        with count:
            y = self._checked(self.forward(one, rewriting=True))
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
        y = self.forward(batch, rewriting=True)
        graph = Graph(y, self._names, self._views)
        if operator := graph.coupled():
            raise ValueError(
                f"the model takes statistics of the batch ({operator.removesuffix('Backward0')}): one "
                "sample's outputs depend on the others. Call model.eval() first"
            )
        _compare(y.detach()[: len(alone)], alone)
        n, generator = len(y), torch.Generator().manual_seed(0)
        u = torch.zeros((n, *y.shape), dtype=y.dtype, device=y.device)
        for i in range(n):
            u[i, i] = torch.randn(self.c, generator=generator, dtype=torch.float64).to(y)
        cotangents = self._cotangents_of_samples(graph, u) if graph.sites else []
        found = locate(graph, cotangents, self.parameters)
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
            found = growing(found, graph, n, before, len(earlier))
        left[:] = [a & b for a, b in zip(left, found)] if left else found
        self._layouts = [next(iter(layouts)) if len(layouts) == 1 else None for layouts in left]
        for site, layout in zip(graph.sites, self._layouts):
            site.layout = layout
        self._live = [live_positions(site, g) for site, g in zip(graph.sites, cotangents)]
        return graph, same

    def _cotangents_of_samples(self, graph: Graph, u: Tensor) -> list[Tensor]:
        """Each site's cotangents (n, ...) of u (n, n, C); decides whether vmap can take the backward pass and
        gives what autograd gives."""
        found: dict[int, Tensor] = {}
        with _observable(self.model):
            if self._batched:
                plain: dict[int, Tensor] = {}
                graph.cotangents(u[:1], plain.__setitem__, batched=False, keep=True)
                reason = "differs from autograd"
                try:
                    graph.cotangents(u, found.__setitem__, batched=True, keep=True)
                    self._batched = all(_close(g[0], plain[at][0]) for at, g in found.items())
                except (RuntimeError, NotImplementedError) as error:
                    self._batched, reason = False, f"refuses: {str(error).split('.')[0]}"
                if not self._batched:
                    log.info("LayerJacobians: one backward pass an output, for vmap %s", reason)
            if not self._batched:
                graph.cotangents(u, found.__setitem__, batched=False, keep=True)
        return [found[at] for at in range(len(graph.sites))]

    def _make_groups(self, graph: Graph) -> None:
        unknown = dict(graph.unknown)
        for site, layout, live in zip(graph.sites, self._layouts, self._live):
            site.live = live
            if layout is None:
                for view in site.roles.values():
                    unknown.setdefault(view.parameter, site.node.name().removesuffix("Backward0"))
        uses: dict[str, list[Use]] = {}
        for i, site in enumerate(graph.sites):
            for role, view in site.roles.items():
                if view.parameter not in unknown:
                    shape = _view_shape(view, self.parameters[view.parameter])
                    uses.setdefault(view.parameter, []).append(Use(i, role, view, shape))
        parts = {name: _parts(found, self.parameters[name]) for name, found in uses.items()}
        done: set[tuple[str, int]] = set()
        for name in uses:  # weights first, which take their biases along
            for k, part in enumerate(parts[name]):
                form = "outer" if _alike(graph, part) else "rows" if _is_scale(graph, part) else ""
                if form:
                    bias = self._bias_of(graph, name, part, parts)
                    done |= {(name, k)} if bias is None else {(name, k), (bias, 0)}
                    together = (name,) if bias is None else (name, bias)
                    self.groups.append(Group(self.layers[name], together, part, form, bias is not None))
        for name in uses:
            for k, part in enumerate(parts[name]):
                if (name, k) not in done:
                    single = len(part) == 1 and part[0].view.injective
                    lookup = single and graph.sites[part[0].site].kind == "lookup"
                    form = "lookup" if lookup else "rows" if single else "sum"
                    self.groups.append(Group(self.layers[name], (name,), part, form))
        by_layer: dict[str, list[str]] = {}
        for name in unknown:
            by_layer.setdefault(self.layers[name], []).append(name)
        for layer, names in by_layer.items():
            self.groups.append(Group(layer, tuple(names), (), "samples"))
            log.info(
                "LayerJacobians: layer %r (%s) is differentiated sample by sample by torch.func: what %s "
                "does with it has no form of its own",
                *(layer, ", ".join(names), unknown[names[0]]),
            )
        order = {name: i for i, name in enumerate(self.parameters)}
        self.groups.sort(key=lambda group: order[group.parameters[0]])

    def _bias_of(
        self, graph: Graph, name: str, part: Sequence[Use], parts: Mapping[str, Sequence[Sequence[Use]]]
    ) -> str | None:
        """The bias that the same operators took, and they alone, if it is of the same layer."""
        first = graph.sites[part[0].site]
        view = first.roles.get("bias")
        if view is None or self.layers[view.parameter] != self.layers[name] or view.parameter not in parts:
            return None
        if first.kind == "convolution" and first.node._saved_transposed:
            return None
        mine = [(use.site, "bias") for use in part]
        found = [[(use.site, use.role) for use in other] for other in parts[view.parameter]]
        return view.parameter if found == [mine] and view.injective else None

    def _measure(self, graph: Graph, n: int) -> None:
        """Extents and bytes of every group, from the shapes of a pass of n samples."""
        item = self.dtype.itemsize
        views = {node for site in graph.sites for view in site.roles.values() for node, _ in view.steps}
        passed = [node for node in graph.nodes if node._input_metadata and node not in views]
        self.largest = max(
            (math.prod(shape_of((f, 0))) for f in passed if not hasattr(f, "variable")), default=0
        )
        self.largest = self.largest // n * item
        for group in self.groups:
            group.numel = sum(self.parameters[name].numel() for name in group.parameters)
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
                    g = torch.empty(shape, dtype=self.dtype, device="meta")
                    parts[use.site, use.role] = self._part(graph, group, use, g, n)
                factor = self._factor(group, parts)
            if isinstance(factor, (Outer, Lookup)):
                group.size = size = factor.size
                group.numel = size.numel
                if isinstance(factor, Outer):
                    group.shared = factor.shared // n
                    group.spread = size.q * size.s * size.t * item
                group.moved = size.q * size.r * size.t * item
            else:
                group.numel = math.prod(group.uses[0].shape) * (2 if group.bias else 1)
                group.moved = group.numel * item * (1 + len(group.uses))
                group.kept = group.numel * item

    # --- a pass

    def _part(self, graph: Graph, group: Group, use: Use, g: Tensor, n: int) -> Factor:
        """What one use adds to its group, from the cotangents (c, ...) of its site."""
        site = graph.sites[use.site]
        view = site.roles[use.role]
        if not view.plain and not self._same_view(view, use.view):
            raise ValueError(
                f"layer {group.layer!r}: another part of {view.parameter!r} is used here than for the first "
                "samples of x: give samples of one shape"
            )
        try:
            return self._plain_part(group, use, site, view, g, n)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"layer {group.layer!r}: what {use.view.parameter!r} was applied to has been changed in "
                "place since; its Jacobian needs it. Use the operation's form that makes a new tensor"
            ) from error

    def _same_view(self, a: View, b: View) -> bool:
        shape = self.parameters[a.parameter].shape
        return torch.equal(a.index(shape), b.index(shape))

    def _plain_part(self, group: Group, use: Use, site: Site, view: View, g: Tensor, n: int) -> Factor:
        if use.role == "weight" and site.kind in ("linear", "convolution", "lookup"):
            part: Factor = matrix_factor(site, g, n, group.bias, view, use.shape)
        else:
            part = Rows(vector_rows(site, use.role, g, n, use.shape, group.bias))
        if group.form != "sum":
            return part
        p = self.parameters[group.parameters[0]]
        in_order = view.whole or (view.transposed and isinstance(part, Outer))
        return Rows(scatter(part.rows(), None if in_order else view.index(p.shape), p.numel()))

    def _factor(self, group: Group, parts: Mapping[tuple[int, str], Factor]) -> Factor:
        factors = [parts[use.site, use.role] for use in group.uses]
        if len(factors) == 1:
            return factors[0]
        outer = [f for f in factors if isinstance(f, Outer)]
        return joined(outer) if outer else Rows(torch.stack([f.rows() for f in factors]).sum(0))

    def run(self, tile: Tile, receive: Callable[[int, Factor], None]) -> None:
        """One forward and one backward pass: ``receive`` gets every group's number and factor."""
        batch = rows_of(self.inputs, tile.i, tile.j)
        with _observable(self.model):
            y = self._checked(self.forward(batch, rewriting=True))
            graph = Graph(y, self._names, self._views)
            n = tile.n
            if graph.key != self._key and n == 1:
                # strides of size one let torch take another course: the sample twice, and its half of it all
                n = 2
                y = self.forward(_stack([batch, batch]), rewriting=True)
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
                draws = torch.Generator().manual_seed(1)
                mix = torch.randn((n, tile.outputs), generator=draws, dtype=torch.float64).to(u)
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
                    found[use.site, use.role] = self._part(graph, group, use, g, n)
                    if len(found) == len(group.uses):
                        factor = self._factor(group, parts.pop(number))
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
                    receive(number, Rows(self._by_samples(group.parameters, batch, tile)))

    def _check_order(self, site: Site, g: Tensor, mix: Tensor) -> None:
        """Refuses samples whose cotangents lie elsewhere than the probe's. ``g``: of single outputs and,
        last, those of sample i's outputs weighted by mix[i], which must be the same sums of them."""
        if site.layout is None:
            return
        n = len(mix)
        if g.shape[1 + site.layout.axis] % n == 0:
            g = site.layout.arrange(g, n, 1).flatten(2)
            if _close((g[:, :-1] * mix.unsqueeze(2)).sum(1), g[:, -1]):
                return
        layer = self.layers[next(iter(site.roles.values())).parameter]
        raise RuntimeError(
            f"layer {layer!r}: the model gathers rows by the values of its input (sorting, masks, routing), "
            "and these samples' rows lie in another order than those of the first ones"
        )

    def _by_samples(self, names: Sequence[str], batch: Any, tile: Tile) -> Tensor:
        """J (n, c, p) of a few parameters, by torch.func or, where that does not work, one row at a time."""
        key = (tuple(names), tile.outputs)
        if key not in self._functional:
            self._functional[key] = self._agree(names, tile)
        if self._functional[key]:
            return self._by_func(names, batch, tile)
        rows = [self._by_row(names, rows_of(batch, i, i + 1), tile) for i in range(tile.n)]
        return torch.stack(rows)

    def _agree(self, names: Sequence[str], tile: Tile) -> bool:
        """Whether torch.func gives autograd's rows for a few different samples: some operators' batching
        rules do not, or only for some numbers of samples and outputs."""
        picked = sorted({0, self.n // 2, self.n - 1})
        if len(picked) in (1, tile.outputs):  # a rule that confuses two batches passes where they are alike
            picked += [0] * (2 if tile.outputs == len(picked) + 1 else 1)
        samples = [rows_of(self.inputs, i, i + 1) for i in picked]
        try:
            found = self._by_func(names, _stack(samples), tile)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            log.info(
                "LayerJacobians: row by row, for torch.func refuses this model: %s", str(error).split(".")[0]
            )
            return False
        if all(_close(rows, self._by_row(names, one, tile)) for rows, one in zip(found, samples)):
            return True
        log.info("LayerJacobians: row by row, for torch.func differs from autograd on this model")
        return False

    def _by_func(self, names: Sequence[str], batch: Any, tile: Tile) -> Tensor:
        chosen = {name: self.parameters[name].detach() for name in names}
        leaves, spec = tree_flatten(copy_tensors(batch))
        tensors = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]

        def outputs(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
            parts = list(leaves)
            for k, x in zip(tensors, sample):
                parts[k] = x.unsqueeze(0)
            args, kwargs = call_arguments(tree_unflatten(parts, spec))
            y: Tensor = torch.func.functional_call(self.model, parameters, args, kwargs)
            return y[0, tile.c : tile.e]

        in_dims = (None, *(0 for _ in tensors))
        found = torch.func.vmap(torch.func.jacrev(outputs), in_dims)(chosen, *(leaves[k] for k in tensors))
        rows = [found[name].reshape(len(leaves[tensors[0]]), tile.outputs, -1) for name in names]
        return torch.cat(rows, 2).detach()

    def _by_row(self, names: Sequence[str], one: Any, tile: Tile) -> Tensor:
        parameters = [self.parameters[name] for name in names]
        y = self.forward(one)[0, tile.c : tile.e]
        rows = []
        for k in range(len(y)):
            last = k == len(y) - 1
            with _observable(self.model):
                found = torch.autograd.grad(y[k], parameters, retain_graph=not last, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)
