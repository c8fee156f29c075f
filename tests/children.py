"""The processes that tests start: each is ended, whatever happens to its test or to pytest itself.

Each child leads a group of its own, so that all that it starts in turn ends with it. ``end`` is called after
every test. Where pytest is killed and can end nothing, a watcher does: it is told of every child, and its
standard input is a pipe that the system closes with the last process that writes to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

WATCHER = """
import os, signal, sys
living = set()
for line in sys.stdin:
    (living.add if line[0] == "+" else living.discard)(int(line[1:]))
for pid in living:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
"""

Popen = subprocess.Popen  # as it is, whatever a test puts in its place
_children: list[Child] = []
_watchers: list[subprocess.Popen[str]] = []  # one, once there was a child


class Child(subprocess.Popen[Any]):
    """A process that is ended after the test at the latest, with all that it started."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"start_new_session": True})
        _children.append(self)
        adopt(self.pid)

    def end(self) -> None:
        _children.remove(self)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        _tell(f"-{self.pid}")


def start(command: Sequence[object], **options: Any) -> Child:
    """A child whose output, as text, comes in pipes.

    ``python -c`` runs in another folder, for the working directory would shadow the installed package.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if "-c" in command:
        pipes["cwd"] = tempfile.gettempdir()
    return Child([str(word) for word in command], **pipes | options)


def run(
    command: Sequence[object], *, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A child's exit code and output, once it has ended."""
    child = start(command, **options)
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.end()
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def end() -> None:
    """Ends all that still runs."""
    while _children:
        _children[-1].end()


def adopt(pid: int) -> int:
    """Lets the watcher end a process that was started in another way."""
    _tell(f"+{pid}")
    return pid


def _tell(line: str) -> None:
    if not _watchers:
        command = [sys.executable, "-S", "-c", WATCHER]
        _watchers.append(Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True))
    pipe = _watchers[0].stdin
    assert pipe is not None
    pipe.write(f"{line}\n")
    pipe.flush()
