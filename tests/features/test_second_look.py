"""What a model computes of a sample is a function of that sample alone, or it is refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import gcfast

N, D, M, C = 60, 6, 80, 3


def data(dtype=torch.float32, n=N):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=g).to(dtype), torch.arange(n) % C


class Layer(nn.Module):
    """`function(self, h)` between two layers, with a state to change."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("mean", torch.zeros(M))
        self.register_buffer("count", torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(M))

    def forward(self, h):
        return self.function(self, h)


def model(*layers, dtype=torch.float32):
    torch.manual_seed(1)
    body = (nn.Linear(D, M), nn.Tanh(), *layers, nn.Linear(M, C))
    return nn.Sequential(*body).to(dtype).requires_grad_(False)


def with_step(function, dtype=torch.float32):
    return model(Layer(function), dtype=dtype)


USES = {
    "certify": gcfast.certify,
    "solve_head": lambda *args: gcfast.solve_head(*args, target_gap=0.5),
    "FeatureCache": gcfast.FeatureCache,
}


def one_column(layer, h):
    """The noise is small beside another column."""
    return torch.cat([1e5 * h[:, :1], h[:, 1:2] + 1e-3 * torch.randn(len(h), 1), h[:, 2:]], 1)


def gate(draw):
    return lambda layer, h: h if draw() < 0.5 else 1.1 * h


RANDOM = {
    "dropout": lambda layer, h: F.dropout(h, 0.1, training=True),
    "torch": lambda layer, h: h + 1e-3 * torch.randn_like(h),
    "own generator": lambda layer, h: h + 1e-3 * torch.randn(h.shape, generator=layer.generator),
    "python": lambda layer, h: h * (1 + 0.1 * random.random()),
    "numpy": lambda layer, h: h * (1 + 0.1 * np.random.rand()),
    "torch gate": gate(lambda: torch.rand(())),
    "python gate": gate(random.random),
    "numpy gate": gate(np.random.rand),
    "one column": one_column,
    "as small as rounding": lambda layer, h: h + 1e-6 * torch.randn_like(h),
    "small in float64": lambda layer, h: h + 1e-9 * torch.randn_like(h),
    "counter": lambda layer, h: h * (1 + 0.01 * next_call(layer)),
    "counter buffer": lambda layer, h: h * (1 + 0.01 * layer.count.add_(1)),
    "from the twentieth time on": lambda layer, h: h * (1 + 0.01 * (next_call(layer) >= 20)),
    "from a count of ten on": lambda layer, h: h * (1 + 0.01 * (layer.count.add_(1) >= 10)),
    "slow running mean": lambda layer, h: h - layer.mean.lerp_(h.mean(0), 1e-7),
    "slow learning": lambda layer, h: h * layer.gain.mul_(1 + 2e-7),
    "slow mean put in its place": lambda layer, h: h - next_mean(layer, h),
    "every other time": lambda layer, h: h * (1 + 0.01 * (next_call(layer) % 2)),
    "running mean": lambda layer, h: h - layer.mean.lerp_(h.mean(0), 0.1),
}


def next_mean(layer, h):
    layer.mean = layer.mean.lerp(h.mean(0), 1e-7)
    return layer.mean


def next_call(layer):
    layer.calls += 1
    return layer.calls


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", RANDOM)
def test_what_gives_others_each_time_is_refused(kind, use):
    dtype = torch.float64 if "float64" in kind else torch.float32
    with pytest.raises(ValueError, match=r"^model: the same inputs gave other features in a second look"):
        USES[use](with_step(RANDOM[kind], dtype), data(dtype))


def normalised(layer, h):
    return F.batch_norm(h, layer.mean.clone(), torch.ones(M), training=True)


MIXING = {
    "batch statistics": lambda: model(nn.BatchNorm1d(M, track_running_stats=False)),
    "batch statistics by function": lambda: with_step(normalised),
    "centred": lambda: with_step(lambda layer, h: h - h.mean(0)),
    "divided by the number": lambda: with_step(lambda layer, h: h * (1 + 1 / len(h))),
    "the sample before": lambda: with_step(lambda layer, h: h + 0.1 * h.roll(1, 0)),
    "the first sample": lambda: with_step(lambda layer, h: h - 0.1 * h[:1]),
    "the place": lambda: with_step(lambda layer, h: h + torch.arange(len(h))[:, None] / len(h)),
    "softmax": lambda: with_step(lambda layer, h: h.softmax(0)),
    "attention": lambda: with_step(lambda layer, h: F.scaled_dot_product_attention(h, h, h)),
}


@pytest.mark.parametrize("size", [N, 7, 59, 2])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", MIXING)
def test_what_depends_on_the_batch_is_refused(kind, use, size):
    loader = DataLoader(list(zip(*data(), strict=True)), batch_size=size)
    with pytest.raises(ValueError, match=r"^model: "):
        USES[use](MIXING[kind](), loader)


@pytest.mark.parametrize("use", USES)
def test_small_sets_are_looked_at_too(use):
    for n in (2, 3):
        with pytest.raises(ValueError, match=r"^model: the same samples gave other features"):
            USES[use](MIXING["centred"](), data(n=n))
    loader = DataLoader(list(zip(*data(n=3), strict=True)), batch_size=1)
    with pytest.raises(ValueError, match=r"^model: the same samples gave other features"):
        USES[use](MIXING["softmax"](), loader)


def test_batch_statistics_of_pictures():
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    whole = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), body, nn.Tanh(), nn.Linear(16, C))
    x = torch.randn(12, 16)
    with pytest.raises(ValueError, match=r"^model: the same samples gave other features among other"):
        gcfast.certify(whole, x)
    body[1] = nn.BatchNorm2d(4)
    assert gcfast.certify(whole, x).status == "holds"


def test_a_model_that_takes_one_size_of_batch_alone_is_named():
    whole = with_step(lambda layer, h: h.view(N, M))
    with pytest.raises(ValueError, match=r"^model: fails on a few of the samples in a batch of their own"):
        gcfast.certify(whole, data())
    always = with_step(lambda layer, h: torch.ones(N, 1) * layer.gain)
    with pytest.raises(
        ValueError, match=r"^model: gave features \(60, 80\) in a second look, where \(8, 80\)"
    ):
        gcfast.certify(always, data())


def skipping(layer, h):
    """As layer drop is often written: drawn always, used while training alone."""
    return h if torch.rand(()) > 0.5 or not layer.training else 0 * h


FINE = {
    "norms": lambda: model(nn.BatchNorm1d(M), nn.LayerNorm(M), nn.Dropout(0.5)),
    "drawn, not used": lambda: with_step(skipping),
    "counted, not used": lambda: with_step(lambda layer, h: h + 0 * layer.count.add_(1)),
    "column of zeros": lambda: with_step(lambda layer, h: torch.cat([0 * h[:, :1], h[:, 1:]], 1)),
    "column of rounding errors": lambda: with_step(
        lambda layer, h: torch.cat([h, 1e-7 * (h @ h.mT.mean(1, keepdim=True)).sum(1, keepdim=True)], 1)[
            :, :M
        ]
    ),
    "scaled": lambda: with_step(lambda layer, h: h * torch.logspace(-20, 5, M)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("size", [N, 7, 1, 59])
@pytest.mark.parametrize(
    "kind", ["norms", "drawn, not used", "counted, not used", "column of zeros", "scaled"]
)
def test_what_is_fixed_is_taken(kind, size, use):
    USES[use](FINE[kind](), DataLoader(list(zip(*data(), strict=True)), batch_size=size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_no_difference(dtype):
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(M, M), nn.LayerNorm(M), nn.GELU())]
    for size in (N, 7, 1):
        loader = DataLoader(list(zip(*data(dtype), strict=True)), batch_size=size)
        gcfast.FeatureCache(model(*layers, dtype=dtype), loader)


def test_sequences_of_several_lengths():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.LSTM(D, M, batch_first=True), nn.Linear(M, C)

        def forward(self, x, names=None):
            assert names is None or len(names) == len(x)
            return self.head(self.inner(x)[0][:, -1])

    whole = Recurrent().requires_grad_(False)
    batches = [((torch.randn(5, k, D), ["a"] * 5), torch.arange(5) % C) for k in (3, 4, 7)]
    assert len(gcfast.FeatureCache(whole, batches)) == 15
    assert len(gcfast.FeatureCache(whole, (torch.randn(1, 4, D), torch.zeros(1, dtype=torch.long)))) == 1


def test_random_states_are_given_back():
    whole = FINE["drawn, not used"]()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    gcfast.certify(whole, data())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_what_holds_the_output_does_not_matter():
    class Held(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}

    class Growing(Held):
        """Gives more than one tensor for a batch that is not full."""

        def forward(self, x):
            return {**super().forward(x), **({} if len(x) != 20 else {"inputs": x})}

    for use in USES.values():
        use(Held(*model()), data())
    loss, held = (gcfast.certify(m, data(), loss="cross_entropy").loss for m in (model(), Held(*model())))
    assert held == pytest.approx(loss)
    batches = [(x, y) for x, y in zip(data()[0].split(40), data()[1].split(40), strict=True)]
    for call in USES.values():
        with pytest.raises(gcfast.HeadError, match=r"model: gives 2 tensors .* for samples 40 to 59"):
            call(Growing(*model()), batches)
