"""What a compiled kernel needs and does: ptxas -v and the disassembly, read; and what must hold of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field

SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # bytes a block can ask for (8.6, 8.9, 12.0: 99 KB)
REGISTERS = 65536  # of a multiprocessor, dealt out to warps in units of 256

# Rows that may use local memory: {name: (bytes at most, why)}. Better to have none.
MAY_SPILL: dict[str, tuple[int, str]] = {}


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
        allowed = MAY_SPILL.get(self.name, (0, ""))[0]
        if max(self.spill_stores, self.spill_loads, self.stack) > allowed:
            found.append(
                f"local memory: {self.spill_stores} bytes of spill stores, {self.spill_loads} of loads, "
                f"a stack frame of {self.stack}, with {self.registers} registers a thread"
            )
        if self.expected and not any(m.lower().startswith(self.expected.lower()) for m in self.matrix):
            seen = ", ".join(self.matrix) or "no matrix instruction"
            found.append(f"expected {self.expected}, found {seen}")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(
                f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}"
            )
        warps, registers = -(-self.threads // 32), -(-self.registers * 32 // 256) * 256
        if self.threads > 1024 or warps * registers > REGISTERS:
            found.append(f"{self.registers} registers in {self.threads} threads cannot be launched")
        return [f"{self.name}: {what}" for what in found]


def read_ptxas(log: str) -> dict[str, dict[str, int]]:
    """The figures of ``ptxas -v`` by mangled entry name; those of functions not inlined are added."""
    kernels: dict[str, dict[str, int]] = {}
    now: dict[str, int] = {}
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)'", line):
            now = kernels.setdefault(entry[1], Counter())
        elif frame := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            for key, value in zip(("stack", "spill_stores", "spill_loads"), frame.groups()):
                now[key] += int(value)
        elif used := re.search(r"Used (\d+) registers", line):
            now["registers"] = int(used[1])
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            now["shared"] = int(shared[1]) if shared else 0
    return kernels


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_PTX_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_PTX_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bufs]x?(\d+)\b")
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)")


def _load(row: Row, bits: int, kind: str) -> None:
    if bits > row.load_bits:
        row.load_bits, row.load_kind = bits, kind


def read_ptx(row: Row, ptx: str) -> None:
    """The matrix instructions and the widest load that ptxas is asked for."""
    row.matrix += sorted(set(_PTX_MATRIX.findall(ptx)))
    for count, bits in set(_PTX_LOAD.findall(ptx)):
        _load(row, int(count or 1) * int(bits), "")
    for size in set(_PTX_ASYNC.findall(ptx)):
        _load(row, 8 * int(size, 0), "async")
    if "cp.async.bulk" in ptx:
        row.load_kind = "TMA"


def read_sass(row: Row, sass: str) -> None:
    """The same of the machine code; and local memory, which ptxas -v leaves out if it is not a spill's."""
    opcodes = Counter(_SASS.findall(sass))
    matrix: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base = opcode.split(".")[0]
        if base.endswith("MMA"):
            matrix[base] += count
        elif base in ("LDG", "LDGSTS", "LD"):
            width = re.search(r"\.(?:[US](8|16)|(64|128|256))(?=\.|$)", opcode)
            _load(row, int(width[1] or width[2]) if width else 32, "async" if base == "LDGSTS" else "")
        elif base in ("UTMALDG", "UBLKCP"):
            row.load_kind = "TMA"
        elif base in ("STL", "LDL"):
            row.stack = max(row.stack, 1)
    row.matrix = [name for name, _ in matrix.most_common()] + row.matrix


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
