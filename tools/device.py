"""The logic of tools/device.sh: sections in turn, each in processes of its own, within its share of the time.

Standard library only. Whatever breaks in one section, the others run, and the verdicts come at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # the modules that benchmarks share

import _build
import _record
import table
from _record import ROOT
from _session import GRACE, LEAST, TIMED_OUT, Session, Verdict

BENCH, TOOLS = ROOT / "bench", ROOT / "tools"
SECTIONS = {  # and weights: of the time left a section may take its part among those still to come
    "build": 300,  # everything stands on it; what it leaves goes to the others
    "backends": 40,
    "ceilings": 20,
    "tests": 130,
    "sanitize": 70,
    "bench": 160,
    "table": 1,
}


NOTHING_COLLECTED = 5  # pytest's exit code


class NoDevice(Exception):
    """Why there is no CUDA device to work on."""


def benchmarks() -> list[str]:
    return sorted(p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py"))


def select(only: str | None) -> tuple[list[str], list[str]]:
    """Sections and benchmarks that ``--only`` names; without it all. What they need is always among them."""
    if only is None:
        return list(SECTIONS), benchmarks()
    names = [name for name in re.split(r"[,\s]+", only) if name]
    unknown = [name for name in names if name not in SECTIONS and name not in benchmarks()]
    if unknown or not names:
        raise ValueError(
            f"--only: {', '.join(unknown) or 'nothing'} is none of {', '.join([*SECTIONS, *benchmarks()])}"
        )
    chosen = [name for name in benchmarks() if name in names]
    wanted = {"build", "table", *names} | ({"bench"} if chosen else set())
    return [s for s in SECTIONS if s in wanted], chosen or benchmarks()


def share(left: float, section: str, coming: list[str]) -> float:
    """Seconds that `section` may take of those left, `coming` being the sections after it."""
    return left * SECTIONS[section] / sum(SECTIONS[s] for s in [section, *coming])


def probe() -> dict[str, Any]:
    """The GPU as torch sees it. Raises NoDevice."""
    if shutil.which("nvidia-smi") is None:
        raise NoDevice("nvidia-smi is not on the PATH")
    try:
        seen = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoDevice(f"nvidia-smi does not answer ({type(error).__name__})") from None
    if seen.returncode != 0 or "GPU" not in seen.stdout:
        said = (seen.stdout + seen.stderr).strip().splitlines() or ["nothing"]
        raise NoDevice(f"nvidia-smi lists none: {said[0]}")
    script = (
        "import json, torch\n"
        "ok = torch.cuda.is_available()\n"
        "print(json.dumps({'name': torch.cuda.get_device_name() if ok else '', 'torch': torch.__version__,"
        " 'capability': torch.cuda.get_device_capability() if ok else None, 'cuda': torch.version.cuda}))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        raise NoDevice(f"torch cannot be imported by {sys.executable}") from None
    if not found["name"]:
        raise NoDevice(f"torch {found['torch']} (CUDA {found['cuda']}) sees none")
    return found


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _pytest(*arguments: str) -> list[str]:
    options = ("-q", "-p", "no:cacheprovider", "--color=no", "-c", str(ROOT / "pyproject.toml"))
    return _python("-m", "pytest", f"--rootdir={ROOT}", *options, *arguments)


def _closing(session: Session, since: int) -> str:
    """pytest's last line: how many passed."""
    found = [line for line in session.tail(since, 200) if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    return found[-1].strip("= ") if found else "no report"


def _script(name: str) -> Callable[[Session, float], tuple[int, str]]:
    def section(session: Session, limit: float) -> tuple[int, str]:
        since = session.log.stat().st_size
        code = session.run(_python(str(TOOLS / f"{name}.py")), limit)
        return code, session.tail(since, 1)[0]

    return section


def build(session: Session, limit: float) -> tuple[int, str]:
    end = time.monotonic() + limit
    session.run(_python("-m", "pip", "list"), min(30.0, limit))  # for the log: what is there

    def run(command: list[str], env: dict[str, str]) -> int:
        part = 0.7 if env["GCFAST_CUDA"] == "1" else 1.0  # a second try needs time, too
        return session.run(command, part * (end - time.monotonic()), env)

    good, note = _build.build(run, session.work, session.arch)
    return int(not good), note


def tests(session: Session, limit: float) -> tuple[int, str]:
    since = session.log.stat().st_size
    options = ("-m", "gpu", "--tb=short", "--maxfail=40", "--durations=8", "--continue-on-collection-errors")
    report = f"--junitxml={session.out / 'tests.xml'}"
    code = session.run(_pytest(str(ROOT / "tests"), *options, report), limit)
    closing = _closing(session, since)
    return code or int(" passed" not in closing), closing  # all skipped proves nothing


def sanitize(session: Session, limit: float) -> tuple[int, str]:
    """tools/sanitize.py as it is, which fills Triton's cache, then under each tool of compute-sanitizer."""
    program = _python(str(TOOLS / "sanitize.py"))
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    search = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    sanitizer = shutil.which("compute-sanitizer", path=search)
    if sanitizer is None:
        return 1, "compute-sanitizer is not on the PATH"
    options = ["--error-exitcode", "77", "--print-limit", "20", "--target-processes", "application-only"]
    commands = {"plain": program} | {
        tool: [sanitizer, "--tool", tool, *options, *program]
        for tool in ("memcheck", "racecheck", "initcheck")
    }
    end, notes, worst = time.monotonic() + limit, [], 0
    for i, (name, command) in enumerate(commands.items()):
        # without torch's memory pool an access beyond a tensor is one beyond its allocation
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        part = 2 if i == 0 else len(commands) - i  # the first one compiles
        code = session.run(command, (end - time.monotonic()) / part, env)
        notes.append(f"{name} {_word(code)}")
        worst = worst or code
        if i == 0 and code != 0:
            break  # it does not run as it is: the tools would say no more
    return worst, ", ".join(notes)


def bench(session: Session, limit: float, names: list[str]) -> tuple[int, str]:
    end, notes, worst = time.monotonic() + limit, [], 0
    for i, name in enumerate(names):
        since = session.log.stat().st_size
        command = _pytest(str(BENCH / f"bench_{name}.py"), "--benchmark-only", "-s", "--device", "cuda")
        limit = (end - time.monotonic()) / (len(names) - i)
        code = session.run([*command, "-k", "table"], limit)
        if code == NOTHING_COLLECTED:  # no bench_table in this file: all of it
            code = session.run(command, limit)
        closing = _closing(session, since)
        skipped = re.search(r"\d+ skipped", closing)
        word = "skipped" if code == 0 and " passed" not in closing else _word(code)
        notes.append(f"{name} {word}" + (f" ({skipped[0]})" if skipped else ""))
        worst = worst or code
    return worst, ", ".join(notes)


def _word(code: int) -> str:
    return {0: "passed", TIMED_OUT: "timed out"}.get(code, f"FAILED ({code})")


def show_table(session: Session, limit: float) -> tuple[int, str]:
    if not session.results.exists():
        return 0, "nothing was measured"
    run = _record.read(session.results)
    with session.log.open("a", encoding="utf-8") as log:
        log.write(f"\n{table.show(run)}\n")
    return 0, f"{len(run['results'])} comparisons in {session.results}"


def work(session: Session, sections: list[str], names: list[str]) -> None:
    """Every section, whatever becomes of the others."""
    functions = {
        "build": build,
        "backends": _script("backends"),
        "ceilings": _script("ceilings"),
        "tests": tests,
        "sanitize": sanitize,
        "bench": lambda s, limit: bench(s, limit, names),
        "table": show_table,
    }
    for i, section in enumerate(sections):
        began = time.monotonic()
        limit = share(session.left(), section, sections[i + 1 :])
        if section != "table":
            print(f"\n== {section}, {max(limit, 0):.0f} s at most", flush=True)
        with session.log.open("a", encoding="utf-8") as log:
            log.write(f"\n== {section}\n")
        since = session.log.stat().st_size
        if limit < LEAST and section != "table":
            code, note, word = 1, "no time left", "skipped"
        else:
            try:
                code, note = functions[section](session, limit)
            except Exception as error:
                code, note = 1, f"{type(error).__name__}: {error}"
            word = "passed" if code == 0 else "timed out" if code == TIMED_OUT else "FAILED"
        if section != "table":
            print("\n".join(session.tail(since, 4 if code == 0 else 15)), flush=True)
        session.verdicts.append(Verdict(section, word, round(time.monotonic() - began, 1), note))
        session.summary()


def finish(session: Session) -> int:
    if session.results.exists():
        with contextlib.suppress(ValueError, OSError):
            print(f"\n{table.show(_record.read(session.results))}")
    print(f"\n{session.device['name']}; everything is in {session.out}")
    for v in session.verdicts:
        print(f"{v.section:<9} {v.verdict:<9} {v.seconds:6.1f} s  {v.note}")
    session.shorten_log()
    return int(any(v.verdict != "passed" for v in session.verdicts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/device.sh",
        description="Build, test, sanitize and measure gcfast on an NVIDIA GPU; no network needed.",
        epilog="Exit codes: 0 all passed, 1 a section did not, 2 no CUDA device or wrong options. OUT names "
        "the folder of results.json, summary.json, tests.xml and device.log (default ./gcfast-device). The "
        "build is kept in the temporary folder for the next run. GCFAST_DATA names the folder of mnist.npz, "
        "without which the end-to-end benchmarks are skipped; GCFAST_BENCH_COMMIT the commit, where there is "
        "no git. PYTHON chooses the interpreter.",
    )
    parser.add_argument(
        "--only", metavar="NAMES", help="sections or benchmarks, for example tests,activation"
    )
    parser.add_argument("--list", action="store_true", help="print the sections and the benchmarks")
    parser.add_argument("--seconds", type=float, default=540, help="time in all (default %(default)s)")
    args = parser.parse_args(argv)
    if args.list:
        print("sections:", *SECTIONS, "\nbenchmarks:", *benchmarks())
        return 0
    try:
        sections, names = select(args.only)
    except ValueError as error:
        parser.error(str(error))
    began = time.monotonic()
    try:
        device = probe()
    except NoDevice as why:
        print(f"tools/device.sh: no CUDA device: {why}", file=sys.stderr)
        return 2
    # SIGTERM, from `timeout` for one, ends the section at hand and still prints the table.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seconds = args.seconds - (time.monotonic() - began) - GRACE - 2
    session = Session(Path(os.environ.get("OUT") or "gcfast-device").resolve(), seconds, device)
    print(f"{device['name']}, torch {device['torch']}: {', '.join(sections)}; {session.log}", flush=True)
    try:
        work(session, sections, names)
    except KeyboardInterrupt:
        session.verdicts.append(
            Verdict("all", "timed out", round(time.monotonic() - began, 1), "interrupted")
        )
        session.summary()
    return finish(session)


if __name__ == "__main__":
    sys.exit(main())
