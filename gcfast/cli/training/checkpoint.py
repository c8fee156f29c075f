"""Checkpoints of the command line: weights with the recipe of the model and of the data they were trained on.

Plain values and tensors only, so that ``torch.load(..., weights_only=True)`` reads them as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.data.split import DataSplit
from gcfast.cli.training.models import ModelSpec
from gcfast.errors import UserError, came
from gcfast.storage import load_torch, save_torch

_FORMAT = "gcfast-checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class DataSpec:
    """How to load the same samples again, wherever their files are by then."""

    name: str
    limit: int | None
    test_limit: int | None
    seed: int
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    def load(self, root: str | Path | None) -> DataSplit:
        """The samples at ``root`` by this recipe, normalised as in training."""
        return load_dataset(
            self.name,
            root,
            self.limit,
            self.test_limit,
            self.seed,
            image_size=self.image_size,
            statistics=(self.mean, self.std),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSpec:
        mean = tuple(float(value) for value in values["mean"])
        std = tuple(float(value) for value in values["std"])
        if not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
            raise ValueError("expected finite means and positive standard deviations")
        kinds = {"name": str, "fingerprint": str, "seed": int}
        counts = {
            key: values[key] for key in ("limit", "test_limit", "image_size") if values[key] is not None
        }
        for key, value in {**counts, **{key: values[key] for key in kinds}}.items():
            if type(value) is not kinds.get(key, int):
                raise TypeError(f"{key}: {type(value).__name__}")
        return cls(**{**values, "mean": mean, "std": std})


@dataclass(frozen=True)
class RunCheckpoint:
    """Weights and recipes; ``stage`` is ``phase one``, ``switch`` (V_tau) or ``nearest`` (solved).

    ``heads`` keeps every head found for the same hidden weights: ``switch``, ``nearest``, ``two_phase``.
    """

    model: ModelSpec
    data: DataSpec
    loss: str
    stage: str
    step: int
    state_dict: Mapping[str, torch.Tensor]
    heads: Mapping[str, Mapping[str, torch.Tensor]]

    def save(self, path: Path) -> Path:
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.to_dict(),
            "data": self.data.to_dict(),
            "loss": self.loss,
            "stage": self.stage,
            "step": self.step,
            "state_dict": dict(self.state_dict),
            "heads": {name: dict(head) for name, head in self.heads.items()},
        }
        return save_torch(path, content)

    @classmethod
    def load(cls, path: Path) -> RunCheckpoint:
        if not path.is_file():
            raise UserError(f"CHECKPOINT: expected a file written by gcfast train, {path} is not there")
        try:
            content = load_torch(path)
        except UserError as error:
            raise UserError(f"CHECKPOINT: {path} is not a readable checkpoint ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(f"CHECKPOINT: {path} was not written by gcfast train")
        version = content.get("version")
        if type(version) is not int or version != _VERSION:
            raise UserError(
                f"CHECKPOINT: {path} has format version {came(version)}, this gcfast reads {_VERSION}"
            )
        try:
            return cls(
                model=ModelSpec.from_dict(content["model"]),
                data=DataSpec.from_dict(content["data"]),
                loss=str(content["loss"]),
                stage=str(content["stage"]),
                step=int(content["step"]),
                state_dict=_tensors(content["state_dict"]),
                heads={name: _tensors(head) for name, head in content["heads"].items()},
            )
        except Exception as error:  # a tensor in the place of a value raises nearly anything
            raise UserError(f"CHECKPOINT: {path} is incomplete ({error!r:.200})") from error

    def build(self) -> nn.Module:
        """The model with these weights, in evaluation mode, as phase two sees it."""
        # First without memory: the recipe may name any widths, the weights are as large as their file.
        sizes = (*self.model.hidden, *self.model.shape, self.model.classes, self.model.wide)
        try:
            if len(self.model.hidden) > len(self.state_dict) or max(sizes) >= 1 << 31:
                raise RuntimeError(f"it names {len(sizes)} sizes up to {max(sizes):.3g}")
            with torch.device("meta"):
                model = self.model.build()
            for name, value in model.state_dict().items():
                given = self.state_dict.get(name, value).dtype
                if given != value.dtype:
                    raise RuntimeError(f"{name} is {given}, expected {value.dtype}")
            copies = {name: value.clone() for name, value in self.state_dict.items()}
            model.load_state_dict(copies, assign=True)
        except (RuntimeError, OverflowError) as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(f"CHECKPOINT: its weights do not fit its own model recipe ({what})") from error
        return model.eval()


def _tensors(values: Any) -> dict[str, torch.Tensor]:
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise TypeError("expected tensors by name")
    return values
