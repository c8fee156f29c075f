"""Checkpoints of the command line: weights with the recipe of the model and of the data they were trained on.

Plain values and tensors only, so that they load with ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.data.split import DataSplit
from gcfast.cli.training.models import ModelSpec
from gcfast.errors import UserError
from gcfast.storage import save_torch

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
        raw = path.read_bytes()
        try:
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive raises nearly anything
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"CHECKPOINT: {path} is not a readable checkpoint, corrupt or cut short ({first})"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(f"CHECKPOINT: {path} was not written by gcfast train")
        if content.get("version") != _VERSION:
            raise UserError(
                f"CHECKPOINT: {path} has format version {content.get('version')}, this gcfast reads"
                f" {_VERSION}"
            )
        try:
            return cls(
                model=ModelSpec.from_dict(content["model"]),
                data=DataSpec.from_dict(content["data"]),
                loss=str(content["loss"]),
                stage=str(content["stage"]),
                step=int(content["step"]),
                state_dict=content["state_dict"],
                heads=content["heads"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"CHECKPOINT: {path} is incomplete ({error!r})") from error

    def build(self) -> nn.Module:
        """The model with these weights, in evaluation mode, as phase two sees it."""
        model = self.model.build()
        try:
            model.load_state_dict(dict(self.state_dict))
        except RuntimeError as error:
            raise UserError(f"CHECKPOINT: its weights do not fit its own model recipe ({error})") from error
        return model.eval()
