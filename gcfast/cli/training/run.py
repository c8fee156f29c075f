"""One ``gcfast train`` run: phase one, certificate, solved head, the paper's phase two, the base optimizer.

The order puts what matters most first. Each stage adds to a record that can be saved at any time, so an
interruption or a diverging comparison loses nothing that was finished.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gcfast.cli.data.split import DataSplit
from gcfast.cli.progress import ProgressBar
from gcfast.cli.training.checkpoint import DataSpec, RunCheckpoint
from gcfast.cli.training.models import ModelSpec
from gcfast.cli.training.record import Record, certificate_values
from gcfast.cli.training.train import CurvePoint, Diverged, Schedule, Settings, Trainer, threads
from gcfast.storage import write_json

if TYPE_CHECKING:
    from gcfast.features import FeatureCache

# Up to here singular values for the picture take seconds, certificate and solver well under one: a second
# thread has too little to gain, and on a busy machine waiting for it costs ten times as much.
_SMALL = 2048
# The solved head is rounded to the model's float32; aiming lower leaves room for that.
_TARGET_SHARE = 0.8
# Phase two is fastest from stored features; beyond this, or a quarter of what is free, from less.
_MOST_CACHED = 1 << 30


class Run:
    """Executes the stages; ``say`` prints a line for the user."""

    def __init__(
        self,
        data: DataSplit,
        data_spec: DataSpec,
        model: ModelSpec,
        settings: Settings,
        out: Path,
        command: str,
        *,
        quiet: bool = False,
    ) -> None:
        self.data, self.spec, self.settings, self.out, self.quiet = data, model, settings, out, quiet
        self.schedule = Schedule(
            len(data.y_train), settings.batch_size, settings.epochs, settings.tau, settings.seed
        )
        self.record = Record(data, data_spec, model, settings, self.schedule, command)
        self.trainer = Trainer(settings, self.schedule, data.to(settings.device), data.classes)
        torch.manual_seed(settings.seed)
        model_zero = model.build().to(settings.device)
        self._initial = copy.deepcopy(model_zero.state_dict())
        self._heads: dict[str, dict[str, torch.Tensor]] = {}
        self._hidden: dict[str, torch.Tensor] = {}

    def execute(self) -> None:
        """All stages; :class:`Diverged` if the training of A(base) itself breaks down."""
        from gcfast.optim import TwoPhase

        settings, schedule = self.settings, self.schedule
        model = self._model(self._initial)
        optimizer = TwoPhase(
            settings.optimizer(model.parameters()),
            model,
            switch_step=schedule.switch,
            perturbation=settings.perturbation,
            seed=settings.seed,
        )
        self._stage("phase_one")
        curve = self.record.curves["two_phase"]
        curve.append(self.trainer.evaluate(model, 0))
        try:
            self._train("phase_one", "phase one", model, optimizer, 0, schedule.switch, curve.append)
        except KeyboardInterrupt:
            self._save_checkpoint(model, "phase one", getattr(optimizer, "step_count", 0))
            raise
        # The last point was taken after the Gaussian step, which belongs to the last step of phase one.
        self.record.switch = curve[-1]
        self._hidden = _cpu_copy(model.state_dict())
        self._heads["switch"] = _head_of(self._hidden)
        self._save_checkpoint(model, "switch", schedule.switch)

        available = torch.get_num_threads()
        with threads(settings.threads or (1 if len(self.data.y_train) <= _SMALL else available)):
            self._stage("certify")
            self._certify()
            self._stage("solve")
            self._solve()

        self._stage("phase_two")
        try:
            self._train(
                "phase_two",
                "phase two (paper)",
                model,
                optimizer,
                schedule.switch,
                schedule.total,
                curve.append,
                self._cache(model),
            )
            self._heads["two_phase"] = _head_of(_cpu_copy(model.state_dict()))
            self._save_checkpoint(
                None, "nearest" if "nearest" in self._heads else "two_phase", schedule.total
            )
        except Diverged as trouble:
            self._note(
                f"The paper's phase two, {settings.base} on the head, diverged ({trouble}): a smaller --lr"
                " would"
                " cure it. The solved head does not depend on it."
            )

        if settings.compare:
            self._stage("base")
            self._compare()
        self._picture()
        self._stage("done")
        self.record.status = "complete"

    def save_result(self) -> Path:
        return write_json(self.out / "result.json", self.record.values())

    def _stage(self, name: str) -> None:
        self.record.stage = name

    def _note(self, text: str) -> None:
        self.record.notes.append(text)

    def _model(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        model = self.spec.build().to(self.settings.device)
        model.load_state_dict(state)
        return model

    def _train(
        self,
        key: str,
        title: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        start: int,
        stop: int,
        record: Callable[[CurvePoint], None],
        cache: FeatureCache | None = None,
    ) -> None:
        before = 0.0 if cache is None or self.record.cache is None else self.record.cache["seconds"]
        with ProgressBar(title, stop - start, quiet=self.quiet) as progress:
            try:
                self.trainer.run(model, optimizer, start, stop, progress, record, cache)
            finally:
                self.record.seconds[key] = before + self.trainer.seconds

    def _cache(self, model: nn.Module) -> FeatureCache | None:
        """What enters the head, for the samples are the same at every step; None where it does not fit."""
        from gcfast.features import FeatureCache
        from gcfast.storage import available

        data = (self.trainer.x_train, self.trainer.targets)
        free = available(data[0].device)
        few = self.settings.threads or (1 if len(data[0]) <= _SMALL else torch.get_num_threads())
        start = time.perf_counter()
        with threads(few):
            try:
                most = _MOST_CACHED if free is None else max(1, min(_MOST_CACHED, free // 4))
                cache = FeatureCache(model, data, store="features", max_bytes=most)
            except MemoryError:
                try:
                    cache = FeatureCache(model, data)
                except MemoryError as trouble:
                    self._note(f"The paper's phase two ran the whole model at every step: {trouble}")
                    return None
        self.record.cache = {
            "stored": cache.stored,
            "width": cache.features.shape[1],
            "bytes": cache.nbytes,
            "seconds": time.perf_counter() - start,
        }
        return cache

    def _certify(self) -> None:
        from gcfast.certificate import certify

        model = self._model(self._hidden).eval()
        data = (self.trainer.x_train, self.trainer.targets)
        with ProgressBar("certificate", 1000, quiet=self.quiet) as progress:

            def show(step: str, share: float) -> None:
                progress.update(round(1000 * share), step)

            start = time.perf_counter()
            try:
                found = certify(model, data, loss=self.settings.loss, callback=show)
            except (ValueError, MemoryError) as trouble:
                self._note(f"No certificate: {trouble}")
            else:
                self.record.certificate = certificate_values(found)
            self.record.seconds["certify"] = time.perf_counter() - start

    def _solve(self) -> None:
        from gcfast.solve import solve_head

        model = self._model(self._hidden).eval()
        target = self.settings.target_gap * _TARGET_SHARE
        with ProgressBar("phase two (solved)", 1000, quiet=self.quiet) as progress:

            def show(state: Any) -> None:
                progress.update(round(1000 * state.fraction), f"gap {state.gap:.2e}")

            start = time.perf_counter()
            try:
                found = solve_head(
                    model,
                    (self.trainer.x_train, self.trainer.targets),
                    loss=self.settings.loss,
                    target_gap=target,
                    method="nearest",
                    callback=show,
                )
            except (ValueError, MemoryError) as trouble:
                self._note(f"Phase two was not solved: {trouble}")
                return
            finally:
                self.record.seconds["solve"] = time.perf_counter() - start
            progress.update(1000, f"gap {found.gap:.2e}")
        # Of the model as it is stored, so that the head's rounding to float32 is in the figure.
        self.record.nearest = self.trainer.evaluate(model, self.schedule.switch)
        self.record.path = [(float(weight), float(loss)) for weight, loss in found.path]
        self.record.solver = {
            "loss": float(found.loss),
            "gap": float(found.gap),
            "duality_gap": float(found.duality_gap),
            "infimum": float(found.infimum),
            "converged": bool(found.converged),
            "reason": found.reason,
            "iterations": int(found.iterations),
            "peak_bytes": int(found.peak_bytes),
        }
        if not found.converged and not found.interrupted:
            self._note(f"The solver stopped short of the target gap: {found.reason}.")
        self._heads["nearest"] = _head_of(_cpu_copy(model.state_dict()))
        self._save_checkpoint(None, "nearest", self.schedule.switch)
        if found.interrupted:
            raise KeyboardInterrupt

    def _compare(self) -> None:
        model = self._model(self._initial)
        curve = self.record.curves["base"]
        curve.append(self.trainer.evaluate(model, 0))
        optimizer = self.settings.optimizer(model.parameters())
        try:
            title = f"{self.settings.base} alone"
            self._train("base", title, model, optimizer, 0, self.schedule.total, curve.append)
        except Diverged as trouble:
            self._note(f"The base optimizer alone diverged ({trouble}), so there is nothing to compare with.")

    @torch.no_grad()
    def _picture(self) -> None:
        """Singular values of [features, 1] for the report's picture; the proof does not use them."""
        if len(self.data.y_train) > _SMALL or not self._hidden:
            return
        model = self._model(self._hidden).eval()
        caught: list[torch.Tensor] = []
        head = model.get_submodule("head")
        handle = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].double()))
        model(self.trainer.x_train)
        handle.remove()
        with_ones = torch.cat([caught[0], caught[0].new_ones(len(caught[0]), 1)], dim=1)
        self.record.spectrum = torch.linalg.svdvals(with_ones).tolist()

    def _save_checkpoint(self, model: nn.Module | None, stage: str, step: int) -> None:
        state = _cpu_copy(model.state_dict()) if model is not None else dict(self._hidden)
        if stage in self._heads:
            state.update(self._heads[stage])
        RunCheckpoint(
            self.spec, self.record.data_spec, self.settings.loss, stage, step, state, self._heads
        ).save(self.out / "checkpoint.pt")


def _head_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items() if name.startswith("head.")}


def _cpu_copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
