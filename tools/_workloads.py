"""What tools/no_slower.py times, through the public API alone: a process that works when it is told to."""

import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import gcfast
from gcfast import ops

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
f32, f64 = torch.float32, torch.float64


def full(batch, n, m, dtype):
    return (torch.randn(batch, n, m, dtype=f64) + 3 * n**0.5 * torch.eye(n, m, dtype=f64)).to(dtype)


def layer(n, d, m, c, dtype=f32):
    return (
        torch.randn(n, d, dtype=dtype),
        torch.randn(m, d, dtype=dtype) / d**0.5,
        torch.randn(m, dtype=dtype),
        torch.randn(c, m, dtype=dtype) / m**0.5,
        torch.randn(c, dtype=dtype),
        torch.randn(n, c, dtype=dtype),
    )


def rank(*shape):
    a = full(*shape)
    return lambda: gcfast.matrix_rank(a)


def deficient():
    a = full(64, 64, 128, f64)
    a[::2, -16:] = a[::2, :16]
    return lambda: gcfast.matrix_rank(a)


def activation(name, n=1 << 20):
    x = torch.randn(n)
    out = torch.empty_like(x)
    return lambda: ops.activation(x, activation=name, out=out)


def gradient():
    x, b = torch.randn(512, 1024, requires_grad=True), torch.randn(1024, requires_grad=True)
    g = torch.randn(512, 1024)
    return lambda: torch.autograd.grad(ops.activation(x, b, activation="gelu"), (x, b), g)


def gram_product():
    z, w, b, *_, r = layer(2000, 128, 2200, 10)
    return lambda: gcfast.wide_gram_product(z, w, b, r)


def wide_step():
    model = gcfast.WideHead(gcfast.WideLayer(256, 4400), torch.nn.Linear(4400, 10))
    z, g = torch.randn(128, 256, requires_grad=True), torch.randn(128, 10)
    return lambda: torch.autograd.grad(model(z), [z, *model.parameters()], g)


def wide_gram():
    z, w, b, *_ = layer(800, 64, 880, 1, f64)
    return lambda: gcfast.wide_gram(z, w, b)


def mlp_ntk():
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.Softplus(),
        torch.nn.Linear(256, 256),
        torch.nn.Softplus(),
        torch.nn.Linear(256, 10),
    )
    x = torch.randn(64, 64)
    return lambda: gcfast.LayerJacobians(model, x).gram()


def conv_ntk():
    c = torch.nn.Conv2d
    model = torch.nn.Sequential(
        c(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        c(16, 32, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).eval()
    x = torch.randn(8, 3, 16, 16)
    return lambda: gcfast.LayerJacobians(model, x).gram()


def problem(n, m):
    centres = torch.randn(10, 20)
    y = torch.randint(0, 10, (n,))
    z = centres[y] + torch.randn(n, 20)
    return F.softplus(z @ torch.randn(20, m)).double(), y


def head(n=800, m=880):
    h, y = problem(n, m)
    return lambda: gcfast.solve_head(h, y, target_gap=1e-6)


def certificate(n=600, m=660):
    h, y = problem(n, m)
    return lambda: gcfast.certify(h, y, loss="cross_entropy")


def importing():
    return lambda: subprocess.run([sys.executable, "-c", "import gcfast"], check=True)


WORKLOADS = {
    "import gcfast": importing,
    "batched rank 4096 x 8 x 8": lambda: rank(4096, 8, 8, f32),
    "batched rank 512 x 32 x 32": lambda: rank(512, 32, 32, f32),
    "one rank 8 x 8": lambda: rank(1, 8, 8, f64),
    "batched rank 64 x 64 x 128, half deficient": deficient,
    "softplus": lambda: activation("softplus"),
    "softplus, 100 elements": lambda: activation("softplus", 100),
    "gelu and gradients": gradient,
    "wide_gram_product": gram_product,
    "WideHead step": wide_step,
    "wide_gram": wide_gram,
    "NTK of an MLP": mlp_ntk,
    "NTK of a convolutional net": conv_ntk,
    "solve_head": head,
    "certify": certificate,
}


def main():
    """A workload's name a line; the first time the answer is how often it fits into a tenth of a second."""
    ready, calls = {}, {}
    for line in sys.stdin:
        name = json.loads(line)
        if name == "list":
            print(json.dumps(list(WORKLOADS)), flush=True)
            continue
        if name not in ready:
            f = ready[name] = WORKLOADS[name]()
            f()
            start = time.perf_counter()
            f()
            print(max(1, int(0.1 / (time.perf_counter() - start))), flush=True)
            calls[name] = int(sys.stdin.readline())
        start = time.perf_counter()
        for _ in range(calls[name]):
            ready[name]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
