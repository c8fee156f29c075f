"""tests/children.py: no process outlives the test that started it, nor a pytest that was killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import children
import pytest

HERE = Path(children.__file__).parent

# It hears nothing but SIGKILL, nor does the child of its own. Both hold its standard output open.
STUBBORN = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def left() -> Iterator[list[children.Child]]:
    """Children that a test leaves behind: they have ended when the tests of this file have."""
    kept: list[children.Child] = []
    yield kept
    for child in kept:
        assert child.returncode == -9


def test_a_child_left_behind_is_ended(left):
    child = children.start([sys.executable, "-c", STUBBORN])
    assert child.stdout.readline() == "ready\n"
    left.append(child)


def test_all_that_a_child_started_ends_with_it():
    child = children.start([sys.executable, "-c", STUBBORN])
    assert child.stdout.readline() == "ready\n"
    with os.fdopen(os.dup(child.stdout.fileno())) as output:
        children.end()
        assert child.returncode == -9 and output.read() == ""  # what they held open ended when they did


def test_a_child_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, "-c", STUBBORN], timeout=2)


def test_children_of_a_killed_parent_are_ended():
    """As pytest may be: with no moment left to do anything."""
    parent = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import children\n"
        f"child = children.start([sys.executable, '-c', {STUBBORN!r}], stdout=None)\n"
        "child.wait()\n"
    )
    process = children.start([sys.executable, "-c", parent])
    assert process.stdout.readline() == "ready\n"
    process.kill()
    out, _ = process.communicate(timeout=30)
    assert out == "" and process.returncode == -9


def test_no_test_starts_a_process_otherwise():
    starts = re.compile(r"subprocess\.(run|Popen|call|check_\w+)\(|os\.(system|popen|spawn\w+)\(")
    mine = {Path(__file__).name, "children.py"}
    files = [p for p in HERE.rglob("*.py") if p.name not in mine]
    assert files and not [p.name for p in files if starts.search(p.read_text())]
