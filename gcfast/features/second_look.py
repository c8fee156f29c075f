"""A second look at a few samples: in another batch, with other random numbers, they have the same features.

What a model computes in evaluation mode is a function of one sample, or the features are no fixed matrix.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gcfast.features.loader import tensors
from gcfast.features.second_reading import is_column
from gcfast.model import FeatureTap, copy_tensors, keeping_random_state

FEW = 8  # samples looked at again, of the first batch and of the last one
LOOKS = 32  # where a state moves in a pass, of which the model may make use now and then only


class _Reached(Exception):
    """Ends a forward pass, and takes along what entered the module tapped."""


class _LookingTap(FeatureTap):
    """Notes whether a state moved on the way, and stops there: what is left may cost more.

    A state is that of a random number generator, or what a module counts and keeps.
    """

    moved = False

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.moved = self.moved or self.before != self._states()
        super()._note(module, args, kwargs)
        raise _Reached(self._seen[module][-1])

    def look(self, rows: Any) -> Tensor:
        """What enters the module, with other random numbers than before: a call gives torch's state back."""
        for device in (torch.device("cpu"), *_gpus(self.model)):
            torch.rand(97, device=device)
        self.before = self._states()
        try:
            return self(rows)[0]  # of a model that catches what ends the pass
        except _Reached as reached:
            return reached.args[0]

    def _states(self) -> tuple[Any, ...]:
        return _random_states(self.model), [*map(_kept_by, self.model.modules())]


def _gpus(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _random_states(model: nn.Module) -> tuple[Any, ...]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _gpus(model))]
    return (*(s.numpy().tobytes() for s in states), random.getstate(), pickle.dumps(np.random.get_state()))


def _kept_by(module: nn.Module) -> list[Any]:
    """Numbers and tensors that a module keeps, as far as they move; its flag is lowered on the way."""
    own = {**vars(module), "training": None}.values()
    # a tensor put in the place of another is most often an output that is of no use, but these are a state
    named = (*module._buffers.values(), *module._parameters.values())
    return [
        *((id(t), _version(t)) for t in named),
        *(_version(v) for v in own if isinstance(v, (int, float, Tensor))),
    ]


def _version(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return 0 if value.is_inference() else value._version


class SecondLook:
    """Keeps a few samples of the first batch and of the last one with their features, and looks again.

    ``module``: what the features enter.
    """

    def __init__(self, model: nn.Module, module: Any) -> None:
        self.model, self.module = model, module
        self.by_rows = True
        self.sizes: list[int] = []  # of the first batch and of the last one
        self.kept: list[tuple[Any, Tensor] | None] = []  # their inputs and features, None: not by rows

    def keep(self, inputs: Any, features: Tensor) -> None:
        """Take in the next batch, inputs where the model is; look again at the first one at once."""
        rows = len(features)
        few = range(min(FEW, (rows + 1) // 2))
        whole = not by_rows(inputs, rows)
        # copies, for what is kept of a large batch would keep all of its memory
        chosen = None if whole else copy_tensors((taken(inputs, few), features[: len(few)]))
        if not self.kept:
            self.by_rows = not whole
            self.sizes, self.kept = [rows], [chosen or copy_tensors((inputs, features))]
            self._check(1)
        else:
            self.sizes[1:], self.kept[1:] = [rows], [chosen]

    def finish(self, again: bool = False) -> None:
        """Look at the first batch and the last one together; ``again``: whatever has been looked at."""
        if again or len(self.kept) > 1:
            self._check(0)

    def samples(self) -> Any:
        """Inputs of the few samples that are looked at."""
        return self._mixture()[0]

    def _check(self, again: int) -> None:
        """Raise ValueError naming ``model`` where features are others, among other samples or ``again``."""
        inputs, expected = self._mixture()
        tap = _LookingTap(self.model, self.module)
        with keeping_random_state(self.model), tap:
            found = self._look(tap, inputs)
            if found.shape != expected.shape:
                raise ValueError(
                    f"model: gave features {tuple(found.shape)} in a second look, where "
                    f"{tuple(expected.shape)} are expected; what it computes of a sample must not depend on "
                    "its batch"
                )
            for _ in range(LOOKS if tap.moved else again):
                other = self._look(tap, inputs)
                # the same rows, so the same roundings, but where a device adds in any order
                exact = min(1e-4, 64 * torch.finfo(other.dtype).eps) if other.device.type == "cpu" else 1e-4
                if tap.moved and other.device.type == "cpu":  # then any difference is of that state
                    exact = 0.0
                if _differ(other, found, exact, 0.0 if other.device.type == "cpu" else 1.0):
                    raise ValueError(
                        "model: the same inputs gave other features in a second look (relative difference "
                        f"{_relative(other, found):.1e}): something random stays active in evaluation mode, "
                        "or a state moves with every pass. Switch it off: the guarantee is about one fixed "
                        "matrix of features"
                    )
        eps = torch.finfo(found.dtype).eps
        if found.device.type != "cpu":
            eps = max(eps, 2.0**-10)  # of TF32, in which float32 may be computed
        if _differ(found, expected, eps**0.5 if eps > 1e-6 else min(1e-4, eps**0.5), 1e-3):
            raise ValueError(
                "model: the same samples gave other features among other samples (relative difference "
                f"{_relative(found, expected):.1e}): what the model computes of a sample depends on its "
                "batch (batch statistics in evaluation mode, as of track_running_stats=False?) or on earlier "
                "batches, so that no matrix of features belongs to it"
            )

    def _look(self, tap: _LookingTap, inputs: Any) -> Tensor:
        try:
            return tap.look(inputs)
        except Exception as error:
            raise ValueError(
                f"model: fails on a few of the samples in a batch of their own, where it took them among "
                f"others ({type(error).__name__}: {error}); what it computes of a sample must not depend on "
                "its batch"
            ) from error

    def _mixture(self) -> tuple[Any, Tensor]:
        """Samples of both batches in another order and number than in either, where samples are rows."""
        assert self.kept[0] is not None
        inputs, features = self.kept[0]
        if not self.by_rows:
            return inputs, features
        if len(self.kept) > 1 and self.kept[1] is not None:
            joined = _joined(inputs, self.kept[1][0])
            if joined is not None:
                inputs, features = joined, torch.cat([features, self.kept[1][1]])
        index = list(reversed(range(len(features))))
        while len(index) < 2 or len(index) in self.sizes:
            index.append(index[-1])
        return taken(inputs, index), features[index]


def by_rows(inputs: Any, rows: int) -> bool:
    """Whether every tensor of a batch has the samples first."""
    return all(t.dim() > 0 and len(t) == rows for t in tensors(inputs)) and bool(tensors(inputs))


def taken(inputs: Any, index: Sequence[int]) -> Any:
    """Samples of a batch; what is not a tensor or a list of values stays."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[list(index)]
        return type(value)(value[i] for i in index) if isinstance(value, (list, tuple)) else value

    rows = len(tensors(inputs)[0])
    return tree_map(part, inputs, is_leaf=lambda value: is_column(value, rows))


def _joined(a: Any, b: Any) -> Any:
    """Two batches as one, None where they do not fit together."""
    (left, kind), (right, other) = tree_flatten(a), tree_flatten(b)
    fits = kind == other and all(
        x.dtype == y.dtype and x.shape[1:] == y.shape[1:]
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else type(x) is type(y) and x == y
        for x, y in zip(left, right)
    )
    if not fits:
        return None
    pairs = zip(left, right, strict=True)
    return tree_unflatten([torch.cat([x, y]) if isinstance(x, Tensor) else x for x, y in pairs], kind)


def _differ(a: Tensor, b: Tensor, tolerance: float, share: float) -> bool:
    """Whether a column differs by more than ``tolerance`` of its largest entry, or of ``share`` of all's."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()  # what is not finite is refused elsewhere
    largest = torch.maximum(a.abs(), b.abs()).amax(0)
    allowed = tolerance * torch.maximum(largest, share * largest.amax())
    return not bool(((a - b).abs() <= allowed).all())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().amax() / (b.double().abs().amax() + 1e-300))
