"""Solved heads judged in 80 digits: no reported bound lies on the wrong side, and nearly all converge."""

from __future__ import annotations

import random
from typing import Any

import pytest
import resumable
import torch
from heads_exact import ExactHeads, ExactLoss, holds
from torch import nn

import gcfast

CHUNK = 500


def drawn(seed: int, most: int) -> tuple[Any, ...]:
    """Features, targets, loss, its judge and the settings of one head; n up to ``most``."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n = round(2 * (most / 2) ** rng.random())
    m, c = n + rng.randint(0, n // 2 + 1), rng.randint(2, 20 if most > 100 else 5)
    h = torch.randn(n, m, generator=g, dtype=torch.float64)
    kind = rng.randrange(4)
    if kind == 1:  # what a wide layer makes
        h = nn.functional.softplus(h @ torch.randn(m, m, generator=g, dtype=torch.float64) / m**0.5)
    elif kind == 2:
        h[:, 0] *= 1e3
    elif kind == 3 and n > 3:  # equal samples, whose targets may conflict
        h[-1] = h[0]
    h = (h * 10 ** rng.uniform(-2, 2)).to(rng.choice((torch.float32, torch.float64)))
    name = rng.choice(("labels", "smoothed", "probabilities", "mse", "bce_with_logits", "huber"))
    if name == "labels":
        y, loss, judge = torch.randint(0, c, (n,), generator=g), "cross_entropy", ExactLoss("cross_entropy")
    elif name == "smoothed":
        y, loss = torch.randint(0, c, (n,), generator=g), nn.CrossEntropyLoss(label_smoothing=0.125)
        judge = ExactLoss("cross_entropy", label_smoothing=0.125)
    elif name == "probabilities":  # that add up to one exactly
        cuts = torch.randint(0, 1025, (n, c - 1), generator=g).sort(1)[0]
        edges = [torch.zeros(n, 1), cuts, torch.full((n, 1), 1024)]
        y = torch.cat(edges, 1).double().diff(dim=1) / 1024
        loss, judge = "cross_entropy", ExactLoss("cross_entropy")
    elif name == "bce_with_logits":
        y = torch.rand(n, c, generator=g, dtype=torch.float64)
        beside = 2.0 ** -rng.randint(1, 50)
        y = (y > 0.5).double() if rng.random() < 0.5 else torch.where(y > 0.5, 1 - beside, beside)
        loss, judge = name, ExactLoss(name)
    else:
        y = torch.randn(n, c, generator=g, dtype=torch.float64) * 10 ** rng.uniform(-1, 3)
        loss, judge = name, ExactLoss(name)
    settings: dict[str, Any] = {"target_gap": 10 ** -rng.uniform(3, 7)}
    if rng.random() < 0.3:
        w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((c, m), (c,)))
        settings["start"] = (w.to(h.dtype), b.to(h.dtype))
    if n * c < 60 and rng.random() < 0.2:
        settings |= {"weight_decay": 10 ** -rng.uniform(1, 4), "target_gap": 1e-4}
    return h, y, loss, judge, settings


def judged(seeds: range, most: int) -> dict[str, Any]:
    """How many converge, and every bound that is false."""
    converged, false = 0, []
    for seed in seeds:
        h, y, loss, judge, settings = drawn(seed, most)
        found = gcfast.solve_head(h, y, loss=loss, **settings)
        converged += found.converged
        exact = ExactHeads(h, y, judge, len(found.weight))
        value, infimum = exact.value(found.weight, found.bias), exact.infimum()
        decay = settings.get("weight_decay")
        gap = exact.regularised(found.weight, found.bias, None, decay)[0] if decay else value - infimum
        wrong = {
            "gap": not holds(found.gap, gap),
            "loss": not holds(found.loss, value),
            "infimum": not holds(-found.infimum, -infimum),
            "converged": found.converged and gap > settings["target_gap"],
        }
        said = (found.gap, float(gap), found.loss, float(value))
        false += [f"seed {seed}, {tuple(h.shape)}, {loss}: {k}, {said}" for k in wrong if wrong[k]]
    return {"converged": converged, "false": false}


@pytest.mark.parametrize("first", range(0, 48, 12))
def test_four_dozen_heads(first):
    found = judged(range(first, first + 12), 40)
    assert not found["false"], "\n".join(found["false"])
    assert found["converged"] == 12


@pytest.mark.soundness
@pytest.mark.parametrize("chunk", range(20))
def test_ten_thousand_heads(chunk):
    """By hand, with -m soundness."""
    seeds = range(CHUNK * chunk, CHUNK * (chunk + 1))
    found = resumable.kept(f"heads {chunk}", lambda: judged(seeds, 300))
    assert not found["false"], "\n".join(found["false"])
    assert found["converged"] >= 0.99 * CHUNK
