"""The empirical NTK of whole models, J J^T summed over layers, beside all others who compute it.

The peers (neural-tangents, BackPACK, curvlinops) are left out, with the reason, where they are not installed
or cannot run a model. neural-tangents 0.6.5 needs a JAX of its time: with jax==0.4.23 jaxlib==0.4.23
tf2jax==0.3.5 numpy<2 all of its implementations run; with 0.4.26 to 0.5.3 structured derivatives fail, with
0.6.2 and 0.10.2 the import.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _compare import compare, only_smallest, show, sized
from _jacobian_models import Problem, problem
from _jacobian_peers import PEERS, Peer, jacobian

SIZES = sized(
    {
        "cpu": {"resnet18": 8, "mlp": 512, "mlp, small": 64, "vit": 16},
        "cuda": {"resnet18": 64, "mlp": 512, "mlp, small": 64, "vit": 64},
    },
    smallest={where: {"mlp, small": 2, "vit": 1} for where in ("cpu", "cuda")},
)
SLOWER = 2.0  # a peer this many times behind the best one runs in one round only
TOLERANCE = 1e-5  # of gcfast; the peers' products of long rows may lose ten times as much
TARGETS = {"resnet18": (4, 0.2), "mlp": (10, None), "mlp, small": (10, None), "vit": (3, None)}


def truth(p: Problem, samples: int = 2) -> torch.Tensor:
    """The Gram's rows of the first samples in float64, the columns a sample at a time."""
    p = p.to(torch.float64)
    first = list(jacobian(p, p.x[:samples]))
    columns = [sum(a @ b.mT for a, b in zip(first, jacobian(p, one[None]))) for one in p.x]
    return torch.cat(columns, 1)


def error(peer: Peer, want: torch.Tensor) -> float:
    """Of the part that a peer computes and the truth covers, relative to its Frobenius norm."""
    got = peer.gram().to(want)
    want = want[peer.corner[0] :, peer.corner[1] :][: len(got), : got.shape[1]]
    return float((got[: len(want)] - want).norm() / want.norm())


def memory(kind: str, n: int, name: str) -> int | None:
    """Bytes beside inputs and result of one call in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("_jacobian_peers.py")),
        kind,
        str(n),
        name,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


@pytest.mark.parametrize("case", SIZES["cpu"])
def bench_table(benchmark, device, case):
    n, kind = SIZES[device.type][case], case.split(",")[0]
    p = problem(kind, n, device)
    want = truth(p)
    peers, errors, seconds, failed = {}, {}, {}, {}
    for name, make in PEERS.items():
        try:
            peers[name] = make(p)
            start = time.perf_counter()
            errors[name] = error(peers[name], want)
            seconds[name] = (time.perf_counter() - start) * peers[name].scale
            print(f"  checked {name}: {seconds[name]:.1f} s", flush=True)
        except Exception as reason:  # what it cannot run is part of the result
            peers.pop(name, None)
            failed[name] = f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0][:200]}"
    assert "gcfast" in peers, failed["gcfast"]
    wrong = {k: e for k, e in errors.items() if not e <= (TOLERANCE if k == "gcfast" else 10 * TOLERANCE)}
    assert not wrong
    print()
    baseline = min((name for name in seconds if name.startswith("torch.func")), key=seconds.__getitem__)
    order = [baseline, *(name for name in peers if name != baseline)]
    timings = benchmark.pedantic(
        lambda: compare(
            {name: peers[name].gram for name in order},
            repeats=3,
            warmup=0,
            device=device,
            once=[name for name in order[1:] if seconds[name] > SLOWER * seconds[baseline]],
            scale={name: peers[name].scale for name in order},
        ),
        rounds=1,
    )
    extra = {name: {"error": errors[name]} for name in order}
    for name in order:
        if peers[name].scale != 1:
            extra[name]["scaled"] = peers[name].scale
        if device.type != "cpu" or (only_smallest() and name != "gcfast"):
            used = None
        else:
            used = memory(kind, n, name)
        if used is not None:
            extra[name]["memory"] = used
    extra["gcfast"]["could not run"] = failed
    show(
        f"empirical NTK, {p.size}, float32",
        timings,
        op="empirical NTK",
        size=p.size,
        dtype="float32",
        extra=extra,
    )
    for t in timings:
        used = extra[t.name].get("memory", t.peak_bytes)
        scaled = f", time of a part times {peers[t.name].scale:g}" if peers[t.name].scale != 1 else ""
        megabytes = "-" if used is None else f"{used / 2**20:.0f} MiB"
        print(f"  {t.name:<22} error {errors[t.name]:.1e}, {megabytes} beside inputs and result{scaled}")
    for name, reason in failed.items():
        print(f"  {name:<22} cannot run it: {reason}")
    faster, share = TARGETS[case]
    print(
        f"  wanted: {faster} times as fast as torch.func"
        + (f", in {share:.0%} of its memory" if share else "")
    )
