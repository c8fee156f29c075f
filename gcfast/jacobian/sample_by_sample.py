"""Per-sample gradients by torch.func or row by row, where an operator has no Jacobian factor of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gcfast.jacobian.forward import forward, is_close, log, observable, rows_of, sample_count, stack_samples
from gcfast.jacobian.groups import Tile
from gcfast.model import call_arguments, copy_tensors


class SampleBySample:
    """J of a few of a model's parameters for samples of ``inputs``, by torch.func where that works.

    Whether it does is tried once for the parameters' names and the number of outputs.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any) -> None:
        self.model, self.parameters, self.inputs = model, parameters, inputs
        self._functional: dict[tuple[tuple[str, ...], int], bool] = {}

    def rows(self, names: Sequence[str], batch: Any, tile: Tile) -> Tensor:
        """J (n, c, p) of a few parameters, by torch.func or, where that does not work, one row at a time."""
        chosen = {name: self.parameters[name] for name in names}
        key = (tuple(names), tile.outputs)
        if key not in self._functional:
            self._functional[key] = self._agrees(chosen, tile)
        outputs = slice(tile.c, tile.e)
        if self._functional[key]:
            return _rows_by_torch_func(self.model, chosen, batch, outputs)
        samples = (rows_of(batch, i, i + 1) for i in range(tile.n))
        return torch.stack([rows_by_autograd(self.model, chosen, one, outputs) for one in samples])

    def _agrees(self, chosen: Mapping[str, nn.Parameter], tile: Tile) -> bool:
        """Whether torch.func gives autograd's rows for a few different samples: some operators' batching
        rules do not, or only for some numbers of samples and outputs."""
        n = sample_count(self.inputs)
        picked = sorted({0, n // 2, n - 1})
        if len(picked) in (1, tile.outputs):  # a rule that confuses two batches passes where they are alike
            picked += [0] * (2 if tile.outputs == len(picked) + 1 else 1)
        samples, outputs = [rows_of(self.inputs, i, i + 1) for i in picked], slice(tile.c, tile.e)
        try:
            found = _rows_by_torch_func(self.model, chosen, stack_samples(samples), outputs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            log.info(
                "LayerJacobians: row by row, for torch.func refuses this model: %s", str(error).split(".")[0]
            )
            return False
        truth = (rows_by_autograd(self.model, chosen, one, outputs) for one in samples)
        if all(is_close(rows, true) for rows, true in zip(found, truth)):
            return True
        log.info("LayerJacobians: row by row, for torch.func differs from autograd on this model")
        return False


def _rows_by_torch_func(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Any, outputs: slice
) -> Tensor:
    """J (n, c, p) of a batch of n samples, in one pass of vmap and jacrev."""
    weights = {name: p.detach() for name, p in parameters.items()}
    leaves, spec = tree_flatten(copy_tensors(batch))
    tensors = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]

    def outputs_of_one(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        parts = list(leaves)
        for k, x in zip(tensors, sample):
            parts[k] = x.unsqueeze(0)
        args, kwargs = call_arguments(tree_unflatten(parts, spec))
        y: Tensor = torch.func.functional_call(model, weights, args, kwargs)
        return y[0, outputs]

    in_dims = (None, *(0 for _ in tensors))
    jacobians = torch.func.vmap(torch.func.jacrev(outputs_of_one), in_dims)
    found = jacobians(weights, *(leaves[k] for k in tensors))
    rows = [found[name].reshape(*found[name].shape[:2], -1) for name in weights]
    return torch.cat(rows, 2).detach()


def rows_by_autograd(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], one: Any, outputs: slice
) -> Tensor:
    """J (c, p) of one sample, a backward pass for each output."""
    weights = list(parameters.values())
    y = forward(model, one)[0, outputs]
    rows = []
    for k in range(len(y)):
        last = k == len(y) - 1
        with observable(model):
            found = torch.autograd.grad(y[k], weights, retain_graph=not last, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)
