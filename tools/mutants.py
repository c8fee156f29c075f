"""Plants small faults in a copy of the code, one after the other, and says which of them the tests find.

The faults are listed in tools/mutants.toml, each with the room (the folder of tests/) whose tests ought to
find it; the test that once did is tried first. A fault's place is found by its text, which occurs once in the
sources, so files may be moved. The user's own tree is only read; the copy is restored after every fault.
Changed C++ is built anew.

    python tools/mutants.py --room proofs --tier all                    all of a room, by all its tests
    python tools/mutants.py --sample 5 --seed $(date +%F) --no-check    a handful, another one each day
    python tools/mutants.py --generated 400 --minutes 180               constants, signs and comparisons

The last draws its faults from the sources (tools/_mutant_sample.py), and tries each on the tests that run its
function. Those that survive need a reason in tools/mutant_reasons.toml: why what is said is still true.
The exit status is 1 if a fault survives of which the list does not say so, 2 if a fault could not be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _mutant_sample
import tomllib

HERE = Path(__file__).resolve().parent
CPP = (".cpp", ".h")
MAPPED = ("proofs", "losses", "solve", "certificate", "ops")  # rooms whose tests find generated faults
ENOUGH = 60.0  # seconds of tests, as recorded, that are tried on one
NOT_COPIED = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "*venv", "dist", "shared")
TIERS = {"default": [], "all": ["-m", "not soundness"]}  # soundness takes minutes a run
NEEDED = ("id", "room", "why", "find", "replace")
FIELDS = (*NEEDED, "found_by", "survived", "survives")
Mutant = dict[str, Any]


class CannotTry(Exception):
    """A fault that could not be planted, built or tested; the message says why."""


def read_list(path: Path) -> list[Mutant]:
    """The mutants of a list, checked for what every one needs."""
    mutants: list[Mutant] = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    for mutant in mutants:
        if set(NEEDED) - mutant.keys() or mutant.keys() - set(FIELDS):
            raise SystemExit(f"{path}: {mutant.get('id')}: expected {FIELDS}; got {tuple(mutant)}")
    return mutants


def write_list(path: Path, mutants: list[Mutant]) -> None:
    """The list again, what stands before the first mutant kept."""
    text = path.read_text(encoding="utf-8").split("[[mutant]]")[0]
    for mutant in mutants:
        keys = [key for key in FIELDS if key in NEEDED or mutant.get(key)]
        lines = [f"{key} = {json.dumps(mutant[key], ensure_ascii=False)}" for key in keys]
        text += "\n".join(["[[mutant]]", *lines, "", ""])
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def source_texts(root: Path) -> dict[Path, str]:
    """The sources that faults are planted in; a link to triton_kernels is no second copy of it."""
    folders = (root / name for name in ("gcfast", "csrc", "triton_kernels"))
    found = {path.resolve() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {p: p.read_text(encoding="utf-8") for p in sorted(found) if p.suffix in (".py", ".cu", *CPP)}


def place_of(sources: dict[Path, str], mutant: Mutant) -> tuple[Path, str]:
    """The file that a mutant changes, and its text with the fault in it."""
    find, replace = mutant["find"], mutant["replace"]
    hits = [path for path, text in sources.items() for _ in range(text.count(find))]
    if len(hits) != 1 or find == replace:
        where = ", ".join(path.name for path in hits) or "nowhere"
        raise CannotTry(f"its text must occur once and change; it occurs {len(hits)} times ({where})")
    changed = sources[hits[0]].replace(find, replace)
    if hits[0].suffix == ".py":
        compile(changed, str(hits[0]), "exec")  # a SyntaxError would be found by any test
    return hits[0], changed


def run(command: list[str], folder: Path, limit: float) -> tuple[int | None, str]:
    """Exit status (None: stopped at the time limit) and output of a command and all that it started."""
    path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # no stale byte code; and no fault is planted in CUDA code, which need not be built
    env = {"GCFAST_CUDA": "0", **os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        options: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=folder, env=env, **options)
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        return status, out.read()


class Scratch:
    """A copy of the tree, its compiled modules included, or built where there are none."""

    def __init__(self, root: Path, folder: Path, tier: str) -> None:
        self.folder, self.saved, self.tier = folder / "tree", folder / "modules", tier
        shutil.copytree(root, self.folder, symlinks=True, ignore=NOT_COPIED)
        link = self.folder / "gcfast" / "triton_kernels"
        if (self.folder / "triton_kernels").is_dir() and not link.exists():
            link.symlink_to(Path("..", "triton_kernels"))
        if (self.folder / "setup.py").is_file() and not list((self.folder / "gcfast").glob("*.so")):
            self.build()
        self.saved.mkdir()
        for module in (self.folder / "gcfast").glob("*.so"):
            shutil.copy(module, self.saved)

    def build(self) -> None:
        status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], self.folder, 3600)
        if status != 0:
            raise CannotTry(f"the build failed:\n{output[-3000:]}")

    def test(self, tests: list[str], limit: float) -> tuple[str, float]:
        """What fails first of these ("": nothing), in their order as ever, and after how long.

        Whole rooms are tested by the tier's tests, single ones whatever their tier.
        """
        tier = "all" if all("::" in test for test in tests) else self.tier
        options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", *TIERS[tier]]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        began = time.monotonic()
        status, output = run(command, self.folder, limit)
        took = round(time.monotonic() - began, 1)
        if status is None or status < 0 or status > 128:
            what = f"the time limit of {limit:.0f} s" if status is None else f"a crash (exit status {status})"
            return what, took
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        if status in (1, 2) and failed:
            return failed[1], took
        if status == 4 and "while loading conftest" in output:
            return "importing gcfast", took
        if status != 0:
            raise CannotTry(f"pytest ended with status {status}:\n{output[-3000:]}")
        return "", took

    def plant(self, mutant: Mutant, limit: float) -> tuple[str, float]:
        """What finds a fault ("": nothing) and after how long; afterwards the copy is as it was."""
        sources = source_texts(self.folder)
        path, changed = place_of(sources, mutant)
        try:
            path.write_text(changed, encoding="utf-8")
            if programs := mutant.get("programs"):
                by, seconds = self.test(programs, limit)
                if by:
                    return by, seconds
            if path.suffix in CPP:
                try:
                    self.build()
                except CannotTry:
                    if programs:
                        return "the compiler", 0.0
                    raise
            if finder := mutant.get("found_by"):
                with contextlib.suppress(CannotTry):  # a test that is gone
                    by, seconds = self.test([finder], limit)
                    if by:
                        return by, seconds
            return self.test(mutant.get("tests") or [f"tests/{mutant['room']}"], limit)
        finally:
            path.write_text(sources[path], encoding="utf-8")  # newer than its object, which is then made anew
            for module in self.saved.glob("*.so") if path.suffix in CPP else ():
                shutil.copy(module, self.folder / "gcfast")

    def calls(self, names: list[str]) -> _mutant_sample.Calls:
        """Which functions each test runs."""
        found = self.folder / "calls.json"
        os.environ["GCFAST_CALLS"] = str(found)
        rooms = [f"tests/{room}" for room in names if (self.folder / "tests" / room).is_dir()]
        options = ["-q", "-p", "tools._calls", "-p", "no:cacheprovider", "-k", "not triton"]
        status, output = run([sys.executable, "-m", "pytest", *options, *rooms], self.folder, 7200)
        if status not in (0, 1) or not found.is_file():
            raise CannotTry(f"pytest ended with status {status}:\n{output[-3000:]}")
        return json.loads(found.read_text())


def digest(root: Path) -> str:
    """Of sources and tests: results of others are not taken over."""
    tests = (path.read_text() for path in sorted((root / "tests").rglob("*.py")))
    return hashlib.sha256("\0".join((*source_texts(root).values(), *tests)).encode()).hexdigest()


def generated(args: argparse.Namespace, scratch: Scratch, tree: str) -> list[Mutant]:
    """The sample of faults, each with the tests that run its function, and the reason why it may survive."""
    rooms = args.room.split(",") if args.room else list(MAPPED)
    kept = args.root / "build" / f"mutants-calls-{'-'.join(rooms)}.json"
    calls = json.loads(kept.read_text()) if kept.is_file() else {}
    if calls.get("tree") != tree:
        calls = {"tree": tree, "calls": scratch.calls(rooms)}
        kept.write_text(json.dumps(calls))
    texts = source_texts(args.root)
    sources = {path.relative_to(args.root.resolve()).as_posix(): text for path, text in texts.items()}
    listed = args.reasons.read_text(encoding="utf-8") if args.reasons.is_file() else ""
    reasons = {
        (s["file"], s["line"], s["change"]): s["reason"] for s in tomllib.loads(listed).get("survivor", [])
    }
    found = _mutant_sample.candidates(sources, int(args.seed))
    mutants = []
    for mutant in _mutant_sample.sample(found, args.generated, int(args.seed)):
        mutant = _mutant_sample.placed(mutant, sources)
        mutant["tests"] = _mutant_sample.tests_of(mutant, calls["calls"], ENOUGH)
        if mutant["file"].endswith(CPP):
            mutant["programs"] = _mutant_sample.programs_of(mutant, args.root)
        mutant["survives"] = reasons.get((mutant["file"], mutant["why"], mutant["id"].split(" ", 1)[1]), "")
        mutants.append(mutant)
    return mutants


def chosen(mutants: list[Mutant], args: argparse.Namespace) -> list[Mutant]:
    """The mutants asked for, by rooms. A sample goes through the whole list in as many days as that takes."""
    ids = args.only.split(",") if args.only else [m["id"] for m in mutants]
    rooms = args.room.split(",") if args.room else sorted({m["room"] for m in mutants})
    if unknown := set(ids) - {m["id"] for m in mutants}:
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}")
    mutants = [m for m in mutants if m["id"] in ids and m["room"] in rooms]
    if args.sample:
        day = int(args.seed) if args.seed.isdigit() else datetime.date.fromisoformat(args.seed).toordinal()
        mutants = random.Random(0).sample(mutants, len(mutants))
        count = min(args.sample, len(mutants))
        mutants = [mutants[(day * count + k) % len(mutants)] for k in range(count)]
    return sorted(mutants, key=lambda m: rooms.index(m["room"]))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, default=HERE.parent, help="the tree (default: this one)")
    add("--list", type=Path, default=HERE / "mutants.toml", help="the list of faults")
    add("--only", metavar="IDS", help="ids, separated by commas")
    add("--room", metavar="ROOMS", help="rooms, separated by commas, tried in this order")
    add("--sample", type=int, metavar="K", help="K faults; --seed says which")
    add("--seed", default="0", metavar="DAY", help="a date such as 2026-01-31, or a number")
    add(
        "--generated",
        type=int,
        metavar="K",
        help="K from the sources, and all constants of bounds",
    )
    add("--minutes", type=float, default=math.inf, help="begin no fault after this; a later run goes on")
    add("--reasons", type=Path, default=HERE / "mutant_reasons.toml", help="why generated ones may survive")
    add("--tier", choices=TIERS, default="default", help="all: every marker but soundness")
    add("--limit", type=float, default=600, help="seconds a fault; at least twice its room's")
    add("--no-check", action="store_true", help="do not test the rooms without a fault first")
    add("--record", action="store_true", help="write found_by and survived into the list")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup ignores, but tests send
    args = arguments(argv)
    began = time.monotonic()
    mutants = [] if args.generated else read_list(args.list)
    kind = f"generated-{args.seed}" if args.generated else args.tier
    results = args.root / "build" / f"mutants-{kind}.json"  # to go on from
    results.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"tree": digest(args.root), "rooms": {}, "mutants": {}}
    if results.is_file() and (earlier := json.loads(results.read_text()))["tree"] == state["tree"]:
        state = earlier
    ends: dict[str, list[str]] = {"found": [], "survived": [], "unexpected": [], "error": []}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        scratch = Scratch(args.root.resolve(), Path(folder), args.tier)
        if args.generated:
            mutants, args.no_check = generated(args, scratch, state["tree"]), True
        for mutant in chosen(mutants, args):
            if (time.monotonic() - began) / 60 > args.minutes:
                break
            key, room, fault = mutant["id"], mutant["room"], f"{mutant['find']} -> {mutant['replace']}"
            try:
                if not args.no_check and room not in state["rooms"]:
                    by, state["rooms"][room] = scratch.test([f"tests/{room}"], 7200)
                    if by:
                        raise SystemExit(f"tests/{room} fails without a fault, by {by}")
                entry = state["mutants"].get(key, {})
                if entry.get("fault") != fault:
                    limit = max(args.limit, 2 * state["rooms"].get(room, 0.0))
                    by, seconds = scratch.plant(mutant, limit)
                    state["mutants"][key] = entry = {"by": by, "seconds": seconds, "fault": fault}
                    results.write_text(json.dumps(state, indent=1, ensure_ascii=False))
            except CannotTry as error:
                print(f"error               {key}: {error}", flush=True)
                ends["error"].append(key)
                continue
            how = "found" if entry["by"] else "survived"
            ends[how].append(key)
            print(f"{how:<8} {entry['seconds']:>7.1f} s  {key}: {entry['by'] or mutant['why']}", flush=True)
            if not (entry["by"] or mutant.get("survived") or mutant.get("survives")):
                ends["unexpected"].append(key)
            if args.record and not args.generated:
                mutant |= {"found_by": entry["by"], "survived": not entry["by"]}
                write_list(args.list, mutants)
    print(f"{len(ends['found'])} found; survived: {', '.join(ends['survived']) or 'none'}")
    if args.generated:
        tried = len(ends["found"]) + len(ends["survived"])
        share = 100 * len(ends["survived"]) / max(tried, 1)
        print(f"{tried} of {len(mutants)} tried, {share:.1f} % survived")
    if ends["unexpected"]:
        print(f"survived although the list did not say so: {', '.join(ends['unexpected'])}")
    return 2 if ends["error"] else 1 if ends["unexpected"] else 0


if __name__ == "__main__":
    sys.exit(main())
