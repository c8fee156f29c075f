"""Time and memory of certify and solve_head against n on MNIST.

A cell is one size in a process of its own, which ends with a line of JSON: a killed run goes on where it
stopped.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("cells.json")
EPOCHS, TAU, SEED = 10, 0.6, 0
D, BETA, LR = 128, 4.0, 7.0  # the step is LR / m, at most 0.02: what the command line takes
MEMORY_CELL = 10**9  # max_bytes of the cell that may not store K


class Peak:
    """The largest resident set while something runs, in bytes beyond what was there at the start."""

    def __enter__(self) -> Peak:
        self.base = self.most = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, _resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(self.most, _resident()) - self.base


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def _train(model: Any, opt: Any, x: Any, y: Any, steps: int, generator: Any) -> None:
    """``steps`` steps of batches of 64, the order fixed by the generator."""
    import torch
    import torch.nn.functional as F

    done = 0
    while done < steps:
        for batch in torch.randperm(len(x), generator=generator).split(64):
            if done >= steps:
                return
            opt.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
            done += 1


def cell(n: int, with_base: bool, max_bytes: int | None) -> dict[str, Any]:
    """One size: phase one, the certificate, the solved head; the base optimizer beside them where asked."""
    import torch
    from _mnist import mnist
    from torch import nn

    import gcfast

    x, y, xt, yt = mnist()
    x, y = x[:n], y[:n]
    m = -(-11 * n // 10)

    def fresh() -> nn.Module:
        torch.manual_seed(SEED)
        wide = gcfast.WideHead(gcfast.WideLayer(D, m, beta=BETA), nn.Linear(m, 10))
        return nn.Sequential(nn.Linear(784, 256), nn.Softplus(), nn.Linear(256, D), nn.Softplus(), wide)

    model = fresh()
    total = EPOCHS * -(-n // 64)
    switch = int(TAU * total)
    lr = min(0.02, LR / m)

    def error() -> float:
        with torch.no_grad():
            wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(xt.split(1000), yt.split(1000)))
        return 100 * wrong / len(yt)

    found: dict[str, Any] = {"n": n, "m": m, "d": D, "threads": torch.get_num_threads()}
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    began = time.perf_counter()
    two = gcfast.TwoPhase(opt, model, switch_step=switch, perturbation=1e-3, seed=SEED)
    _train(model, two, x, y, switch, torch.Generator().manual_seed(SEED))
    found["phase_one_seconds"] = time.perf_counter() - began
    found["switch"] = {"loss": _loss(model, x, y), "test_error": error()}
    data = (x, y)
    if max_bytes is None:
        with Peak() as peak:
            began = time.perf_counter()
            c = gcfast.certify(model, data, loss="cross_entropy", sharp=False, route="direct")
            seconds = time.perf_counter() - began
        reason = next(a.reason for a in c.assumptions if a.name.startswith("rank"))
        found["certify"] = {
            "status": c.status,
            "route": c.route,
            "reason": reason,
            "sigma_min_lower": c.sigma_min_lower,
            "sigma_max_upper": c.sigma_max_upper,
            "seconds": seconds,
            "bytes": peak.extra,
        }
        print(found["certify"], file=sys.stderr, flush=True)
    with Peak() as peak:
        began = time.perf_counter()
        s = gcfast.solve_head(model, data, target_gap=1e-6, max_bytes=max_bytes)
        seconds = time.perf_counter() - began
    found["solve"] = {
        "form": s.form,
        "loss": s.loss,
        "gap": s.gap,
        "converged": s.converged,
        "distance_bound": s.distance_bound,
        "iterations": s.iterations,
        "products": s.products,
        "seconds": seconds,
        "bytes": peak.extra,
        "max_bytes": max_bytes,
        "test_error": error(),
        "model_loss": _loss(model, x, y),
    }
    print(found["solve"], file=sys.stderr, flush=True)
    if with_base:
        model = fresh()
        opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        began = time.perf_counter()
        _train(model, opt, x, y, total, torch.Generator().manual_seed(SEED))
        seconds = time.perf_counter() - began
        found["base"] = {"seconds": seconds, "loss": _loss(model, x, y), "test_error": error()}
    return found


def theorem(n: int = 1_281_167, d: int = 512, planted: int = 1000) -> dict[str, Any]:
    """The theorem route at ImageNet's size: planted pairs of equal rows, half with conflicting labels."""
    import torch

    import gcfast

    with Peak() as peak:
        g = torch.Generator().manual_seed(SEED)
        m = -(-11 * n // 10)
        z = torch.randn((n, d), generator=g)
        layer = torch.randn((m, d), generator=g), torch.randn(m, generator=g)
        y = torch.randint(0, 1000, (n,), generator=g)
        distinct = gcfast.WideFeatures(z, layer)
        began = time.perf_counter()
        clean = gcfast.certify(distinct, y, loss="cross_entropy", route="theorem")
        seconds = time.perf_counter() - began
        pairs = torch.randperm(n, generator=g)[: 2 * planted].view(planted, 2).sort(1).values
        z[pairs[:, 1]] = z[pairs[:, 0]]
        y[pairs[:, 1]] = y[pairs[:, 0]]
        conflicts = pairs[: planted // 2]
        y[conflicts[:, 1]] = (y[conflicts[:, 0]] + 1) % 1000
        began = time.perf_counter()
        spoiled = gcfast.certify(gcfast.WideFeatures(z, layer), y, loss="cross_entropy", route="theorem")
        with_pairs = time.perf_counter() - began
    found = sorted(o.samples for o in spoiled.offenders)
    conflicting = sorted(o.samples for o in spoiled.offenders if o.conflicting)
    assert clean.status == "holds" and clean.route == "theorem", clean
    assert spoiled.status == "fails" and found == sorted(pairs.tolist())
    assert conflicting == sorted(conflicts.tolist())
    infimum = len(conflicts) * 2 * math.log(2) / n
    assert spoiled.infimum is not None and math.isclose(spoiled.infimum, infimum, rel_tol=1e-12)
    return {
        "n": n,
        "m": m,
        "d": d,
        "planted": planted,
        "conflicts": len(conflicts),
        "seconds": seconds,
        "seconds_with_pairs": with_pairs,
        "bytes": peak.extra,
    }


def _loss(model: Any, x: Any, y: Any) -> float:
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        parts = zip(x.split(1000), y.split(1000))
        total = sum(float(F.cross_entropy(model(a).double(), b, reduction="sum")) for a, b in parts)
    return total / len(x)


def measure(sizes: list[int], base: set[int], memory: set[int]) -> None:
    """Every cell that the results lack, saved one by one."""
    import _record

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    wanted = [(str(n), ["--cell", str(n)] + (["--base"] if n in base else [])) for n in sizes]
    wanted.append(("theorem", ["--theorem"]))
    wanted += [(f"{n} in 1 GB", ["--cell", str(n), "--memory", str(MEMORY_CELL)]) for n in sorted(memory)]
    for index, (name, arguments) in enumerate(wanted):
        if name in known["cells"]:
            continue
        print(f"cell {name} ({index + 1} of {len(wanted)})", flush=True)
        command = [sys.executable, "-m", "experiments.scaling", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"cell {name} ended with {done.returncode}")
        known["cells"][name] = json.loads(done.stdout.strip().splitlines()[-1])
        known |= {"machine": _record.header()["cpu"], "epochs": EPOCHS, "tau": TAU}
        known["commit"] = _record.commit()
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
