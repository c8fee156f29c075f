"""The exact solve of the squared loss, and the paper's own gradient steps (gd, sgd)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gcfast.features import Features
from gcfast.losses import MSE
from gcfast.proofs import SMALLEST, Tiles, cholesky, solve_triangular
from gcfast.solve.grams import TiledGram, build_gram
from gcfast.solve.problem import HeadProblem, same_head
from gcfast.solve.solution import HeadSolution, Progress, evaluate_head
from gcfast.storage import check_memory


def exact(
    head_problem: HeadProblem, max_bytes: int | None, weight_decay: float, target_gap: float
) -> HeadSolution:
    """V_tau + H1^T (H1 H1^T)^-1 (Y - H1 V_tau): the limit of gradient descent for the squared loss."""
    if type(head_problem.loss) is not MSE:
        raise ValueError(
            f"method: 'exact' is for loss='mse'; got loss {head_problem.loss.name!r} (use 'nearest')"
        )
    if weight_decay:
        raise ValueError("weight_decay: 'exact' has none; use method='nearest'")
    n, m = head_problem.n, head_problem.features.m
    if n > m + int(head_problem.bias is not None):
        raise ValueError(
            f"method: 'exact' needs n <= m + 1; got n = {n}, m = {m}: "
            "gcfast.widen the model, or use 'nearest'"
        )
    need = 2 * 8 * Tiles.count(n, head_problem.device) + 2 * n * 1024 * 8
    check_memory("solve_head(method='exact')", need, max_bytes, head_problem.device, "use method='gd'")
    gram = build_gram(head_problem.features, head_problem.bias is not None, torch.float64, dense=False)
    assert isinstance(gram, TiledGram)
    low = Tiles(n, torch.float64, head_problem.device)
    if not cholesky(gram.tiles, 0.0, low):
        raise ValueError(
            "features: numerically dependent rows, no exact solve; use method='nearest', or gcfast.certify "
            "to see which samples"
        )
    a = torch.zeros_like(head_problem.logits(head_problem.weight, head_problem.bias))
    weight, bias = head_problem.weight, head_problem.bias
    steps, before = 0, math.inf
    for _ in range(5):  # iterative refinement with the true residual
        steps += 1
        gap = head_problem.targets - head_problem.logits(weight, bias)
        size = float(gap.abs().amax())
        if size == 0 or size > 0.5 * before:
            break
        before = size
        a = a + solve_triangular(low, solve_triangular(low, gap), transposed=True)
        du, db = head_problem.transpose(a)
        weight, bias = (
            head_problem.weight + du,
            None if head_problem.bias is None or db is None else head_problem.bias + db,
        )
    return evaluate_head(
        head_problem,
        weight,
        bias,
        lam=0.0,
        gap_target=target_gap,
        weight_decay=0.0,
        method="exact",
        interrupted=False,
        iterations=steps,
        products=0,
        peak_bytes=need,
        reason="minimum-norm correction of the start, the limit of gradient descent",
        path=[],
    )


def descent(
    head_problem: HeadProblem,
    method: str,
    target_gap: float,
    weight_decay: float,
    max_iterations: int | None,
    generator: torch.Generator | None,
    on_progress: Callable[[Progress], None],
    began: float,
) -> HeadSolution:
    """The paper's own phase two: gradient descent with step 1/beta, or SGD with square-summable steps."""
    curvature = head_problem.loss.smoothness(len(head_problem.weight))
    if not math.isfinite(curvature):
        raise ValueError(
            f"loss: {head_problem.loss!r} states no smoothness(), which {method} needs for its step; "
            "use 'nearest'"
        )
    n = head_problem.n
    weight, bias = (
        head_problem.weight.clone(),
        None if head_problem.bias is None else head_problem.bias.clone(),
    )
    h = head_problem.features
    interrupted, done, due = False, 0, 1
    path: list[tuple[float, float]] = []
    limit = max_iterations if max_iterations is not None else (10_000 if method == "gd" else 200)
    if method == "gd":
        sigma = _sigma_max(h, bias is not None)
        beta = curvature * (sigma * sigma) / n + weight_decay
    else:
        squares, _ = h.square_norms(torch.zeros(h.m, device=h.device))
        beta = curvature * (float(squares.amax()) * (1 + 1e-5) + 1) + weight_decay
        order = generator or torch.Generator("cpu").manual_seed(0)
    reason = "iteration limit"
    if not SMALLEST <= beta < math.inf:
        limit, reason = 0, f"there is no step 1/beta for beta = {beta:g}: scale the features"
    step = 1.0 / max(beta, SMALLEST)

    def advance(rows: Features, y: Tensor, eta: float) -> None:
        nonlocal weight, bias
        z = rows.times(weight)
        r = head_problem.loss.residual(z if bias is None else z + bias, y) / rows.n
        weight = weight - eta * (rows.transposed_times(r) + weight_decay * weight)
        if bias is not None:
            bias = bias - eta * (r.sum(0) + weight_decay * bias)

    def objective(value: float) -> float:
        if weight_decay:
            norm2 = float((weight**2).sum()) + (0.0 if bias is None else float((bias**2).sum()))
            value += 0.5 * weight_decay * norm2
        return math.inf if math.isnan(value) else value

    least = objective(head_problem.mean_loss(head_problem.start_logits))
    best = seen = weight, bias
    try:
        while done < limit:
            if method == "gd":
                advance(h, head_problem.targets, step)
            else:
                shuffled = torch.randperm(n, generator=order, dtype=torch.int64, device="cpu")
                batches = shuffled.to(h.device).split(256)
                for i, batch in enumerate(batches):
                    t = done + i / len(batches)
                    # sum eta = inf, sum eta^2 < inf
                    advance(h.select(batch), head_problem.targets[batch], step / (1 + t / limit) ** 0.6)
            done += 1
            if done < min(due, limit):
                continue
            # however many steps are allowed, a look at the loss comes by the fiftieth part of those taken
            due = done + (max(1, min(done, limit // 4) // 50) if method == "gd" else 1)
            value = head_problem.mean_loss(head_problem.logits(weight, bias))
            path.append((weight_decay, value))
            if (now := objective(value)) < least:
                least, best = now, (weight, bias)
            on_progress(
                Progress(
                    done,
                    weight_decay,
                    value,
                    value - head_problem.infimum,
                    time.perf_counter() - began,
                    done / limit,
                )
            )
            target = head_problem.infimum + target_gap
            if not weight_decay and value <= target and head_problem.loss_above(weight, bias) <= target:
                reason = "target gap reached"
                break
            if method == "gd" and same_head((weight, bias), seen):
                reason = "no step changes the head any more"
                break
            seen = weight, bias
    except KeyboardInterrupt:
        interrupted, reason = True, "interrupted; the best head so far"
    weight, bias = best
    return evaluate_head(
        head_problem,
        weight,
        bias,
        lam=weight_decay,
        gap_target=target_gap,
        weight_decay=weight_decay,
        method=method,
        interrupted=interrupted,
        iterations=done,
        products=0,
        peak_bytes=8 * 4096 * h.m + 40 * n * len(weight),
        reason=reason,
        path=path,
    )


def _sigma_max(h: Features, ones: bool) -> float:
    """Largest singular value of H1 by power iteration, enlarged by 2 %.

    From a vector at random: that of ones would see nothing of features whose columns have mean zero.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn((h.n, 1), generator=generator, dtype=torch.float64, device="cpu").to(h.device)
    sigma = 0.0
    for _ in range(100):
        v = v / torch.linalg.vector_norm(v)
        u = h.transposed_times(v)
        new = float(torch.sqrt((u**2).sum() + (v.sum() ** 2 if ones else 0.0)))
        v = h.times(u) + (v.sum() if ones else 0.0)
        if new <= sigma * (1 + 1e-6):
            break
        sigma = new
    return 1.02 * max(sigma, new)
