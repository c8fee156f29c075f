"""A plugin of pytest: which functions of gcfast each test calls, and its seconds, into $GCFAST_CALLS."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

calls: dict[str, tuple[float, list[str]]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    sys.setprofile(None)
    threading.setprofile(None)  # type: ignore[arg-type]
    root = f"{item.config.rootpath}{os.sep}"
    names = {(c.co_filename.removeprefix(root), c.co_firstlineno) for c in codes}
    found = sorted(f"{name}:{line}" for name, line in names if name.startswith("gcfast"))
    calls[item.nodeid] = (round(seconds, 3), found)


def pytest_sessionfinish() -> None:
    Path(os.environ["GCFAST_CALLS"]).write_text(json.dumps(calls))
