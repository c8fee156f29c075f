"""States of torch that a caller may have set, and that must not change what a public call gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Outside inference mode and autocast, as if the call stood alone; a decorator as well.

    Tensors that are made in inference mode count no versions and take no part in backpropagation; autocast
    would have products of a proof, and the model whose features are looked at, in half precision. Inside a
    transform of ``torch.func`` each tensor is wrapped: whose numbers a proof reads cannot be said there.

    Raises:
        RuntimeError: inside such a transform.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func: this cannot be called inside grad, vjp, jvp, jacfwd, jacrev or vmap, and is not "
            "differentiated or batched by them; call it outside, on plain tensors"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
