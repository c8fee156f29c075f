"""Every operator of ``torch.ops.gcfast`` called with operands that do not fit: it raises, or is right.

    python tests/op_sweep.py [SEED] [PAIRS]

The calls run in this process, so that whoever starts it sees a crash, and which call it was: each is named on
a line of its own before it is made. Every tensor lies in the middle of a larger one, whose rest is checked
afterwards. A call that raises nothing must give what the reference backend gives. What a single wrong operand
is told must name it.
"""

from __future__ import annotations

import faulthandler
import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path: the folder above has the package where it is not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from gcfast import ops
from gcfast.jacobian import graph

F32, F64, I64 = torch.float32, torch.float64, torch.int64
GUARD = 64  # elements on both sides of every tensor


class Guarded:
    """Tensors inside larger ones, and whether all around them is as it was."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, Tensor, slice]] = []

    def put(self, value: Tensor) -> Tensor:
        size = value.numel()
        whole = torch.full((size + 2 * GUARD,), 77, dtype=value.dtype)
        inside = slice(GUARD, GUARD + size)
        whole[inside] = value.reshape(-1)
        self.whole.append((whole, whole.clone(), inside))
        return whole[inside].view(value.shape)

    def intact(self) -> bool:
        def outside(t: Tensor, inside: slice) -> Tensor:
            return torch.cat([t[: inside.start], t[inside.stop :]])

        return all(torch.equal(outside(now, at), outside(then, at)) for now, then, at in self.whole)


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def layer(n: int, d: int, m: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "z": normal(n, d, dtype=dtype),
        "weight": normal(m, d, dtype=dtype),
        "bias": normal(m, dtype=dtype),
    }


def symmetric(n: int, dtype: torch.dtype) -> Tensor:
    a = normal(n, n, dtype=dtype)
    return a + a.mT


def of_rank(rank: int, batch: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers, products of `rank` columns and rows."""
    return (torch.randint(-9, 9, (batch, n, rank)) @ torch.randint(-9, 9, (batch, rank, m))).to(dtype)


SOFT = {"activation": "softplus", "beta": 1.5, "precision": None}
NEEDS = {"need_z": True, "need_hidden": True, "need_head": True}
# Arguments that fit, by the names of the schema, for sizes that may be others. Order among the operands is
# that of the schema as well. Sizes whose names differ by a 2 are equal where a triangle is asked for.
CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "activation": lambda n=4, m=5, dtype=F32: {
        "x": normal(n, m, dtype=dtype),
        "bias": normal(m, dtype=dtype),
        "activation": "gelu",
        "beta": 1.0,
        "order": 1,
    },
    "activation_grad": lambda n=4, m=5, dtype=F32: {
        "grad": normal(n, m, dtype=dtype),
        "x": normal(n, m, dtype=dtype),
        "bias": normal(m, dtype=dtype),
        "activation": "tanh",
        "beta": 1.0,
        "order": 1,
    },
    "activation_out": lambda n=4, m=5, dtype=F32: {
        "x": normal(n, m, dtype=dtype),
        "bias": normal(m, dtype=dtype),
        "activation": "silu",
        "beta": 1.0,
        "order": 2,
        "out": normal(n, m, dtype=dtype),
    },
    "softmax_residual": lambda n=6, labels=4, dtype=F32: {
        "logits": normal(n, labels, dtype=dtype),
        "target": torch.arange(n) % labels,
        "label_smoothing": 0.1,
        "check_target": False,
    },
    "softmax_curvature": lambda n=6, labels=4, dtype=F32: {
        "logits": normal(n, labels, dtype=dtype),
        "v": normal(n, labels, dtype=dtype),
    },
    "wide_forward": lambda n=5, d=3, m=7, c=2, dtype=F32: {
        **layer(n, d, m, dtype),
        "head_weight": normal(c, m, dtype=dtype),
        "head_bias": normal(c, dtype=dtype),
        **SOFT,
    },
    "wide_backward": lambda n=5, d=3, m=7, c=2, dtype=F32: {
        "g": normal(n, c, dtype=dtype),
        **layer(n, d, m, dtype),
        "head_weight": normal(c, m, dtype=dtype),
        **SOFT,
        **NEEDS,
    },
    "wide_head_grad": lambda n=5, d=3, m=7, c=2, dtype=F32: {
        **layer(n, d, m, dtype),
        "residual": normal(n, c, dtype=dtype),
        **SOFT,
    },
    "wide_gram_product": lambda n=5, d=3, m=7, c=2, dtype=F32: {
        **layer(n, d, m, dtype),
        "r": normal(n, c, dtype=dtype),
        **SOFT,
    },
    "wide_panel_out": lambda n=5, d=3, m=7, dtype=F64: {
        **layer(n, d, m, dtype),
        "activation": "softplus",
        "beta": 1.5,
        "out": normal(n, m, dtype=F64),
    },
    "gram_product": lambda n=5, c=2, dtype=F32: {
        "gram": symmetric(n, dtype),
        "x": normal(n, c, dtype=dtype),
    },
    "add_product": lambda n=4, n2=4, k=6, dtype=F32: {
        "out": normal(n, n2, dtype=dtype),
        "a": normal(n, k, dtype=dtype),
        "b": normal(k, n2, dtype=dtype),
        "alpha": -1.0,
        "inner": 4,
        "lower": False,
    },
    "gram_error_bound": lambda n=4, m=6, dtype=F32: {"h": normal(n, m, dtype=dtype)},
    "abs_products": lambda n=4, m=6, dtype=F32: {
        "a": normal(n, m, dtype=dtype),
        "left": torch.rand(n, dtype=F64),
        "right": torch.rand(m, dtype=F64),
    },
    "jacobian_gram": lambda layers=2, n=2, c=3, t=2, n2=2, c2=3, t2=2, r=5, dtype=F32: {
        "out": normal(n * c, n2 * c2, dtype=dtype),
        "g": normal(n, c, t, r, dtype=dtype),
        "h": normal(n2, c2, t2, r, dtype=dtype),
        "scale": normal(layers, n * t, n2 * t2, dtype=dtype),
        "ends": [r - (layers - 1 - i) * r // (layers + 1) for i in range(layers)],
        "lower": False,
    },
    "gradient_gram": lambda n=2, c=3, t=2, n2=2, c2=3, t2=2, r=5, s=4, dtype=F32: {
        "out": normal(n * c, n2 * c2, dtype=dtype),
        "g": normal(n, c, t, r, dtype=dtype),
        "a": normal(n, t, s, dtype=dtype),
        "h": normal(n2, c2, t2, r, dtype=dtype),
        "b": normal(n2, t2, s, dtype=dtype),
    },
    "batched_rank": lambda batch=3, n=4, m=5, rank=4, dtype=F32: {
        "a": of_rank(rank, batch, n, m, dtype),
        "atol": torch.zeros(batch, dtype=F64),
        "rtol": torch.full((batch,), 1e-6, dtype=F64),
        "check_tolerance": True,
    },
    "capture_cotangent": lambda n=3, dtype=F32: {"g": normal(n, dtype=dtype), "key": 12345},
}
CALLS["matrix_rank"] = CALLS["batched_rank"]
WRITTEN = "out"


def operators() -> set[str]:
    """All that are registered: each has a call."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gcfast::"))
    found = {name.split("::")[1].split(".")[0] for name in names}
    assert found == set(CALLS), found ^ set(CALLS)
    return found


INTEGERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**62, 10**30, None, "a", 1.5)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 2.5, 1e300, None, "a", 10**400)
WORDS = ("", "nope", "relu", "bf16", "ieee", None, 3)
FLAGS = (True, False, None, "a", 2)
LISTS = ([], [0], [-1, 5], [5], [5, 3], [2**62], [3, 5, 5], [10**30, 5], None, 3, ["a"])


def tensors(t: Tensor, others: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What an operand can be put in place of, by words that say what it is."""
    for value in (None, 3, "a", [1.0]):
        yield f"{value!r}", lambda value=value: value
    dtypes = (F32, F64, torch.float16, torch.bfloat16, torch.int32, I64, torch.bool, torch.complex64)
    for dtype in (*dtypes, torch.float8_e4m3fn, torch.uint8):
        if dtype != t.dtype:
            yield str(dtype), lambda dtype=dtype: t.to(dtype)
    yield "meta", lambda: t.to("meta")
    yield "sparse", lambda: t.to_sparse()
    yield "mkldnn", lambda: t.float().to_mkldnn() if t.dtype == F32 else t.to_sparse()
    yield "requires grad", lambda: t.clone().requires_grad_() if t.is_floating_point() else t.to("meta")
    yield "no memory", lambda: _without_memory(t)
    yield "cut memory", lambda: _without_memory(t, t.element_size())
    if t.dtype in (F32, F64):
        yield "negated view", lambda: torch.complex(-t, -t).conj().imag
    yield "one more axis", lambda: t[None]
    yield "a last axis of one", lambda: t[..., None]
    yield "one axis less", lambda: t[0] if t.dim() else t
    yield "one element", lambda: t.flatten()[:1]
    yield "a number", lambda: t.flatten()[0]
    yield "flat", lambda: t.flatten()
    yield "turned", lambda: t.mT if t.dim() > 1 else t.flip(0)
    for axis in range(t.dim()):
        size = t.shape[axis]
        for other in {size - 1, size + 1, 0, 1, 2 * size} - {size}:
            index = torch.arange(other) % size
            yield f"{other} on axis {axis}", lambda i=index, axis=axis: t.index_select(axis, i)
        yield f"expanded on axis {axis}", lambda a=axis: t.narrow(a, 0, 1).expand(t.shape)
        huge = [2**40 if a == axis else -1 for a in range(t.dim())]
        yield f"2^40 on axis {axis}", lambda a=axis, s=huge: t.narrow(a, 0, 1).expand(s)
    if t.dim() > 1:
        yield "columns first", lambda: t.mT.contiguous().mT
        yield "rows far apart", lambda: _apart(t)
        yield "every other column", lambda: torch.stack([t, t], -1).flatten(-2)[..., ::2]
        steps = [1] * t.dim()
        yield "overlapping", lambda: torch.as_strided(t.clone().flatten(), t.shape, steps)
    if t.is_floating_point():
        yield "NaN", lambda: torch.full_like(t, math.nan)
        yield "infinite", lambda: torch.full_like(t, math.inf)
        yield "huge", lambda: torch.full_like(t, torch.finfo(t.dtype).max)
    else:
        for label in (-1, 4, 2**31, -(2**63), 2**63 - 1):
            yield f"label {label}", lambda label=label: torch.full_like(t, label)
    for name, other in others.items():
        if isinstance(other, Tensor) and other is not t:
            yield f"the same as {name}", lambda other=other: other
            if other.numel() >= t.numel() and other.dtype == t.dtype and t.dim():
                shifted = min(1, other.numel() - t.numel())
                yield (
                    f"in the memory of {name}",
                    lambda o=other, s=shifted: torch.as_strided(
                        o, t.shape, t.stride(), o.storage_offset() + s
                    ),
                )


def _without_memory(t: Tensor, left: int = 0) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(left)
    return t


def _apart(t: Tensor) -> Tensor:
    wide = torch.full(
        (*t.shape[:-1], t.shape[-1] + 3), math.nan if t.is_floating_point() else 0, dtype=t.dtype
    )
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def values(value: Any, others: dict[str, Any]) -> list[tuple[str, Callable[[], Any]]]:
    if isinstance(value, Tensor):
        return list(tensors(value, others))
    if isinstance(value, list):
        chosen: tuple[Any, ...] = LISTS
    elif isinstance(value, bool):
        chosen = FLAGS
    else:
        chosen = {int: INTEGERS, float: FLOATS}.get(type(value), WORDS)
    return [(repr(v)[:20], lambda v=v: v) for v in chosen]


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies that do not share memory, laid out in whole."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def results(found: Any, arguments: dict[str, Any]) -> list[Tensor]:
    found = [found] if isinstance(found, Tensor) else list(found or ())
    return [t.detach() for t in found] or [arguments[WRITTEN].detach()]


def same(got: Tensor, want: Tensor, rough: bool) -> bool:
    """Equal but for rounding; where a value is not finite, as finite as the other."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    close = 0.1 if rough else 2e-3
    got, want = got.double(), want.double()
    fine = torch.isfinite(got) & torch.isfinite(want)
    return bool(torch.allclose(got[fine], want[fine], rtol=close, atol=close))


def call(name: str, arguments: dict[str, Any], precise: bool) -> tuple[str, str]:
    """What came of a call: "raised" and the words, "right", or "WRONG" and why."""
    op = getattr(torch.ops.gcfast, name).default
    before = copies(arguments) if precise else {}
    try:
        found = op(*arguments.values())
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    if not precise or any(isinstance(t, Tensor) and t.is_meta for t in results(found, arguments)):
        return "right", ""
    halves = (torch.float16, torch.bfloat16)
    rough = any(
        v == "bf16" if isinstance(v, str) else getattr(v, "dtype", F32) in halves for v in before.values()
    )
    with ops.backend("reference"), torch.no_grad():
        try:
            want = results(op(*before.values()), before)
        except Exception as error:
            return "WRONG", f"only the reference raises: {error}"
    if name in ("batched_rank", "matrix_rank"):  # the bounds of another method are others
        tolerances = [v for v in (before["atol"], before["rtol"]) if isinstance(v, Tensor)]
        if not before["check_tolerance"] and any(bool(t.isnan().any()) for t in tolerances):
            return "right", ""  # a caller who has not had a NaN refused gets any count
        want = want[:1]
    fits = all(same(g, w, rough) for g, w in zip(results(found, arguments), want))
    return ("right", "") if fits else ("WRONG", f"{results(found, arguments)} for {want}")


def sweep(name: str, seed: int, pairs: int, say: Callable[[str], None]) -> list[str]:
    """What is wrong with an operator: each of its arguments in turn, and `pairs` of two at once."""
    wrong: list[str] = []
    draw = random.Random(f"{seed}{name}")

    def one(changes: list[tuple[str, int]]) -> None:
        torch.manual_seed(seed)
        guarded = Guarded()
        arguments = {k: guarded.put(v) if isinstance(v, Tensor) else v for k, v in CALLS[name]().items()}
        words = []
        for key, number in changes:
            choices = values(arguments[key], arguments)
            what, make = choices[number % len(choices)]
            words.append(f"{key}: {what}")
            try:
                arguments[key] = make()
            except (RuntimeError, NotImplementedError):  # there is no such tensor
                return
        title = f"{name}({', '.join(words)})"
        if "2^40" in title and name in ("batched_rank", "matrix_rank"):  # which take it, and their time
            return
        say(title)
        # What torch itself could not copy, or the reference not hold, is only called.
        whole = not re.search("2\\^40|(no|cut) memory", title)
        precise = whole and name != "capture_cotangent"
        outcome, why = call(name, arguments, precise)
        if outcome == "WRONG":
            wrong.append(f"{title}: {why}")
        if not guarded.intact():
            wrong.append(f"{title}: wrote where nothing of its is")
        named = [re.search(rf"\b{key}\b", why) for key, _ in changes]
        told = any(named) or "alloc" in why  # of an operand whose copy would be too large
        # before 2.10 torch itself, before the operator's own check
        told = told or (name == "capture_cotangent" and "Cannot access storage" in why)
        if outcome == "raised" and len(changes) == 1 and not told:
            wrong.append(f"{title}: says not what is wrong with it: {why}")

    one([])
    example = CALLS[name]()
    numbers = {key: range(len(values(value, example))) for key, value in example.items()}
    for key, those in numbers.items():
        for number in those:
            one([(key, number)])
    chosen = [(a, b) for a, b in itertools.combinations(numbers, 2)]
    for a, b in (draw.choice(chosen) for _ in range(pairs) if chosen):
        one([(a, draw.choice(numbers[a])), (b, draw.choice(numbers[b]))])
    return wrong


def main(seed: int = 0, pairs: int = 200, *only: str) -> int:
    faulthandler.enable()
    graph._receivers[12345] = lambda g: None
    wrong = []
    for name in only or sorted(operators()):
        wrong += sweep(name, seed, pairs, lambda title: print(title, flush=True))
    print("\n".join(f"WRONG {line}" for line in wrong))
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]))
