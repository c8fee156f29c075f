"""States of torch that a caller may have set, and that must not change what a public call gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Outside inference mode and autocast, as if the call stood alone; a decorator as well.

    Tensors that are made in inference mode count no versions and take no part in backpropagation; autocast
    would have products of a proof, and the model whose features are looked at, in half precision.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
