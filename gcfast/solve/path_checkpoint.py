"""Save the regularisation path to a checkpoint, and take it up again after a killed run."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.solve.path_point import PathPoint
from gcfast.solve.problem import HeadProblem
from gcfast.solve.working_set import WorkingSet
from gcfast.storage import SavedState, StateFile


class PathCheckpoint:
    """Saves the path's next point when it is time. ``form``: "set" or "all" where one was found."""

    def __init__(
        self, checkpoint: StateFile | None, head_problem: HeadProblem, path: list[tuple[float, float]]
    ):
        self.checkpoint, self.head_problem, self.path = checkpoint, head_problem, path
        self.state: SavedState | None = checkpoint.load() if checkpoint is not None else None
        self.form: str | None = None
        self._working: WorkingSet | None = None
        if self.state is not None:
            self.form = self.state.values["form"]

    def point(self, working: WorkingSet | None) -> PathPoint | None:
        """Where to go on, for the working set, whose samples it fills in, or for all samples (None)."""
        self._working = working
        state = self.state
        if state is None or self.form != ("all" if working is None else "set"):
            return None
        self.state = None
        device, values = self.head_problem.device, state.values

        def read(name: str) -> Tensor:
            return state.tensors(name).to(device)

        if working is not None:
            if values["exact"]:
                working.switch_to_float64()
            working.add(read("rows"))
            working.steps, working.products = values["steps"], values["products"]
        self.path[:] = [(lam, loss) for lam, loss in values["path"]]
        previous = None
        if values["previous"] is not None:
            previous = (values["previous"], read("previous_a"), read("previous_f"))
        point = PathPoint(
            values["index"], values["lam"], read("a"), read("f"), previous, values["flat"], values["attempts"]
        )
        state.close()
        return point

    def keep_set(self, point: PathPoint) -> None:
        working = self._working
        assert working is not None
        if self.checkpoint is not None and self.checkpoint.due():
            exact = working.dtype == torch.float64
            self._save(point, "set", working.steps, working.products, {"rows": working.rows}, exact)

    def keep_all(self, point: PathPoint) -> None:
        if self.checkpoint is not None and self.checkpoint.due():
            self._save(point, "all", 0, 0, {})

    def _save(
        self,
        point: PathPoint,
        form: str,
        steps: int,
        products: int,
        tensors: dict[str, Tensor],
        exact: bool = False,
    ) -> None:
        tensors = {"a": point.a, "f": point.f, **tensors}
        if point.previous is not None:
            tensors |= {"previous_a": point.previous[1], "previous_f": point.previous[2]}
        values = {
            "form": form,
            "exact": exact,
            "index": point.index,
            "lam": point.lam,
            "previous": None if point.previous is None else point.previous[0],
            "flat": point.flat,
            "attempts": point.attempts,
            "steps": steps,
            "products": products,
            "path": [list(p) for p in self.path],
        }
        assert self.checkpoint is not None
        self.checkpoint.save(values, tensors)
