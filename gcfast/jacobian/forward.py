"""The model's forward pass: outputs checked, what it saves for backpropagation counted, samples sliced."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from gcfast import errors
from gcfast.jacobian.eval_norm import Rewriting
from gcfast.model import call_arguments, copy_tensors
from gcfast.nn import WideLayer

log = logging.getLogger("gcfast")


@contextlib.contextmanager
def observable(model: nn.Module) -> Iterator[None]:
    """Wide layers are called as such, not fused with their head; attention has derivatives of every kind."""
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, WideLayer)]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*batching rule.*")
            yield
    finally:
        for hook in hooks:
            hook.remove()


def sample_count(inputs: Any) -> int:
    return len(next(v for v in tree_leaves(inputs) if isinstance(v, Tensor)))


def forward(model: nn.Module, inputs: Any, rewriting: bool = False) -> Tensor:
    """The output (n, C), checked; ``rewriting``: for a backward pass to intermediate edges alone."""
    args, kwargs = call_arguments(copy_tensors(inputs))  # the model may change them in place
    with observable(model), Rewriting() if rewriting else contextlib.nullcontext(), errors.blaming("x"):
        y = model(*args, **kwargs)
    if not isinstance(y, Tensor):
        raise TypeError(f"the model must return one tensor (n, C); got {type(y).__name__}")
    samples = sample_count(inputs)
    if y.dim() != 2 or len(y) != samples:
        raise ValueError(
            f"the model must return outputs of shape (n, C), here ({samples}, C); got {tuple(y.shape)}"
        )
    if not y.is_floating_point():
        raise TypeError(f"the model's outputs must be floating; got {y.dtype}")
    if y.grad_fn is None:
        raise ValueError(
            "the model's output depends on none of its parameters by autograd: was it computed under "
            "torch.no_grad(), or detached?"
        )
    return y


def checked_finite(y: Tensor) -> Tensor:
    if not bool(y.detach().isfinite().all()):
        raise ValueError("the model's output holds a NaN or an infinity: its Jacobian is not defined")
    return y


def rows_of(inputs: Any, first: int, last: int) -> Any:
    """Samples [first, last) of every tensor, in one layout in memory: every pass takes the same course."""
    keep = torch.contiguous_format
    return tree_map(
        lambda v: v[first:last].detach().clone(memory_format=keep) if isinstance(v, Tensor) else v, inputs
    )


def is_close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    scale = max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0
    return scale == 0.0 or float((a - b).abs().max()) <= torch.finfo(a.dtype).eps ** 0.5 * scale


def and_others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more: {', '.join(map(repr, names[1:4]))})" if len(names) > 1 else ""


def stack_samples(samples: Sequence[Any]) -> Any:
    """Batches of one sample as one batch."""
    return tree_map(lambda *v: torch.cat(v) if isinstance(v[0], Tensor) else v[0], *samples)


def refuse_dependent_samples(together: Tensor, alone: Tensor) -> None:
    """A sample's output must not depend on the batch that it is in, nor on random numbers."""
    if not is_close(together, alone):
        error, scale = float((together - alone).abs().max()), float(alone.abs().max())
        raise ValueError(
            "the model's output for a sample in a batch differs from its output for the sample alone (by "
            f"{error:.2e} where outputs are up to {scale:.2e}): it depends on the other samples or on random "
            "numbers (batch statistics, active dropout). Call model.eval() first"
        )


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward pass keeps for the backward pass, beside parameters."""

    def __init__(self, parameters: Any) -> None:
        self.bytes = 0
        seen = {p.untyped_storage().data_ptr() for p in parameters}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return x

        super().__init__(pack, lambda x: x)
