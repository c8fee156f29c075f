"""Products of absolute values and rounding-error bounds of a Gram, checked and dispatched."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.registration import operator


def gram_error_bound(h: Tensor) -> Tensor:
    """The row sums of |h| |h|^T, with which the rounding errors of h h^T are bounded; |h| is never stored.

    Args:
        h: (n, m), any floating dtype and strides (no copy is made of any layout).

    Returns:
        (n,) float64: |h| (|h|^T 1), within relative gamma_(n+m) = (n+m) u / (1 - (n+m) u), u = 2^-53, of the
        exact values: all terms are non-negative, and none goes through more than n + m roundings, in whatever
        order. (Short of overflow, and of denormal products: they may be off by 2^-1022 m as well.) A NaN
        or infinity in h is never lost: every row that it belongs to is NaN or infinite, and so is every
        row that meets its column (0 times infinity is NaN). Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: h requires a gradient.
    """
    return gram_error_bound_op(h)


def abs_products(a: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """|a| right and left |a| in one reading of a: its absolute row and column sums, weighted.

    Args:
        a: (n, m), any floating dtype and strides (no copy is made of any layout).
        left: (n,) float64, >= 0 (not checked), ones by default; right: (m,), likewise.

    Returns:
        |a| right (n,) and left |a| (m,), float64, within relative gamma_m and gamma_n of the exact values
        (gamma_k = k u / (1 - k u), u = 2^-53; denormal products as in :func:`gram_error_bound`). NaN and
        infinities come out of every sum that they go into. Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    return abs_products_op(a, left, right)


def _weights(w: Tensor | None) -> int:
    return 0 if w is None else w.data_ptr()


def _check_abs_products(a: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    arguments.is_matrix("a", a)
    for name, weights, size, side in (("left", left, 0, "n"), ("right", right, 1, "m")):
        if weights is not None:
            arguments.is_float64(name, weights, "a", a)
            arguments.has_shape(name, weights, a.shape[size : size + 1], f"{side} from a")


def _row_and_column_sums(a: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, columns = (a.new_empty(size, dtype=torch.float64) for size in a.shape)
    return rows, columns


@operator("abs_products", _check_abs_products, _row_and_column_sums)
def abs_products_op(a: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    backend = dispatch.choose("gram_error_bound", a)
    if backend == "reference":
        return reference.abs_products(a, left, right)
    if a.numel() == 0:
        return a.new_zeros(a.shape[0], dtype=torch.float64), a.new_zeros(a.shape[1], dtype=torch.float64)
    left, right = (None if w is None else w.contiguous() for w in (left, right))
    if backend == "triton":
        from gcfast.triton_kernels import gram_error_bound as kernels

        return kernels.abs_products(a, left, right)
    assert native.cpu is not None
    rows, columns = _row_and_column_sums(a)
    kernel = native.cpu.abs_products_f64 if a.dtype == torch.float64 else native.cpu.abs_products_f32
    weights = (_weights(left), _weights(right))
    threads = torch.get_num_threads()
    kernel(a.data_ptr(), *weights, rows.data_ptr(), columns.data_ptr(), *a.shape, *a.stride(), threads)
    return rows, columns


@operator(
    "gram_error_bound",
    lambda h: arguments.is_matrix("h", h),
    lambda h: h.new_empty(h.shape[0], dtype=torch.float64),
)
def gram_error_bound_op(h: Tensor) -> Tensor:
    backend = dispatch.choose("gram_error_bound", h)
    if backend == "reference":
        return reference.gram_error_bound(h)
    if h.numel() == 0:
        return h.new_zeros(h.shape[0], dtype=torch.float64)
    if backend == "triton":
        from gcfast.triton_kernels import gram_error_bound as kernels

        return kernels.gram_error_bound(h)
    assert native.cpu is not None
    out = torch.empty(h.shape[0], dtype=torch.float64, device="cpu")
    double = h.dtype == torch.float64
    kernel = native.cpu.gram_error_bound_f64 if double else native.cpu.gram_error_bound_f32
    kernel(h.data_ptr(), out.data_ptr(), *h.shape, *h.stride(), torch.get_num_threads())
    return out
