"""The algorithms of csrc/core in C++, on the host: values, hostile inputs, sanitizers (tests/core/run.sh)."""

from __future__ import annotations

import shutil
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mode", ["plain", "native", "sanitized", "nvcc", "threads"])
def test_core(mode):
    if not (ROOT / "csrc" / "core").is_dir() or shutil.which("bash") is None:
        pytest.skip("needs bash and the source tree")
    run = ["bash", str(ROOT / "tests" / "core" / "run.sh"), mode]
    done = children.run(run, timeout=1800)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    sources = (ROOT / "tests" / "core").glob("*.cpp")
    programs = sum(mode != "threads" or '"team.h"' in source.read_text() for source in sources)
    assert programs > 0 and done.stdout.count(f"passed {mode}") == programs
