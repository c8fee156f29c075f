"""Every op that has GPU kernels, called through gcfast.ops, with its plain PyTorch formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcfast import ops, reference

Make = Callable[[int, int, torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    op: str
    make: Make  # (n, c, dtype, device) -> inputs
    call: Callable[..., Any]
    truth: Callable[..., Any]  # of the inputs in float64
    backends: tuple[str, ...]

    def run(self, args: tuple[Any, ...]) -> list[Tensor]:
        out = self.call(*args)
        return list(out) if isinstance(out, tuple) else [out]

    def expected(self, args: tuple[Any, ...]) -> list[Tensor]:
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = self.truth(*wide)
        return list(out) if isinstance(out, tuple) else [out]


def strided(n: int, c: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, c) with a gap after each row that no 16-byte access divides, starting off a 16-byte boundary."""
    return torch.randn(n, c + 3, dtype=dtype, device=device)[:, 1 : c + 1]


def _panel(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return 3 * strided(n, c, dtype, device), torch.randn(c, dtype=dtype, device=device)


def _labels(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return 5 * strided(n, c, dtype, device), torch.randint(c, (n,), device=device)


def _pair(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return 5 * strided(n, c, dtype, device), strided(n, c, dtype, device)


def _wide(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    return strided(n, 7, dtype, device), normal(c, 7), normal(c), normal(3, c) / c**0.5, normal(3)


def _wide_sides(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return *_wide(n, c, dtype, device)[:3], strided(n, 3, dtype, device)


def _softmax_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    y = torch.nn.functional.one_hot(labels, logits.shape[1])
    return -log_p.gather(1, labels[:, None])[:, 0], p - y, (p * log_p).sum(dim=1)


def _curvature(logits: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(logits, dim=1)
    return p * (v - (p * v).sum(dim=1, keepdim=True))


def _wide_forward(z: Tensor, w: Tensor, b: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    return reference.activation(z @ w.T, b) @ head.T + head_bias


def _rank(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """n matrices of c x 40 or, beyond a warp's 32 rows, of 40 x c in columns: of full rank, with a row and a
    column twice, zero, and in float64 beyond what squares have range for."""
    a = torch.randint(-9, 10, (n, c, 41), device=device).to(dtype)[:, :, 1:]
    a[1::4, -1] = a[1::4, 0]
    a[1::4, :, -1] = a[1::4, :, 0]
    a[2::4] = 0
    a[3::4] *= 1e-30 if dtype == torch.float32 else 1e-250
    tolerances = torch.tensor([[0.0], [40 * torch.finfo(dtype).eps]], dtype=torch.float64, device=device)
    return a if c <= 32 else a.mT, *tolerances.expand(2, n)


def _matrix_rank(a: Tensor, atol: Tensor, rtol: Tensor) -> Tensor:
    return torch.linalg.matrix_rank(a / a.abs().amax((1, 2), True).clamp(min=1e-300), atol=atol, rtol=rtol)


def _jacobian(n: int, c: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """c columns of two layers, 3 outputs and 2 positions of n / 8 samples."""
    samples = n // 8 + 1
    g = strided(6 * samples, c, dtype, device).unflatten(0, (samples, 3, 2))
    scale = torch.randn(2, 2 * samples, 2 * samples, dtype=dtype, device=device)
    return strided(3 * samples, 3 * samples, dtype, device), g, scale


def _jacobian_gram(out: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    out = out.clone()
    ops.jacobian_gram(out, g, g, scale, ends=(g.shape[3] // 2, g.shape[3]))
    return out


def _jacobian_sums(out: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    half = g.shape[3] // 2
    for layer, part in zip(scale, (g[..., :half], g[..., half:])):
        layer = layer.view(len(g), 2, len(g), 2)
        out = out + torch.einsum("icto,jeso,itjs->icje", part, part, layer).reshape(out.shape)
    return out


BOTH = ("triton", "cuda")
CASES = [
    *(
        Case(
            "activation",
            _panel,
            lambda x, b, name=name, order=order: ops.activation(x, b, activation=name, order=order),
            lambda x, b, name=name, order=order: reference.activation(x, b, activation=name, order=order),
            BOTH,
        )
        for name, order in (("softplus", 0), ("softplus", 1), ("gelu", 2), ("gelu_tanh", 1), ("relu", 0))
    ),
    Case("softmax_residual", _labels, lambda *a: ops.softmax_residual(*a), _softmax_residual, ("triton",)),
    Case("softmax_curvature", _pair, lambda *a: ops.softmax_curvature(*a), _curvature, ("triton",)),
    Case(
        "gram_error_bound",
        lambda n, c, dtype, device: (strided(n, c, dtype, device),),
        lambda h: ops.gram_error_bound(h),
        lambda h: h.abs() @ h.abs().sum(dim=0),
        ("triton",),
    ),
    Case("jacobian_gram", _jacobian, _jacobian_gram, _jacobian_sums, ("triton",)),
    Case(  # the rank, and both its bounds
        "batched_rank",
        _rank,
        lambda *a: ops.batched_rank(*a)[:3],
        lambda *a: (_matrix_rank(*a),) * 3,
        ("cuda",),
    ),
    Case("wide_forward", _wide, lambda *a: ops.wide_forward(*a), _wide_forward, ("triton",)),
    Case(
        "wide_head_grad",
        _wide_sides,
        lambda *a: ops.wide_head_grad(*a),
        reference.wide_head_grad,
        ("triton",),
    ),
    Case(
        "wide_gram_product",
        _wide_sides,
        lambda *a: ops.wide_gram_product(*a),
        reference.wide_gram_product,
        ("triton",),
    ),
    Case(
        "wide_panel",
        lambda *a: _wide(*a)[:3],
        lambda *a: ops.wide_panel(*a),
        reference.wide_features,
        BOTH,
    ),
]
DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def error(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest entry; NaN and infinities count as infinite."""
    if got.numel() == 0:
        return 0.0
    worst = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
    return float(worst) if bool(torch.isfinite(worst)) else float("inf")
