"""The rank of a matrix, or of many, with a proof: ``torch.linalg.matrix_rank`` without the doubt."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from gcfast import errors
from gcfast.ops import RankBounds, kernel_ranks, rank_operator
from gcfast.proofs.large_matrix_rank import rank_of_large


@dataclass(frozen=True)
class RankEstimate:
    """What :func:`matrix_rank` found; every field has the batch shape of the input.

    ``rank`` (int64): the number of singular values above the tolerance, as ``torch.linalg.matrix_rank``
    means it. ``lower``, ``upper`` (int64): bounds of that number for the matrix as stored, proved, rounding
    errors included; as a singular value above the tolerance is not zero, ``lower`` also bounds the exact
    rank. ``sigma_min_lower``, ``sigma_max_upper`` (float64): proved bounds of the smallest of the min(n, m)
    singular values (0 where nothing is proved of it) and of the largest; inf and 0 for a matrix without
    entries.
    """

    rank: Tensor
    lower: Tensor
    upper: Tensor
    sigma_min_lower: Tensor
    sigma_max_upper: Tensor

    @property
    def certified(self) -> Tensor:
        """Where ``rank`` itself is proved: ``lower`` equals ``upper``."""
        return self.lower == self.upper

    def __str__(self) -> str:
        total = self.rank.numel()
        if total == 1:
            bounds = "proved" if bool(self.certified) else f"{int(self.lower)} to {int(self.upper)} proved"
            least, largest = float(self.sigma_min_lower), float(self.sigma_max_upper)
            return f"rank {int(self.rank)} ({bounds}), {least:.3e} <= sigma <= {largest:.3e}"
        proved = int(self.certified.sum())
        span = f"ranks {int(self.rank.min())} to {int(self.rank.max())}, " if total else ""
        return f"{span}{proved} of {total} proved"


def _tolerance(name: str, value: float | Tensor, device: torch.device) -> float | Tensor:
    """A float, or a float64 tensor on `device`."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number or a real tensor; got {value.dtype}")
        if value.device != device and value.dim() > 0:
            raise ValueError(f"{name} must be on the device of A, {device}; got {value.device}")
        errors.is_dense(name, value, traced=True)
        # its values are checked where they are read
        return value.detach().resolve_neg().to(device, torch.float64)
    found = errors.as_real(value)
    if found != found and not isinstance(value, float):
        raise TypeError(f"{name} must be a real number or a real tensor; got {type(value).__name__}")
    if not found >= 0:
        raise ValueError(f"{name} must be >= 0; got {value}")
    return found


def _relative(absolute: float | Tensor, default: float) -> float | Tensor:
    """The default of rtol: none beside an atol > 0."""
    # by their bits: a denormal number is not 0, also where this thread flushes it
    if isinstance(absolute, Tensor):
        return torch.where(absolute.view(torch.int64) > 0, torch.zeros_like(absolute), default)
    if torch.compiler.is_compiling():  # which does not follow struct
        return 0.0 if absolute > 0 else default
    return 0.0 if struct.unpack("q", struct.pack("d", absolute))[0] > 0 else default


@rank_operator("matrix_rank")
def matrix_rank_op(a: Tensor, atol: Tensor, rtol: Tensor, check_tolerance: bool = True) -> RankBounds:
    found = kernel_ranks(a, atol, rtol, check_tolerance)
    if found is not None:
        return found
    parts = [rank_of_large(a[i : i + 1], atol[i : i + 1], rtol[i : i + 1]) for i in range(len(a))]
    return tuple(torch.cat(column) for column in zip(*parts))  # type: ignore[return-value]


def matrix_rank(
    A: Tensor, *, atol: float | Tensor | None = None, rtol: float | Tensor | None = None
) -> RankEstimate:
    """The number of singular values of A above max(atol, rtol sigma_max), with proved bounds of it.

    In place of an SVD it takes the inertia of A A^T - tol^2 I, which an elimination gives in a fraction of
    the time (Sylvester's law), and bounds what all rounding errors together can have moved (Weyl): in
    float64, and where that leaves a count open, in pairs of float64. A matrix with a singular value right at
    the tolerance is given to the SVD, so that ``rank`` is ``torch.linalg.matrix_rank``'s wherever that is not
    itself a matter of rounding. Matrices larger than the kernels take have their full rank proved one by
    one, or else a verified SVD.

    Args:
        A: (..., n, m), floating, finite, any strides and sizes, n or m of zero included. bfloat16 and float16
            are taken as float32, exactly.
        atol, rtol: real, >= 0, a number or a tensor that broadcasts with the batch shape. By default, as in
            torch, atol is 0, and rtol is max(n, m) eps of A's dtype, or 0 if an atol > 0 is given.

    Returns:
        A :class:`RankEstimate`, its tensors on A's device. Nothing is differentiated.

    Raises:
        TypeError: A is no tensor, or complex, or integer. ValueError: A has fewer than two dimensions or
            has a NaN or an infinity; atol or rtol is negative, NaN or does not broadcast.

    Source: Parlett, *The Symmetric Eigenvalue Problem*, section 3.3 (inertia); Higham, *Accuracy and
    Stability of Numerical Algorithms*, chapters 3 and 11 (errors of products and eliminations).
    """
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a tensor; got {type(A).__name__}")
    errors.is_dense("A", A, traced=True)
    if A.is_complex():
        raise TypeError(f"A must be real; got {A.dtype}")
    if not A.is_floating_point():
        raise TypeError(f"A must have a floating dtype; got {A.dtype}: A.double() keeps integers below 2^53")
    if "float4" in str(A.dtype):
        raise TypeError(f"A must have a floating dtype that torch converts; got {A.dtype}")
    if A.dim() < 2:
        raise ValueError(f"A must have shape (..., n, m); got {tuple(A.shape)}")
    a = A.detach()
    if a.dtype not in (torch.float32, torch.float64):
        a = a.float()
    n, m = a.shape[-2:]
    absolute = _tolerance("atol", 0.0 if atol is None else atol, a.device)
    if rtol is None:
        relative = _relative(absolute, max(n, m) * torch.finfo(a.dtype).eps)
    else:
        relative = _tolerance("rtol", rtol, a.device)
    limits = (absolute, relative)
    batch = a.shape[:-2]
    shapes = [tuple(t.shape) for t in limits if isinstance(t, Tensor)]
    try:
        batch = torch.broadcast_shapes(batch, *shapes) if shapes else batch
    except RuntimeError:
        raise ValueError(
            f"atol and rtol must broadcast with the batch shape of A, {tuple(batch)}; got "
            f"{' and '.join(map(str, shapes))}"
        ) from None
    count = math.prod(batch)
    # reshape copies only what cannot be seen as one batch dimension
    flat = a.expand(*batch, n, m).reshape(count, n, m)
    vectors = (
        t.expand(batch).reshape(count)
        if isinstance(t, Tensor)
        else torch.full((count,), t, dtype=torch.float64, device=a.device)
        for t in limits
    )
    found = matrix_rank_op(flat, *vectors, bool(shapes))
    if len(batch) == 1:  # as it is: five views cost a tenth of a small call
        return RankEstimate(*found)
    return RankEstimate(*(t.reshape(batch) for t in found))
