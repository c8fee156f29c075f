"""An epoch of phase two: the whole model at every step, or a FeatureCache, whose making is timed as well."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from _compare import compare, show, sized

import gcfast
from gcfast.cli.training.models import mlp, resnet18

BATCH = 64


def net(kind: str) -> tuple[torch.nn.Module, tuple[int, ...], str]:
    """A model, its inputs' shape with n, and its size in words."""
    if kind == "mlp":
        n, m = sized((4000, 4400), smallest=(96, 106))
        return mlp(784, 10, (256, 128), wide=m), (n, 784), f"MLP 784-256-128-{m}-10 n={n}"
    n, m, width = sized((256, 282, 16), smallest=(16, 18, 2))
    return resnet18(3, 10, width, wide=m), (n, 3, 32, 32), f"ResNet-18 width={width} m={m} n={n}"


class PhaseTwo:
    """A model just switched, and epochs of its phase two, with or without the cache."""

    def __init__(self, kind: str, store: str | None, device: torch.device) -> None:
        torch.manual_seed(0)
        model, shape, self.size = net(kind)
        self.model = model.to(device)
        self.x, self.y = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
        base = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.opt = gcfast.TwoPhase(base, self.model, switch_step=None, head="head", seed=0)
        self.opt.switch()
        self.model.train()
        self.store = store
        self.cache = self.make() if store else None

    def make(self) -> gcfast.FeatureCache:
        return gcfast.FeatureCache(self.model, (self.x, self.y), store=self.store or "auto")

    def epoch(self) -> torch.Tensor:
        order = torch.Generator().manual_seed(1)
        if self.cache is None:
            rows = torch.randperm(len(self.y), generator=order).to(self.y.device).split(BATCH)
            batches = ((self.x[r], self.y[r]) for r in rows)
        else:
            batches = self.cache.batches(BATCH, generator=order)
        forward = self.model if self.cache is None else self.cache.head
        for z, y in batches:
            self.opt.zero_grad()
            F.cross_entropy(forward(z), y).backward()
            self.opt.step()
        return self.opt.head.weight.detach()


@pytest.mark.parametrize("kind", ["mlp", "resnet18"])
def bench_table(benchmark, device, kind):
    stores = {"whole model": None, "cache, below": "below", "cache, features": "features"}
    runs = {name: PhaseTwo(kind, store, device) for name, store in stores.items()}
    heads = [run.epoch() for run in runs.values()]
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0], rtol=1e-4, atol=1e-5)
    candidates = {name: run.epoch for name, run in runs.items()}
    makes = {
        f"making {name}": functools.partial(lambda run: run.make().features, run)
        for name, run in runs.items()
        if run.cache is not None
    }
    timings = benchmark.pedantic(
        lambda: compare({**candidates, **makes}, repeats=5, warmup=1, device=device), rounds=1
    )
    extra = {name: {"cache_bytes": run.cache.nbytes} for name, run in runs.items() if run.cache is not None}
    size = runs["whole model"].size + f" batch {BATCH}"
    title = f"phase two epoch, {size}, float32"
    show(title, timings, op="phase two epoch", size=size, dtype="float32", extra=extra)
    for name, found in extra.items():
        print(f"  {name:<20} holds {found['cache_bytes'] / 2**20:.1f} MiB")
