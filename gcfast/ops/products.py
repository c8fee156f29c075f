"""Gram products and accumulating matrix products with the rounding that the proofs rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast import errors, reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.registration import operator


def _check_gram_product(gram: Tensor, x: Tensor) -> None:
    arguments.is_float("gram", gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must have shape (n, n); got {tuple(gram.shape)}")
    arguments.matches("x", x, "gram", gram)
    if x.dim() != 2 or x.shape[0] != gram.shape[0]:
        raise ValueError(f"x must have shape ({gram.shape[0]}, c); got {tuple(x.shape)}")


@operator(
    "gram_product",
    _check_gram_product,
    lambda gram, x: x.new_empty(x.shape),
    refusal="{op} cannot be differentiated: use gram @ x, detach {name}, or work under torch.no_grad()",
)
def gram_product_op(gram: Tensor, x: Tensor) -> Tensor:
    if dispatch.choose("gram_product", gram) == "reference":
        return reference.gram_product(gram, x)
    assert native.cpu is not None
    n, c = x.shape
    right_hand_sides = x.mT.contiguous()  # the kernel takes each right-hand side as a row
    out = torch.empty_like(right_hand_sides)
    if out.numel() == 0:
        return x.new_empty(n, c)
    rows = gram if gram.stride(1) == 1 and gram.stride(0) >= n else gram.contiguous()
    double = gram.dtype == torch.float64
    kernel = native.cpu.gram_product_f64 if double else native.cpu.gram_product_f32
    threads = torch.get_num_threads()
    kernel(rows.data_ptr(), right_hand_sides.data_ptr(), out.data_ptr(), n, c, rows.stride(0), threads)
    return out.mT.contiguous()


def _check_add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, inner: int, lower: bool) -> None:
    arguments.is_added_to(out, "(r, c)")
    r, c = out.shape
    for name, value in (("a", a), ("b", b)):
        arguments.matches(name, value, "out", out)
    if a.dim() != 2 or a.shape[0] != r:
        raise ValueError(f"a must have shape ({r}, k), r from out; got {tuple(a.shape)}")
    arguments.has_shape("b", b, (a.shape[1], c), "k from a, c from out")
    if not isinstance(alpha, (int, float)) or alpha not in (1.0, -1.0):
        raise ValueError(f"alpha must be 1 or -1; got {errors.came(alpha)}")
    arguments.is_whole("inner", inner, 1)
    errors.is_flag("lower", lower)
    if lower and r != c:
        raise ValueError(f"out must be square with lower=True; got {(r, c)}")


@operator("add_product", _check_add_product, lambda *given: None, mutates=("out",))
def add_product_op(out: Tensor, a: Tensor, b: Tensor, alpha: float, inner: int, lower: bool) -> None:
    backend = dispatch.choose("add_product", out)
    if not (out.numel() and a.numel()):
        return
    inner = min(inner, a.shape[1])  # what comes after the last column is not counted with
    if backend == "reference":
        reference.add_product(out, a, b, alpha=alpha, inner=inner, lower=lower)
        return
    assert native.cpu is not None
    kernel = native.cpu.add_product_f64 if out.dtype == torch.float64 else native.cpu.add_product_f32
    strides = (*out.stride(), *a.stride(), *b.stride())
    settings = (inner, alpha, lower, torch.get_num_threads())
    kernel(out.data_ptr(), a.data_ptr(), b.data_ptr(), *out.shape, a.shape[1], *strides, *settings)


def add_product(
    out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, inner: int = 128, lower: bool = False
) -> None:
    """out += alpha a b in place, with the rounding errors that proofs are made with.

    Args:
        out: (r, c) float32 or float64, any strides that keep its elements apart; it shares none with a, b.
        a: (r, k), b: (k, c), of out's dtype and device, any strides; they may overlap.
        alpha: 1 or -1.
        inner: sums over slices of this length begin at zero and are added to out one by one.
        lower: r == c, and nothing above out's diagonal is read or written, in about half the time.

    Every element of out goes through one rounding a slice, and every slice's sum is within gamma_inner of the
    exact one: beyond the roundings of what was in out, the error is at most gamma_(inner + slices + 2) |a||b|
    with gamma_k = k u / (1 - k u), short of underflow. On a GPU that needs ``torch``'s TF32 switched off.
    Repeatable bit for bit: on the CPU's kernels neither the number of threads nor the rows and columns that
    a call is given change a bit of the others. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    add_product_op(out, a, b, alpha, inner, lower)


def gram_product(gram: Tensor, x: Tensor) -> Tensor:
    """gram x for a symmetric matrix and few right-hand sides: the inner step of phase two's solver.

    Args:
        gram: (n, n), symmetric; not checked: the CPU kernel reads the lower triangle, in half the time.
        x: (n, c), of gram's dtype and device, any strides.

    Returns:
        (n, c). Not differentiable. Repeatable bit for bit at the same number of threads.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    return gram_product_op(gram, x)
