"""Where a parameter is used in the autograd graph, and by which operator: one site per use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node
Edge = tuple[Node, int]  # a node and the number of one of its outputs


def signed(value: int) -> int:
    """Negative numbers that a node has saved come back as unsigned ones."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shape_of(edge: Edge) -> tuple[int, ...]:
    node, number = edge
    return tuple(node._input_metadata[number].shape)


def _reshape(x: Tensor, node: Node, number: int) -> Tensor:
    return x.reshape(shape_of((node, number)))


def _slice(x: Tensor, node: Node, number: int) -> Tensor:
    start, end = (None if v is None else signed(v) for v in (node._saved_start, node._saved_end))
    part: list[slice] = [slice(None)] * (signed(node._saved_dim) % x.dim())
    part.append(slice(start, end, node._saved_step))
    return x[tuple(part)]


# A view of a parameter, made again of a tensor of its shape: (tensor, node, number of the node's output).
VIEWS: dict[str, Callable[[Tensor, Node, int], Tensor]] = {
    "TBackward0": lambda x, f, i: x.t(),
    "TransposeBackward0": lambda x, f, i: x.transpose(signed(f._saved_dim0), signed(f._saved_dim1)),
    "PermuteBackward0": lambda x, f, i: x.permute([signed(d) for d in f._saved_dims]),
    **dict.fromkeys(
        (
            *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0"),
            *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "AliasBackward0", "CloneBackward0"),
        ),
        _reshape,
    ),
    "SplitBackward0": lambda x, f, i: x.split(f._saved_split_size, signed(f._saved_dim))[i],
    "SplitWithSizesBackward0": lambda x, f, i: x.split(list(f._saved_split_sizes), signed(f._saved_dim))[i],
    "UnbindBackward0": lambda x, f, i: x.unbind(signed(f._saved_dim))[i],
    "SelectBackward0": lambda x, f, i: x.select(signed(f._saved_dim), signed(f._saved_index)),
    "SliceBackward0": _slice,
}
# What may give each sample its own share of a parameter, and is a view of it where it does not.
_SHARES: dict[str, Callable[[Tensor, Node, int], Tensor]] = {
    "ExpandBackward0": lambda x, f, i: x.expand(shape_of((f, i))),
    "RepeatBackward0": lambda x, f, i: x.repeat(list(f._saved_repeats)),
    "EmbeddingBackward0": lambda x, f, i: x[f._saved_indices.cpu()].masked_fill(padding_mask(f).cpu(), -1),
}


def padding_mask(node: Node) -> Tensor:
    """Where an embedding's indices ask for the row that has no gradient; (..., 1)."""
    return (node._saved_indices == signed(node._saved_padding_idx)).unsqueeze(-1)


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
        out = torch.arange(math.prod(shape), device="cpu").view(tuple(shape))
        for node, number in self.steps:
            again = VIEWS.get(node.name()) or _SHARES[node.name()]
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
        # autograd itself sums over what a shorter bias was broadcast to
        whole = math.prod(shape_of(node.next_functions[0])) == shape_of((node, 0))[-1]
        return ("linear", "bias", 1.0) if whole else None
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
CONSUMERS: dict[str, Callable[[Node, int], Role | None]] = {
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
