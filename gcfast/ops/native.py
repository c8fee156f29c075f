"""The compiled modules: what was loaded, and if not, why and what to do about it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

_API = 9  # must equal the `api` attribute of the compiled modules
_FIX = "reinstall gcfast where a C++17 compiler is available: pip install --force-reinstall --no-deps gcfast"


def load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module ``gcfast.<name>``, or None and the reason."""
    try:
        module = importlib.import_module(f"gcfast.{name}")
    except ImportError as error:
        return None, str(error)
    if getattr(module, "api", None) != _API:
        return None, f"gcfast.{name} was built from other sources: its api is not {_API}"
    return module, ""


cpu, cpu_error = load("_cpu")
if cpu is None:
    warnings.warn(
        f"gcfast's CPU kernels are not available, the plain PyTorch reference is used instead: {cpu_error}. "
        f"To mend it, {_FIX}",
        RuntimeWarning,
        stacklevel=2,
    )
cuda, cuda_error = load("_cuda")  # loads without a driver too: whether it could run is cuda_status()'s matter


def cuda_status() -> dict[str, Any]:
    """Whether CUDA kernels could run: ``built``, ``why`` (empty if they could), versions and devices."""
    if cuda is None:
        return {"built": False, "why": f"not built: {cuda_error}", "devices": []}
    status = dict(cuda.status())
    devices = [dict(cuda.device(i)) for i in range(status["count"])]
    why = status["error"] or ("no CUDA device" if not devices else "")
    return {"built": True, "why": why, "devices": devices, **status}


def cpu_instruction_set() -> str:
    """What the CPU kernels run with here: x86-64-v4, x86-64-v3 or baseline; '' without the kernels."""
    return str(cpu.instruction_set()) if cpu is not None else ""
