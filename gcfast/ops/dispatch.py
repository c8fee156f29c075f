"""Which backend runs an op: availability with reasons, forcing, logging, and a record of what ran.

``preferred`` is the whole policy: the backends of a call, best first, by device, dtype and size. The first
one that is usable there runs; ``reference`` closes every list.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping

import torch

from gcfast import errors
from gcfast.ops import native

log = logging.getLogger("gcfast")

BACKENDS = ("cpu", "triton", "cuda", "reference")
OPS = (
    "activation",
    "softmax_residual",
    "softmax_curvature",
    "gram_error_bound",
    "wide_forward",
    "wide_head_grad",
    "wide_gram_product",
    "wide_panel",
    "gram_product",
    "add_product",
    "jacobian_gram",
    "gradient_gram",
    "batched_rank",
)
_WIDE = ("wide_forward", "wide_head_grad", "wide_gram_product")
_KERNELS = {
    "cpu": OPS,
    "triton": tuple(
        op for op in OPS if op not in ("gram_product", "add_product", "gradient_gram", "batched_rank")
    ),
    "cuda": ("activation", "wide_panel", "batched_rank"),
    "reference": OPS,
}
_ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPES = {"cpu": (torch.float32, torch.float64), "triton": _ALL, "cuda": (torch.float32, torch.float64)}
_SMALL = 1 << 16  # elements; below, a launch costs more than the work: the binding's is the cheaper one
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

    def reason(self, op: str, backend: str) -> str:
        return self._reasons[op][backend]

    def __repr__(self) -> str:
        lines = [f"{'op':<18} {'backend':<10} usable"]
        for op, row in self._reasons.items():
            for backend, reason in row.items():
                lines.append(f"{op:<18} {backend:<10} {'yes' if not reason else 'no: ' + reason}")
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        return "\n".join(lines)


def _dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return ", ".join(names[:-1]) + " and " + names[-1]


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _triton_error() -> str:
    """Why Triton cannot be used, whatever the device; "" if it can. Imports nothing but Triton itself."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; Linux only)"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken install must not take the other backends along
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return ""


def _triton_reason() -> str:
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _triton_error()


@functools.cache
def _cuda_reason() -> str:
    status = native.cuda_status()
    if status["why"]:
        return str(status["why"])
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _static_reason(op: str, backend: str) -> str:
    """Why `backend` cannot run `op` on this machine; "" if it can."""
    if op not in _KERNELS[backend]:
        return "this op has no kernel there"
    if backend == "cpu":
        return "" if native.cpu is not None else native.cpu_error
    if backend == "triton":
        return _triton_reason()
    return _cuda_reason() if backend == "cuda" else ""


@functools.cache
def _capability_reason(backend: str, device: torch.device) -> str:
    """Why the kernels of a GPU backend were not built for this device; "" if they were."""
    capability = torch.cuda.get_device_capability(device)
    found = f"{device} has compute capability {capability[0]}.{capability[1]}"
    if backend == "triton":
        return "" if capability >= (8, 0) else f"needs compute capability 8.0, {found}"
    if torch.version.hip is not None:
        return "needs a CUDA device, torch is built for HIP"
    archs = str(native.cuda_status()["archs"]).split(";")
    # Machine code serves its own major version from its minor on; the last one is there as PTX too. An
    # architecture-specific one ("90a") serves exactly itself, a family's ("100f") its major version.
    number = 10 * capability[0] + capability[1]
    for arch in archs:
        code = int(arch.rstrip("af"))
        if code == number or (arch[-1] != "a" and code // 10 == capability[0] and code <= number):
            return ""
    if archs[-1].isdigit() and int(archs[-1]) <= number:
        return ""
    return f"was compiled for {', '.join(archs)} (GCFAST_CUDA_ARCHS), {found}"


def dtypes_of(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """What a backend's kernels of an op take: the wide layer's, half precision everywhere."""
    return _ALL if op in _WIDE else _DTYPES[backend]


def _input_reason(op: str, backend: str, tensor: torch.Tensor) -> str:
    """Why `backend` cannot run `op` on inputs like `tensor`; "" if it can."""
    if backend == "reference":
        return ""
    wanted = "cpu" if backend == "cpu" or (backend == "triton" and interpreting()) else "cuda"
    if tensor.device.type != wanted:
        kind = {"cpu": "CPU", "cuda": "CUDA"}[wanted]
        mode = " (Triton's interpreter is on)" if backend == "triton" and wanted == "cpu" else ""
        return f"serves {kind} tensors{mode}, got {tensor.device}"
    dtypes = dtypes_of(op, backend)
    if tensor.dtype not in dtypes:
        got = str(tensor.dtype).removeprefix("torch.")
        return f"serves {_dtype_names(dtypes)}, got {got}"
    return _capability_reason(backend, tensor.device) if wanted == "cuda" else ""


def preferred(op: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """The backends for `op` on inputs like `tensor`, best first: the policy by device, dtype and size.

    On the GPU the CUDA kernels come first for float64 (the same source as the CPU's; Triton's need about as
    many instructions an element) and for small inputs (a launch through the binding costs a fraction of one
    through Triton), and for batched_rank, which only they have; Triton's serve everything else. The wide
    layer's are Triton's alone but for its float64 panel, on whose order of summation proofs rest: there the
    CUDA kernel writes it out.
    """
    if tensor.device.type == "cpu":
        return ("cpu", "reference")  # the interpreter runs on request only: it is for tests
    if op == "batched_rank" or tensor.dtype == torch.float64 or tensor.numel() < _SMALL:
        return ("cuda", "triton", "reference")
    return ("triton", "cuda", "reference")


def _triton_note() -> str:
    if _triton_error():
        return _triton_error()
    import triton

    return f"version {triton.__version__}" + (", interpreted on the CPU" if interpreting() else "")


def backends() -> BackendTable:
    """Every op's backends: usable, or the reason why not. ``print(gcfast.backends())`` shows a table."""
    cuda = native.cuda_status()
    bf16 = native.cpu.wide_bf16() if native.cpu is not None else ""
    products = f", bf16 products by {bf16}" if bf16 else ""
    notes = {
        "cpu": f"{native.cpu_instruction_set() or 'no kernels'}, {torch.get_num_threads()} threads"
        + products,
        "cuda": cuda["why"] or ", ".join(str(d["name"]) for d in cuda["devices"]),
        "triton": _triton_note(),
        "in force": forced() or "auto",
    }
    return BackendTable({op: {b: _static_reason(op, b) for b in BACKENDS} for op in OPS}, notes)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block: one of ``BACKENDS``, or ``"auto"``.

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
    if not isinstance(name, str) or name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where} must be one of {', '.join((*BACKENDS, 'auto'))}; got {errors.came(name)}")


def forced() -> str | None:
    """The backend in force by context or ``GCFAST_BACKEND``; None when the choice is automatic."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("GCFAST_BACKEND", "").strip().lower() or "auto"
        _check_name(name, "the environment variable GCFAST_BACKEND")
    return None if name == "auto" else name


def _reason(op: str, backend: str, tensor: torch.Tensor) -> str:
    return _static_reason(op, backend) or _input_reason(op, backend, tensor)


def serves(op: str, backend: str, tensor: torch.Tensor) -> bool:
    """Whether ``backend`` has a kernel for `op` that takes inputs like `tensor` here."""
    return not _reason(op, backend, tensor)


def choose(op: str, tensor: torch.Tensor) -> str:
    """The backend for `op` on inputs like `tensor`; raises if a forced one cannot serve them."""
    name = forced()
    if name is not None:
        reason = _reason(op, name, tensor)
        if reason:
            raise BackendError(f"backend {name!r} was asked for but cannot run {op}: {reason}")
    else:
        passed: list[str] = []
        for name in preferred(op, tensor):
            reason = _reason(op, name, tensor)
            if not reason:
                break
            passed.append(f"{name} {reason}")
        assert name is not None
        key = (op, name, "; ".join(passed))
        if key not in _logged:
            _logged.add(key)
            log.debug("%s runs on backend %s%s", op, name, f" ({key[2]})" if passed else "")
    _last[op] = name
    return name


def last_backend(op: str) -> str | None:
    """The backend that the latest call of `op` in this process ran on; None before the first call."""
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {errors.came(op)}")
    return _last.get(op)
