"""Every Triton and CUDA op on small hostile inputs, against plain PyTorch: food for compute-sanitizer.

    compute-sanitizer --tool memcheck python tools/sanitize.py        (also racecheck, initcheck, synccheck)

Ragged and strided inputs off 16-byte boundaries, in place, fused gradients, a stream of its own. Allocations
go past torch's caching allocator, so that an access beyond a tensor is one beyond its allocation. Exit status
0: all right; 1: wrong values; 2: no GPU, or an op that cannot run on a backend.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is first imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

SHAPES = ((1, 1), (2, 31), (5, 33), (3, 252), (2, 507), (0, 5))


def in_place(backend: str, device: torch.device) -> float:
    """out = x, and out = the fused upstream gradient."""
    from gcfast import ops, reference
    from gcfast.ops.activations import run_activation

    worst = 0.0
    for dtype in (torch.float32, torch.float64):
        x, g = (torch.randn(7, 61, dtype=dtype, device=device)[:, 2:35] for _ in range(2))
        b = torch.randn(33, dtype=dtype, device=device)
        want = reference.activation(x.double(), b.double(), order=1, grad=g.double())
        run_activation(backend, x, b, "softplus", 1.0, 1, g, g)
        worst = max(worst, float((g - want).abs().max()))
        want = reference.activation(x.double(), b.double())
        ops.activation(x, b, out=x)
        worst = max(worst, float((x - want).abs().max()))
    return worst


def check(backend: str, device: torch.device) -> list[str]:
    """What went wrong on a backend: op, dtype, shape and error."""
    from op_cases import CASES, DTYPES, TOLERANCE, error

    from gcfast import ops

    wrong: list[str] = []
    with ops.backend(backend):
        for case in CASES:
            if backend not in case.backends:
                continue
            for dtype in DTYPES:
                for n, c in SHAPES:
                    args = case.make(n, c, dtype, device)
                    worst = max(error(g, w) for g, w in zip(case.run(args), case.expected(args)))
                    assert ops.last_backend(case.op) == backend
                    if not worst <= TOLERANCE[dtype]:
                        wrong.append(f"{case.op} on {backend}, {dtype}, {n} x {c}: error {worst:.3g}")
        worst = in_place(backend, device)
        if not worst <= 1e-5:
            wrong.append(f"activation in place on {backend}: error {worst:.3g}")
    return wrong


def main(backends: list[str]) -> int:
    if not torch.cuda.is_available():
        print("tools/sanitize.py needs a GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    from gcfast import ops

    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    wrong: list[str] = []
    for backend in backends or ["triton", "cuda"]:
        reason = ops.backends().reason("activation", backend)
        if reason:
            print(f"backend {backend} cannot run: {reason}", file=sys.stderr)
            return 2
        with torch.cuda.stream(torch.cuda.Stream(device)):
            wrong += check(backend, device)
        torch.cuda.synchronize(device)
        print(f"{backend}: done")
    print("\n".join(wrong) or "all values right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
