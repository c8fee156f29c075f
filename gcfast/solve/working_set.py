"""The regularisation path over a working set: the samples that matter, as for support vector machines.

With hard labels the dual variable of a sample, A_i = -residual_i / (lambda n), vanishes where its margin is
large, and late on the path most margins are. So K = H1 H1^T is formed for the working set S alone; the others
have A_i = 0 and are looked at in each pass over the features. Samples whose pull
p_ic K_ii / (lambda n) exceeds a threshold belong to S. At the end the threshold falls until the gradient over
*all* samples, in float64, is within the tolerance: what is certified is the whole problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gcfast.features import StoredFeatures
from gcfast.solve.grams import DenseGram
from gcfast.solve.newton import GramProblem, NewtonState, gram_noise, minimise
from gcfast.solve.path_point import TIGHT, PathForm
from gcfast.solve.problem import HeadProblem

ROUGH, FINE = 1e-2, 1e-4  # thresholds on the way and at the end
MOST, GROWTH = 1280, 384  # samples of S at first, and joining at a time; the end has no such limit


class WorkingSetFull(Exception):
    """More samples matter than there is room for."""


class WorkingSet(PathForm):
    """Features (n, m), the Gram of a set S of rows, and passes over all of them: in float32, until
    :meth:`finer` makes them float64.

    ``most``: the largest S allowed; beyond it :class:`WorkingSetFull` is raised. Unless ``patient``, another
    form may take over where steps are long.
    """

    def __init__(self, name: str, head_problem: HeadProblem, most: int | None = None, patient: bool = True):
        self.name, self.head_problem, self.patient = name, head_problem, patient
        given = self.given = head_problem.features
        self.dtype = torch.float32
        convert = isinstance(given, StoredFeatures) and given.dtype != torch.float32
        self.h = StoredFeatures(given.matrix.to(torch.float32)) if convert else given  # type: ignore[attr-defined]
        self.most = head_problem.n if most is None else most
        self.bias, self.start = head_problem.bias is not None, head_problem.offset
        self.targets, self.loss = head_problem.targets, head_problem.loss
        self.n, device = head_problem.n, head_problem.device
        mean = self.h.transposed_times(torch.full((self.n, 1), 1.0 / self.n, device=device))[0]
        # squared distance from the mean row: the diagonal of the centred Gram
        square, cross = self.h.square_norms(mean)
        centred = square - 2 * cross + float(mean @ mean)
        self.squares = square + float(self.bias)
        self.diagonal = torch.maximum(centred, self.squares / self.n).clamp(min=1e-300)
        self.scale = float(self.diagonal.mean())
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        self.gram = torch.zeros((0, 0), dtype=torch.float32, device=device)
        self.chosen = self.h.select(self.rows)
        self.steps = self.products = 0

    @property
    def counts(self) -> tuple[int, int]:
        return self.steps, self.products

    def zero(self) -> Tensor:
        return self.head_problem.zero

    def direction(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.head_problem.transpose(a)

    def evaluate(self, a: Tensor, f: Tensor, lam: float) -> float:
        return self.head_problem.mean_loss(self.start + f) + 0.5 * lam * float((a * f).sum())

    def noise(self, a: Tensor) -> float:
        return gram_noise(self.squares, a, self.dtype)

    def finer(self) -> bool:
        """Float64; False where that is so already, or S has no room for it."""
        if self.dtype == torch.float64 or len(self.rows) > self.most / math.sqrt(2):
            return False
        self.dtype, self.hurried = torch.float64, False
        self.most = int(self.most / math.sqrt(2))  # of twice the bytes in the same room
        self.h = self.given
        rows, self.rows = self.rows, self.rows[:0]
        self.gram = torch.zeros((0, 0), dtype=torch.float64, device=self.gram.device)
        if len(rows):
            self.add(rows)
        return True

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"exact": self.dtype == torch.float64, "counts": [*self.counts]}, {"rows": self.rows}

    def restore(self, values: dict[str, Any], tensors: Callable[[str], Tensor]) -> None:
        if values["exact"]:
            self.finer()
        self.add(tensors("rows"))
        self.steps, self.products = values["counts"]

    def outputs(self, a: Tensor) -> Tensor:
        """K a (n, C) for a that is zero outside S: a pass over S's features and one over all."""
        part = a[self.rows]
        scale = float(part.abs().amax()) if part.numel() else 0.0
        if scale == 0.0:
            return torch.zeros_like(a)
        part = part / scale
        part[part.abs() < 1e-30] = 0.0
        u = self.chosen.transposed_times(part.to(self.dtype))
        f = self.h.times(u).to(torch.float64)
        if self.bias:
            f += part.sum(0)
        return f * scale

    def choose(self, a: Tensor, f: Tensor, lam: float, threshold: float, most: int) -> None:
        """Add to S the samples that pull most at the outputs start + f, as far as there is room.

        What has a part in a stays: dropping it would cost more steps than its rows cost time.
        """
        z = self.start + f
        _, residual, _ = self.loss.terms(z, self.targets)
        pull = residual.abs().amax(1) * self.diagonal / (self.n * lam)
        pull[self.rows] = 0.0
        new = (pull > threshold).nonzero()[:, 0]
        room = max(most - len(self.rows), GROWTH)
        if len(new) > room:
            new = pull.topk(room).indices
        if len(new):
            self.add(new)

    def add(self, new: Tensor) -> None:
        """Samples to S."""
        k = len(self.rows)
        if k + len(new) > self.most:
            raise WorkingSetFull
        self.rows = torch.cat([self.rows, new])
        self.chosen = self.h.select(self.rows)
        block = self.h.block(new, self.chosen, self.dtype)
        if self.bias:
            block += 1.0
        gram = block.new_empty((len(self.rows), len(self.rows)))
        gram[:k, :k] = self.gram
        gram[k:] = block
        gram[:k, k:] = block[:, :k].mT
        self.gram = gram

    def minimise(self, a: Tensor, f: Tensor, lam: float, tolerance: float) -> NewtonState:
        self.choose(a, f, lam, ROUGH, MOST)
        state = self.minimise_over_set(a, f, lam, tolerance)
        f = self.outputs(state.a)
        return replace(state, f=f, loss=self.head_problem.mean_loss(self.start + f))

    def minimise_over_set(self, a: Tensor, f: Tensor, lam: float, tolerance: float) -> NewtonState:
        """The path's problem at lambda over S, from (a, f = K a); a (n, C) is zero outside S, f of S."""
        rows = self.rows
        problem = GramProblem(DenseGram(self.gram), self.start[rows], self.loss, self.targets[rows], n=self.n)
        part = a[rows]
        own = problem.product(part)
        problem.offset = self.start[rows] + f[rows] - own  # f may be exact where the Gram is float32
        state = minimise(problem, NewtonState(part, own), lam, tolerance)
        self.steps += problem.steps
        self.products += problem.products
        self.hurried |= problem.slow and not self.patient
        new = torch.zeros_like(a)
        new[rows] = state.a
        return replace(state, a=new)

    def polish(self, state: NewtonState, lam: float) -> tuple[NewtonState, bool] | None:
        """Newton steps until the gradient over all samples, in float64, is within the tolerance."""
        head_problem = self.head_problem
        a, f = state.a, state.f
        for step in range(7):
            self.choose(a, f, lam, FINE * 0.1**step, head_problem.n)
            a = self.minimise_over_set(a, f, lam, TIGHT).a
            true = head_problem.outputs(head_problem.transpose(a))
            f = true - self.start
            value, residual, _ = self.loss.terms(true, self.targets)
            gw, gb = head_problem.transpose(residual / self.n + lam * a, remember=False)
            gap = (float((gw**2).sum()) + (0.0 if gb is None else float((gb**2).sum()))) / (2 * lam)
            if gap <= 2 * TIGHT * 0.5 * lam * float((a * f).sum()):
                return NewtonState(a, f, float(value.mean())), True
        return None
