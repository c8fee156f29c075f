"""The algorithms of csrc/core in C++, on the host: values, hostile inputs, sanitizers (tests/core/run.sh)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]


PROGRAMS = {source.stem: source.read_text() for source in sorted((ROOT / "tests" / "core").glob("*.cpp"))}
CASES = [
    (mode, name)
    for mode in ("native", "plain", "sanitized", "nvcc", "threads")
    for name, text in PROGRAMS.items()
    if mode != "threads" or '"team.h"' in text
]


@pytest.mark.tools
@pytest.mark.parametrize(("mode", "name"), CASES)
def test_core(mode, name):
    if not (ROOT / "csrc" / "core").is_dir() or shutil.which("bash") is None:
        pytest.skip("needs bash and the source tree")
    run = ["bash", str(ROOT / "tests" / "core" / "run.sh"), mode, name]
    done = children.run(run, timeout=1800, env={**os.environ, "CXXFLAGS": "-Werror"})
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"passed {mode} {name}"
