"""Training and test tensors of a data set, standardised."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gcfast.cli.data.formats import Images
from gcfast.errors import UserError
from gcfast.storage import check_memory

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class DataSplit:
    """Training and test samples; images are float32 (n, channels, height, width), labels int64."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalisation: str
    source: str

    @property
    def features(self) -> int:
        channels, height, width = self.shape
        return channels * height * width

    def fingerprint(self) -> str:
        """A hash of the training samples, to tell whether a checkpoint meets the data it was trained on."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.y_train):
            digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self.x_train.to(device),
            self.y_train.to(device),
            self.x_test.to(device),
            self.y_test.to(device),
        )


@dataclass(frozen=True)
class Raw:
    """What a reader found, before any normalisation."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    scale: float
    source: str


def standardise(
    name: str,
    raw: Raw,
    limit: int | None,
    test_limit: int | None,
    statistics: tuple[Sequence[float], Sequence[float]] | None,
) -> DataSplit:
    classes = len(raw.class_names)
    if classes < 2:
        raise UserError(f"{raw.source}: expected at least two classes, found {classes}")
    for class_name in raw.class_names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in class_name):
            raise UserError(f"{raw.source}: expected class names that can be printed, got {class_name!r}")
    train, test = raw.train.check(raw.source, classes), raw.test.check(raw.source, classes)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{raw.source}: training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}"
        )
    images, labels = train.images[:limit], train.labels[:limit]
    channels, height, width = (int(extent) for extent in images.shape[1:])
    rows = len(images) + len(test.images[:test_limit])
    way_out = "fewer samples (--limit, --test-limit) or smaller images"
    check_memory(f"{raw.source} in float32", 4 * rows * math.prod(images.shape[1:]), None, _CPU, way_out)
    if statistics is None:
        moments = [_moments(counts) for counts in _pixel_counts(images).tolist()]
        mean, std = np.array(moments).T / raw.scale
        std = np.where(std > 0, std, 1.0)  # a constant channel has nothing to scale
    else:
        mean, std = np.asarray(statistics[0], dtype=np.float64), np.asarray(statistics[1], dtype=np.float64)
        if mean.shape != (channels,) or std.shape != (channels,):
            raise UserError(
                f"{raw.source}: images have {channels} channels, the checkpoint's data had {mean.size}"
            )

    def tensor(part: NDArray[np.uint8]) -> torch.Tensor:
        # A table of the 256 pixel values: distinct pixels stay distinct, with no float64 copy of the images.
        table = ((np.arange(256) / raw.scale - mean[:, None]) / std[:, None]).astype(np.float32)
        out = np.empty(part.shape, dtype=np.float32)
        for channel in range(channels):
            out[:, channel] = table[channel][part[:, channel]]
        return torch.from_numpy(out)

    def shown(values: NDArray[np.float64]) -> str:
        return ", ".join(f"{value:.4f}" for value in values)

    return DataSplit(
        name=name,
        x_train=tensor(images),
        y_train=torch.from_numpy(np.ascontiguousarray(labels)),
        x_test=tensor(test.images[:test_limit]),
        y_test=torch.from_numpy(np.ascontiguousarray(test.labels[:test_limit])),
        classes=classes,
        class_names=raw.class_names,
        shape=(channels, height, width),
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        normalisation=(
            f"pixels / {raw.scale:g}, minus mean {shown(mean)}, divided by standard deviation {shown(std)}"
            " (one of each a channel, from the training samples)"
        ),
        source=raw.source,
    )


def _moments(counts: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of pixels of which ``counts[v]`` have the value v.

    In whole numbers: E[x^2] - E[x]^2 in floating point leaves 1e-10 of a constant channel, by which unseen
    pixels would be divided. So the deviation is zero where all are equal, and only there.
    """
    n, total = sum(counts), sum(level * count for level, count in enumerate(counts))
    squares = sum(level * level * count for level, count in enumerate(counts))
    return total / n, math.sqrt(n * squares - total * total) / n


def _pixel_counts(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each channel takes each of the 256 values: exact, hence the same on every machine."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for start in range(0, len(images), 4096):  # bincount widens to 64 bits
        for channel, values in enumerate(counts):
            values += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
    return counts
