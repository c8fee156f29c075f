"""Selects layers by name, glob pattern or class; checks the samples, and that the model is in eval mode."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gcfast import errors

Layers = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def checked_inputs(name: str, x: Any) -> Any:
    leaves = [v for v in tree_leaves(x) if isinstance(v, Tensor)]
    if not leaves:
        raise TypeError(f"{name} must be a tensor, or a tuple or dict of tensors; got {type(x).__name__}")
    for v in leaves:
        errors.is_dense(name, v)
        if v.dim() == 0:
            raise ValueError(
                f"{name} must have a first dimension of samples; got a tensor without dimensions"
            )
        if len(v) != len(leaves[0]):
            raise ValueError(
                f"{name}: all tensors must have one row a sample; got {len(leaves[0])} and {len(v)} rows"
            )
        if v.is_floating_point() and v.element_size() > 1 and not bool(v.isfinite().all()):
            raise ValueError(f"{name} must be finite; it holds a NaN or an infinity")
    if len(leaves[0]) == 0:
        raise ValueError(f"{name} must hold at least one sample; got shape {tuple(leaves[0].shape)}")
    return x


def refuse_training(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"model: {name!r} is not initialised yet (a lazy module): run one forward pass")
    for name, module in model.named_modules():
        where = f"layer {name!r} ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{where} takes statistics of the batch, so that one sample's outputs depend on the others: "
                "call model.eval() first"
                + ("" if module.track_running_stats else "; it keeps no running statistics")
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
            raise ValueError(
                f"{where} has scale_grad_by_freq: its gradient is divided by counts in the batch, and is no "
                "derivative of the output"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{where} drops at random: call model.eval() first")
        if isinstance(module, nn.MultiheadAttention) and module.training and module.dropout > 0:
            raise ValueError(f"{where} drops at random: call model.eval() first")


def owning_layers(model: nn.Module) -> dict[str, str]:
    """The layer of each parameter, under the first of its names."""
    owners = {}
    for name, _ in model.named_parameters():
        layer = name.rpartition(".")[0]
        owners[name] = layer or name
    return owners


def listed(layers: Layers) -> list[str | type[nn.Module]]:
    """The layers that a user names, as a list that is not empty."""
    items = [layers] if isinstance(layers, (str, type)) else layers
    if not isinstance(items, Sequence) or not items:
        raise TypeError(
            f"layers: expected names, patterns or classes of modules, at least one; got {errors.came(layers)}"
        )
    return list(items)


def select_parameters(
    model: nn.Module, owners: Mapping[str, str], layers: Layers | None, known: set[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the layers that are asked for, in the model's order."""
    every = {name: p for name, p in model.named_parameters() if name in owners}
    if layers is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "the model has no parameter with requires_grad: there is nothing to differentiate by"
            )
        return chosen
    aliases = {id(p): name for name, p in every.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: set[str] = set()
    for item in listed(layers):
        found = set()
        if isinstance(item, type):
            for module in modules.values():
                if isinstance(module, item):
                    found |= {aliases[id(p)] for p in module.parameters(recurse=False) if id(p) in aliases}
        elif isinstance(item, str):
            for alias, p in model.named_parameters(remove_duplicate=False):
                layer = alias.rpartition(".")[0] or alias
                if id(p) in aliases and (
                    fnmatch.fnmatchcase(alias, item) or fnmatch.fnmatchcase(layer, item)
                ):
                    found.add(aliases[id(p)])
        else:
            raise TypeError(
                f"layers must be names, patterns or classes of modules; got {type(item).__name__}"
            )
        if not found:
            have = sorted(known or set(owners.values()))
            raise ValueError(
                f"layers: {item!r} names no layer or parameter; the model has {', '.join(have[:20])}"
                + (", ..." if len(have) > 20 else "")
            )
        names |= found
    for name in every:
        if name in names and not every[name].requires_grad:
            raise ValueError(
                f"layers: parameter {name!r} has requires_grad=False; autograd does not reach it"
            )
    return {name: p for name, p in every.items() if name in names}
