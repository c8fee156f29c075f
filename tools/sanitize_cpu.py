"""The compiled CPU module under AddressSanitizer and UndefinedBehaviorSanitizer, called from Python.

    python tools/sanitize_cpu.py [--seconds 15] [--seed NUMBER] [--folder FOLDER]

Builds csrc/cpu by setup.py in a copy of the sources, which FOLDER keeps for the next time, and runs both
parts of tests/op_calls.py on it: random calls of every operator, others each day, and faults that must be
seen. Exit status 0: nothing was found; 1: something was; 77: the compiler has no sanitizers here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "gcfast", "setup.py", "pyproject.toml", "README.md", "LICENSE")
# What comes after setup.py's own options, whose -fwrapv would define what is to be found. Functions that are
# compiled for several instruction sets are for one here; of the tiles LEVEL chooses. The bindings are mostly
# pybind11's.
COMPILER = """#!/bin/sh
case "$*" in *bindings.cpp*) level=-O0;; *) level=-O1;; esac
exec {compiler} "$@" $level -g1 -fno-wrapv -fsanitize=address,undefined,float-cast-overflow \\
  -fno-sanitize-recover=all '-Dtarget_clones(...)=unused' \\
  '-DGCFAST_LEVEL=(getenv("LEVEL") ? atoi(getenv("LEVEL")) : instruction_level())'
"""
# Torch and Python, which are not instrumented, keep memory to the end. Fresh memory is NaN.
ASAN = "detect_leaks=0:redzone=512:quarantine_size_mb=64:malloc_fill_byte=255:max_malloc_fill_size=1000000000"


def runtime(folder: Path, compiler: str) -> str:
    """The libraries that a process must load first; "" where the compiler has no sanitizers."""
    (folder / "probe.cpp").write_text("int main() {}\n")
    probe = [compiler, "-fsanitize=address,undefined", folder / "probe.cpp", "-o", folder / "probe"]
    # the second one for exceptions, which the first passes on
    files = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
    try:
        subprocess.run(probe, check=True, capture_output=True)
        found = [subprocess.check_output([compiler, name], text=True).strip() for name in files]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return " ".join(found) if all(map(os.path.isabs, found)) else ""


def build(folder: Path, compiler: str) -> Path:
    """A copy of the sources with the compiled module in it."""
    source, script = folder / "src", folder / "compiler"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    for path in (ROOT / name for name in SOURCES):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=built)
        else:
            shutil.copy2(path, source)
    script.write_text(COMPILER.format(compiler=compiler))
    script.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", folder / "objects"]
    env = {**os.environ, "CC": str(script), "CXX": str(script), "GCFAST_CUDA": "0"}
    done = subprocess.run(command, cwd=source, env=env, text=True, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}{done.stderr}\nthe module did not build")
    return source


def main(folder: Path, seconds: float, seed: int) -> int:
    compiler = os.environ.get("CXX", "g++")
    libraries = runtime(folder, compiler)
    if not libraries:
        print(f"{compiler} has no sanitizer runtime")
        return 77
    began = time.monotonic()
    source = build(folder, compiler)
    print(f"built in {time.monotonic() - began:.0f} s; seed {seed}", flush=True)
    env = {**os.environ, "LD_PRELOAD": libraries, "PYTHONPATH": str(source), "GCFAST_BACKEND": "auto"}
    parts = {
        "random": ([str(seconds), str(seed)], "symbolize=1"),
        "moved": ([], "symbolize=0"),  # a hundred reports, which take a second each with names
    }
    running = []
    for part, (words, option) in parts.items():
        command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "op_calls.py"), part, *words]
        own = {**env, "ASAN_OPTIONS": f"{ASAN}:{option}", "UBSAN_OPTIONS": "print_stacktrace=1"}
        with open(folder / f"{part}.log", "w") as log:
            running.append(subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=log))
    failed = 0
    for part, process in zip(parts, running):
        failed |= process.wait() != 0
        said = (folder / f"{part}.log").read_text()
        if process.returncode:  # the last call that was named, and the report
            said = said[said.rfind("\n", 0, said.rfind(" threads, level ") + 1) + 1 :][:8000]
        else:
            said = said[said[:-1].rfind("\n") + 1 :]
        print(said, end="", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=15, help="of random calls")
    parser.add_argument("--seed", type=int, default=int(time.time()) // 86400, help="default: the day")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gcfast-sanitize.") as temporary:
        place = (given.folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(main(place, given.seconds, given.seed))
