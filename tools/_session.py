"""One run of tools/device.sh: its folders, its clock, its log, and commands that end in time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _build
import _record
from _record import ROOT

TIMED_OUT = 124
GRACE = 8.0  # seconds between the interrupt, after which pytest still reports, and the kill
LEAST = 5.0  # seconds under which nothing is begun
LOG_BYTES = 8 << 20
DROPPED = ("TRITON_INTERPRET", "GCFAST_BACKEND", "PYTHONSAFEPATH", "PYTHONHOME", "PYTEST_ADDOPTS")


@dataclass
class Verdict:
    section: str
    verdict: str  # passed, FAILED, timed out, skipped
    seconds: float
    note: str


class Session:
    """One run: the output folder, the log, the clock and the verdicts so far."""

    def __init__(self, out: Path, seconds: float, device: dict[str, Any]) -> None:
        self.out, self.device = out, device
        self.deadline = time.monotonic() + seconds
        major, minor = device["capability"]
        self.arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"  # sm_90a has wgmma
        self.work = _build.work_folder(ROOT, self.arch)
        self.work.mkdir(mode=0o700, exist_ok=True)
        if self.work.stat().st_uid != os.getuid():
            raise SystemExit(f"{self.work} belongs to someone else: set TMPDIR")
        self.verdicts: list[Verdict] = []
        out.mkdir(parents=True, exist_ok=True)
        self.results = out / "results.json"
        if self.results.exists():  # of an earlier run
            os.replace(self.results, out / "results-previous.json")
        for name in ("device.log", "summary.json", "tests.xml"):
            (out / name).unlink(missing_ok=True)
        self.log = out / "device.log"
        self.log.touch()
        self.cwd = self.work / "cwd"  # empty: the source tree must not shadow what was installed
        self.cwd.mkdir(exist_ok=True)
        path = [str(self.work / "site"), os.environ.get("PYTHONPATH", "")]
        self.env = {k: v for k, v in os.environ.items() if k not in DROPPED} | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "GCFAST_BENCH_DEVICE": "cuda",
            "GCFAST_BENCH_OUT": str(self.results),
        }
        if self.env.get("GCFAST_DATA"):
            self.env["GCFAST_DATA"] = os.path.abspath(self.env["GCFAST_DATA"])  # commands run elsewhere

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, command: list[str], limit: float, env: dict[str, str] | None = None) -> int:
        """The exit code; TIMED_OUT after `limit` seconds. Output goes to the log; no process is left."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}   # {limit:.0f} s\n".encode())
            log.flush()
            if limit < LEAST:
                log.write(b"no time left\n")
                return TIMED_OUT
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env={**self.env, **(env or {})},
                start_new_session=True,
            )
        timed_out = False
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(limit - GRACE, limit / 2))
            timed_out = True
            self._signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, limit / 2))
            return TIMED_OUT
        finally:
            self._signal(process, signal.SIGKILL)  # and what it left behind in its group
            if timed_out or process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    def tail(self, since: int, lines: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(since, self.log.stat().st_size - (1 << 16)))
            return log.read().decode(errors="replace").splitlines()[-lines:]

    def shorten_log(self) -> None:
        text, half = self.log.read_bytes(), LOG_BYTES // 2
        if len(text) > LOG_BYTES:
            self.log.write_bytes(text[:half] + b"\n[...]\n" + text[-half:])

    def summary(self) -> None:
        data = {"device": self.device, "verdicts": [asdict(v) for v in self.verdicts]}
        _record.write(self.out / "summary.json", data)
