"""Is one checkout of gcfast no slower than another? Both in one run, in turn, through the public API.

    python tools/no_slower.py BEFORE AFTER [--rounds 20] [--threads 1] [--only NAMES]

BEFORE and AFTER are folders that hold a gcfast package with its compiled modules, such as a checkout built in
place. Every round has two new processes, for where memory lies can make one a quarter slower than another of
the same code; each waits while the other one works, and who begins changes. Printed are the median of the
paired ratios AFTER / BEFORE and the upper limit of its 95 % confidence interval, by the sign test. The exit
code is 1 where that limit exceeds --limit (1.05).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from scipy.stats import binom

WORKER = Path(__file__).with_name("_workloads.py")


class Side:
    """A checkout at work in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        # Whether freed memory goes back to the system depends on where it lies: up to a quarter of a call.
        # All up to 32 MB, the most that glibc takes here, stays.
        env |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
        command = [sys.executable, str(WORKER), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True, cwd="/")

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; its error is above")
        return line


def timed(name: str, order: tuple[Side, Side]) -> dict[Side, float]:
    """Seconds of as many calls as fit into a tenth of a second, the same on both sides, once warm."""
    for side in order:
        side.say(name)
    calls = max(1, min(int(side.hear()) for side in order))
    for side in order:  # one that does not count
        side.say(str(calls))
        side.hear()
    seconds = {}
    for side in order:
        side.say(name)
        seconds[side] = float(side.hear())
    return seconds


def upper_limit(ratios: list[float]) -> float:
    """Of the 95 % confidence interval of the median: an order statistic, by the sign test."""
    n = len(ratios)
    return sorted(ratios)[min(n - 1, int(binom.ppf(0.975, n, 0.5)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("--only", nargs="*", help="workloads whose names contain one of these")
    args = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    for number in range(args.rounds):
        with (
            Side(args.before.resolve(), args.threads) as before,
            Side(args.after.resolve(), args.threads) as after,
        ):
            after.say('"list"')
            for name in json.loads(after.hear()):
                if not args.only or any(word in name for word in args.only):
                    order = (before, after) if number % 2 else (after, before)
                    seconds = timed(json.dumps(name), order)
                    ratios.setdefault(name, []).append(seconds[after] / seconds[before])
        print(f"round {number + 1} of {args.rounds}", end="\r", file=sys.stderr, flush=True)
    failed = False
    for name, found in ratios.items():
        limit = upper_limit(found)
        low, _, high = statistics.quantiles(found, n=4)
        failed |= limit > args.limit
        verdict = " SLOWER" if limit > args.limit else ""
        line = f"{statistics.median(found):.3f} ({low:.3f} to {high:.3f}), at most {limit:.3f}"
        print(f"{name:<44} {line}{verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
