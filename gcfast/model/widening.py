"""Put a wide analytic layer before the head of a model that has none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.model.head import Head, find_head
from gcfast.model.tracing import unwrap
from gcfast.nn import WideHead, WideLayer
from gcfast.ops import arguments


@ordinary()
def widen(
    model: nn.Module,
    n_samples: int,
    *,
    width: int | None = None,
    activation: str = "softplus",
    beta: float = 1.0,
    inputs: Any = None,
    head: Head | nn.Module | str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put a wide analytic layer before the head of ``model``, in place, unless a wide enough layer is there.

    The head ``nn.Linear(d, C)`` gives way to ``WideHead(WideLayer(d, m), nn.Linear(m, C))``, of
    its device, dtype and with a bias if it had one; both are drawn anew, so widen before training and before
    the optimizer is made.

    Args:
        model: any model whose head ``gcfast.find_head`` finds.
        n_samples: size n of the training set.
        width: m; default 1.1 n, rounded up: 10 % above the n the theorem needs keeps sigma_min away from 0.
        activation, beta: of the :class:`WideLayer`.
        inputs: a batch for one observed forward pass, where the structure leaves the head ambiguous.
        head: module or name, likewise.
        generator: for the weights of both layers.

    Returns:
        the same model (a new ``WideHead`` where the model is itself the head).

    Raises:
        HeadError: no head, or an ambiguous one. ValueError: naming the argument.
    """
    n_samples = errors.is_count("n_samples", n_samples)
    if width is not None:
        width = errors.is_count("width", width, n_samples)
    errors.is_generator("generator", generator)
    arguments.is_activation(activation, beta)
    m = -(-11 * n_samples // 10) if width is None else width
    root = unwrap(model)
    found = find_head(root, inputs, head)
    if found.in_features >= n_samples:
        return model
    old = found.module
    options: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    wide = WideLayer(found.in_features, m, activation=activation, beta=beta, **options)
    new = nn.Linear(m, found.out_features, bias=old.bias is not None, **options)
    if generator is not None:
        wide.reset_parameters(generator)
        with torch.no_grad():  # as nn.Linear draws them
            for p in new.parameters():
                p.uniform_(-1.0 / math.sqrt(m), 1.0 / math.sqrt(m), generator=generator)
    pair = WideHead(wide, new)
    pair.train(old.training)
    if old is root:
        return pair
    parent, _, attribute = found.name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, pair)
    return model
