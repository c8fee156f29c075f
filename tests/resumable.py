"""Results of long tests, kept in build/ for the code that they are of: a run goes on where one ended."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gcfast
from gcfast.storage import write_json

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _digest() -> str:
    """Of all that the results depend on: the package and what draws and judges."""
    package = Path(gcfast.__file__).parent
    files = [*package.rglob("*.py"), *package.glob("*.so"), *(ROOT / "tests").glob("*.py")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, numbers and texts, or returned before under this name."""
    path = ROOT / "build" / "soundness" / _digest() / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made": make()})
    return json.loads(path.read_text())["made"]
