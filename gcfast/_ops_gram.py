"""The torch.library ops on Grams and on the factors of Grams."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import _dispatch, _native, reference


@torch.library.custom_op("gcfast::gram_product", mutates_args=())
def gram_product_op(gram: Tensor, x: Tensor) -> Tensor:
    if _dispatch.choose("gram_product", gram) == "reference":
        return reference.gram_product(gram, x)
    assert _native.cpu is not None
    n, c = x.shape
    sides = x.mT.contiguous()  # the kernel takes each right-hand side as a row
    out = torch.empty_like(sides)
    if out.numel() == 0:
        return x.new_empty(n, c)
    rows = gram if gram.stride(1) == 1 and gram.stride(0) >= n else gram.contiguous()
    double = gram.dtype == torch.float64
    kernel = _native.cpu.gram_product_f64 if double else _native.cpu.gram_product_f32
    threads = torch.get_num_threads()
    kernel(rows.data_ptr(), sides.data_ptr(), out.data_ptr(), n, c, rows.stride(0), threads)
    return out.mT.contiguous()


@gram_product_op.register_fake
def _(gram: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("gcfast::add_product", mutates_args=("out",))
def add_product_op(out: Tensor, a: Tensor, b: Tensor, alpha: float, inner: int, lower: bool) -> None:
    if _dispatch.choose("add_product", out) == "reference":
        reference.add_product(out, a, b, alpha=alpha, inner=inner, lower=lower)
        return
    assert _native.cpu is not None
    kernel = _native.cpu.add_product_f64 if out.dtype == torch.float64 else _native.cpu.add_product_f32
    strides = (*out.stride(), *a.stride(), *b.stride())
    settings = (inner, alpha, lower, torch.get_num_threads())
    kernel(out.data_ptr(), a.data_ptr(), b.data_ptr(), *out.shape, a.shape[1], *strides, *settings)


@add_product_op.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, alpha: float, inner: int, lower: bool) -> None:
    return None


def _weights(w: Tensor | None) -> int:
    return 0 if w is None else w.data_ptr()


@torch.library.custom_op("gcfast::abs_products", mutates_args=())
def abs_products_op(a: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    backend = _dispatch.choose("gram_error_bound", a)
    if backend == "reference":
        return reference.abs_products(a, left, right)
    if a.numel() == 0:
        return a.new_zeros(a.shape[0], dtype=torch.float64), a.new_zeros(a.shape[1], dtype=torch.float64)
    left, right = (None if w is None else w.contiguous() for w in (left, right))
    if backend == "triton":
        from gcfast.triton_kernels import gram_error_bound as kernels

        return kernels.abs_products(a, left, right)
    assert _native.cpu is not None
    rows, columns = (torch.empty(k, dtype=torch.float64) for k in a.shape)
    kernel = _native.cpu.abs_products_f64 if a.dtype == torch.float64 else _native.cpu.abs_products_f32
    weights = (_weights(left), _weights(right))
    threads = torch.get_num_threads()
    kernel(a.data_ptr(), *weights, rows.data_ptr(), columns.data_ptr(), *a.shape, *a.stride(), threads)
    return rows, columns


@abs_products_op.register_fake
def _(a: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    n, m = a.shape
    return a.new_empty(n, dtype=torch.float64), a.new_empty(m, dtype=torch.float64)


@torch.library.custom_op("gcfast::gram_error_bound", mutates_args=())
def gram_error_bound_op(h: Tensor) -> Tensor:
    backend = _dispatch.choose("gram_error_bound", h)
    if backend == "reference":
        return reference.gram_error_bound(h)
    if h.numel() == 0:
        return h.new_zeros(h.shape[0], dtype=torch.float64)
    if backend == "triton":
        from gcfast.triton_kernels import gram_error_bound as kernels

        return kernels.gram_error_bound(h)
    assert _native.cpu is not None
    out = torch.empty(h.shape[0], dtype=torch.float64)
    double = h.dtype == torch.float64
    kernel = _native.cpu.gram_error_bound_f64 if double else _native.cpu.gram_error_bound_f32
    kernel(h.data_ptr(), out.data_ptr(), *h.shape, *h.stride(), torch.get_num_threads())
    return out


@gram_error_bound_op.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], dtype=torch.float64)
