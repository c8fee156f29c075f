"""What the Gaussian step drew for each weight, as long as the weight is as it was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gcfast.model.freeze import digest


@dataclass(frozen=True)
class Draw:
    """scale · N(0, I) was added to a weight after step number ``step``, from a generator seeded by ``seed``.

    ``scale`` 0: the weight was left out, or nothing was added.
    """

    scale: float
    seed: int
    step: int


_drawn = WeakTensorKeyDictionary()


def note_draws(parameters: Mapping[str, nn.Parameter], draws: Mapping[str, Draw]) -> None:
    """Remember the draws, by name, of parameters that are now as they were drawn."""
    for name, draw in draws.items():
        _drawn[parameters[name]] = (draw, digest(parameters[name]))


def forget_draws(parameters: Mapping[str, nn.Parameter]) -> None:
    """The parameters are trained again, so that what was drawn is not what they are."""
    for parameter in parameters.values():
        _drawn.pop(parameter, None)


def draw_of(parameter: Tensor) -> Draw | None:
    """What was drawn for the parameter; None where nothing is recorded or its numbers have changed since."""
    draw, bits = _drawn.get(parameter, (None, b""))
    return draw if draw is not None and digest(parameter) == bits else None
