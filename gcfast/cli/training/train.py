"""The training loop of the command line: full passes in a fixed order, watched by the loss on all samples."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gcfast.cli.progress import ProgressBar
from gcfast.errors import UserError

if TYPE_CHECKING:
    from gcfast.features import FeatureCache

# Default learning rates: the lesser of the first number and the second divided by the wide layer's width.
# The loss is as curved in the head as that layer is wide, and a step moves the outputs in proportion.
BASES = {"sgd": (0.02, 7.0), "adam": (1e-3, 1.4), "adamw": (1e-3, 1.4), "rmsprop": (2e-4, 0.3)}
LOSSES = ("cross_entropy", "mse")
_EVALUATION_ROWS = 1024
_SMALL_STEP = 5e8  # operations: below this, waiting for a second thread costs more than it brings
_MOST_POINTS = 50  # of a curve: evaluating costs a pass over the data


def default_lr(base: str, width: int) -> float:
    most, over_width = BASES[base]
    return float(f"{min(most, over_width / width):.1g}")


class Diverged(RuntimeError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class Settings:
    """What decides a run besides its data and model."""

    base: str = "sgd"
    lr: float = 0.005
    momentum: float = 0.9
    batch_size: int = 64
    epochs: int = 100
    tau: float = 0.6
    perturbation: float = 1e-3
    loss: str = "cross_entropy"
    target_gap: float = 1e-6
    seed: int = 0
    compare: bool = True
    device: str = "cpu"
    threads: int | None = None

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.base == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)
        if self.base == "adam":
            return torch.optim.Adam(parameters, lr=self.lr)
        if self.base == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr)
        if self.base == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=self.lr, momentum=self.momentum)
        raise UserError(f"--base: expected one of {', '.join(BASES)}, got {self.base!r}")


@dataclass(frozen=True)
class Schedule:
    """How many steps there are, and which samples each takes: a function of the seed and the epoch alone,
    so that two optimizers see the same batches in the same order."""

    n: int
    batch_size: int
    epochs: int
    tau: float
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        # A last batch of one sample has no variance to normalise by; it joins the batch before.
        full, rest = divmod(self.n, self.batch_size)
        return max(1, full + (rest > 1 or (rest == 1 and self.batch_size == 1)))

    @property
    def total(self) -> int:
        return self.epochs * self.batches_per_epoch

    @property
    def switch(self) -> int:
        """tau in steps, with at least one step in each phase."""
        return min(max(1, round(self.tau * self.total)), self.total - 1)

    def batches(self, epoch: int) -> Sequence[torch.Tensor]:
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        order = torch.randperm(self.n, generator=generator)
        edges = [index * self.batch_size for index in range(self.batches_per_epoch)]
        return [order[low:high] for low, high in zip(edges, [*edges[1:], self.n], strict=True)]


@dataclass(frozen=True)
class CurvePoint:
    """One point of a curve: the loss on all training samples and the test error in percent."""

    step: int
    epoch: float
    loss: float
    test_error: float


class Trainer:
    """Data on a device, a schedule, and the loops over them. Evaluation is not counted as training time."""

    def __init__(
        self,
        settings: Settings,
        schedule: Schedule,
        data: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        classes: int,
    ) -> None:
        self.settings, self.schedule = settings, schedule
        self.x_train, self.labels, self.x_test, self.y_test = data
        self.targets = targets_for(settings.loss, self.labels, classes)
        self.seconds = 0.0
        self._every = max(1, math.ceil(schedule.epochs / _MOST_POINTS))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (
            F.cross_entropy(logits, targets)
            if self.settings.loss == "cross_entropy"
            else mse(logits, targets)
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> CurvePoint:
        """The full training loss and the test error, with normalisation as it is when the model is used."""
        training = model.training
        model.eval()
        total = 0.0
        for low in range(0, len(self.x_train), _EVALUATION_ROWS):
            rows = slice(low, low + _EVALUATION_ROWS)
            targets = self.targets[rows]
            logits = model(self.x_train[rows]).double()
            total += self.loss(logits, targets).item() * len(targets)
        wrong = 0
        for low in range(0, len(self.x_test), _EVALUATION_ROWS):
            rows = slice(low, low + _EVALUATION_ROWS)
            wrong += int((model(self.x_test[rows]).argmax(dim=1) != self.y_test[rows]).sum())
        model.train(training)
        epoch = step / self.schedule.batches_per_epoch
        return CurvePoint(step, epoch, total / len(self.x_train), 100 * wrong / len(self.x_test))

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        start: int,
        stop: int,
        progress: ProgressBar,
        record: Callable[[CurvePoint], None],
        cache: FeatureCache | None = None,
    ) -> None:
        """Steps ``start`` to ``stop``; ``record`` gets a point at ends of epochs and after the last step.

        With a ``cache`` steps are made on its rows and evaluations, as ever, on the whole model.
        """
        stepped = model if cache is None else cache.head
        with threads(self.settings.threads or self._suitable_threads(stepped, torch.get_num_threads())):
            self._run(model, optimizer, start, stop, progress, record, cache)

    def _suitable_threads(self, model: nn.Module, available: int) -> int:
        """One for steps so small that threads mostly wait for each other, badly so on a busy machine."""
        if any(isinstance(layer, nn.Conv2d) for layer in model.modules()):
            return available
        operations = 6 * self.schedule.batch_size * sum(parameter.numel() for parameter in model.parameters())
        return 1 if operations < _SMALL_STEP else available

    def _run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        start: int,
        stop: int,
        progress: ProgressBar,
        record: Callable[[CurvePoint], None],
        cache: FeatureCache | None,
    ) -> None:
        forward, inputs = (model, self.x_train) if cache is None else (cache.head, cache.features)
        per_epoch = self.schedule.batches_per_epoch
        self.seconds = 0.0
        step = start
        since = time.perf_counter()
        model.train()
        while step < stop:
            epoch, offset = divmod(step, per_epoch)
            for batch in self.schedule.batches(epoch)[offset:]:
                index = batch.to(self.labels.device)
                optimizer.zero_grad()
                loss = self.loss(forward(inputs[index]), self.targets[index])
                value = loss.item()
                if not math.isfinite(value):
                    raise Diverged(f"the loss is {value} at step {step + 1} of {self.schedule.total}")
                loss.backward()
                optimizer.step()
                step += 1
                progress.update(step - start, f"loss {value:.2e}")
                if step == stop:
                    break
            if step == stop or (epoch + 1) % self._every == 0:
                self.seconds += time.perf_counter() - since
                point = self.evaluate(model, step)
                if not math.isfinite(point.loss):
                    raise Diverged(
                        f"the training loss is {point.loss} after step {step} of {self.schedule.total}"
                    )
                record(point)
                progress.update(step - start, f"loss {point.loss:.2e}")
                since = time.perf_counter()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """CPU threads of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def targets_for(loss: str, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels as the loss takes them: class numbers, or one-hot rows for the squared loss."""
    return labels if loss == "cross_entropy" else F.one_hot(labels, classes).float()


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs, targets.to(outputs.dtype))
