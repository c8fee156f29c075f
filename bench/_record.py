"""What a benchmark run leaves behind: a JSON file that GCFAST_BENCH_OUT names, rewritten each time.

    {"header": {device, capability, driver, torch, ..., commit, date},
     "ceilings": {"cuda": {"copy": bytes a second, "matmul float32": FLOP a second, ...}},
     "results": [{op, size, dtype, device, limit, limit_seconds, rounds, candidates: [{name, best, ...}]}]}

Only the standard library is needed to read one; the figures are seconds, bytes and ratios.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = "GCFAST_BENCH_OUT"


def write(path: Path, data: Any) -> None:
    """All of the new file or all of the old one, whatever happens on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        raise ValueError(f"{path} holds no benchmark results")
    return data


def _output(*command: str) -> str:
    """What a command prints, "" if it cannot be run, fails, or takes more than ten seconds."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def commit() -> str:
    """Short hash, "-dirty" if tracked files differ; GCFAST_BENCH_COMMIT names it where there is no git."""
    named = os.environ.get("GCFAST_BENCH_COMMIT", "").strip()
    git = ("git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*")
    return named or _output(*git) or "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = re.sub(r"\((R|TM)\)|Processor.*|CPU.*", "", line.split(":", 1)[1])
                return " ".join(name.split())
    return platform.processor() or platform.machine()


@cache
def header() -> dict[str, Any]:
    """The machine, the versions and the commit of this run."""
    import torch

    from gcfast.ops import native

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else ""
    return {
        "device": torch.cuda.get_device_name() if cuda else None,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "instruction_set": native.cpu_instruction_set() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(run: dict[str, Any], device: str) -> str:
    """The name of a device's file in bench/results: nvidia-h100-80gb-hbm3, amd-epyc-x86-64-v4."""
    name = run["device"] if device == "cuda" else f"{run['cpu']}-{run['instruction_set']}"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def _open() -> tuple[Path, dict[str, Any]] | None:
    if not os.environ.get(OUT, "").strip():
        return None
    path = Path(os.environ[OUT])
    now = header()
    fresh = {"header": now, "ceilings": {}, "results": []}
    if not path.exists():
        return path, fresh
    try:
        data = read(path)
    except ValueError as error:  # torn by something else: kept aside, since this run must not be lost with it
        aside = path.with_name(path.name + ".broken")
        os.replace(path, aside)
        print(f"{path} cannot be read ({error}): moved to {aside}", file=sys.stderr)
        return path, fresh
    for key, value in now.items():
        was = data["header"].get(key)
        if key != "date" and was != value:
            raise RuntimeError(
                f"{OUT}: {path} holds a run with {key} {was}, this one has {value}: name another file"
            )
    return path, data


def plain(value: Any) -> Any:
    """Five significant digits are more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def append(result: dict[str, Any]) -> None:
    """Add one comparison to the file; the same op, size, dtype and device measured before is replaced."""
    if (opened := _open()) is None:
        return
    path, data = opened
    data["results"] = [r for r in data["results"] if key(r) != key(result)] + [plain(result)]
    write(path, data)


def ceiling(device: str, name: str, value: float) -> None:
    """Add what the device was measured to reach: bytes or FLOP a second."""
    if (opened := _open()) is None:
        return
    path, data = opened
    data["ceilings"].setdefault(device, {})[name] = plain(value)
    write(path, data)


def key(result: dict[str, Any]) -> tuple[str, str, str, str]:
    return result["op"], result["size"], result["dtype"], result["device"]


def from_title(title: str) -> tuple[str, str, str]:
    """Op, size and dtype of "softplus, 1048576 elements, torch.float32"; what is missing is ""."""
    op, *rest = [part.strip() for part in title.split(",")]
    dtype = ""
    if rest and re.fullmatch(r"(torch\.)?(b?float\d+|tf32|complex\d+|int\d+)", rest[-1]):
        dtype = rest.pop().removeprefix("torch.")
    return op, ", ".join(rest), dtype
