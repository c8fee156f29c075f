"""Table 1 and what belongs to it: rank n proved at random weights, sigma_min by width, time by n."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from scaling.measure import Peak
from torch import Tensor, nn

import gcfast

from .context import Context
from .problem import PERTURBATION, build, load, settle, width


@dataclass(frozen=True)
class Proof:
    """One row: the condition at random weights, batch normalisation's statistics being those of the data."""

    data: str
    n: int | None
    model: str
    seed: int
    compare: bool = True  # with singular values, which take longer than the proof


def random_model(kind: str, data: Any, m: int, seed: int, device: str, **options: Any) -> nn.Module:
    """At its initial weights plus the Gaussian vector of A(base), in evaluation mode."""
    torch.manual_seed(seed)
    model = build(kind, data, m, **options).to(device)
    settle(model, data.x_train.to(device))
    # switched before a step of base: what is random are the initial weights and the Gaussian vector
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    two = gcfast.TwoPhase(opt, model, switch_step=None, perturbation=PERTURBATION, seed=seed)
    two.switch()
    return model.eval()


def _wall(context: Context) -> float:
    if context.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def row(cell: Proof, context: Context) -> dict[str, Any]:
    split = load(cell.data, cell.n, cell.seed)
    n = len(split.y_train)
    m = width(n)
    model = random_model(cell.model, split, m, cell.seed, context.device)
    x, y = split.x_train.to(context.device), split.y_train.to(context.device)
    began = _wall(context)
    cache = gcfast.FeatureCache(model, (x, y), store="below")
    body = _wall(context) - began
    context.say(0.3, "certificate")
    rows = gcfast.WideFeatures(cache.features, model.get_submodule("wide"))
    if context.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Peak() as peak:
        began = _wall(context)
        proof = gcfast.certify(rows, y, loss="cross_entropy", route="direct", sharp=True)
        seconds = _wall(context) - began
    grown = peak.extra if context.device == "cpu" else torch.cuda.max_memory_allocated() - before
    began = _wall(context)
    theorem = gcfast.certify(rows, y, route="theorem")
    theorem_seconds = _wall(context) - began
    reason = next(a.reason for a in proof.assumptions if a.name.startswith("rank"))
    return {
        "n": n,
        "m": m,
        "d": cache.features.shape[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "status": proof.status,
        "route": proof.route,
        "reason": reason,
        "rank_lower": proof.rank_lower,
        "sigma_min_lower": proof.sigma_min_lower,
        "sigma_max_upper": proof.sigma_max_upper,
        "offenders": [vars(o) for o in proof.offenders][:5],
        "theorem": {"status": theorem.status, "reason": theorem.reason, "seconds": theorem_seconds},
        "body_seconds": body,
        "seconds": seconds,
        "peak_bytes": grown,
        **(_singular_values(model, (x, y), context) if cell.compare else {}),
    }


def _singular_values(model: nn.Module, data: tuple[Tensor, Tensor], context: Context) -> dict[str, Any]:
    """What a float32 rank would say, and estimates of sigma_min and the condition number."""
    context.say(0.7, "singular values")
    stored = gcfast.FeatureCache(model, data, store="features").features
    plain = torch.cat([stored.float(), stored.new_ones(len(stored), 1)], 1)
    began = _wall(context)
    rank = int(torch.linalg.matrix_rank(plain))
    seconds = _wall(context) - began
    values = torch.linalg.svdvals(plain.double())
    return {
        "matrix_rank_float32": rank,
        "matrix_rank_seconds": seconds,
        "sigma_min_estimate": float(values[-1]),
        "cond_estimate": float(values[0] / values[-1]),
    }


@dataclass(frozen=True)
class Widths:
    """sigma_min of H1 against m / n, and against the wide layer's sharpness."""

    data: str
    n: int | None
    model: str
    ratios: tuple[float, ...]
    betas: tuple[float, ...]
    seeds: tuple[int, ...]


def widths(cell: Widths, context: Context) -> dict[str, Any]:
    points = []
    wanted = [(b, r, s) for b in cell.betas for r in cell.ratios for s in cell.seeds]
    for index, (beta, ratio, seed) in enumerate(wanted):
        context.say(index / len(wanted), f"m = {ratio} n")
        context.check()
        split = load(cell.data, cell.n, seed)
        n = len(split.y_train)
        m = -(-round(100 * ratio) * n // 100)
        model = random_model(cell.model, split, m, seed, context.device, beta=beta)
        x = split.x_train.to(context.device)
        began = _wall(context)
        proof = gcfast.certify(model, x, route="direct", sharp=True)
        points.append(
            {
                "beta": beta,
                "ratio": ratio,
                "seed": seed,
                "n": n,
                "m": m,
                "status": proof.status,
                "sigma_min_lower": proof.sigma_min_lower,
                "sigma_max_upper": proof.sigma_max_upper,
                "rank_lower": proof.rank_lower,
                "seconds": _wall(context) - began,
            }
        )
    return {"points": points}


@dataclass(frozen=True)
class Times:
    """Seconds of the certificate against n, of one model on growing parts of one data set."""

    data: str
    model: str
    sizes: tuple[int, ...]
    seed: int


def times(cell: Times, context: Context) -> dict[str, Any]:
    points = []
    for index, n in enumerate(cell.sizes):
        context.say(index / len(cell.sizes), f"n = {n}")
        split = load(cell.data, n, cell.seed)
        model = random_model(cell.model, split, width(n), cell.seed, context.device)
        x, y = split.x_train.to(context.device), split.y_train.to(context.device)
        cache = gcfast.FeatureCache(model, (x, y), store="below")
        rows = gcfast.WideFeatures(cache.features, model.get_submodule("wide"))
        seconds, proof = [], None
        for _ in range(3 if n <= 2000 else 1):
            began = _wall(context)
            proof = gcfast.certify(rows, route="direct", sharp=False)
            seconds.append(_wall(context) - began)
        assert proof is not None
        began = _wall(context)
        theorem = gcfast.certify(rows, route="theorem")
        points.append(
            {
                "n": n,
                "m": width(n),
                "status": proof.status,
                "sigma_min_lower": proof.sigma_min_lower,
                "seconds": sorted(seconds)[len(seconds) // 2],
                "theorem_status": theorem.status,
                "theorem_seconds": _wall(context) - began,
            }
        )
    return {"points": points}
