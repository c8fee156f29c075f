"""Progress shown while something runs: a bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from types import TracebackType
from typing import Any, TextIO


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class ProgressBar:
    """Counts up to ``total``; used as a context manager so that a bar is closed whatever happens."""

    def __init__(
        self, title: str, total: int | None = None, *, quiet: bool = False, stream: TextIO | None = None
    ):
        self._title = title
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._start = time.perf_counter()
        self._done = 0
        self._last_line = self._start
        self._last_share = 0.0
        self._bar: Any = None
        if not quiet and total and self._stream.isatty():
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                self._write("(no progress bars: pip install 'gcfast[cli]')")
            else:
                self._bar = tqdm(
                    total=total,
                    desc=f"{title:<22}",
                    file=self._stream,
                    # Asked here, because tqdm shows nothing on a terminal that gives its size as zero.
                    ncols=shutil.get_terminal_size().columns,
                    nrows=shutil.get_terminal_size().lines,
                    bar_format="{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining}{postfix}",
                )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._write(f"{self._title:<22} done in {format_seconds(self.elapsed)}")

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def update(self, done: int, text: str = "") -> None:
        """``done`` of ``total`` is behind us; ``text`` is the newest figure worth seeing."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        elif self._total:
            share, now = done / self._total, time.perf_counter()
            # A line for every fifth of the work, not faster than anybody reads, and one a minute at least.
            due = share - self._last_share >= 0.2 and now - self._last_line >= 2
            if due or now - self._last_line >= 60:
                left = self.elapsed * (1 - share) / share if share > 0 else float("nan")
                self._write(f"{self._title:<22} {share:4.0%}  {text}  about {format_seconds(left)} left")
                self._last_line, self._last_share = now, share
        self._done = done

    def _write(self, line: str) -> None:
        if not self._quiet:
            print(line, file=self._stream, flush=True)
