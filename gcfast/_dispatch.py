"""Which backend runs an op: availability with reasons, forcing, logging, and a record of what ran."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
from collections.abc import Iterator, Mapping

import torch

from gcfast import _native

log = logging.getLogger("gcfast")

BACKENDS = ("cpu", "triton", "cuda", "reference")
OPS = ("activation", "softmax_residual", "wide_forward", "gram_product")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("gcfast_backend", default=None)
_last: dict[str, str] = {}
_logged: set[tuple[str, str, str]] = set()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class BackendTable(Mapping[str, Mapping[str, str]]):
    """``table[op][backend]`` is "" where the backend is usable, else the reason why it is not."""

    def __init__(self, reasons: Mapping[str, Mapping[str, str]], notes: Mapping[str, str]) -> None:
        self._reasons = reasons
        self.notes = dict(notes)

    def __getitem__(self, op: str) -> Mapping[str, str]:
        return self._reasons[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)

    def usable(self, op: str, backend: str) -> bool:
        return self._reasons[op][backend] == ""

    def reason(self, op: str, backend: str) -> str:
        return self._reasons[op][backend]

    def __repr__(self) -> str:
        lines = [f"{'op':<18} {'backend':<10} usable"]
        for op, row in self._reasons.items():
            for backend, reason in row.items():
                lines.append(f"{op:<18} {backend:<10} {'yes' if not reason else 'no: ' + reason}")
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        return "\n".join(lines)


def _static_reason(op: str, backend: str) -> str:
    if backend == "reference":
        return ""
    if backend == "cpu":
        return "" if _native.cpu is not None else _native.cpu_error
    return "not implemented for this op in this version"


def backends() -> BackendTable:
    """Every op's backends: usable, or the reason why not. ``print(gcfast.backends())`` shows a table."""
    cuda = _native.cuda_status()
    notes = {
        "cpu": f"{_native.cpu_instruction_set() or 'no kernels'}, {torch.get_num_threads()} threads",
        "cuda": cuda["why"] or ", ".join(str(d["name"]) for d in cuda["devices"]),
        "in force": forced() or "auto",
    }
    return BackendTable({op: {b: _static_reason(op, b) for b in BACKENDS} for op in OPS}, notes)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: ``"reference"``, ``"cpu"`` or ``"auto"``.

    It overrides ``GCFAST_BACKEND``. The choice is per thread and per asynchronous task (a context variable)
    and is read when an op runs: it works around a call of a ``torch.compile``-d function and does not belong
    inside one. An op that the forced backend cannot serve raises :class:`BackendError`.
    """
    _check_name(name, "backend(name)")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check_name(name: str, where: str) -> None:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where} must be one of {', '.join((*BACKENDS, 'auto'))}; got {name!r}")


def forced() -> str | None:
    """The backend in force by context or ``GCFAST_BACKEND``; None when the choice is automatic."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("GCFAST_BACKEND", "").strip().lower() or "auto"
        _check_name(name, "the environment variable GCFAST_BACKEND")
    return None if name == "auto" else name


def _input_reason(backend_name: str, tensor: torch.Tensor) -> str:
    if backend_name == "cpu":
        if tensor.device.type != "cpu":
            return f"serves CPU tensors, got {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float64):
            return f"serves float32 and float64, got {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def choose(op: str, tensor: torch.Tensor) -> str:
    """The backend for `op` on inputs like `tensor`; raises if a forced one cannot serve them."""
    name = forced()
    if name is not None:
        reason = _static_reason(op, name) or _input_reason(name, tensor)
        if reason:
            raise BackendError(f"backend {name!r} was asked for but cannot run {op}: {reason}")
    else:
        reason = _static_reason(op, "cpu") or _input_reason("cpu", tensor)
        name = "reference" if reason else "cpu"
        key = (op, name, reason)
        if key not in _logged:
            _logged.add(key)
            log.debug("%s runs on backend %s%s", op, name, f" (cpu {reason})" if reason else "")
    _last[op] = name
    return name


def last_backend(op: str) -> str | None:
    """The backend that the latest call of `op` in this process ran on; None before the first call."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    return _last.get(op)
