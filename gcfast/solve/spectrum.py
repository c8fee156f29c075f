"""The path's problem in an orthonormal basis of the rows of H1, for features that K in float64 cannot hold.

A direction in which the features are 1e-8 as large as in another one is lost in K = H1 H1^T, and so is the
part of U = H1^T A in it. With the right singular vectors T (r, m + 1) of H1 and U = T^T A, L = H1 T^T (n, r),
both are kept as they are, for singular values down to 1e-16 of the largest: columns, rows and a common mean
of any size may meet. The metric stays that of U, for T is orthonormal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.losses import ConvexLoss, CrossEntropy
from gcfast.solve.newton import Preconditioner, Problem, shifted_cholesky
from gcfast.solve.problem import HeadProblem

COUPLED = 4096  # most unknowns in one factorisation that couples outputs


class SpectralProblem(Problem):
    """U = T^T A for A (r, C), r = min(n, m + 1). ``h``: H1 (n, m + 1), or H where the head has no bias."""

    repeatable = False

    def __init__(self, h: Tensor, offset: Tensor, loss: ConvexLoss, targets: Tensor):
        self.offset, self.loss, self.targets, self.n = offset, loss, targets, len(h)
        self.basis: Tensor = torch.linalg.svd(h, full_matrices=False).Vh
        self.rows, self.sizes = h @ self.basis.mT, h.abs()
        self.scale = float(((self.rows - self.rows.mean(0)) ** 2).sum(1).mean())
        self.scale = max(self.scale, float((self.rows**2).sum(1).mean()) / self.n, 1e-300)

    def product(self, x: Tensor) -> Tensor:
        self.products += 1
        return self.rows @ x

    def pull(self, r: Tensor) -> Tensor:
        return self.rows.mT @ r

    def metric(self, x: Tensor, f: Tensor) -> Tensor:
        return x

    def zero(self) -> Tensor:
        return self.rows.new_zeros((self.rows.shape[1], self.offset.shape[1]))

    def direction(self, head_problem: HeadProblem, a: Tensor) -> tuple[Tensor, Tensor | None]:
        u, m = a.mT @ self.basis, head_problem.features.m
        return u[:, :m], None if head_problem.bias is None else u[:, m]

    def coordinates(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        a = self.basis @ (weight if bias is None else torch.cat([weight, bias[:, None]], 1)).mT
        return a - a.mean(1, keepdim=True) if isinstance(self.loss, CrossEntropy) else a

    def noise(self, a: Tensor) -> float:
        # of H1 U: L A knows nothing of what cancels in H1 T^T
        return torch.finfo(torch.float64).eps * float((self.sizes @ (self.basis.mT @ a).abs()).amax())

    def preconditioner(self, z: Tensor, residual: Tensor, lam: float, d: Tensor | None) -> Preconditioner:
        """The inverse for losses that couple no outputs and a softmax of few; else output by output."""
        c = z.shape[1]
        few = self.rows.shape[1] * (c - 1) <= COUPLED
        if isinstance(self.loss, CrossEntropy) and c > 1 and few and d is None:
            return self._coupled(self.loss.probabilities(residual, self.targets), lam)
        d = (self.loss.curvature_diagonal(z, self.targets) if d is None else d) / self.n
        factors: list[Tensor] = []
        for k in range(c):
            if k and torch.equal(d[:, k], d[:, k - 1]):
                factors.append(factors[-1])
                continue
            system = (self.rows * d[:, k : k + 1]).mT @ self.rows
            system.diagonal().add_(lam)
            factors.append(shifted_cholesky(system))

        def apply(r: Tensor, kr: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.cat([torch.cholesky_solve(r[:, k : k + 1], f) for k, f in enumerate(factors)], 1)
            return x, self.rows @ x

        return apply

    def _coupled(self, p: Tensor, lam: float) -> Preconditioner:
        """In an orthonormal basis of the differences between outputs.

        A shift of all outputs changes no loss, so U has none: what rounding leaves of one in g stays out.
        """
        r, c = self.rows.shape[1], p.shape[1]
        ones = torch.ones((c, 1), dtype=p.dtype, device=p.device)
        basis = torch.linalg.qr(ones, mode="complete").Q[:, 1:]  # (C, C - 1)
        q = p @ basis
        system = torch.empty((c - 1, r, c - 1, r), dtype=p.dtype, device=p.device)
        for i in range(c - 1):
            for j in range(i + 1):
                curvature = (p @ (basis[:, i] * basis[:, j]) - q[:, i] * q[:, j]) / self.n
                block = (self.rows * curvature[:, None]).mT @ self.rows
                system[i, :, j], system[j, :, i] = block, block
        square = system.view((c - 1) * r, (c - 1) * r)
        square.diagonal().add_(lam)
        low = shifted_cholesky(square)

        def apply(g: Tensor, kg: Tensor) -> tuple[Tensor, Tensor]:
            inside = torch.cholesky_solve((g @ basis).mT.reshape(-1, 1), low)
            x = inside.view(c - 1, r).mT @ basis.mT
            return x, self.rows @ x

        return apply
