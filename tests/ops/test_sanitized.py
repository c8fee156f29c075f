"""The compiled CPU module built with sanitizers, called from Python (tools/sanitize_cpu.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.tools
def test_operators_under_sanitizers():
    """Random calls are right, and a pointer moved on by one element is seen in every kernel."""
    if not (ROOT / "csrc" / "cpu").is_dir():
        pytest.skip("needs the source tree")
    for name in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(name)
    done = children.run([sys.executable, ROOT / "tools" / "sanitize_cpu.py"], timeout=1800)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "operators are right" in done.stdout and "\n0 of " in done.stdout
