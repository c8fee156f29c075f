"""The head, or the wide layer and the head, as a module that goes on from the rows of a FeatureCache."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.features.frozen_body import BodySnapshot
from gcfast.model import Freezer, Head
from gcfast.nn import WideLayer, through_head

# A batch's features up to this size are kept for the backward pass, as the model itself does in phase two:
# on a CPU 1.3 times as fast at 4 MiB as making them anew, which is 1.5 times as fast at 7 MiB and above.
_KEPT_BYTES = 6 << 20


class CachedHead(nn.Module):
    """The model from the cached rows on: the wide layer, if there is one, and the head."""

    def __init__(
        self, head: Head, wide: WideLayer | None, shape: tuple[int, ...] | None, unchanged: BodySnapshot
    ) -> None:
        super().__init__()
        self.wide = None if wide is None else _without_freezer(wide)
        self.linear = head.module
        self._shape, self._snapshot = shape, unchanged

    def forward(self, rows: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._snapshot.check()
        if not torch.is_autocast_enabled(rows.device.type):  # the model's own may have made the rows
            rows = rows.to(self.linear.weight.dtype)
        if self.wide is None:
            out: Tensor = self.linear(rows)
        else:
            kept = rows.nbytes // self.wide.d * self.wide.m
            out = through_head(self.wide, self.linear, rows, fused=kept > _KEPT_BYTES)
        return out if self._shape is None else out.reshape(len(rows), *self._shape)


def output_shape(out: Any, batch: int, head: Head) -> tuple[int, ...] | None:
    """The shape of one sample's output where it is not (C,): the model may end in a view, such as squeeze."""
    plain = (head.out_features,)
    if not isinstance(out, Tensor) or out.dim() == 0 or len(out) != batch or out.shape[1:] == plain:
        return None
    return tuple(out.shape[1:]) if out.numel() == batch * head.out_features else None


def _without_freezer(wide: WideLayer) -> WideLayer:
    """The layer with its own parameters, less the hooks of phase two: frozen it is, and fused it can be."""
    bare = copy.copy(wide)
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(wide, kind).items()
        kept = ((key, hook) for key, hook in hooks if not isinstance(getattr(hook, "__self__", 0), Freezer))
        setattr(bare, kind, OrderedDict(kept))
    return bare
