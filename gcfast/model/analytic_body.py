"""Is the network below the head real analytic in its weights? The operators that decide it, named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gcfast.model.analytic_ops import Verdict
from gcfast.model.head import Head, describe_module, find_head, head_of_trace
from gcfast.model.tracing import (
    ModuleCall,
    OpCall,
    Trace,
    call_arguments,
    trace,
    unwrap,
)


@dataclass(frozen=True)
class Finding:
    """One operator on the way to the head.

    `module` is the qualified name of the innermost module that applied it, "" for the model's own forward.
    """

    op: str
    module: str
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.op} in {describe_module(self.module)}: {self.verdict} ({self.reason})"


def analyticity(model: nn.Module, head: Head | nn.Module | str | None, inputs: Any) -> list[Finding]:
    """Every operator applied before the head, with a verdict on each: is it real analytic?

    One forward pass is watched at the level of dispatched operators, so that functional calls and in-place
    forms are seen as well as modules. What acts on the data alone, and not on anything computed from a
    weight, is a constant as far as the weights are concerned, and counts as analytic. "ties": analytic
    except on a set such as equal arguments of a maximum, or outside an open domain; "unknown": no rule,
    listed by name. Each pair of operator and module appears once, with the worst verdict it got, in the
    order of the forward pass.

    `head=None` finds the head from the same pass.
    """
    record, call = trace_to_head(model, head, inputs)
    return _findings(record.ops[: call.start])


_WORSE: dict[Verdict, int] = {"analytic": 0, "ties": 1, "unknown": 2, "not analytic": 3}


def _findings(ops: list[OpCall]) -> list[Finding]:
    found: dict[tuple[str, str], Finding] = {}
    for op in ops:
        old = found.get((op.op, op.module))
        if old is None or _WORSE[op.verdict] > _WORSE[old.verdict]:
            found[op.op, op.module] = Finding(op.op, op.module, op.verdict, op.reason)
    return list(found.values())


def trace_to_head(
    model: nn.Module,
    head: Head | nn.Module | str | None,
    inputs: Any,
    watch: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> tuple[Trace, ModuleCall]:
    model = unwrap(model)
    chosen = None if head is None else find_head(model, head=head)
    record = trace(model, *call_arguments(inputs), watch=watch)
    found = head_of_trace(model, record, chosen)
    return record, next(c for c in record.calls if c.module is found.module)
