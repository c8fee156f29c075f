"""The arithmetic that proofs rest on: set right while one runs, checked when it begins and when it ends.

Round to nearest, gradual underflow, and products by the plain IEEE rules. What this thread, its workers and
torch are set to otherwise is put right for the proof and put back; what cannot be set is refused by name.
Our own kernels see to every thread that works by themselves (csrc/core/arithmetic.h). For a library's, all
that can be had are known answers: operations of the same kind, dtype and number of threads, before and after,
in each entry of whose results another rounding mode, a flush to zero or a shorter format would show.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gcfast.ops import native

GRAIN = 1 << 15  # elements of an elementwise operation that torch gives to each thread, at least


def _precision_switches() -> list[tuple[str, Any]]:
    """Torch's settings that let a float32 product use TF32 or bf16: names, and what has `fp32_precision`."""
    paths = {
        "torch.backends": torch.backends,
        "torch.backends.cuda.matmul": getattr(torch.backends.cuda, "matmul", None),
        "torch.backends.mkldnn.matmul": getattr(getattr(torch.backends, "mkldnn", None), "matmul", None),
    }
    return [(name, p) for name, p in paths.items() if p is not None and hasattr(p, "fp32_precision")]


class _PlainProducts:
    """Torch's switches, which are the process's: off from the first proof's begin to the last one's end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._meddled = 0  # times that somebody else has set a switch meanwhile
        self._before: list[tuple[str, Any, str]] = []

    def _take_over(self) -> str:
        """Switch off what is on, to be put back at the end; returns the names of what was."""
        names = []
        for i, (name, switch, _) in enumerate(self._before):
            if switch.fp32_precision != "ieee":
                names.append(f"{name}.fp32_precision = {switch.fp32_precision!r}")
                self._before[i] = (name, switch, switch.fp32_precision)
                switch.fp32_precision = "ieee"
        return ", ".join(names)

    def enter(self) -> int:
        with self._lock:
            if self._holders == 0:
                self._before = [(name, s, s.fp32_precision) for name, s in _precision_switches()]
                self._take_over()
            else:
                self._meddled += bool(self._take_over())
            self._holders += 1
            return self._meddled

    def leave(self, entered: int) -> bool:
        """Whether the switches stayed off since ``enter`` returned ``entered``."""
        with self._lock:
            self._meddled += bool(self._take_over())
            self._holders -= 1
            if self._holders == 0:
                for _, switch, before in self._before:
                    switch.fp32_precision = before
            return self._meddled == entered


_products = _PlainProducts()
_forked = False


def _in_child() -> None:
    global _forked, _products
    _forked, _products = True, _PlainProducts()


os.register_at_fork(after_in_child=_in_child)


def _exchange(words: list[int], threads: int) -> list[int]:
    """Give this thread and its workers these control words, or plain ones; returns what they had.

    Without kernels that cannot be done, and nothing is returned.
    """
    if native.cpu is None:
        return []
    before: list[int] = native.cpu.exchange_control_words(words, threads)
    return before


def _named(words: list[int]) -> str:
    """What control words say that is not plain; "" where nothing is."""
    if native.cpu is None or not words:
        return ""
    said = []
    for bits, what in ((native.cpu.rounding_bits, "rounding"), (native.cpu.flush_bits, "flush to zero")):
        if any(word & bits for word in words):
            said.append(what)
    return " and ".join(said)


# Sums that round to the first operand, in whatever direction another mode would go.
_FACTS = [(1.0, 2.0**-54), (-1.0, -(2.0**-54)), (1.0, -(2.0**-55))]


def _check_this_thread() -> None:
    """Raise RuntimeError where Python's own arithmetic, which is this thread's, is not plain."""
    if [a + b for a, b in _FACTS] != [a for a, _ in _FACTS]:
        raise RuntimeError(
            "this thread does not round to nearest, so nothing can be proved in it: "
            "call fesetround(FE_TONEAREST) where another mode was set"
        )
    if native.flushes():
        raise RuntimeError(
            "this thread flushes denormal numbers to zero, so nothing can be proved in it: "
            "call torch.set_flush_denormal(False)"
        )


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@functools.cache
def _known_sums(threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and the bits of x + y, long enough that each of torch's threads has every kind of entry."""
    least = 2.0**-1074
    kinds = [(a, b, a) for a, b in _FACTS] + [(least, 2 * least, 3 * least)]
    # a row that is seen as many: no memory is kept for each thread
    pattern = torch.tensor(kinds, dtype=torch.float64, device="cpu").mT.repeat(1, 256).contiguous()
    rows = GRAIN * threads // pattern.shape[1] if threads > 1 else 1
    x, y, total = pattern
    return x.expand(rows, -1), y.expand(rows, -1), _bits(total).expand(rows, -1)


@functools.cache
def _known_product(dtype: torch.dtype, threads: int, flush: bool) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and a b as plain arithmetic has it, in whatever order and with or without FMA.

    Every entry is the product of two numbers whose last bits matter, beside terms that are zero times a
    large number: exact, but not where operands are split relative to the largest of a row.
    """
    double = dtype == torch.float64
    rows, inner, columns = 64 * threads, 64, 64
    near, below = (1 + 2.0**-26, 1 - 2.0**-28) if double else (1 + 2.0**-12, 1 - 2.0**-13)
    tiny, large = (2.0**-1040, 2.0**60) if double else (2.0**-140, 2.0**20)
    if not flush:
        tiny = 0.25
    # Factors in b, and what they make of `near`; the first product is 1/4 ulp above the exact one.
    pairs = [(below, near + below - 1), (1.0, near), (tiny, near * tiny)]
    a = torch.zeros((rows, inner), dtype=torch.float64, device="cpu")
    b = torch.zeros((inner, columns), dtype=torch.float64, device="cpu")
    row, column = torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
    sign = 1.0 - 2.0 * (row // (inner // 2) % 2).double()
    a[row, row % (inner // 2)] = sign * near
    a[row, inner // 2 + row % (inner // 2)] = large
    kind = torch.where(column % 8 == 2, 2, column % 2)  # few are denormal: those take long
    factors, products = (torch.tensor(x, dtype=torch.float64, device="cpu")[kind] for x in zip(*pairs))
    b[: inner // 2] = factors
    return a.to(dtype), b.to(dtype), (sign[:, None] * products).to(dtype)


def _check_products(device: torch.device, threads: int) -> None:
    """Raise RuntimeError where known answers on ``device`` come out otherwise."""
    cpu = device.type == "cpu"
    if cpu:
        x, y, bits = _known_sums(threads)
        if not torch.equal(_bits(x + y), bits):
            raise RuntimeError(
                "a worker thread of torch does not round to nearest, or flushes denormal numbers to zero, "
                "and cannot be set otherwise from here, so nothing can be proved: it was started by a thread "
                "that was set so. Start the process anew without that, or call torch.set_num_threads(1)"
            )
    for dtype in (torch.float64, torch.float32):
        # a GPU may flush float32: the bounds allow for that (rounding.SMALLEST_NORMAL)
        a, b, want = _known_product(dtype, threads if cpu else 3, cpu)
        found = (a.to(device) @ b.to(device)).cpu()
        if not torch.equal(_bits(found), _bits(want)):
            raise RuntimeError(
                f"{dtype} products on {device} are less exact than IEEE arithmetic (TF32, bf16 or emulated "
                "float64 is on, or a thread of the library's rounds otherwise or flushes denormal numbers to "
                "zero), so nothing can be proved with them: switch that off "
                "(torch.set_float32_matmul_precision('highest'), no CUBLAS_EMULATE_* or "
                "ONEDNN_DEFAULT_FPMATH_MODE in the environment)"
            )


@contextmanager
def plain_thread() -> Iterator[None]:
    """Plain arithmetic for float64 in this thread alone: for blocks too small for a library to share out."""
    words = _exchange([], 1)
    try:
        _check_this_thread()
        yield
    finally:
        _exchange(words, 1)


@contextmanager
def exact_products(device: torch.device | None = None) -> Iterator[None]:
    """The arithmetic that the bounds of proofs assume, for the block; no autocast and no gradients in it.

    Args:
        device: where the block's products are made: known answers are asked for there at both ends. None:
            nothing is proved in the block, or by our own kernels alone.

    Raises:
        RuntimeError: something could not be set right, or was set otherwise while the block ran: nothing that
            was computed in it is to be believed then. Blocks may be nested, and run in several threads.
    """
    threads = torch.get_num_threads()
    if _forked and threads > 1:
        # the workers of the parent are not there, and whose arithmetic they had nobody could ask
        torch.set_num_threads(1)
    entered = _products.enter()
    stayed = False
    try:
        words = _exchange([], torch.get_num_threads())
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                _check_this_thread()
                if device is not None:
                    _check_products(device, torch.get_num_threads())
                yield
                _check_this_thread()
                if device is not None:
                    _check_products(device, torch.get_num_threads())
        finally:
            changed = _named(_exchange(words, max(len(words), 1)))
    finally:
        stayed = _products.leave(entered)
        if _forked and threads > 1:
            torch.set_num_threads(threads)
    if changed:
        raise RuntimeError(f"{changed} of this thread or of its workers was changed while a proof ran")
    if not stayed:
        raise RuntimeError("torch's precision of float32 products was changed while a proof ran")
