"""Random small models: layers, bare parameters, reuse, views and detours, in the order that a seed gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jacobian_cases import Read, settled
from torch import Tensor, nn

D = 4  # features, or channels


class Pool(nn.Module):
    """Parameters and layers of fitting sizes, for any number of uses each."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw
        self.linear = nn.ModuleList(nn.Linear(D, D, bias=draw.random() < 0.7) for _ in range(3))
        self.conv = nn.ModuleList(
            nn.Conv1d(D, D, k, padding="same", groups=g, bias=draw.random() < 0.7)
            for k, g in ((3, 1), (2, 2), (1, 4))
        )
        self.back = nn.ConvTranspose1d(D, D, 3, padding=1, groups=draw.choice((1, 2)))
        self.norm = nn.ModuleList((nn.LayerNorm(D), nn.BatchNorm1d(D), nn.GroupNorm(2, D), nn.RMSNorm(D)))
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.rnn = nn.GRU(D, D, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(2 * D, 2 * D) / 2)
        self.vector = nn.Parameter(torch.randn(2 * D))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.table = nn.Embedding(9, D, padding_idx=draw.choice((None, 1)))
        self.slope = nn.PReLU(D)


def _vector(p: Pool) -> Tensor:
    v = p.vector
    return p.draw.choice(
        (lambda: v[:D], lambda: v[D:], lambda: v[::2], lambda: v.view(2, D)[1], lambda: v[:D] * p.scalar,
         lambda: v.view(2, D).sum(0), lambda: p.matrix[0, :D], lambda: p.table.weight[3])
    )()  # fmt: skip


def _matrix(p: Pool) -> Tensor:
    m = p.matrix
    return p.draw.choice(
        (lambda: m[:D, :D], lambda: m[D:, D:], lambda: m[:D, :D].t(), lambda: m[1 : D + 1, 2 : D + 2],
         lambda: m[:D] @ m[:, :D], lambda: m.view(2, D, 2, D)[0, :, 1], lambda: 2 * m[:D, D:],
         lambda: p.linear[0].weight, lambda: p.linear[1].weight.t(), lambda: p.table.weight[:D])
    )()  # fmt: skip


def _steps(p: Pool) -> Callable[[Tensor], Tensor]:
    """A step (n, T, D) -> (n, T', D); what it draws it draws once."""
    draw = p.draw
    a, b = draw.choice(p.linear), draw.choice(p.linear)
    conv, kind, at = draw.choice(p.conv), draw.randrange(4), draw.randrange(30)
    state = draw.getstate()

    def drawn(make: Callable[[Pool], Tensor]) -> Tensor:
        draw.setstate(state)
        return make(p)

    def norm(z: Tensor) -> Tensor:
        return p.norm[kind](z.mT).mT if kind in (1, 2) else p.norm[kind](z)

    def time_first(z: Tensor) -> Tensor:
        return torch.tanh(a(z.transpose(0, 1))).transpose(0, 1)

    def folded(z: Tensor) -> Tensor:
        return torch.relu(a(z.flatten(0, 1))).unflatten(0, z.shape[:2])

    def in_place(z: Tensor) -> Tensor:
        z = b(z)
        z[:, 0] = drawn(_vector)
        z += drawn(_vector)
        return z.sin_()

    def first(z: Tensor) -> Tensor:
        return torch.cat([z[:, :1], b(z)[:, :1]], 1)

    places = torch.arange(2)
    steps: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda z: torch.tanh(a(z)),
        lambda z: torch.relu(a(z)),
        lambda z: z + b(torch.tanh(a(z))),
        lambda z: torch.tanh(conv(z.mT).mT),
        lambda z: F.gelu(p.back(z.mT)).mT,
        norm,
        norm,
        time_first,
        folded,
        in_place,
        first,
        lambda z: z + p.attention(z, z, z, need_weights=False)[0],
        lambda z: p.rnn(z)[0],
        lambda z: torch.tanh(z @ drawn(_matrix)),
        lambda z: torch.tanh(F.linear(z, drawn(_matrix), drawn(_vector))),
        lambda z: torch.einsum("ntd,do->nto", z, drawn(_matrix)).sin(),
        lambda z: z * drawn(_vector),
        lambda z: z - drawn(_vector),
        lambda z: z / (2 + drawn(_vector).square()),
        lambda z: z * p.scalar + p.token,
        lambda z: torch.cat([p.token.expand(len(z), -1, -1), z], 1),
        lambda z: z[:, :2] + p.table(places[: z.shape[1]]),
        lambda z: z + p.table((z[..., 0].detach() > 0).long() * 2),
        lambda z: z + a(p.token),
        lambda z: torch.tanh(a(p.table.weight))[(z[..., 1].detach() > 0).long() * 5] + z,
        lambda z: p.slope(z.mT).mT,
        lambda z: z.flip(1) * z.mean(1, keepdim=True),
        lambda z: torch.softmax(a(z) @ b(z).mT, -1) @ z,
        lambda z: F.relu(a(z) - 3) + z,
        lambda z: torch.where(z > 0, a(z), drawn(_vector)),
    )
    return steps[at]


class Random(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.pool = Pool(draw)
        self.steps = [_steps(self.pool) for _ in range(draw.randint(2, 6))]
        self.head = draw.choice((Read(), None))
        self.last = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for step in self.steps:
            z = step(z)
        return self.head(z) if self.head is not None else self.last(z[:, -1])


def random_model(seed: int) -> tuple[nn.Module, Any]:
    """A model all of whose parameters with ``requires_grad`` have a part in the output, and its input."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = settled(Random(draw).double())
    x = torch.randn(draw.choice((1, 2, 3, 4, 6)), draw.choice((1, 2, 3, 4)), D, dtype=torch.float64)
    y = model(x).sum()
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(y, parameters, allow_unused=True)):
        p.requires_grad_(g is not None)
    return model, x
