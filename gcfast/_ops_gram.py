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
