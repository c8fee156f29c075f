"""From what a user calls a loss (a name, a torch.nn module, their own) to a convex loss."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from gcfast.errors import came
from gcfast.losses.base import ConvexLoss
from gcfast.losses.cross_entropy import CrossEntropy
from gcfast.losses.elementwise import MSE, BCEWithLogits, Elementwise, Huber
from gcfast.losses.rounding import UNIT, mean_below

_BY_NAME: dict[str, type[ConvexLoss]] = {
    "cross_entropy": CrossEntropy,
    "mse": MSE,
    "bce_with_logits": BCEWithLogits,
    "huber": Huber,
}
OWN = tuple(_BY_NAME.values())

# the loss of each torch module, and the arguments that it takes over; all others must have their defaults
_OF_TORCH: dict[type[nn.Module], tuple[type[ConvexLoss], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (CrossEntropy, ("label_smoothing", "ignore_index")),
    nn.MSELoss: (MSE, ()),
    nn.BCEWithLogitsLoss: (BCEWithLogits, ()),
    nn.HuberLoss: (Huber, ("delta",)),
    nn.SmoothL1Loss: (Huber, ()),  # with beta = 1 the same function; otherwise Huber's over beta
}
_FORWARD = {kind: kind.forward for kind in _OF_TORCH}
_WAY_OUT = "subclass gcfast.ConvexLoss for a loss of your own"
_HINTS = {
    "reduction": "L is the mean over the samples; size_average=False and reduce=False set this too",
    "beta": "nn.HuberLoss(delta=beta) is beta times this loss: the same minimisers",
}


def resolve_loss(loss: str | nn.Module | ConvexLoss) -> ConvexLoss:
    """The :class:`ConvexLoss` of ``loss``: a name, a ``torch.nn`` loss with mean reduction, or itself.

    A torch module is taken for what its class computes, so it must be of that very class, without hooks and
    patches; its options are read here and now. Raises TypeError and ValueError naming ``loss``.
    """
    if isinstance(loss, ConvexLoss):
        if isinstance(loss, OWN) and (type(loss) not in OWN or _patched(loss)):
            raise TypeError(
                f"loss: {loss!r} changes a loss of gcfast's, whose other methods then belong to another "
                f"function; {_WAY_OUT}"
            )
        if isinstance(loss, OWN):  # made again, for its options may have been set to anything
            options = inspect.signature(type(loss)).parameters
            try:
                return type(loss)(**{name: getattr(loss, name) for name in options})
            except (TypeError, ValueError) as error:
                raise type(error)(f"loss: {loss!r} with {error}") from error
        return loss
    if isinstance(loss, str):
        name = loss.lower().replace("-", "_")
        if name not in _BY_NAME:
            raise ValueError(
                f"loss: expected one of {sorted(_BY_NAME)}, a torch.nn loss or a gcfast.ConvexLoss; "
                f"got {loss!r}"
            )
        return _BY_NAME[name]()
    if type(loss) in _OF_TORCH:
        return _resolve_torch(loss)
    got = f"the class {loss.__name__}, not an instance" if isinstance(loss, type) else type(loss).__name__
    if isinstance(loss, tuple(_OF_TORCH)):
        got += ", a subclass, which is a loss of its own"
    raise TypeError(
        f"loss: expected one of {sorted(_BY_NAME)}, {', '.join(f'nn.{kind.__name__}' for kind in _OF_TORCH)} "
        f"or a gcfast.ConvexLoss (convex in the outputs); got {got}; {_WAY_OUT}"
    )


def _resolve_torch(loss: nn.Module) -> ConvexLoss:
    kind = type(loss)
    own, options = _OF_TORCH[kind]
    hooks = ("forward_hooks", "forward_pre_hooks")
    found = [f"{name} is replaced" for name in _patched(loss)]
    found += [f"it has {name}" for name in hooks if getattr(loss, f"_{name}")]
    found += [f"there are global {name}" for name in hooks if getattr(global_hooks, f"_global_{name}")]
    if kind.forward is not _FORWARD[kind]:
        found.append("the forward of its class is replaced")
    if loss._compiled_call_impl is not None:
        found.append("it is compiled")
    if found:
        raise ValueError(
            f"loss: expected nn.{kind.__name__} as torch made it, but {', '.join(found)}: it may be another "
            f"function; give a new one, or {_WAY_OUT}"
        )
    for name, parameter in inspect.signature(kind).parameters.items():
        value, default = getattr(loss, name, parameter.default), parameter.default
        same = value is default or (isinstance(value, (int, float, str)) and value == default)
        if name not in options and not same:
            hint = _HINTS.get(name)
            raise ValueError(
                f"loss: expected nn.{kind.__name__} with {name}={default!r}; got {name}="
                f"{f'a {type(value).__name__}' if isinstance(value, Tensor) else repr(value)}"
                f"{f' ({hint})' if hint else ''}; {_WAY_OUT}"
            )
    try:
        return own(**{name: getattr(loss, name, None) for name in options})
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss: nn.{kind.__name__} with {error}") from error


def _patched(thing: object) -> list[str]:
    """Methods of its class that an object has replaced for itself."""
    return [name for name in vars(thing) if callable(getattr(type(thing), name, None))]


def check_matches_outputs(loss: ConvexLoss, y: Tensor, shape: torch.Size) -> None:
    """Raise ValueError where torch would broadcast targets y and outputs of one model, ``shape`` a sample.

    (n,) against (n, 1) makes n x n values there, none of which need be a sample's own. Of outputs (n, C, k)
    its cross-entropy takes k labels a sample, and of (n,) a single one for all.
    """
    if isinstance(loss, CrossEntropy) and len(shape) != 1:
        raise ValueError(
            f"loss: cross-entropy is of outputs (n, C); the model's are {(len(y), *shape)}, which torch's "
            "loss takes for something else; leave out the view at the model's end"
        )
    if isinstance(loss, Elementwise) and y.dim() > 0 and y.shape[1:] != shape:
        raise ValueError(
            f"targets: expected shape {tuple(y.shape[:1] + shape)}, as the model's outputs; got "
            f"{tuple(y.shape)}, which torch's loss broadcasts or refuses; reshape the targets"
        )


def infimum_with_copies(loss: ConvexLoss, y: Tensor, copies: list[list[int]]) -> float:
    """No more than L* = (1/n) sum_i inf loss_i, where equal samples must share one output."""
    if not isinstance(y, Tensor) or y.dim() == 0:
        raise ValueError(f"loss: {loss!r}.prepare must give a tensor, one row per sample; got {came(y)}")
    found = loss.infimum(y)
    if not isinstance(found, Tensor) or found.shape != y.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"loss: {loss!r}.infimum must give one number a sample, ({len(y)},); got {got}")
    total = found.to(torch.float64).clone()
    if copies:
        members = torch.tensor([i for group in copies for i in group], device=y.device)
        sizes = torch.tensor([len(group) for group in copies], device=y.device)
        group = torch.arange(len(copies), device=y.device).repeat_interleave(sizes)
        total[members] = 0.0
        total[members[sizes.cumsum(0) - sizes]] = loss.group_infimum(y[members], group, len(copies)).to(total)
    if loss.assumes_rounding:
        total -= 64 * UNIT * total.abs()
    return mean_below(total)
