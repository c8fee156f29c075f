"""Where a forward pass used its parameters, read off the autograd graph, and the cotangents arriving there.

The graph holds every use of every parameter: by a module, by a function, by a module that ran twice, under
two names. :class:`Graph` goes from each parameter up to the operators that took it, through views, and makes
a :class:`Site` of each one that ``CONSUMERS`` knows; a parameter that reaches any other operator is listed
as unknown, for whoever differentiates sample by sample. :mod:`gcfast.jacobian.sample_axis` finds the axis of
a site's cotangent along which the samples lie, from exact zeros and never from a shape alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gcfast.jacobian.sites import CONSUMERS, VIEWS, Edge, Node, Site, View, shape_of

# What may move rows by values of the input: samples that were in order for one batch need not be for another.
DATA_DEPENDENT_OPS = (
    *("Index", "Gather", "Scatter", "MaskedSelect", "MaskedScatter", "Take", "Put", "Sort", "Topk"),
    *("RepeatInterleave", "PackPaddedSequence"),
)


def walk(output: Tensor) -> list[Node]:
    """Every node below the output, in an order that depends on the graph alone."""
    seen: dict[Node, None] = {}
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        todo.extend(child for child, _ in reversed(node.next_functions))
    return list(seen)


class Graph:
    """The sites of one forward pass, in a fixed order, and what no site stands for.

    Args:
        output: of the pass.
        names: the name of each parameter that counts, by id.
        views: numbers, in the order of the walk, of expansions and embeddings that are the same for all
            samples: views of their parameter, for whoever takes them.

    ``seen``: the parameters that the output depends on. ``unknown``: those that an operator took that is not
    known, and its name.
    """

    def __init__(self, output: Tensor, names: Mapping[int, str], views: frozenset[int] = frozenset()) -> None:
        self.output = output
        self.nodes = walk(output)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self._views = views
        self._above: dict[Node, list[tuple[Node, int, int]]] = {}
        for parent in self.nodes:
            for at, (child, number) in enumerate(parent.next_functions):
                if child is not None:
                    self._above.setdefault(child, []).append((parent, at, number))
        self.routed = any(node.name().startswith(DATA_DEPENDENT_OPS) for node in self.nodes)
        self.seen: set[str] = set()
        self.unknown: dict[str, str] = {}
        sites: dict[tuple[int, str], Site] = {}
        for node in self.nodes:
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in names:
                self.seen.add(names[id(variable)])
                self._follow(node, View(names[id(variable)]), sites)
        self.sites = [sites[place] for place in sorted(sites)]
        for site in self.sites:
            site.roles = {role: v for role, v in site.roles.items() if v.parameter not in self.unknown}
        self.sites = [site for site in self.sites if site.roles]

    def _follow(self, node: Node, view: View, sites: dict[tuple[int, str], Site]) -> None:
        """All that is made of a parameter's view, the (only) tensor that ``node`` takes or stands for."""
        leaf = not hasattr(node, "variable")
        for parent, at, number in self._above.get(node, []):
            here = View(view.parameter, (*view.steps, (node, number))) if leaf else view
            name, place = parent.name(), self.number[parent]
            if name in VIEWS or place in self._views:
                self._follow(parent, here, sites)
                continue
            consumer = CONSUMERS.get(name)
            known = None if consumer is None else consumer(parent, at)
            if known is None:
                self.unknown.setdefault(view.parameter, name.removesuffix("Backward0"))
                continue
            kind, role, sign = known
            # weight and bias of a layer share a site; terms and factors each have their own
            part = "" if kind in ("linear", "convolution", "norm") else role
            where = parent.next_functions[0] if kind == "shift" else (parent, 0)
            site = sites.setdefault((place, part), Site(kind, parent, where, sign=sign))
            site.roles[role] = here

    @property
    def key(self) -> tuple[Any, ...]:
        return (*(site.key for site in self.sites), *sorted(self.unknown))

    def coupled(self) -> str:
        """The name of an operator that takes statistics over the samples; "" if there is none."""
        for node in self.nodes:
            if "BatchNormBackward" in node.name() and node._saved_training and shape_of((node, 0))[0] != 1:
                return str(node.name())
        return ""

    def _terminal(self, edges: Collection[Edge]) -> list[Edge]:
        """Those edges below which there is no other: autograd passes by all when it is asked for these."""
        nodes = {node for node, _ in edges}
        waiting = {node: len(self._above.get(node, [])) for node in self.nodes}
        order, ready = [], [self.nodes[0]] if self.nodes else []
        while ready:
            node = ready.pop()
            order.append(node)
            for child, _ in node.next_functions:
                if child is not None:
                    waiting[child] -= 1
                    if waiting[child] == 0:
                        ready.append(child)
        above: set[Node] = set()  # nodes with one of `nodes` below them
        for node in reversed(order):
            if any(child in nodes or child in above for child, _ in node.next_functions):
                above.add(node)
        return [edge for edge in edges if edge[0] not in above]

    def cotangents(
        self, u: Tensor, receive: Callable[[int, Tensor], None], batched: bool, keep: bool = False
    ) -> None:
        """One backward pass for all of u (C', n, C): ``receive`` is given each site's cotangents (C', ...) as
        soon as they are there, from the output down, and they are dropped when it returns.

        ``batched``: in one pass by vmap; else in C' passes, after which all are received at once.
        ``keep``: the graph, for another pass.
        """
        at: dict[Edge, list[int]] = {}
        for i, site in enumerate(self.sites):
            at.setdefault(site.where, []).append(i)
        ends = self._terminal(at)  # in the order of sites, so that sums have one order
        inputs = [GradientEdge(*edge) for edge in ends]
        passes = [edge for edge in at if edge not in set(ends)]
        options = {"dtype": u.dtype, "device": u.device}

        def deliver(edge: Edge, g: Tensor) -> None:
            for i in at[edge]:
                receive(i, g)

        def backward(v: Tensor, last: bool) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(
                self.output, inputs, v, retain_graph=keep or not last, allow_unused=True
            )
            return tuple(
                torch.zeros(shape_of(edge), **options) if g is None else g for g, edge in zip(found, ends)
            )

        if batched:
            with _Capturing(passes, deliver, len(u), options):
                # receivers may draw random numbers: one draw for the whole batch
                found = torch.func.vmap(lambda v: backward(v, True), randomness="same")(u)
            for edge, g in zip(ends, found):
                deliver(edge, g)
            return
        kept: dict[Edge, Tensor] = {}
        for c, v in enumerate(u):  # receivers read what the operators have saved: the graph stays

            def store(edge: Edge, g: Tensor, c: int = c) -> None:
                if edge not in kept:
                    kept[edge] = g.new_zeros((len(u), *g.shape))
                kept[edge][c] = g

            with _Capturing(passes, store, 0, options):
                found = backward(v, False)
            for edge, g in zip(ends, found):
                store(edge, g)
        for edge in (*passes, *ends):
            if edge in kept:
                deliver(edge, kept.pop(edge))


_receivers: dict[int, Callable[[Tensor], None]] = {}
_numbers = itertools.count()


def _receiver(key: int) -> Callable[[Tensor], None]:
    if key not in _receivers:
        raise ValueError(f"key must be of a backward pass that is being captured; got {key}")
    return _receivers[key]


@torch.library.custom_op("gcfast::capture_cotangent", mutates_args=())
def capture_cotangent(g: Tensor, key: int) -> Tensor:
    """Hands a cotangent over; an op, because vmap gives an op the whole batch."""
    if not isinstance(g, Tensor):  # torch takes None for one
        raise TypeError(f"g must be a tensor; got {type(g).__name__}")
    _receiver(key)(g)
    return g.new_empty(0)


@capture_cotangent.register_fake
def _(g: Tensor, key: int) -> Tensor:
    return g.new_empty(0)


def _capture_batch(info: Any, in_dims: tuple[int | None, ...], g: Tensor, key: int) -> tuple[Tensor, None]:
    at = in_dims[0]
    _receiver(key)(g.expand(info.batch_size, *g.shape) if at is None else g.movedim(at, 0))
    return g.new_empty(0), None


capture_cotangent.register_vmap(_capture_batch)


class _Capturing:
    """Context in which cotangents at edges inside the graph are handed to ``deliver``."""

    def __init__(
        self,
        edges: Sequence[Edge],
        deliver: Callable[[Edge, Tensor], None],
        batch: int,
        options: dict[str, Any],
    ) -> None:
        self.edges, self.deliver, self.batch, self.options = edges, deliver, batch, options
        self.handles: list[Any] = []
        self.keys: list[int] = []

    def __enter__(self) -> None:
        for edge in self.edges:
            key = next(_numbers)
            self.keys.append(key)
            _receivers[key] = lambda g, edge=edge: self.deliver(edge, g)  # type: ignore[misc]
            self.handles.append(edge[0].register_prehook(self._hook(edge, key)))

    def _hook(self, edge: Edge, key: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            g = grads[edge[1]]
            if g is not None:
                if self.batch:
                    capture_cotangent(g, key)
                else:
                    self.deliver(edge, g)
                return
            zero = torch.zeros(shape_of(edge), **self.options)
            self.deliver(edge, zero.expand(self.batch, *zero.shape) if self.batch else zero)

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for key in self.keys:
            _receivers.pop(key, None)
