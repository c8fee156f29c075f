"""What the launchers share: launch configurations, architectures, and the list of compilations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

ARCHITECTURES = (80, 90, 100)  # the rows that launch tables have; a device takes the last one not above it

# Fixed when Triton is first imported. Kernels read it where the interpreter does not do what hardware does.
INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = tl.constexpr(INTERPRETED)

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """A launch configuration: the kernel's block sizes, warps a program, stages of software pipelining."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Specialization:
    """One compilation of a kernel that a launcher can ask for.

    ``signature`` gives the types of the run-time arguments ("*fp32", "i32", "i64", "fp32"), ``constants`` the
    values of the constexpr ones (those of ``launch.blocks`` come on top), ``divisible`` the arguments known
    to be multiples of 16. A pointer that is None, or an integer that is always 1, is a constant to Triton and
    is given among the constants. ``instruction`` names the matrix instruction expected in the machine code of
    an architecture, where one is: the start of its name in SASS (HMMA, DMMA, HGMMA, UTCHMMA) or in PTX
    (mma.sync, wgmma, tcgen05).
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    architectures: tuple[int, ...] = ARCHITECTURES
    divisible: frozenset[str] = frozenset()
    instruction: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        fixed = ", ".join(f"{k}={v}" for k, v in self.constants.items())
        types = sorted({t for t in self.signature.values() if t.startswith("*")})
        return f"{self.kernel.__name__}({', '.join(types)}; {fixed}; {self.launch.num_warps} warps)"


def variants(s: Specialization) -> dict[str, Specialization]:
    """`s` with the other things that Triton can find out about its arguments at run time.

    ``aligned``: every pointer a multiple of 16; ``unaligned``: nothing known to be one; ``ones``: every
    integer 1, hence a constant; ``64-bit``: every integer too large for 32 bits. List
    ``variants(s)["unaligned"]`` where it is as common as the aligned one; what is not listed ``tools/aot.py``
    compiles for one architecture.
    """
    fixed = {p.name for p in getattr(s.kernel, "params", ()) if p.do_not_specialize}
    integers = {k for k, t in s.signature.items() if t in ("i32", "i64")}
    pointers = frozenset(k for k, t in s.signature.items() if t.startswith("*")) - fixed
    ones = integers - fixed
    rest = {k: t for k, t in s.signature.items() if k not in ones}
    return {
        "aligned": replace(s, divisible=pointers),
        "unaligned": replace(s, divisible=frozenset()),
        "ones": replace(
            s, signature=rest, constants={**s.constants, **dict.fromkeys(sorted(ones), 1)}, divisible=pointers
        ),
        "64-bit": replace(s, signature={k: "i64" if k in integers else t for k, t in s.signature.items()}),
    }


@functools.cache
def architecture(device: torch.device) -> int:
    """The row of a launch table that serves this device; that of the H100 for the interpreter's CPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """For grids that fill the device; 1 in the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def run(
    kernel: Any, grid: tuple[int, ...], launch: Launch, device: torch.device, *args: Any, **constants: Any
) -> None:
    """Launch on the device of the tensors, whichever is current, on that device's current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **launch.blocks, **constants, **launch.options())
    else:
        kernel[grid](*args, **launch.blocks, **constants)
