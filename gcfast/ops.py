"""The only door to the kernels: validated, dispatched, differentiable, compilable.

Each function checks its arguments, then calls an op registered with ``torch.library`` under the namespace
``gcfast`` (with fake kernel and gradient, so ``torch.compile(fullgraph=True)`` sees one node). The op runs on
the ``cpu`` backend (C++; float32 and float64, for the wide layer half precision too), on ``triton`` or
``cuda`` (CUDA tensors, on their device and its current stream), or on ``reference`` (plain PyTorch; anything
else). All kernels are deterministic.
``backends()`` says which are usable and why not, ``backend(...)`` and ``GCFAST_BACKEND`` force one, and
``last_backend(op)`` tells which one ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcfast import _validate
from gcfast._dispatch import BackendError, BackendTable, backend, backends, last_backend
from gcfast._ops_activation import activation_op, activation_out_op
from gcfast._ops_gram import abs_products_op, add_product_op, gram_error_bound_op, gram_product_op
from gcfast._ops_jacobian import gradient_gram_op, jacobian_gram_op
from gcfast._ops_rank import batched_rank_op
from gcfast._ops_softmax import softmax_curvature_op, softmax_residual_op
from gcfast._ops_wide import wide_forward_op, wide_gram_product_op, wide_head_grad_op, wide_panel_out_op

__all__ = [
    "BackendError",
    "BackendTable",
    "abs_products",
    "activation",
    "add_product",
    "backend",
    "backends",
    "batched_rank",
    "gradient_gram",
    "gram_error_bound",
    "gram_product",
    "jacobian_gram",
    "last_backend",
    "softmax_curvature",
    "softmax_residual",
    "wide_features",
    "wide_forward",
    "wide_gram_product",
    "wide_head_grad",
    "wide_panel",
]


def activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    order: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """act(x + bias), or its first or second derivative there.

    Args:
        x: any shape and strides; float32 and float64 run on every backend, bfloat16 and float16 on triton (in
            float32, rounded once) and the reference.
        bias: shape ``x.shape[-1:]``, added along the last dimension.
        activation: softplus (log(1 + exp(beta x)) / beta, without a threshold), sigmoid, tanh, gelu (by erf),
            gelu_tanh, silu or relu (derivative 0 at 0).
        beta: softplus's sharpness, > 0; the others take 1.0 only.
        order: 0, 1 or 2. Gradients work as long as ``order`` and the number of differentiations add up to at
            most 2; one more raises.
        out: written and returned; may be `x`. Not differentiable: an error if a gradient would be needed.

    Returns:
        x's shape and dtype, contiguous (or `out`).

    Accuracy on the cpu, cuda and triton backends: within 4 ulp over the whole range, denormal results
    included (of the sum of the magnitudes of its terms where a derivative of gelu, gelu_tanh or silu crosses
    zero; within 4.5 on a CPU without FMA).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _validate.is_float("x", x)
    _validate.is_activation(activation, beta, order)
    if bias is not None:
        _validate.matches("bias", bias, "x", x)
        _validate.has_shape("bias", bias, x.shape[-1:] if x.dim() else (1,), "the last dimension of x")
        if x.dim() == 0:
            raise ValueError("bias needs an x with at least one dimension; got an x without dimensions")
    if out is None:
        return activation_op(x, bias, activation, float(beta), order)
    _validate.matches("out", out, "x", x)
    _validate.has_shape("out", out, x.shape, "as x")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, out)):
        raise RuntimeError("out= cannot be differentiated: leave it out, or work under torch.no_grad()")
    activation_out_op(x, bias, activation, float(beta), order, out)
    return out


def softmax_residual(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, check_target: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, its residual and its conjugate term, per row, in one pass.

    Args:
        logits: (n, C), C >= 1, any strides.
        target: int64 class indices (n,), or probabilities (n, C) of logits' dtype whose rows sum to one.
        label_smoothing: in [0, 1); the targets are q = (1 - label_smoothing) y + label_smoothing / C.
        check_target: whether the values of `target` are checked. That costs a pass over it and, on the GPU,
            a synchronisation, which is not allowed while a CUDA graph is captured. Without the check a label
            outside [0, C) gives NaN in all three outputs of its row, and rows of probabilities are taken as
            they are; no memory outside the arguments is read.

    Returns:
        loss (n,), as ``torch.nn.functional.cross_entropy(..., reduction="none")``; residual (n, C), p - q
        with p = softmax(logits), the gradient of the loss; neg_entropy (n,), sum p log p, the conjugate of
        log-sum-exp at p. All have small relative error where they are tiny. A row with a NaN or an
        infinite maximum gives NaN; a logit of -inf is a class of probability zero, and 0 log 0 = 0.

    All three outputs can be differentiated in `logits`; `target` must not require a gradient.

    Raises:
        TypeError, ValueError: naming the argument; a label out of range with its index and value.
    """
    _validate.logits_and_target(logits, target)
    _validate.smoothing(label_smoothing)
    return softmax_residual_op(logits, target, float(label_smoothing), bool(check_target))


def softmax_curvature(logits: Tensor, v: Tensor) -> Tensor:
    """The curvature of cross-entropy times a vector, per row: (diag(p) - p p^T) v with p = softmax(logits).

    Args:
        logits: (n, C), C >= 1, any strides.
        v: (n, C), of logits' dtype and device, any strides.

    Returns:
        (n, C), contiguous: with k the first maximum of the row, w_c = v_c - v_k and mu the sum of p_c w_c
        over c != k, it is p_c (w_c - mu) for c != k and -p_k mu at k. Nothing cancels where p is nearly
        one-hot, so the small numbers there keep their relative accuracy. A row of logits with a NaN or an
        infinite maximum gives NaN; a logit of -inf is a class of probability zero.

    Symmetric and linear in `v`; differentiable any number of times in both arguments.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _validate.is_logits(logits)
    _validate.matches("v", v, "logits", logits)
    _validate.has_shape("v", v, logits.shape, "as logits")
    return softmax_curvature_op(logits, v)


def wide_features(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """The features act(z weight^T + bias), stored whole: z (..., d), weight (m, d), bias (m,) to (..., m).

    Twice differentiable. With `out` (contiguous, shape (..., m)) nothing else of that size is allocated, and
    no gradient flows.
    """
    _validate.wide(z, weight, bias)
    _validate.is_activation(activation, beta)
    if out is None:
        pre = torch.nn.functional.linear(z, weight)
        return activation_op(pre, bias, activation, float(beta), 0)
    _validate.matches("out", out, "z", z)
    _validate.has_shape("out", out, (*z.shape[:-1], weight.shape[0]), "(..., m)")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous; got strides {tuple(out.stride())}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (z, weight, bias, out)):
        raise RuntimeError("out= cannot be differentiated: leave it out, or work under torch.no_grad()")
    torch.mm(z.reshape(-1, z.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]))
    activation_out_op(out, bias, activation, float(beta), 0, out)
    return out


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """What autocast makes of an operand: float64 and what is not floating stay."""
    castable = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if castable else t


def wide_forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """act(z weight^T + bias) head_weight^T + head_bias without ever storing the features.

    Args:
        z: (..., d); weight: (m, d); bias: (m,); head_weight: (C, m); head_bias: (C,) or None; all of one
            dtype and device. Half precision is accumulated in float32 and rounded once. Under autocast they
        are cast to its dtype first, as torch casts the operands of a product.
        activation, beta: as in :func:`activation`.
        precision: how products of float32 may be made: "ieee", or, where that is faster on the device at
            hand, "tf32x3" (errors near float32's), "tf32" (10 bits) or "bf16" (operands rounded to 8 bits,
            sums in float32). A processor without such instructions computes as if it were "ieee". None: what
            torch allows its own products (``torch.backends.cuda.matmul.fp32_precision``, on the CPU
            ``torch.backends.mkldnn.matmul.fp32_precision``).

    Returns:
        (..., C). Features exist in tiles only, in the backward pass too, where they are computed again;
        gradients reach all five tensors, once (not twice) differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(z, Tensor) and torch.is_autocast_enabled(z.device.type):
        dtype = torch.get_autocast_dtype(z.device.type)
        operands = (z, weight, bias, head_weight, head_bias)
        z, weight, bias, head_weight, head_bias = (_autocast(t, dtype) for t in operands)
    _validate.wide(z, weight, bias, head_weight, head_bias)
    _validate.is_activation(activation, beta)
    _validate.precision(precision, z.dtype)
    flat = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    out = wide_forward_op(flat, weight, bias, head_weight, head_bias, activation, float(beta), precision)
    return out.reshape(*z.shape[:-1], head_weight.shape[0])


def wide_head_grad(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """residual^T Phi with Phi = act(z weight^T + bias), never stored: the gradient of a linear head's weight.

    Args:
        z: (n, d); weight: (m, d); bias: (m,); residual: (n, C), the gradient of the loss in the outputs; all
            of one dtype and device, any strides. The head bias's gradient is ``residual.sum(0)``.
        activation, beta, precision: as in :func:`wide_forward`.

    Returns:
        (C, m), as ``nn.Linear(m, C).weight.grad``. Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    _validate.wide_sides("wide_head_grad", z, weight, bias, "residual", residual)
    _validate.is_activation(activation, beta)
    _validate.precision(precision, z.dtype)
    return wide_head_grad_op(z, weight, bias, residual, activation, float(beta), precision)


def wide_gram_product(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    r: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """Phi (Phi^T r) with Phi = act(z weight^T + bias), never stored and computed once: K r for K = Phi Phi^T.

    The inner step of matrix-free solves. With a column of ones in Phi add ``r.sum(0)`` to every row.

    Args:
        z: (n, d); weight: (m, d); bias: (m,); r: (n, C); all of one dtype and device, any strides.
        activation, beta, precision: as in :func:`wide_forward`.

    Returns:
        (n, C). Memory: a panel of Phi, n by 64 columns (on a GPU some tens of megabytes). Not
        differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    _validate.wide_sides("wide_gram_product", z, weight, bias, "r", r)
    _validate.is_activation(activation, beta)
    _validate.precision(precision, z.dtype)
    return wide_gram_product_op(z, weight, bias, r, activation, float(beta), precision)


def wide_panel(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "softplus",
    beta: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """act(z weight^T + bias) in float64, for the columns of the wide layer that are given.

    Args:
        z: (n, d); weight: (w, d); bias: (w,); of one floating dtype and device, any strides; cast to
            float64, which is exact.
        activation, beta: as in :func:`activation`.
        out: (n, w) float64 with a unit column stride, written and returned.

    Returns:
        (n, w) float64. Except on the reference backend an element depends on its row of z, its row of weight
        and its bias alone, bit for bit, whatever other rows and columns are computed with it, on however many
        threads: panels that are computed again, or cut elsewhere, are of one matrix. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument. RuntimeError: an argument requires a gradient.
    """
    _validate.wide_rows("wide_panel", z, weight, bias)
    _validate.is_activation(activation, beta)
    shape = (z.shape[0], weight.shape[0])
    if out is None:
        out = torch.empty(shape, dtype=torch.float64, device=z.device)
    else:
        _validate.is_float64("out", out, z.device)
        _validate.has_shape("out", out, shape, "n from z, w from weight")
        if out.stride(1) != 1 and shape[1] > 1:
            raise ValueError(f"out must have a unit column stride; got strides {tuple(out.stride())}")
    layer = (t.detach().double() for t in (z, weight, bias))
    wide_panel_out_op(*layer, activation, float(beta), out)
    return out


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
    _validate.is_added_to(out, "(r, c)")
    r, c = out.shape
    for name, value in (("a", a), ("b", b)):
        _validate.matches(name, value, "out", out)
    if a.dim() != 2 or a.shape[0] != r:
        raise ValueError(f"a must have shape ({r}, k), r from out; got {tuple(a.shape)}")
    _validate.has_shape("b", b, (a.shape[1], c), "k from a, c from out")
    if alpha not in (1.0, -1.0):
        raise ValueError(f"alpha must be 1 or -1; got {alpha!r}")
    if inner < 1:
        raise ValueError(f"inner must be >= 1; got {inner!r}")
    if lower and r != c:
        raise ValueError(f"out must be square with lower=True; got {(r, c)}")
    _validate.without_gradient("add_product", out=out, a=a, b=b)
    add_product_op(out, a, b, float(alpha), inner, bool(lower))


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
    _validate.is_added_to(out, "(n C, n2 C2)")
    for name, value in (("g", g), ("h", h), ("scale", scale)):
        _validate.matches(name, value, "out", out)
    if g.dim() != 4:
        raise ValueError(f"g must have shape (n, C, T, R); got {tuple(g.shape)}")
    if h.dim() != 4 or h.shape[3] != g.shape[3]:
        raise ValueError(f"h must have shape (n2, C2, T2, {g.shape[3]}), R from g; got {tuple(h.shape)}")
    if lower and g.shape != h.shape:
        raise ValueError(f"h must have g's shape, {tuple(g.shape)}, with lower=True; got {tuple(h.shape)}")
    (n, c, t, r), (n2, c2, t2, _) = g.shape, h.shape
    _validate.has_shape("out", out, (n * c, n2 * c2), "n C from g, n2 C2 from h")
    ends = (r,) if ends is None else tuple(ends)
    if any(a > b for a, b in zip((0, *ends), ends)) or (ends or (0,))[-1] != r:
        raise ValueError(f"ends must not descend and the last be R, {r} from g; got {ends}")
    _validate.has_shape("scale", scale, (len(ends), n * t, n2 * t2), "L from ends, n T from g, n2 T2 from h")
    _validate.without_gradient("jacobian_gram", out=out, g=g, h=h, scale=scale)
    jacobian_gram_op(out, g, h, scale, list(ends), bool(lower))


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
    _validate.is_added_to(out, "(n C, n2 C2)")
    if (h is None) != (b is None):
        raise ValueError(f"{'h' if h is None else 'b'} must be given with {'b' if h is None else 'h'}")
    given = {"g": g, "a": a} if h is None or b is None else {"g": g, "a": a, "h": h, "b": b}
    for name, value in given.items():
        _validate.matches(name, value, "out", out)
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
        _validate.has_shape("b", b, (n2, t2, a.shape[2]), "n2 and T2 from h, S from a")
        columns = n2 * c2
    _validate.has_shape("out", out, (rows, columns), "n C from g, n2 C2 from h or g")
    _validate.without_gradient("gradient_gram", out=out, **given)
    gradient_gram_op(out, g, a, h, b)


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
    _validate.is_float("gram", gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must have shape (n, n); got {tuple(gram.shape)}")
    _validate.matches("x", x, "gram", gram)
    if x.dim() != 2 or x.shape[0] != gram.shape[0]:
        raise ValueError(f"x must have shape ({gram.shape[0]}, c); got {tuple(x.shape)}")
    if torch.is_grad_enabled() and (gram.requires_grad or x.requires_grad):
        raise RuntimeError(
            "gram_product cannot be differentiated: use gram @ x, or work under torch.no_grad()"
        )
    return gram_product_op(gram, x)


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
    _validate.matrix_without_gradient("gram_error_bound", "h", h)
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
    _validate.matrix_without_gradient("abs_products", "a", a, left, right)
    for name, weights, size, side in (("left", left, 0, "n"), ("right", right, 1, "m")):
        if weights is not None:
            _validate.is_float64(name, weights, a.device)
            _validate.has_shape(name, weights, a.shape[size : size + 1], f"{side} from a")
    return abs_products_op(a, left, right)


def batched_rank(
    a: Tensor, atol: Tensor, rtol: Tensor, *, check_tolerance: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The number of singular values above max(atol, rtol sigma_max), a matrix, with proved bounds.

    Args:
        a: (B, n, m) float32 or float64, any strides.
        atol, rtol: (B,) float64, >= 0.
        check_tolerance: whether that is checked, which reads them once more.

    Returns:
        rank, lower, upper (B,) int64 and sigma_min_lower, sigma_max_upper (B,) float64, as
        :class:`gcfast.RankEstimate` explains them. Not differentiable. Repeatable bit for bit.

    Raises:
        TypeError, ValueError: naming the argument; a matrix that is not finite with its index.
    """
    _validate.is_float("a", a)
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a must be float32 or float64; got {a.dtype}")
    if a.dim() != 3:
        raise ValueError(f"a must have shape (B, n, m); got {tuple(a.shape)}")
    for name, value in (("atol", atol), ("rtol", rtol)):
        _validate.is_float64(name, value, a.device)
        _validate.has_shape(name, value, a.shape[:1], "B from a")
    return batched_rank_op(a.detach(), atol, rtol, bool(check_tolerance))
