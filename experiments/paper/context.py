"""What a cell is given to run with: a clock, a place to keep what it has so far, and a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gcfast.storage.files import save_torch

KEEP_EVERY = 60.0  # seconds


class OutOfTime(Exception):
    """The deadline has come; what the cell had is kept."""


class Context:
    """One run of one cell.

    ``folder`` keeps what the cell has so far, and is removed once it is finished. ``deadline`` is in
    ``time.monotonic()``'s seconds, None for none. ``say(share, text)`` tells what is done.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        deadline: float | None = None,
        say: Callable[[float, str], None] | None = None,
    ) -> None:
        self.folder, self.device, self.deadline = folder, device, deadline
        self.say = say or (lambda share, text: None)
        self._kept = time.monotonic()

    def clock(self) -> float:
        """Seconds of this process's own work: CPU time on one thread, which what else the machine does leaves
        alone; else the wall clock, the device's queue emptied."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def kept(self) -> Any:
        """What :meth:`keep` was last given, None at the start."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        return torch.load(path, map_location=self.device, weights_only=True)

    def keep(self, state: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_torch(self.folder / "state.pt", state)
        self._kept = time.monotonic()

    def checkpoint(self, name: str) -> Path:
        """A file for ``certify`` and ``solve_head`` to keep their own state in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def pause(self, state: Callable[[], Any]) -> None:
        """Between two steps: keep the state where it is time to, stop where the deadline has come."""
        now = time.monotonic()
        late = self.deadline is not None and now >= self.deadline
        if late or now - self._kept >= KEEP_EVERY:
            self.keep(state())
        if late:
            raise OutOfTime

    def check(self) -> None:
        """Inside work that keeps its own state."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise OutOfTime

    def clear(self) -> None:
        for path in self.folder.glob("*"):
            path.unlink()
        with suppress(FileNotFoundError):
            self.folder.rmdir()
