"""The networks the command line trains: a multilayer perceptron and a pre-activation ResNet-18.

Both end in one ``nn.Linear`` head, with a :class:`~gcfast.nn.WideLayer` before it on request, and
use analytic activations, because the guarantee needs features that are analytic in the weights.
A :class:`ModelSpec` is a model's recipe in plain values: what a checkpoint stores beside its weights.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gcfast.errors import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
# Slopes at zero: weights of variance 1 / (slope^2 fan_in) hand the samples' spread on from layer to layer.
# torch's default shrinks it several times a layer, and samples that nearly coincide train slowly.
_SLOPES = {"softplus": 0.5, "sigmoid": 0.25, "tanh": 1.0, "gelu": 0.5, "silu": 0.5}
MODELS = ("mlp", "resnet18")


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UserError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _wide(d: int, m: int, activation: str) -> nn.Module:
    from gcfast.nn import WideLayer

    return WideLayer(d, m, activation=activation)


def mlp(
    in_features: int,
    classes: int,
    hidden: Sequence[int] = (256, 128),
    activation: str = "softplus",
    wide: int | None = None,
) -> nn.Sequential:
    """Flatten, ``hidden`` fully connected layers, the wide layer if ``wide`` is given, the head."""
    widths = [in_features, *hidden]
    if min(widths) < 1 or classes < 1 or (wide is not None and wide < 1):
        raise UserError(f"mlp: every width must be at least 1, got {widths}, wide {wide}, classes {classes}")
    _activation(activation)  # an unknown name is refused by name
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        linear = nn.Linear(before, after)
        nn.init.normal_(linear.weight, 0.0, 1.0 / (_SLOPES[activation] * math.sqrt(before)))
        nn.init.zeros_(linear.bias)
        layers[f"linear{index}"] = linear
        layers[f"activation{index}"] = _activation(activation)
    last = widths[-1]
    if wide is not None:
        layers["wide"] = _wide(last, wide, activation)
        last = wide
    layers["head"] = nn.Linear(last, classes)
    return nn.Sequential(layers) if wide is None else _WideMlp(layers)


class _WideMlp(nn.Sequential):
    """Ends in a wide layer and its head, whose features between them are not stored."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from gcfast.nn import through_head

        if len(self) < 2:  # a slice
            out: torch.Tensor = super().forward(x)
            return out
        *body, wide, head = self
        for layer in body:
            x = layer(x)
        return through_head(wide, head, x)


class _Block(nn.Module):
    """norm, activation, 3x3 convolution, twice, added to the input (He et al. 2016, identity mappings)."""

    def __init__(self, before: int, after: int, stride: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.activation1 = _activation(activation)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.activation2 = _activation(activation)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        same = stride == 1 and before == after
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activation1(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.activation2(self.norm2(self.conv1(out))))
        return out + skip


class PreActivationResNet(nn.Module):
    """Four stages of two pre-activation blocks for small images: no pooling but the average at the end."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int = 64,
        wide: int | None = None,
        activation: str = "softplus",
    ) -> None:
        super().__init__()
        if min(in_channels, classes, width) < 1 or (wide is not None and wide < 1):
            raise UserError(
                f"resnet18: every size must be at least 1, got channels {in_channels}, classes {classes},"
                f" width {width}, wide {wide}"
            )
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        before = width
        for stage in range(4):
            after = width * 2**stage
            for index in range(2):
                stages.append(_Block(before, after, 2 if stage and not index else 1, activation))
                before = after
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(before)
        self.activation = _activation(activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.wide: nn.Module | None = None if wide is None else _wide(before, wide, activation)
        self.head = nn.Linear(before if wide is None else wide, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.flatten(self.pool(self.activation(self.norm(self.blocks(self.stem(x))))))
        if self.wide is None:
            return self.head(out)
        from gcfast.nn import through_head

        return through_head(self.wide, self.head, out)


def resnet18(
    in_channels: int, classes: int, width: int = 64, wide: int | None = None, activation: str = "softplus"
) -> PreActivationResNet:
    """The 18-layer pre-activation ResNet; ``width`` is the number of channels of its first stage."""
    return PreActivationResNet(in_channels, classes, width, wide, activation)


@dataclass(frozen=True)
class ModelSpec:
    """A model's recipe. ``hidden`` is the MLP's layers, or a ResNet's one number: its first stage's width."""

    kind: str
    shape: tuple[int, int, int]
    classes: int
    hidden: tuple[int, ...]
    wide: int
    activation: str = "softplus"

    def build(self) -> nn.Module:
        channels, height, width = self.shape
        if self.kind == "mlp":
            return mlp(channels * height * width, self.classes, self.hidden, self.activation, self.wide)
        if self.kind == "resnet18":
            if len(self.hidden) != 1:
                raise UserError(
                    f"--hidden: resnet18 takes one number, its first stage's width, got {self.hidden}"
                )
            return resnet18(channels, self.classes, self.hidden[0], self.wide, self.activation)
        raise UserError(f"--model: expected one of {', '.join(MODELS)}, got {self.kind!r}")

    def describe(self) -> str:
        if self.kind == "mlp":
            inputs = self.shape[0] * self.shape[1] * self.shape[2]
            return "-".join(str(size) for size in (inputs, *self.hidden, self.wide, self.classes)) + " MLP"
        return f"ResNet-18 (width {self.hidden[0]}, wide layer {self.wide}, {self.classes} outputs)"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        try:
            return cls(
                kind=str(values["kind"]),
                shape=(int(values["shape"][0]), int(values["shape"][1]), int(values["shape"][2])),
                classes=int(values["classes"]),
                hidden=tuple(int(size) for size in values["hidden"]),
                wide=int(values["wide"]),
                activation=str(values["activation"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's model recipe is not complete ({error!r})") from error


def default_hidden(kind: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Layers below the wide one: 128-64 for up to 256 inputs, 256-128 above; a ResNet's width 64."""
    if kind == "resnet18":
        return (64,)
    return (128, 64) if shape[0] * shape[1] * shape[2] <= 256 else (256, 128)
