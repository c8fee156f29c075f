"""Gram matrices of Jacobians from their factors: the neural tangent kernel, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcfast import errors, reference
from gcfast.ops import arguments, dispatch, native
from gcfast.ops.registration import operator
from gcfast.ops.wide_calls import chosen_precision


def _unit(x: Tensor) -> Tensor:
    """`x` with a unit stride along o, which the kernels read along."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _check_jacobian_gram(
    out: Tensor, g: Tensor, h: Tensor, scale: Tensor, ends: Sequence[int], lower: bool
) -> None:
    arguments.is_added_to(out, "(n C, n2 C2)")
    for name, value in (("g", g), ("h", h), ("scale", scale)):
        arguments.matches(name, value, "out", out)
    if g.dim() != 4:
        raise ValueError(f"g must have shape (n, C, T, R); got {tuple(g.shape)}")
    if h.dim() != 4 or h.shape[3] != g.shape[3]:
        raise ValueError(f"h must have shape (n2, C2, T2, {g.shape[3]}), R from g; got {tuple(h.shape)}")
    errors.is_flag("lower", lower)
    if lower and g.shape != h.shape:
        raise ValueError(f"h must have g's shape, {tuple(g.shape)}, with lower=True; got {tuple(h.shape)}")
    (n, c, t, r), (n2, c2, t2, _) = g.shape, h.shape
    arguments.has_shape("out", out, (n * c, n2 * c2), "n C from g, n2 C2 from h")
    if not isinstance(ends, Sequence) or any(type(end) is not int for end in ends):
        raise TypeError(f"ends must be a sequence of ints; got {errors.came(ends)}")
    if any(a > b for a, b in zip((0, *ends), ends)) or (list(ends) or [0])[-1] != r:
        raise ValueError(f"ends must not descend and the last be R, {r} from g; got {tuple(ends)}")
    arguments.has_shape("scale", scale, (len(ends), n * t, n2 * t2), "L from ends, n T from g, n2 T2 from h")


@operator("jacobian_gram", _check_jacobian_gram, lambda *given: None, mutates=("out",))
def jacobian_gram_op(out: Tensor, g: Tensor, h: Tensor, scale: Tensor, ends: list[int], lower: bool) -> None:
    backend = dispatch.choose("jacobian_gram", out)
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
    assert native.cpu is not None
    kernel = native.cpu.jacobian_gram_f64 if out.dtype == torch.float64 else native.cpu.jacobian_gram_f32
    stops = torch.tensor(ends, dtype=torch.int64, device="cpu")
    pointers = [t.data_ptr() for t in (out, g, h, scale, stops)]
    sizes = (len(ends), *g.shape[:3], *h.shape[:3])
    strides = (*out.stride(), *g.stride()[:3], *h.stride()[:3], *scale.stride())
    kernel(*pointers, *sizes, *strides, lower, torch.get_num_threads())


def _check_gradient_gram(out: Tensor, g: Tensor, a: Tensor, h: Tensor | None, b: Tensor | None) -> None:
    arguments.is_added_to(out, "(n C, n2 C2)")
    if (h is None) != (b is None):
        raise ValueError(f"{'h' if h is None else 'b'} must be given with {'b' if h is None else 'h'}")
    given = {"g": g, "a": a} if h is None or b is None else {"g": g, "a": a, "h": h, "b": b}
    for name, value in given.items():
        arguments.matches(name, value, "out", out)
    if g.dim() != 4:
        raise ValueError(f"g must have shape (n, C, T, R); got {tuple(g.shape)}")
    n, c, t, r = g.shape
    if a.dim() != 3 or a.shape[:2] != (n, t):
        raise ValueError(f"a must have shape ({n}, {t}, S), n and T from g; got {tuple(a.shape)}")
    rows = columns = n * c
    if h is not None and b is not None:
        if h.dim() != 4 or h.shape[3] != r:
            raise ValueError(f"h must have shape (n2, C2, T2, {r}), R from g; got {tuple(h.shape)}")
        n2, c2, t2, _ = h.shape
        arguments.has_shape("b", b, (n2, t2, a.shape[2]), "n2 and T2 from h, S from a")
        columns = n2 * c2
    arguments.has_shape("out", out, (rows, columns), "n C from g, n2 C2 from h or g")


@operator("gradient_gram", _check_gradient_gram, lambda *given: None, mutates=("out",))
def gradient_gram_op(out: Tensor, g: Tensor, a: Tensor, h: Tensor | None, b: Tensor | None) -> None:
    backend = dispatch.choose("gradient_gram", out)
    if not (out.numel() and g.numel() and a.numel() and (b is None or b.numel())):
        return
    if backend == "reference":
        reference.gradient_gram(out, g, a, h, b)
        return
    assert native.cpu is not None
    kernel = native.cpu.gradient_gram_f64 if out.dtype == torch.float64 else native.cpu.gradient_gram_f32
    lower = h is None or b is None
    h, b = (g, a) if h is None or b is None else (h, b)
    pointers = [t.data_ptr() for t in (out, g, a, h, b)]
    sizes = (*g.shape[:3], *h.shape[:3], g.shape[3], a.shape[2])
    strides = [stride for t in (out, g, a, h, b) for stride in t.stride()]
    kernel(*pointers, *sizes, *strides, lower, torch.get_num_threads())


def jacobian_gram(
    out: Tensor,
    g: Tensor,
    h: Tensor,
    scale: Tensor,
    *,
    ends: Sequence[int] | None = None,
    lower: bool = False,
) -> None:
    """Adds the Gram of a Jacobian to out in place, from what its layers' gradients are made of.

    out[(i, c), (j, e)] += sum over l, t, s of scale[l, (i, t), (j, s)] sum_o g[i, c, t, o] h[j, e, s, o],
    the inner sum over the columns o of layer l. With g the gradients of output c of sample i in what layer l
    puts out at position t, and scale the products of what it takes in, x_it . x_js, that is the Gram of the
    Jacobian in the layers' weights: a gradient is the sum over positions of g_t x_t^T, and
    <g_t x_t^T, h_s y_s^T> = <g_t, h_s> <x_t, y_s>. Neither the factors' Gram nor its product with the scales
    is stored; out is read and written once.

    Args:
        out: (n C, n2 C2) float32 or float64, any strides that keep its elements apart (best: a unit stride of
            columns); it shares none with the others.
        g: (n, C, T, R), h: (n2, C2, T2, R), of out's dtype and device, any strides (copied unless o has unit
            stride); they may overlap.
        scale: (L, n T, n2 T2), row (i, t) and column (j, s), any strides.
        ends: where each layer's columns end, not descending, the last at R; (R,) by default.
        lower: h has g's shape, and nothing above out's diagonal is read or written, in about half the time.

    Sums begin at zero and are added to out with one rounding. Repeatable bit for bit: on the CPU's kernels
    neither the number of threads nor the samples and outputs that a call is given change a bit of the others.
    Products of float32 follow IEEE; on a GPU where ``torch`` allows its own TF32, they are made of three TF32
    ones (errors near float32's), on the reference backend as torch makes them. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    if ends is None:
        ends = [g.shape[-1]] if isinstance(g, Tensor) and g.dim() and not g.is_nested else []
    jacobian_gram_op(out, g, h, scale, ends, lower)


def gradient_gram(
    out: Tensor, g: Tensor, a: Tensor, h: Tensor | None = None, b: Tensor | None = None
) -> None:
    """Adds the Gram of every sample's gradients in one weight to out in place, without storing the gradients.

    out[(i, c), (j, e)] += sum over r, s of J[(i, c), (r, s)] J'[(j, e), (r, s)], where
    J[(i, c), (r, s)] = sum_t g[i, c, t, r] a[i, t, s] is output c's gradient at sample i in an (R, S) weight,
    which takes in a_it at position t and puts out what g is the gradient in; J' is made of h and b alike. It
    is the Gram that :func:`jacobian_gram` makes of one layer, in n C (T + n C / 2) R S products (without h),
    where that takes (n C T)^2 R / 2 beside those of its scales: fewer where positions are many. J is made in
    blocks of parameters that stay in cache.

    Args:
        out: (n C, n2 C2) float32 or float64, any strides that keep its elements apart (best: a unit stride
            of columns); it shares none with the others.
        g: (n, C, T, R), a: (n, T, S), of out's dtype and device, any strides (best: a unit stride of
            positions, or of rows and columns).
        h: (n2, C2, T2, R), b: (n2, T2, S), alike, both or neither: without them J' is J, out is square and
            nothing above its diagonal is read or written.

    Sums begin at zero and are added to out with one rounding. Repeatable bit for bit: on the CPU's kernels,
    at any number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    gradient_gram_op(out, g, a, h, b)
