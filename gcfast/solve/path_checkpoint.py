"""Save the regularisation path to a checkpoint, and take it up again after a killed run."""

from __future__ import annotations

from torch import Tensor

from gcfast.solve.path_point import PathForm, PathPoint
from gcfast.storage import SavedState, StateFile


class PathCheckpoint:
    """Saves the path's next point when it is time. ``name``: of the form that one was found for, or None."""

    def __init__(self, file: StateFile | None):
        self.file, self.path = file, list[tuple[float, float]]()
        self.state: SavedState | None = file.load() if file is not None else None
        self.name: str | None = None if self.state is None else self.state.values["name"]

    def point(self, form: PathForm) -> PathPoint | None:
        """Where to go on in this form, which becomes what it was."""
        state = self.state
        if state is None or form.name != self.name:
            return None
        self.state, values = None, state.values

        def read(key: str) -> Tensor:
            return state.tensors(key).to(form.head_problem.device)

        form.restore(values["form"], read)
        self.path[:] = [(lam, loss) for lam, loss in values["path"]]
        previous = None
        if values["previous"] is not None:
            previous = (values["previous"], read("previous_a"), read("previous_f"))
        counts = {key: values[key] for key in ("index", "flat", "stuck", "attempts")}
        point = PathPoint(lam=values["lam"], a=read("a"), f=read("f"), previous=previous, **counts)
        state.close()
        return point

    def keep(self, form: PathForm, point: PathPoint) -> None:
        if self.file is None or not self.file.due():
            return
        kept = form.kept()
        if kept is None:
            return
        tensors = {"a": point.a, "f": point.f, **kept[1]}
        if point.previous is not None:
            tensors |= {"previous_a": point.previous[1], "previous_f": point.previous[2]}
        values = {
            "name": form.name,
            "form": kept[0],
            "index": point.index,
            "lam": point.lam,
            "previous": None if point.previous is None else point.previous[0],
            "flat": point.flat,
            "stuck": point.stuck,
            "attempts": point.attempts,
            "path": [list(p) for p in self.path],
        }
        self.file.save(values, tensors)
