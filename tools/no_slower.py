"""Is one checkout of gcfast no slower than another? Both in one run, in turn, through the public API.

    python tools/no_slower.py BEFORE AFTER [--rounds 20] [--threads 1] [--only NAMES]

BEFORE and AFTER are folders that hold a gcfast package with its compiled modules, such as a checkout built in
place. Each has a process of its own, which waits while the other one works; every round runs a workload once
in each, in changing order. Printed are the median of the paired ratios AFTER / BEFORE and the upper limit of
its 95 % confidence interval, by the sign test. The exit code is 1 where that limit exceeds --limit (1.05).
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
        command = [sys.executable, str(WORKER), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True, cwd="/")

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
    before, after = (Side(folder.resolve(), args.threads) for folder in (args.before, args.after))
    after.say('"list"')
    names: list[str] = json.loads(after.hear())
    failed = False
    for name in names:
        if args.only and not any(word in name for word in args.only):
            continue
        quoted = f'"{name}"'
        for side in (before, after):
            side.say(quoted)
        calls = max(1, min(int(side.hear()) for side in (before, after)))
        for side in (before, after):  # a round that does not count
            side.say(str(calls))
            side.hear()
        ratios = []
        for number in range(args.rounds):
            seconds = {}
            for side in (before, after) if number % 2 else (after, before):
                side.say(quoted)
                seconds[side] = float(side.hear())
            ratios.append(seconds[after] / seconds[before])
        limit = upper_limit(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        slower = limit > args.limit
        failed |= slower
        print(
            f"{name:<44} {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}), at most {limit:.3f}"
            + (" SLOWER" if slower else ""),
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
