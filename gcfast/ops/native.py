"""The compiled modules: what was loaded, and if not, why and what to do about it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

_API = 10  # must equal the `api` attribute of the compiled modules
_FIX = "reinstall gcfast where a C++17 compiler is available: pip install --force-reinstall --no-deps gcfast"


# A product that is denormal, and back: evaluated when it is asked for.
_LEAST_NORMAL, _SMALL, _LARGE = 2.0**-1022, 2.0**-30, 2.0**30


def flushes() -> bool:
    """Whether this thread flushes denormal numbers to zero."""
    return _LEAST_NORMAL * _SMALL * _LARGE != _LEAST_NORMAL


def load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module ``gcfast.<name>``, or None and the reason."""
    before = flushes()
    try:
        module = importlib.import_module(f"gcfast.{name}")
    except ImportError as error:
        return None, str(error)
    if getattr(module, "api", None) != _API:
        return None, f"gcfast.{name} was built from other sources: its api is not {_API}"
    # setup.py and the sources refuse build flags that break proofs; this is for what slips through
    wrong = module.self_test() if hasattr(module, "self_test") else ""
    if flushes() and not before:
        module.exchange_control_words([], 1)
        wrong = "loading it makes this thread flush denormal numbers to zero (-ffast-math when linking?)"
    if wrong:
        return None, f"gcfast.{name} is not to be trusted with proofs: {wrong}; build it without such flags"
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
