"""Random calls of every operator that has a CPU kernel, for a module that was built with sanitizers.

    python tests/op_calls.py random SECONDS SEED [OPERATOR...]
    python tests/op_calls.py moved

``random``: sizes (0, 1 and ragged ones), dtypes, settings, threads, instruction sets and layouts are drawn.
Each operand ends where its heap block ends and may begin off a 16-byte boundary; what lies between its
elements is NaN, or out of range for integers. Results are those of the reference in float64, and no other
byte changes. One call in eight is on numbers from denormal to infinite and NaN, and asks only for memory and
defined behaviour. ``moved``: each pointer that a kernel is given is moved on by one element, and
AddressSanitizer must see it.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import op_sweep
import torch
from op_sweep import F32, F64, I64
from torch import Tensor

from gcfast import ops, reference
from gcfast.ops import native

OPERATORS = sorted(op_sweep.operators() - {"capture_cotangent"})  # which has no kernel
HALF = (torch.bfloat16,)  # float16 becomes float32 before a kernel sees it
TOLERANCES = {F64: 1e-9, F32: 1e-3}  # an element that is another one's shows; others' tests ask for digits
LEVELS = {"x86-64-v4": (0, 3, 4), "x86-64-v3": (0, 3), "baseline": (0,)}  # that this processor runs
SETTINGS: dict[str, tuple[Any, ...]] = {
    "activation": tuple(reference.ACTIVATIONS),
    "order": (0, 1, 2),
    "label_smoothing": (0.0, 0.1),
    "alpha": (1.0, -1.0),
    "inner": (1, 4, 33, 128, 2**62),
    **dict.fromkeys(("check_target", "need_z", "need_hidden", "need_head"), (True, False)),
}


class Kernels:
    """The compiled module, and the kernels that were called; `before` is told of each call."""

    def __init__(self, before: Callable[..., None] = lambda *of_no_use: None) -> None:
        assert native.cpu is not None, native.cpu_error
        self.module, self.before = native.cpu, before
        self.left = {name for name in dir(native.cpu) if name.endswith(("_f32", "_f64"))}
        native.cpu = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.module, name)
        if not name.endswith(("_f32", "_f64")):
            return kernel
        self.left.discard(name)

        def call(*args: Any) -> Any:
            self.before(name, kernel, args)
            return kernel(*args)

        return call


class Draw(random.Random):
    def size(self) -> int:
        """Often few, often about a whole number of vectors."""
        whole = self.choice((8, 16, 64)) * self.randint(1, 4)
        ranges = ((0, 1), (1, 9), (5, 40), (whole - 1, whole + 1), (140, 700))
        return self.randint(*self.choices(ranges, (1, 5, 4, 5, 1))[0])

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Of few numbers in all products of them."""
        while True:
            sizes = {name: self.size() for name in names}
            if self.random() < 0.5:
                sizes |= {name: sizes[name[:-1]] for name in names if name.endswith("2")}
            if "labels" in sizes:
                sizes["labels"] += sizes["labels"] == 0
            if "layers" in sizes:
                sizes["layers"] = self.randint(1, 3)
            if math.prod(size or 1 for size in sizes.values()) <= 300_000:
                return sizes

    def placed(self, value: Tensor, rows: bool, expand: bool) -> tuple[Tensor, Tensor]:
        """The values in a layout of their own, and the block of memory, which ends with the last of them."""
        axes, strides, extent, shape = list(range(value.dim())), [0] * value.dim(), 1, value.shape
        if not rows and self.random() < 0.4:
            self.shuffle(axes)
        for axis in reversed(axes):
            if expand and shape[axis] and self.random() < 0.05:
                value = value.narrow(axis, 0, 1)
            else:
                dense = axis == axes[-1] and (rows or self.random() < 0.7)
                strides[axis] = extent if dense else extent + self.choice((0, 0, 1, 2, 5))
                extent += max(shape[axis] - 1, 0) * strides[axis]
        begin = self.choice((0, 0, 1, 3))
        size = begin + (extent if value.numel() else 0)
        block = torch.full((size,), -(2**62) if value.dtype == I64 else math.nan, dtype=value.dtype)
        view = block.as_strided(value.shape, strides, begin)
        view.copy_(value)
        return view.expand(shape), block

    def wild(self, value: Tensor) -> Tensor:
        if value.dtype == I64:
            return value
        scale = 10.0 ** (640 * torch.rand(value.shape, dtype=F64) - 320)
        scale[torch.rand(value.shape) < 0.02] = math.nan
        return (value.double() * scale).to(value.dtype)

    def call(self, op: str) -> tuple[dict[str, Any], bool]:
        """Arguments, dense, and whether they are wild."""
        parameters = inspect.signature(op_sweep.CALLS[op]).parameters
        sizes = self.sizes([name for name in parameters if name != "dtype"])
        square = all(sizes[name] == sizes[name[:-1]] for name in sizes if name.endswith("2"))
        half = HALF if op in ("wide_forward", "wide_backward", "wide_head_grad", "wide_gram_product") else ()
        dtype = self.choice((F32, F32, F64, *half))
        found = op_sweep.CALLS[op](**sizes, dtype=dtype)
        for name in found.keys() & SETTINGS.keys():
            found[name] = self.choice(SETTINGS[name])
        if "beta" in found:
            found["beta"] = self.choice((0.5, 1.0, 3.0)) if found["activation"] == "softplus" else 1.0
        if "precision" in found and dtype == F32:
            found["precision"] = self.choice((None, "ieee", "tf32x3", "tf32", "bf16"))
        if "lower" in found:
            found["lower"] = square and self.random() < 0.5
        if op == "gradient_gram":
            if square and self.random() < 0.5:
                found["h"] = found["b"] = None
        else:
            schema = getattr(torch.ops.gcfast, op).default._schema
            for name in (a.name for a in schema.arguments if str(a.type) == "Optional[Tensor]"):
                found[name] = found[name] if self.random() < 0.7 else None
        if op == "softmax_residual":
            if self.random() < 0.4:
                found["target"] = found["logits"].double().softmax(1).roll(1, 0).to(dtype)
            elif not found["check_target"]:
                found["target"][torch.rand(sizes["n"]) < 0.1] = self.choice((-1, sizes["labels"], 2**62))
        wild = self.random() < 0.125
        if wild:
            found = {k: self.wild(v) if isinstance(v, Tensor) else v for k, v in found.items()}
        return found, wild


def difference(op: str, got: list[Tensor], want: list[Tensor], tolerance: float) -> str:
    if op in ("batched_rank", "matrix_rank"):  # the bounds of another method are others
        rank, lower, upper = got[:3]
        if not ((lower <= rank) & (rank <= upper)).all() or any(t.isnan().any() for t in got[3:]):
            return f"bounds that do not hold: {got}"
        got, want = got[:1], want[:1]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        g, w = g.double(), w.double()
        if g.shape != w.shape or not torch.equal(g.isnan(), w.isnan()):
            return f"result {i} has other NaN, or another shape: {g} for {w}"
        error, largest = (
            float(torch.cat([t.flatten(), t.new_zeros(1)]).nan_to_num().abs().max()) for t in (g - w, w)
        )
        if error > tolerance * (1 + largest):
            return f"result {i} is off by {error}: {g} for {w}"
    return ""


def one(op: str, draw: Draw) -> str:
    """What is wrong with a call."""
    torch.manual_seed(draw.getrandbits(32))
    dense, wild = draw.call(op)
    function = getattr(torch.ops.gcfast, op).default
    written = {a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write}
    arguments, blocks = dict(dense), {}
    for name, value in dense.items():
        if isinstance(value, Tensor):
            rows = name == "out" and op == "wide_panel_out"
            expand = name not in (*written, "gram", "target")  # whose values must fit
            arguments[name], blocks[name] = draw.placed(value, rows, expand)
    if op == "activation_out" and draw.random() < 0.3:  # in place
        arguments["x"] = arguments["out"]
        del blocks["x"]
    torch.set_num_threads(draw.choice((1, 1, 2, 3)))
    os.environ["LEVEL"] = str(draw.choice(LEVELS[native.cpu_instruction_set()]))
    shown = (
        f"{v.dtype}{tuple(v.shape)}{v.stride()}" if isinstance(v, Tensor) else repr(v)
        for v in arguments.values()
    )
    print(
        f"{op}({', '.join(shown)}) by {torch.get_num_threads()} threads, level {os.environ['LEVEL']}",
        flush=True,
    )
    whole = {name: block.clone() for name, block in blocks.items()}
    exact = op_sweep.copies(arguments)
    try:
        got = op_sweep.results(function(*arguments.values()), arguments)
    except ValueError:  # of matrices that are not finite
        if not wild:
            raise
        return ""
    for name, block in blocks.items():
        if name in written:
            view = arguments[name]
            whole[name].as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        if not torch.equal(block.view(torch.uint8), whole[name].view(torch.uint8)):
            return f"{name} was written to where it has no element"
    if wild:
        return ""
    tolerance = TOLERANCES.get(next(iter(dense.values())).dtype, 0.1)
    if dense.get("precision") in ("tf32", "bf16"):
        tolerance = 0.1
    exact = {k: v.double() if isinstance(v, Tensor) and v.dtype != I64 else v for k, v in exact.items()}
    if "precision" in exact:
        exact["precision"] = None
    with ops.backend("reference"):
        want = op_sweep.results(function(*exact.values()), exact)
    return difference(op, got, want, tolerance)


def random_calls(seconds: float, seed: int, only: list[str]) -> int:
    draw, kernels, calls, began = Draw(seed), Kernels(), 0, time.monotonic()
    while (spent := time.monotonic() - began) < seconds or (kernels.left and not only):
        if spent > 10 * seconds:
            print(f"kernels that no case calls: {sorted(kernels.left)}")
            return 1
        for op in only or OPERATORS:
            if wrong := one(op, draw):
                print(f"WRONG {wrong}")
                return 1
            calls += 1
    print(f"seed {seed}: {calls} calls of {len(only or OPERATORS)} operators are right")
    return 0


def unseen(name: str, kernel: Any, args: tuple[Any, ...], found: Counter[str]) -> list[str]:
    """Pointers that may be wrong without an end of the process."""
    pointers = [at for at, value in enumerate(args) if isinstance(value, int) and value >> 32]
    if name.endswith("_f32"):  # another instance of the same template
        pointers = pointers[:1]
    faults = [(at, 8, "heap-buffer-overflow") for at in pointers]
    if not found:  # UndefinedBehaviorSanitizer is there as well
        faults.append((0, 1, "misaligned address"))
    missed = []
    for at, by, what in faults:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 2)
            try:
                kernel(*args[:at], args[at] + by, *args[at + 1 :])
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as report:
            said = report.read()
        os.waitpid(child, 0)
        found[what] += 1
        if what not in said:
            missed.append(f"{name}: argument {at} moved on by {by} bytes: no {what} in {said[:200]!r}")
    return missed


def moved() -> int:
    missed: list[str] = []
    found: Counter[str] = Counter()
    torch.set_num_threads(1)  # of which a fork has all
    kernels = Kernels(lambda *call: missed.extend(unseen(*call, found)))
    for op in OPERATORS:
        for dtype in (F32, F64):
            arguments = op_sweep.CALLS[op](dtype=dtype)
            function = getattr(torch.ops.gcfast, op).default
            function(*arguments.values())
            if op == "softmax_residual":
                function(arguments["logits"], arguments["logits"].softmax(1), 0.1, False)
    print(*missed, sep="\n", end="\n" * bool(missed))
    if kernels.left:
        print(f"kernels that no case calls: {sorted(kernels.left)}")
    print(f"{len(missed)} of {found.total()} moved pointers were not seen")
    return 1 if missed or kernels.left else 0


if __name__ == "__main__":
    part, *given = sys.argv[1:]
    sys.exit(moved() if part == "moved" else random_calls(float(given[0]), int(given[1]), given[2:]))
