"""Runs cells: those of one thread side by side, those that are timed on all threads alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _record
import torch

from gcfast.cli.progress import ProgressBar, format_seconds

from . import problem
from .context import Context, OutOfTime
from .suite import Cell

_queue: Any = None


def result(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


def _start(messages: Any, threads: int) -> None:
    """In a worker, before its first cell."""
    global _queue
    _queue = messages
    torch.set_num_threads(threads)


def work(cell: Cell, out: Path, device: str, deadline: float | None, commit: str) -> str:
    """Run one cell and write its file. What came of it: "", or why there is none."""
    told = 0.0

    def say(share: float, text: str) -> None:
        nonlocal told
        if _queue is not None and time.monotonic() - told > 1:
            told = time.monotonic()
            _queue.put((cell.name, share, text))

    context = Context(out / "unfinished" / cell.name, device, deadline, say)
    began = time.perf_counter()
    try:
        context.check()
        found = cell.run(context)
    except OutOfTime:
        return "stopped by the deadline"
    except Exception:
        return traceback.format_exc()
    header = _record.header()
    kept = ("device", "cpu", "instruction_set", "torch", "cuda", "date")
    _record.write(
        result(out, cell),
        {
            "name": cell.name,
            "params": asdict(cell.params),
            "machine": {k: header[k] for k in kept} | {"threads": torch.get_num_threads()},
            "commit": commit,
            "seconds": _record.plain(time.perf_counter() - began),
            "result": _record.plain(found),
        },
    )
    context.clear()
    return ""


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
    minutes: float | None = None,
) -> int:
    """Every cell without a file; 0 if all have one now, 1 if one failed, 3 if time ran out."""
    absent = {
        name: why for name in sorted({c.params.data for c in cells}) if (why := problem.available(name))
    }
    for name, why in absent.items():
        print(f"{name}: its cells are passed over. {why}", flush=True)
    wanted = [c for c in cells if c.params.data not in absent]
    missing = [c for c in wanted if not result(out, c).exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are done already", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    side = workers or (1 if device != "cpu" else cores)
    together = sorted((c for c in missing if not c.quiet), key=lambda c: -c.cost)
    alone = [c for c in missing if c.quiet]
    total = sum(c.cost for c in together) / min(side, max(1, len(together))) + sum(c.cost for c in alone)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    messages = multiprocessing.get_context("spawn").Queue()
    commit = _record.commit()
    failed: dict[str, str] = {}
    if missing:
        print(f"{len(missing)} to run, very roughly {format_seconds(total)}", flush=True)
    with ProgressBar(f"{len(missing)} cells", 1000) as progress:
        bar = _Bar(missing, progress, messages)
        threads = torch.get_num_threads() if device != "cpu" else 1
        batches = [(together, side, threads)] + [([c], 1, torch.get_num_threads()) for c in alone]
        for batch, count, each in batches:
            if batch and not (deadline is not None and time.monotonic() >= deadline):
                failed |= _batch(batch, count, each, out, device, deadline, commit, messages, bar)
    late = [name for name, why in failed.items() if why.startswith("stopped")]
    broken = {name: why for name, why in failed.items() if name not in late}
    for name, why in broken.items():
        print(f"\n{name} failed:\n{why}", flush=True)
    left = [c.name for c in wanted if not result(out, c).exists()]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} cells are done" + (f"; {len(left)} left" if left else "")
    )
    return 1 if broken else (3 if left else 0)


class _Bar:
    """What is done, weighed by what it was thought to cost."""

    def __init__(self, cells: Sequence[Cell], progress: ProgressBar, messages: Any) -> None:
        self.cost = {c.name: c.cost for c in cells}
        self.share = dict.fromkeys(self.cost, 0.0)
        self.progress, self.messages = progress, messages
        self.text = ""

    def done(self, name: str) -> None:
        self.share[name] = 1.0
        self._show()

    def drain(self) -> None:
        try:
            while True:
                name, share, text = self.messages.get_nowait()
                self.share[name] = max(self.share[name], min(share, 0.99))
                self.text = f"{name}: {text}"
        except queue.Empty:
            pass
        self._show()

    def _show(self) -> None:
        whole = sum(self.cost.values())
        done = sum(self.cost[name] * share for name, share in self.share.items())
        count = sum(share == 1.0 for share in self.share.values())
        self.progress.update(round(1000 * done / whole), f"{count} done; {self.text}")


def _batch(
    cells: Sequence[Cell],
    workers: int,
    threads: int,
    out: Path,
    device: str,
    deadline: float | None,
    commit: str,
    messages: Any,
    bar: _Bar,
) -> dict[str, str]:
    failed: dict[str, str] = {}
    method = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, method, _start, (messages, threads)) as pool:
        try:
            waiting: dict[Future[str], Cell] = {}
            for cell in cells:
                waiting[pool.submit(work, cell, out, device, deadline, commit)] = cell
            while waiting:
                finished, _ = wait(waiting, timeout=1.0, return_when="FIRST_COMPLETED")
                for future in finished:
                    cell = waiting.pop(future)
                    why = future.result()
                    if why:
                        failed[cell.name] = why
                    else:
                        bar.done(cell.name)
                bar.drain()
        except BrokenProcessPool:
            lost = [c.name for c in cells if not result(out, c).exists()][:workers]
            failed[f"one of {', '.join(lost)}"] = (
                "a worker died, most likely for want of memory: fewer --workers"
            )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every finished cell, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
