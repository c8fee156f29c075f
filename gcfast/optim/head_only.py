"""Let any torch.optim.Optimizer step the last layer (the head) alone, its parameter groups left whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from gcfast.model import Head, fingerprint


@contextlib.contextmanager
def head_only(base: Optimizer, model: nn.Module, head: Head, verify: bool) -> Iterator[None]:
    """Hide hidden parameters from ``base`` while it steps.

    They are taken out of the lists in place and put back, so that outside a step `param_groups` is complete:
    schedulers see all groups, state_dict numbers parameters as in phase one, and an optimizer that holds on
    to the lists (LBFGS does) sees the change. Having no gradient would not do: some optimizers decay or move
    weights all the same, and LBFGS flattens all it has.

    ``verify``: compare the hidden weights before and after, bit by bit, and raise RuntimeError where ``base``
    changed them all the same.
    """
    groups = base.param_groups
    all_groups, full = list(groups), [(g["params"], list(g["params"])) for g in groups]
    own = {id(p) for p in head.parameters}
    before = fingerprint(model, head, buffers=False) if verify else None
    for params, everything in full:
        params[:] = [p for p in everything if id(p) in own]
    groups[:] = [g for g in all_groups if g["params"]]
    forget_flattening(base)
    try:
        yield
    finally:
        for params, everything in full:
            params[:] = everything
        groups[:] = all_groups
        forget_flattening(base)
    if before is not None and before != fingerprint(model, head, buffers=False):
        raise RuntimeError(
            f"{type(base).__name__} changed hidden weights in phase two: it does not take the "
            "parameters it steps from its param_groups, so TwoPhase cannot freeze them"
        )


def forget_flattening(base: Optimizer) -> None:
    """Have LBFGS count its parameters anew: it steps one long vector, whose length it keeps."""
    if hasattr(base, "_numel_cache"):  # LBFGS
        base._numel_cache = None


def forget_curvature(base: Optimizer) -> None:
    """Clear what LBFGS keeps: the history of one long vector, which has another length from now on."""
    if hasattr(base, "_numel_cache"):  # LBFGS
        base.state.clear()
