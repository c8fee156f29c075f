"""Where a forward pass used its parameters, read off the autograd graph.

The graph holds every use of every parameter: by a module, by a function, by a module that ran twice, under
two names. :class:`Graph` goes from each parameter up to the operators that took it, through views, and makes
a :class:`Site` of each one that ``_CONSUMERS`` knows; a parameter that reaches any other operator is listed
as unknown, for whoever differentiates sample by sample. :func:`locate` finds the axis of a site's cotangent
along which the samples lie, from exact zeros and never from a shape alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

Node = Any  # torch.autograd.graph.Node
Edge = tuple[Node, int]  # a node and the number of one of its outputs


def _signed(value: int) -> int:
    """Negative numbers that a node has saved come back as unsigned ones."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shape_of(edge: Edge) -> tuple[int, ...]:
    node, number = edge
    return tuple(node._input_metadata[number].shape)


def _reshape(x: Tensor, node: Node, number: int) -> Tensor:
    return x.reshape(shape_of((node, number)))


def _slice(x: Tensor, node: Node, number: int) -> Tensor:
    start, end = (None if v is None else _signed(v) for v in (node._saved_start, node._saved_end))
    part: list[slice] = [slice(None)] * (_signed(node._saved_dim) % x.dim())
    part.append(slice(start, end, node._saved_step))
    return x[tuple(part)]


# A view of a parameter, made again of a tensor of its shape: (tensor, node, number of the node's output).
_VIEWS: dict[str, Callable[[Tensor, Node, int], Tensor]] = {
    "TBackward0": lambda x, f, i: x.t(),
    "TransposeBackward0": lambda x, f, i: x.transpose(_signed(f._saved_dim0), _signed(f._saved_dim1)),
    "PermuteBackward0": lambda x, f, i: x.permute([_signed(d) for d in f._saved_dims]),
    **dict.fromkeys(
        (
            *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0"),
            *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "AliasBackward0", "CloneBackward0"),
        ),
        _reshape,
    ),
    "SplitBackward0": lambda x, f, i: x.split(f._saved_split_size, _signed(f._saved_dim))[i],
    "SplitWithSizesBackward0": lambda x, f, i: x.split(list(f._saved_split_sizes), _signed(f._saved_dim))[i],
    "UnbindBackward0": lambda x, f, i: x.unbind(_signed(f._saved_dim))[i],
    "SelectBackward0": lambda x, f, i: x.select(_signed(f._saved_dim), _signed(f._saved_index)),
    "SliceBackward0": _slice,
}
# What may give each sample its own share of a parameter, and is a view of it where it does not.
_SHARES: dict[str, Callable[[Tensor, Node, int], Tensor]] = {
    "ExpandBackward0": lambda x, f, i: x.expand(shape_of((f, i))),
    "RepeatBackward0": lambda x, f, i: x.repeat(list(f._saved_repeats)),
    "EmbeddingBackward0": lambda x, f, i: x[f._saved_indices.cpu()].masked_fill(_padding(f).cpu(), -1),
}


def _padding(node: Node) -> Tensor:
    """Where an embedding's indices ask for the row that has no gradient; (..., 1)."""
    return (node._saved_indices == _signed(node._saved_padding_idx)).unsqueeze(-1)


@dataclass(frozen=True)
class View:
    """A tensor that an operator took, as the parameter of which it is a view."""

    parameter: str
    steps: tuple[Edge, ...] = ()

    @property
    def steps_names(self) -> tuple[tuple[str, int], ...]:
        return tuple((node.name(), number) for node, number in self.steps)

    @property
    def whole(self) -> bool:
        return not self.steps

    @property
    def transposed(self) -> bool:
        return self.steps_names == (("TBackward0", 0),)

    @property
    def plain(self) -> bool:
        """All of the parameter, as it is or transposed."""
        return self.whole or self.transposed

    @property
    def injective(self) -> bool:
        """Whether each element of the parameter is in it at most once."""
        return not any(name in _SHARES for name, _ in self.steps_names)

    def index(self, shape: Sequence[int]) -> Tensor:
        """The position in the parameter, of the given shape, of each element; -1 where it has no gradient."""
        out = torch.arange(math.prod(shape)).view(tuple(shape))
        for node, number in self.steps:
            again = _VIEWS.get(node.name()) or _SHARES[node.name()]
            out = again(out, node, number)
        return out


@dataclass(frozen=True)
class Layout:
    """A cotangent's axis that holds the samples: index i k + j is sample i's if ``outer``, else j n + i."""

    axis: int
    outer: bool

    def arrange(self, x: Tensor, n: int, lead: int = 0) -> Tensor:
        """(lead dimensions, ..., n k, ...) -> (n, lead dimensions, ..., k, ...)."""
        at = lead + self.axis
        k = x.shape[at] // n
        x = x.unflatten(at, (n, k) if self.outer else (k, n))
        return x.movedim(at if self.outer else at + 1, 0)


@dataclass
class Site:
    """An operator that took parameters: as what, and the edge at which the cotangent of its output passes."""

    kind: str  # linear, convolution, norm, lookup, share, sum, product, quotient, slope, shift
    node: Node
    where: Edge
    roles: dict[str, View] = field(default_factory=dict)
    sign: float = 1.0
    layout: Layout | None = None
    live: tuple[Tensor, Tensor] | None = None  # positions that cotangents reach, and the others; None: all

    @property
    def key(self) -> tuple[Any, ...]:
        """What two passes of one model must agree in."""
        roles = ((role, view.parameter, view.steps_names) for role, view in self.roles.items())
        return (self.kind, self.node.name(), self.sign, *roles)


Role = tuple[str, str, float]  # kind, role, sign


def _addmm(node: Node, at: int) -> Role | None:
    if at == 0 and node._saved_beta == 1:
        return "linear", "bias", 1.0
    return ("linear", "weight", 1.0) if at == 2 and node._saved_alpha == 1 else None


def _bmm(node: Node, at: int) -> Role | None:
    return ("linear", "weight", 1.0) if at == 1 and shape_of((node, 0))[0] == 1 else None


def _layer(kind: str) -> Callable[[Node, int], Role | None]:
    """(input, weight, bias)."""
    return lambda node, at: (kind, ("", "weight", "bias")[at], 1.0) if at in (1, 2) else None


def _lookup(node: Node, at: int) -> Role | None:
    return None if node._saved_scale_grad_by_freq or node._saved_sparse else ("lookup", "weight", 1.0)


def _sum(minus: float) -> Callable[[Node, int], Role | None]:
    return lambda node, at: ("sum", f"term {at}", 1.0 if at == 0 else minus * float(node._saved_alpha))


def _shift(node: Node, at: int) -> Role | None:
    """Our own activation, act(x + bias): the bias has the cotangent of x."""
    return ("shift", "bias", 1.0) if at == 1 and node.next_functions[0][0] is not None else None


# What a parameter is to an operator by its place among the arguments; None: that is not known.
_CONSUMERS: dict[str, Callable[[Node, int], Role | None]] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": lambda node, at: ("linear", "weight", 1.0) if at == 1 else None,
    "BmmBackward0": _bmm,
    "ConvolutionBackward0": _layer("convolution"),
    "NativeBatchNormBackward0": _layer("norm"),
    "CudnnBatchNormBackward0": _layer("norm"),
    "MiopenBatchNormBackward0": _layer("norm"),
    "EvalNormBackward": _layer("norm"),
    "NativeLayerNormBackward0": _layer("norm"),
    "NativeGroupNormBackward0": _layer("norm"),
    "EmbeddingBackward0": _lookup,
    "ExpandBackward0": lambda node, at: ("share", "value", 1.0),
    "RepeatBackward0": lambda node, at: ("share", "value", 1.0),
    "AddBackward0": _sum(1.0),
    "SubBackward0": _sum(-1.0),
    "MulBackward0": lambda node, at: ("product", ("self", "other")[at], 1.0),
    "DivBackward0": lambda node, at: ("quotient", ("self", "other")[at], 1.0),
    "PreluKernelBackward0": lambda node, at: ("slope", "weight", 1.0) if at == 1 else None,
    "GeneratedBackwardFor_gcfast_activation_defaultBackward": _shift,
}


class EvalNorm(torch.autograd.Function):
    """Batch normalisation by fixed statistics, in whose backward pass vmap sees one product.

    The rule that torch has for its own moves the batch of cotangents among the channels and back again, which
    copies all of it twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Any:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, var = ctx.saved_tensors
        if any(ctx.needs_input_grad[1:3]) and not ctx.needs_input_grad[0]:
            raise NotImplementedError("the parameters of EvalNorm have no gradient by autograd")
        scale = weight * (var + ctx.eps).rsqrt()
        return g * scale.view(-1, *(1,) * (x.dim() - 2)), None, None, None, None, None


class Rewriting(TorchFunctionMode):
    """Context in which the forward pass takes operators whose backward passes suit vmap."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _batch_norm(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        given = (running_mean, running_var, weight, bias)
        if training or any(t is None for t in given):
            plain = torch.nn.functional.batch_norm
            return plain(x, running_mean, running_var, weight, bias, training, momentum, eps)
        out: Tensor = EvalNorm.apply(x, weight, bias, running_mean, running_var, eps)
        return out


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
            if name in _VIEWS or place in self._views:
                self._follow(parent, here, sites)
                continue
            consumer = _CONSUMERS.get(name)
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

    def _terminal(self, edges: set[Edge]) -> list[Edge]:
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
        ends = self._terminal(set(at))
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
            with _tapped(passes, deliver, len(u), options):
                found = torch.func.vmap(lambda v: backward(v, True))(u)
            for edge, g in zip(ends, found):
                deliver(edge, g)
            return
        kept: dict[Edge, Tensor] = {}
        for c, v in enumerate(u):

            def store(edge: Edge, g: Tensor, c: int = c) -> None:
                if edge not in kept:
                    kept[edge] = g.new_zeros((len(u), *g.shape))
                kept[edge][c] = g

            with _tapped(passes, store, 0, options):
                found = backward(v, c == len(u) - 1)
            for edge, g in zip(ends, found):
                store(edge, g)
        for edge in (*passes, *ends):
            if edge in kept:
                deliver(edge, kept.pop(edge))


_taps: dict[int, Callable[[Tensor], None]] = {}
_numbers = itertools.count()


@torch.library.custom_op("gcfast::jacobian_tap", mutates_args=())
def _tap(g: Tensor, key: int) -> Tensor:
    """Hands a cotangent over; an op, because vmap gives an op the whole batch."""
    _taps[key](g)
    return g.new_empty(0)


@_tap.register_fake
def _(g: Tensor, key: int) -> Tensor:
    return g.new_empty(0)


def _tap_batch(info: Any, in_dims: tuple[int | None, ...], g: Tensor, key: int) -> tuple[Tensor, None]:
    at = in_dims[0]
    _taps[key](g.expand(info.batch_size, *g.shape) if at is None else g.movedim(at, 0))
    return g.new_empty(0), None


_tap.register_vmap(_tap_batch)


class _tapped:
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
            _taps[key] = lambda g, edge=edge: self.deliver(edge, g)  # type: ignore[misc]
            self.handles.append(edge[0].register_prehook(self._hook(edge, key)))

    def _hook(self, edge: Edge, key: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            g = grads[edge[1]]
            if g is not None:
                if self.batch:
                    _tap(g, key)
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
            _taps.pop(key, None)


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


def live_positions(site: Site, g: Tensor) -> tuple[Tensor, Tensor] | None:
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


def locate(graph: Graph, cotangents: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[set[Layout]]:
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
