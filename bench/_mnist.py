"""The end-to-end problem: MNIST features of an MLP with a wide layer, after a few epochs of SGD.

With ``--smallest`` the images are ten clusters of noise, so that nothing needs to be there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _compare import only_smallest
from torch import Tensor, nn

import gcfast


@dataclass(frozen=True)
class HeadProblem:
    """Features (n, m) and targets in training and test, and the head (W, b) at the switch."""

    features: Tensor
    targets: Tensor
    test_features: Tensor
    test_targets: Tensor
    weight: Tensor
    bias: Tensor
    data: str = "MNIST"

    def test_error(self, weight: Tensor, bias: Tensor) -> float:
        z = self.test_features @ weight.to(self.test_features.dtype).T + bias.to(self.test_features.dtype)
        return 100 * float((z.argmax(1) != self.test_targets).float().mean())


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("GCFAST_DATA", default)) / "mnist.npz"
    if not path.exists():
        pytest.skip("mnist.npz not found: set GCFAST_DATA to its folder")
    with np.load(path) as d:
        x, y, xt, yt = (
            torch.from_numpy(d[k]) for k in ("train_images", "train_labels", "test_images", "test_labels")
        )

    def flat(images: Tensor) -> Tensor:
        return (images.reshape(len(images), -1).float() / 255 - 0.1307) / 0.3081

    return flat(x), y.long(), flat(xt), yt.long()


def clusters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`mnist` gives, of ten random images and noise: easy, and always there."""
    centers, y = torch.randn(10, 784), torch.arange(200) % 10
    x, xt = (centers[y] + 0.1 * torch.randn(len(y), 784) for _ in range(2))
    return x, y, xt, y


@cache
def head_problem(
    n: int,
    m: int,
    layer: str = "WideLayer",
    epochs: int = 6,
    device: str = "cpu",
) -> HeadProblem:
    """MLP 784-256-128-m-10, softplus, SGD (lr 0.02, momentum 0.9, batch 64); features in float64.

    The wide layer has beta = 4: with beta = 1 this step size is beyond the edge of stability. ``layer`` says
    how it is initialised: as gcfast's WideLayer, or as torch's nn.Linear.
    """
    torch.manual_seed(0)
    data = "clusters" if only_smallest() else "MNIST"
    x, y, xt, yt = (t.to(device) for t in (clusters() if data == "clusters" else mnist()))
    x, y = x[:n], y[:n]
    model = nn.Sequential(
        nn.Linear(784, 256),
        nn.Softplus(),
        nn.Linear(256, 128),
        nn.Softplus(),
        gcfast.WideLayer(128, m, beta=4.0)
        if layer == "WideLayer"
        else nn.Sequential(nn.Linear(128, m), nn.Softplus(beta=4.0)),
        nn.Linear(m, 10),
    ).to(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(n).to(device).split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
    with torch.no_grad():
        body = model[:-1].double()
        h, ht = (torch.cat([body(rows.double()) for rows in t.split(1000)]) for t in (x, xt))
        return HeadProblem(
            h, y, ht.float(), yt, model[-1].weight.detach().double(), model[-1].bias.detach().double(), data
        )
