"""What a compiled kernel needs and does: ptxas -v and the disassembly, read; and what must hold of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can ask for (8.6, 8.9, 12.0: 99 KB)
REGISTERS = 65536  # of a multiprocessor, dealt out to warps in units of 256

# Kernels that may use local memory: {start of the row's name: reason}. Better to leave it empty.
MAY_SPILL: dict[str, str] = {}


@dataclass
class Row:
    """One kernel in one configuration for one architecture; sizes in bytes, the widest load in bits."""

    kernel: str
    config: str
    arch: int
    registers: int = 0
    threads: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    matrix: list[str] = field(default_factory=list)  # matrix instructions, the most frequent one first
    load_bits: int = 0
    load_kind: str = ""  # "", "async" (cp.async), "TMA"
    expected: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel}[{self.config}] sm_{self.arch}"

    def offences(self) -> list[str]:
        """What is wrong with it, a line each."""
        if self.error:
            lines = [line.strip() for line in self.error.splitlines() if line.strip()]
            return [f"{self.name}: {lines[-1] if lines else 'failed'}"]
        found = []
        if (self.spill_stores or self.spill_loads or self.stack) and not self.name.startswith(tuple(MAY_SPILL)):
            found.append(
                f"local memory: {self.spill_stores} bytes of spill stores, {self.spill_loads} of loads, "
                f"a stack frame of {self.stack}, with {self.registers} registers a thread"
            )
        if self.expected and not any(m.lower().startswith(self.expected.lower()) for m in self.matrix):
            seen = ", ".join(self.matrix) or "no matrix instruction"
            found.append(f"expected {self.expected}, found {seen}")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        warps, registers = -(-self.threads // 32), -(-self.registers * 32 // 256) * 256
        if self.threads > 1024 or warps * registers > REGISTERS:
            found.append(f"{self.registers} registers in {self.threads} threads cannot be launched")
        return [f"{self.name}: {what}" for what in found]


def read_ptxas(log: str) -> dict[str, dict[str, int]]:
    """The figures of ``ptxas -v`` by mangled entry name; those of functions that were not inlined are added."""
    kernels: dict[str, dict[str, int]] = {}
    now: dict[str, int] = {}
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)'", line):
            now = kernels.setdefault(entry[1], Counter())
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            for key, value in zip(("stack", "spill_stores", "spill_loads"), frame.groups()):
                now[key] += int(value)
        elif used := re.search(r"Used (\d+) registers", line):
            now["registers"] = int(used[1])
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            now["shared"] = int(shared[1]) if shared else 0
    return kernels


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_PTX = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b)", re.MULTILINE)
_LOAD = re.compile(r"(LDG|LDGSTS|LD)\.")
_TMA = ("UTMALDG", "UBLKCP", "UBLKPF")


def read_code(row: Row, sass: str, ptx: str = "") -> None:
    """Fill in the row's matrix instructions and widest load; PTX names of the former stand beside SASS's."""
    opcodes = Counter(_SASS.findall(sass))
    matrix: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base = opcode.split(".")[0]
        if base.endswith("MMA"):
            matrix[base] += count
        elif _LOAD.match(opcode):
            width = re.search(r"\.(?:[US](8|16)|(64|128|256))(?=\.|$)", opcode)
            bits = int(width[1] or width[2]) if width else 32
            if bits > row.load_bits:
                row.load_bits, row.load_kind = bits, "async" if base == "LDGSTS" else ""
    row.matrix = [name for name, _ in matrix.most_common()] + sorted(set(_PTX.findall(ptx)))
    if any(opcode.split(".")[0] in _TMA for opcode in opcodes):
        row.load_kind = "TMA"
    if any(opcode.split(".")[0] in ("STL", "LDL") for opcode in opcodes):
        row.stack = max(row.stack, 1)


def disassemble(cuobjdump: str, cubin: str, *options: str) -> str:
    return subprocess.run([cuobjdump, *options, cubin], capture_output=True, text=True, check=True).stdout
