"""Data, models, batches and augmentation of the suite, all functions of a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.data.split import DataSplit
from gcfast.cli.training import models
from gcfast.cli.training.train import Schedule
from gcfast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BETA = 4.0  # of the wide layer's softplus; docs/paper.md has 1.0 beside it
PERTURBATION = 1e-3
TARGET_GAP = 1e-6
BATCH = 64
_ROWS = 1000  # of an evaluation

# Pixels by which augmentation shifts at most, and whether it mirrors: what the images' size and subject bear.
AUGMENTATION = {"digits": (1, False), "semeion": (2, False), "mnist": (2, False), "cifar10": (4, True)}


def data_root() -> Path:
    return Path(os.environ.get("GCFAST_DATA") or ROOT.parent / "shared" / "data")


def load(name: str, n: int | None, seed: int, test: int | None = None) -> DataSplit:
    """``seed`` draws the split of data that have none, and the choice among more images than ``n``."""
    return load_dataset(name, data_root(), limit=n, test_limit=test, seed=seed)


def available(name: str) -> str:
    """Why a data set is not here, "" where it is."""
    try:
        load(name, 2, 0, 2)
    except (UserError, OSError) as error:
        return str(error)
    return ""


def width(n: int) -> int:
    """ceil(1.1 n), in integers."""
    return -(-11 * n // 10)


def build(kind: str, split: DataSplit, m: int, activation: str = "softplus", beta: float = BETA) -> nn.Module:
    """``narrow``: d-8-8-m; ``mlp``: d-128-64-m or d-256-128-m; ``resnet18``: width 64, ``resnet18/4``: 16,
    ``resnet18/4s2``: its first convolution of stride 2."""
    if kind in ("narrow", "mlp"):
        hidden = (8, 8) if kind == "narrow" else models.default_hidden("mlp", split.shape)
        model: Any = models.mlp(split.features, split.classes, hidden, activation, m)
    else:
        channels = 64 if kind == "resnet18" else 16
        model = models.resnet18(split.shape[0], split.classes, channels, m, activation)
        if kind.endswith("s2"):
            model.stem = nn.Conv2d(split.shape[0], channels, 3, 2, 1, bias=False)
    if activation == "softplus":
        model.wide.beta = beta
    return model


def optimizer(base: str, parameters: Any, lr: float) -> torch.optim.Optimizer:
    if base == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return torch.optim.Adam(parameters, lr=lr)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Batch normalisation's statistics at these weights: those of one pass over ``x``."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        return
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over batches
    model.train()
    for rows in x.split(256):
        if len(rows) > 1:
            model(rows)
    for layer in norms:
        layer.momentum = 0.1
    model.eval()


@torch.no_grad()
def evaluate(forward: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, in float64 from the logits on, and the share of wrong answers in percent."""
    total, wrong = 0.0, 0
    for rows, labels in zip(x.split(_ROWS), y.split(_ROWS)):
        logits = forward(rows)
        total += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        wrong += int((logits.argmax(1) != labels).sum())
    return total / len(y), 100 * wrong / len(y)


@dataclass(frozen=True)
class Augmentation:
    """Random shifts over a background of each channel's least value, mirror images where they mean the same.

    A function of the seed and the step, so that two optimizers see the same images, and a run that was
    stopped goes on with the ones it would have seen.
    """

    shift: int
    mirror: bool
    background: Tensor
    seed: int

    @classmethod
    def of(cls, split: DataSplit, seed: int) -> Augmentation:
        shift, mirror = AUGMENTATION[split.name]
        return cls(shift, mirror, split.x_train.amin(dim=(0, 2, 3)), seed)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        state = np.random.SeedSequence((self.seed, step, 1)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        n, channels, height, across = images.shape
        s = self.shift
        frame = self.background.to(images).view(1, channels, 1, 1)
        frame = frame.expand(n, channels, height + 2 * s, across + 2 * s).clone()
        frame[:, :, s : s + height, s : s + across] = images
        offset = torch.randint(0, 2 * s + 1, (2, n, 1), generator=generator).to(images.device)
        rows = offset[0] + torch.arange(height, device=images.device)
        columns = offset[1] + torch.arange(across, device=images.device)
        if self.mirror:
            turned = torch.rand(n, 1, generator=generator).to(images.device) < 0.5
            columns = torch.where(turned, columns.flip(1), columns)
        sample = torch.arange(n, device=images.device)
        # (n, height, width, channels): the channel axis is put last by indexing on both of its sides
        return frame[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def schedule(n: int, epochs: int, seed: int, tau: float = 0.6) -> Schedule:
    return Schedule(n, BATCH, epochs, tau, seed)
