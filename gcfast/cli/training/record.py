"""What is known about a run so far, as plain values: the content of ``result.json``."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gcfast._version import __version__
from gcfast.certificate import Certificate
from gcfast.cli.data.split import DataSplit
from gcfast.cli.training.checkpoint import DataSpec
from gcfast.cli.training.models import ModelSpec
from gcfast.cli.training.train import CurvePoint, Schedule, Settings
from gcfast.losses import gap_above

_STAGES = ("phase_one", "phase_two", "base", "certify", "solve")


@dataclass
class Record:
    """Everything known about a run so far; ``values()`` is what ``result.json`` holds."""

    data: DataSplit
    data_spec: DataSpec
    model: ModelSpec
    settings: Settings
    schedule: Schedule
    command: str
    status: str = "running"
    stage: str = "start"
    notes: list[str] = field(default_factory=list)
    certificate: dict[str, Any] | None = None
    curves: dict[str, list[CurvePoint]] = field(default_factory=lambda: {"two_phase": [], "base": []})
    switch: CurvePoint | None = None
    nearest: CurvePoint | None = None
    path: list[tuple[float, float]] = field(default_factory=list)
    solver: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    spectrum: list[float] | None = None
    seconds: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(_STAGES))

    def final(self, name: str) -> CurvePoint | None:
        """The last point of a curve, if it got to the last step."""
        points = self.curves[name]
        return points[-1] if points and points[-1].step == self.schedule.total else None

    def values(self) -> dict[str, Any]:
        certificate = self.certificate or {}
        infimum = certificate.get("infimum", self.solver.get("infimum"))
        final = self.nearest.loss if self.nearest else None
        gap = None
        if final is not None and infimum is not None:
            # of the logits as the model rounds them, and of its stored head without that: neither is below
            gap = gap_above(max(final, self.solver.get("loss", final)), infimum)

        def error(point: CurvePoint | None) -> float | None:
            return point.test_error if point else None

        def loss(point: CurvePoint | None) -> float | None:
            return point.loss if point else None

        base, two_phase = self.final("base"), self.final("two_phase")
        keys = ("status", "route", "rank_lower", "sigma_min_lower", "offenders")
        return _plain(
            {
                "dataset": self.data.name,
                "n": len(self.data.y_train),
                "n_test": len(self.data.y_test),
                "width": self.model.wide,
                "seed": self.settings.seed,
                "certificate": {key: certificate.get(key) for key in keys},
                "loss": {"switch": loss(self.switch), "final": final, "infimum": infimum, "gap": gap},
                "test_error": {
                    "base": error(base),
                    "two_phase": error(two_phase),
                    "nearest": error(self.nearest),
                },
                "seconds": self.seconds,
                "status": self.status,
                "stage": self.stage,
                "notes": self.notes,
                "certificate_details": {key: value for key, value in certificate.items() if key not in keys},
                "final_loss": {"base": loss(base), "two_phase": loss(two_phase), "nearest": final},
                "steps": {
                    "total": self.schedule.total,
                    "switch": self.schedule.switch,
                    "per_epoch": self.schedule.batches_per_epoch,
                },
                "curves": {name: [asdict(point) for point in points] for name, points in self.curves.items()},
                "path": self.path,
                "solver": self.solver,
                "cache": self.cache,
                "spectrum": self.spectrum,
                "settings": asdict(self.settings),
                "model": {**self.model.to_dict(), "description": self.model.describe()},
                "data": {
                    **self.data_spec.to_dict(),
                    "source": self.data.source,
                    "normalisation": self.data.normalisation,
                    "shape": self.data.shape,
                    "classes": self.data.class_names,
                },
                "command": self.command,
                "versions": versions(),
            }
        )


def certificate_values(found: Certificate) -> dict[str, Any]:
    """A certificate as plain values, with its text."""
    values = {**found.to_dict(), "text": str(found)}
    plain = _plain(values)
    assert isinstance(plain, dict)
    return plain


def versions() -> dict[str, str]:
    return {
        "gcfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def _plain(value: Any) -> Any:
    """Values JSON has: numbers that are not finite become null, and unknown objects their text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    return str(value)
