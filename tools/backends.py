"""Does every op run on the kernels that it should on this GPU? If not, a line for each and exit code 1.

"Should" is the policy of gcfast.ops.dispatch: the first backend that has a kernel for the op and the dtype,
whether or not it is usable here. A module that did not build or does not load is seen by this.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import gcfast
from gcfast import ops
from gcfast.ops import dispatch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS = {"small": 64, "large": 2048}  # x 100: on either side of the size where the policy changes


def _layer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    w = torch.randn(64, x.shape[1], dtype=x.dtype, device=x.device)
    return x, w, w[:, 0].contiguous()


def _wide(x: torch.Tensor) -> object:
    x, w, b = _layer(x)
    return ops.wide_forward(x, w, b, w.mT.contiguous()[:10, :])


def _add(x: torch.Tensor) -> None:
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    ops.add_product(torch.zeros(len(x), len(x), dtype=wide.dtype, device=x.device), wide, wide.mT, lower=True)


def _jacobian(x: torch.Tensor) -> None:
    """64 samples of 10 outputs and 10 positions, a number of a row each."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    g = wide[:64].reshape(64, 10, 10, 1)
    out = torch.zeros(640, 640, dtype=wide.dtype, device=x.device)
    ops.jacobian_gram(out, g, g, torch.ones_like(out)[None], lower=True)


def _gradients(x: torch.Tensor) -> None:
    """64 samples of 10 outputs and 10 positions, a weight of one row."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    g = wide[:64].reshape(64, 10, 10, 1)
    ops.gradient_gram(torch.zeros(640, 640, dtype=wide.dtype, device=x.device), g, g[:, 0])


# An op's call on x (n, 100); those that are missing here fail below, by name.
CALLS = {
    "activation": lambda x: ops.activation(x),
    "softmax_residual": lambda x: ops.softmax_residual(
        x, torch.zeros(len(x), dtype=torch.long, device=x.device)
    ),
    "softmax_curvature": lambda x: ops.softmax_curvature(x, x),
    "gram_error_bound": lambda x: (ops.gram_error_bound(x), ops.abs_products(x)),
    "wide_forward": _wide,
    "wide_head_grad": lambda x: ops.wide_head_grad(*_layer(x), x[:, :3]),
    "wide_gram_product": lambda x: ops.wide_gram_product(*_layer(x), x[:, :3]),
    "wide_panel": lambda x: ops.wide_panel(*_layer(x)),
    "add_product": _add,
    "jacobian_gram": _jacobian,
    "gradient_gram": _gradients,
    "batched_rank": lambda x: gcfast.matrix_rank(x[:64].reshape(4, 16, 100)),
    "gram_product": lambda x: ops.gram_product(x[:8] @ x[:8].mT, x[:8, :8].contiguous()),
}


# The dtype in which an op reaches its kernels, where that is not the caller's.
_HALF_IN_SINGLE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
SEEN = {
    "wide_panel": dict.fromkeys(DTYPES, torch.float64),
    "add_product": _HALF_IN_SINGLE,
    "gradient_gram": _HALF_IN_SINGLE,
    "jacobian_gram": _HALF_IN_SINGLE,
    "batched_rank": _HALF_IN_SINGLE,
}


def expected(op: str, x: torch.Tensor) -> str:
    x = x.to(SEEN.get(op, {}).get(x.dtype, x.dtype))
    for backend in dispatch.preferred(op, x):
        served = backend == "reference" or x.dtype in dispatch.dtypes_of(op, backend)
        if served and op in dispatch._KERNELS[backend]:
            return backend
    raise AssertionError(f"no backend for {op}")


def check(op: str, dtype: torch.dtype, rows: int, device: str) -> str:
    """ "" if the call ran where it should, or what is wrong."""
    x = torch.randn(rows, 100, device=device).to(dtype)
    want = expected(op, x)
    dispatch._last.clear()
    try:
        CALLS[op](x)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # one op that fails must not hide the others
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    got = ops.last_backend(op)
    return "" if got == want else f"ran on {got}, expected {want}"


def main(device: str = "cuda") -> int:
    print(f"gcfast {gcfast.__version__} from {Path(gcfast.__file__).parent}")
    print(gcfast.backends())
    failures = []
    for op in dispatch.OPS:
        for dtype in DTYPES:
            for name, rows in ROWS.items():
                if wrong := check(op, dtype, rows, device):
                    failures.append(f"{op} {str(dtype).removeprefix('torch.')} {name}: {wrong}")
    checked = len(dispatch.OPS) * len(DTYPES) * len(ROWS)
    print(*failures, f"{checked - len(failures)} of {checked} calls ran where they should", sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
