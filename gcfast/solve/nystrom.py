"""A randomised Nystrom preconditioner of K from some of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gcfast.solve.grams import Gram


class Nystrom:
    """A subspace of the head's directions that carries most of K: U = H1^T W, W (n, r), with W^T K W = I.

    A randomised Nystrom approximation K ~ F F^T, F = K W, after Frangella, Tropp, Udell, *Randomized Nystrom
    Preconditioning* (2023). With any curvature diag(d) of the samples, (lambda I + F^T diag(d) F / n)^-1 is
    the exact inverse of the Hessian restricted to the subspace, and 1 / lambda serves for the rest.
    """

    def __init__(self, gram: Gram, rank: int, generator: torch.Generator):
        n, rank = gram.n, min(rank, gram.n)
        omega = torch.randn((n, rank), generator=generator, dtype=torch.float64, device="cpu")
        omega = torch.linalg.qr(omega)[0].to(gram.device)
        y = torch.cat([gram.product(part.to(gram.dtype)).double() for part in omega.split(256, dim=1)], 1)
        self.products = -(-rank // 256)
        core = omega.mT @ y
        core = 0.5 * (core + core.mT)
        unit = 2.0**-23 if gram.dtype == torch.float32 else 2.0**-52
        shift = 4 * unit * float(core.diagonal().sum())
        for _ in range(30):
            low, info = torch.linalg.cholesky_ex(core + shift * torch.eye(rank, device=core.device))
            if int(info) == 0:
                break
            shift *= 4.0
        self.w = torch.linalg.solve_triangular(low, omega.mT, upper=False).mT.contiguous()
        self.f = torch.linalg.solve_triangular(low, y.mT, upper=False).mT.contiguous()

    def inverse(self, d: Tensor, n: int, lam: float) -> Tensor:
        """The Cholesky factor of lambda I + F^T diag(d) F / n (r, r), for d (n,)."""
        system = (self.f * (d / n)[:, None]).mT @ self.f
        system.diagonal().add_(lam)
        return torch.linalg.cholesky(system)
