"""The torch.library op on the factors of a Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import _dispatch, _native, reference
from gcfast._ops_wide import chosen_precision


def _unit(x: Tensor) -> Tensor:
    """`x` with a unit stride along o, which the kernels read along."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


@torch.library.custom_op("gcfast::jacobian_gram", mutates_args=("out",))
def jacobian_gram_op(out: Tensor, g: Tensor, h: Tensor, scale: Tensor, ends: list[int], lower: bool) -> None:
    backend = _dispatch.choose("jacobian_gram", out)
    if not (out.numel() and g.numel() and h.numel() and scale.numel()):
        return
    if backend == "reference":
        reference.jacobian_gram(out, g, h, scale, ends=ends, lower=lower)
        return
    g, h = _unit(g), _unit(h)
    if backend == "triton":
        from gcfast.triton_kernels import jacobian_gram as kernels

        kernels.jacobian_gram(out, g, h, scale, tuple(ends), lower, chosen_precision(None, out))
        return
    assert _native.cpu is not None
    kernel = _native.cpu.jacobian_gram_f64 if out.dtype == torch.float64 else _native.cpu.jacobian_gram_f32
    stops = torch.tensor(ends, dtype=torch.int64)
    pointers = [t.data_ptr() for t in (out, g, h, scale, stops)]
    sizes = (len(ends), *g.shape[:3], *h.shape[:3])
    strides = (*out.stride(), *g.stride()[:3], *h.stride()[:3], *scale.stride())
    kernel(*pointers, *sizes, *strides, lower, torch.get_num_threads())


@jacobian_gram_op.register_fake
def _(out: Tensor, g: Tensor, h: Tensor, scale: Tensor, ends: list[int], lower: bool) -> None:
    return None


@torch.library.custom_op("gcfast::gradient_gram", mutates_args=("out",))
def gradient_gram_op(out: Tensor, g: Tensor, a: Tensor, h: Tensor | None, b: Tensor | None) -> None:
    backend = _dispatch.choose("gradient_gram", out)
    if not (out.numel() and g.numel() and a.numel() and (b is None or b.numel())):
        return
    if backend == "reference":
        reference.gradient_gram(out, g, a, h, b)
        return
    assert _native.cpu is not None
    kernel = _native.cpu.gradient_gram_f64 if out.dtype == torch.float64 else _native.cpu.gradient_gram_f32
    lower = h is None or b is None
    h, b = (g, a) if h is None or b is None else (h, b)
    pointers = [t.data_ptr() for t in (out, g, a, h, b)]
    sizes = (*g.shape[:3], *h.shape[:3], g.shape[3], a.shape[2])
    strides = [stride for t in (out, g, a, h, b) for stride in t.stride()]
    kernel(*pointers, *sizes, *strides, lower, torch.get_num_threads())


@gradient_gram_op.register_fake
def _(out: Tensor, g: Tensor, a: Tensor, h: Tensor | None, b: Tensor | None) -> None:
    return None
