"""Jacobian-vector products J v: by forward mode where it is right, else by two backward passes or by rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.jacobian.forward import forward, is_close, log, observable, rows_of, sample_count
from gcfast.jacobian.sample_by_sample import rows_by_autograd
from gcfast.model import call_arguments, copy_tensors

Parameters = Mapping[str, nn.Parameter]
Direction = Mapping[str, Tensor]  # a tensor for every parameter
# J v, (n, C), of a model in its parameters along a direction, for a batch of n samples
Way = Callable[[nn.Module, Parameters, Direction, Any], Tensor]


def choose_way(model: nn.Module, parameters: Parameters, one: Any, padded: bool) -> Way:
    """The first way that agrees with rows of J on a sample: operators may lack a forward derivative, some
    without a word, or a derivative of the backward one. ``padded``: an embedding has a ``padding_idx``."""
    generator = torch.Generator("cpu").manual_seed(2)
    draw = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p)
        for name, p in parameters.items()
    }
    truth = by_rows(model, parameters, draw, one)
    # the row of an embedding's padding_idx has a forward derivative and no gradient
    ways = (transposed,) if padded else (forward_mode, transposed)
    for way in ways:
        try:
            if is_close(way(model, parameters, draw, one), truth):
                return way
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            log.debug("LayerJacobians: %s refused: %s", way.__name__, error)
    log.info("LayerJacobians: jvp goes row by row: an operator has neither a forward nor a second derivative")
    return by_rows


def forward_mode(model: nn.Module, parameters: Parameters, direction: Direction, batch: Any) -> Tensor:
    args, kwargs = call_arguments(copy_tensors(batch))
    at = {name: parameters[name].detach() for name in direction}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, p, args, kwargs)
        return y

    with observable(model):
        along: Tensor = torch.func.jvp(outputs, (at,), (dict(direction),))[1]
    return along.detach()


def transposed(model: nn.Module, parameters: Parameters, direction: Direction, batch: Any) -> Tensor:
    """<J^T u, v> is linear in u: its gradient is J v."""
    with observable(model):
        y = forward(model, batch)
        u = torch.zeros_like(y, requires_grad=True)
        at = [parameters[name] for name in direction]
        grads = torch.autograd.grad(y, at, u, create_graph=True, allow_unused=True)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, direction.values()) if g is not None])
        return torch.autograd.grad(along.sum(), u)[0].detach()


def by_rows(model: nn.Module, parameters: Parameters, direction: Direction, batch: Any) -> Tensor:
    v = torch.cat([part.flatten() for part in direction.values()])
    at = {name: parameters[name] for name in direction}
    samples = (rows_of(batch, i, i + 1) for i in range(sample_count(batch)))
    return torch.stack([rows_by_autograd(model, at, one, slice(None)) @ v for one in samples])
