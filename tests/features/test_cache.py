"""FeatureCache: phase two from it is phase two of the whole model; it is refused where it would be wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import gcfast
from gcfast.features import cache as cache_module
from gcfast.features import cached_head
from gcfast.nn import OutputHook

N, D, C = 37, 6, 3


def body(*last):
    norm = (nn.BatchNorm1d(12), nn.Softplus(), nn.Dropout(0.3))
    return nn.Sequential(nn.Linear(D, 12), *norm, *last)


def conv(*last):
    layers = (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
    return nn.Sequential(*layers, nn.Dropout2d(0.2), nn.Flatten(), *last)


MODELS = {
    "linear": lambda: body(nn.Linear(12, C)),
    "no bias": lambda: body(nn.Linear(12, C, bias=False)),
    "wide": lambda: body(gcfast.WideHead(gcfast.WideLayer(12, 41), nn.Linear(41, C))),
    "wide, no bias": lambda: body(gcfast.WideLayer(12, 41, activation="tanh"), nn.Linear(41, C, bias=False)),
    "convolution": lambda: conv(nn.Linear(24, C)),
    "wide convolution": lambda: gcfast.widen(conv(nn.Linear(24, C)), N),
}
WIDE = [name for name in MODELS if "wide" in name]
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


def data(dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, D, generator=g), torch.randint(C, (N,), generator=g)
    return x.to(device, dtype), y.to(device)


def in_phase_two(name="wide", base="sgd", dtype=torch.float32, device="cpu"):
    """A model that was trained for two steps, and switched by the second."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device, dtype)
    opt = gcfast.TwoPhase(BASES[base](model.parameters()), model, switch_step=2, seed=0)
    x, y = data(dtype, device)
    for _ in range(2):
        step(opt, model, x, y)
    assert opt.phase == 2
    return model, opt


def step(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if not isinstance(opt.base, torch.optim.LBFGS):
        closure()
        opt.step()
    else:
        opt.step(closure)


def train_whole(model, opt, x, y, size, epochs=3):
    g = torch.Generator().manual_seed(9)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(N, generator=g).to(x.device).split(size):
            step(opt, model, x[rows], y[rows])


def train_cached(cache, opt, size, epochs=3):
    g = torch.Generator().manual_seed(9)
    for _ in range(epochs):
        for z, y in cache.batches(size, generator=g):
            step(opt, cache.head, z, y)


def hidden_state(model, opt):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(opt.head.name + ".")}


# -- the same numbers


@pytest.mark.parametrize("fused", [False, True], ids=["kept", "fused"])
@pytest.mark.parametrize("store", ["auto", "features"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model(name, store, fused, monkeypatch):
    if fused:
        monkeypatch.setattr(cached_head, "_KEPT_BYTES", 0)
    model, opt = in_phase_two(name)
    x, y = data()
    cache = gcfast.FeatureCache(model, (x, y), store=store)
    model.train()
    found = []
    for f, inputs in ((model, x), (cache.head, cache.features)):
        opt.zero_grad()
        out = f(inputs)
        F.cross_entropy(out, y).backward()
        found.append([out.detach(), *(p.grad.clone() for p in opt.head.parameters)])
    exact = not (fused and cache.stored == "below")  # else the same kernels see the same batch
    for whole, cached in zip(*found, strict=True):
        torch.testing.assert_close(cached, whole, rtol=0.0 if exact else 1e-5, atol=0.0 if exact else 1e-6)
    assert all(p.grad is None and not p.requires_grad for p in opt.hidden.values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
def test_phase_two_from_the_cache_is_phase_two(name, base, device):
    size = N if base == "lbfgs" else 8
    (whole, opt), (model, own) = (in_phase_two(name, base, torch.float64, device) for _ in range(2))
    x, y = data(torch.float64, device)
    before, start = hidden_state(model, own), model.get_submodule(own.head.name).weight.detach().clone()
    cache = gcfast.FeatureCache(model, (x, y))
    train_whole(whole, opt, x, y, size)
    train_cached(cache, own, size)
    for p, q in zip(own.head.parameters, opt.head.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert not torch.equal(own.head.weight, start)
    assert own.step_count == opt.step_count
    assert all(torch.equal(v, before[k]) for k, v in hidden_state(model, own).items())
    cache.check()
    out = [m.eval()(x) for m in (whole, model)]
    torch.testing.assert_close(out[1], out[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(cache.head(cache.features), out[1])


@pytest.mark.parametrize("many", [False, True])
def test_large_batches_do_not_store_features(many, monkeypatch):
    calls = []
    real = gcfast.ops.wide_forward
    monkeypatch.setattr(gcfast.ops, "wide_forward", lambda *a, **k: calls.append(1) or real(*a, **k))
    model, _ = in_phase_two("wide")
    cache = gcfast.FeatureCache(model, data())
    monkeypatch.setattr(cached_head, "_KEPT_BYTES", N * 41 * 4 - many)
    calls.clear()
    cache.head(cache.features)
    assert len(calls) == many


def test_making_it_runs_the_body_once_and_the_wide_layer_at_a_few_units(monkeypatch):
    model, _ = in_phase_two("wide")
    seen = {"rows": 0, "features": 0}
    model[0].register_forward_hook(lambda m, args, out: seen.update(rows=seen["rows"] + len(out)))
    look = OutputHook(lambda out: seen.update(features=seen["features"] + out.numel()))
    model[4].wide.register_forward_hook(look)
    monkeypatch.setattr(cache_module, "_COMPARED", 6)
    cache = gcfast.FeatureCache(model, DataLoader(TensorDataset(*data()), batch_size=35))
    # 16 samples: the head, the wide layer, features; two looks at 8 samples, one at these and one of the last
    assert seen["rows"] == N + 3 * 16 + 2 * 8 + 9
    # the same samples, the last time from the cached rows
    assert 1 <= len(cache.compared) <= 6 and seen["features"] == N * len(cache.compared) + 4 * 16 * 41


def test_a_resumed_run_needs_no_forward_pass_of_the_model():
    model, opt = in_phase_two("wide")
    torch.manual_seed(1)
    fresh = MODELS["wide"]()
    fresh.load_state_dict(model.state_dict())
    again = gcfast.TwoPhase(BASES["sgd"](fresh.parameters()), fresh, switch_step=2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (fresh, again)):
        train_cached(gcfast.FeatureCache(m, data()), o, 8)
    assert torch.equal(opt.head.weight, again.head.weight)


def test_of_a_hooked_wide_layer_the_features_themselves_are_stored():
    model, _ = in_phase_two("wide")
    model[-1].wide.register_forward_hook(lambda module, args, out: out * (torch.arange(41) == 7))
    x, y = data()
    cache = gcfast.FeatureCache(model, (x, y))
    assert cache.stored == "features" and int((cache.features != 0).any(0).sum()) == 1
    torch.testing.assert_close(cache.head(cache.features), model.eval()(x))
    with pytest.raises(ValueError, match=r"store: .* plain gcfast\.WideLayer .*forward_hook"):
        gcfast.FeatureCache(model, (x, y), store="below")


def test_a_wide_layer_that_is_left_out_for_some_samples_is_noticed():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.head = gcfast.WideLayer(D, 41), nn.Linear(41, C)

        def forward(self, x):
            chosen = x[:, :1] == 50
            some = bool(chosen.any())  # not so in the first batch
            h = self.wide(x)
            return self.head(torch.where(chosen, h[:, :1], h) if some else h)

    model = Sometimes().requires_grad_(False)
    model.head.requires_grad_(True)
    x, y = data()
    x[32, 0] = 50
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    with pytest.raises(ValueError, match="model: for sample 32 what enters the head is not softplus"):
        gcfast.FeatureCache(model, loader)
    assert gcfast.FeatureCache(model, loader, store="features").stored == "features"


@pytest.mark.parametrize("store", ["below", "features"])
def test_outputs_that_are_changed_for_some_samples_are_noticed(store):
    class Doubled(nn.Sequential):
        def forward(self, x):
            out = super().forward(x)
            return 2 * out if bool((x[:, 0] == 50).any()) else out

    model = Doubled(gcfast.WideLayer(D, 41), nn.Linear(41, C))
    model[0].requires_grad_(False)
    x, y = data()
    x[32, 0] = 50
    with pytest.raises(gcfast.HeadError, match=r"model: for sample 32 the output is not W h \+ b"):
        gcfast.FeatureCache(model, DataLoader(TensorDataset(x, y), batch_size=32), store=store)


def test_the_output_has_the_shape_the_model_gives():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            return self.inner(x).squeeze(-1)

    model = Scalar().requires_grad_(False)
    model.inner[2].requires_grad_(True)
    x, _ = data()
    cache = gcfast.FeatureCache(model, (x, torch.randn(N)))
    assert torch.equal(cache.head(cache.features), model(x))
    assert cache.head(cache.features[:1]).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_have_the_type_of_the_model(dtype):
    model, opt = in_phase_two("wide", dtype=dtype)
    x, y = data(dtype)
    cache = gcfast.FeatureCache(model, (x, y))
    assert cache.dtype == cache.head(cache.features).dtype == dtype
    assert torch.equal(cache.head(cache.features), model(x))
    assert cache.nbytes == N * 12 * dtype.itemsize + N * 8
    train_cached(cache, opt, 8)
    assert bool(opt.head.weight.isfinite().all())


def test_wrapped_model_random_state_and_flags_stay():
    model, _ = in_phase_two("linear")
    model.train()
    model[1].eval()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    cache = gcfast.FeatureCache(nn.DataParallel(model), DataLoader(TensorDataset(*data()), batch_size=10))
    assert torch.equal(state, torch.get_rng_state()) and flags == [m.training for m in model.modules()]
    model.eval()
    torch.testing.assert_close(cache.head(cache.features), model(data()[0]))


# -- what is held


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_is_held(name):
    model, opt = in_phase_two(name)
    cache = gcfast.FeatureCache(model, data())
    width = 24 if "conv" in name else 12
    assert cache.stored == ("below" if name in WIDE else "features")
    assert cache.features.shape == (N, width) and not cache.features.requires_grad
    assert torch.equal(cache.targets, data()[1])
    assert repr(cache).startswith(f"FeatureCache({N} inputs of the ")
    full = gcfast.FeatureCache(model, data(), store="features")
    assert full.stored == "features" and full.features.shape == (N, opt.head.in_features)


def test_a_wide_layer_narrower_than_its_input_is_not_worth_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 12), gcfast.WideHead(gcfast.WideLayer(12, 7), nn.Linear(7, C)))
    model[0].requires_grad_(False)
    model[1].wide.requires_grad_(False)
    assert gcfast.FeatureCache(model, data()).stored == "features"
    assert gcfast.FeatureCache(model, data(), store="below").stored == "below"


# -- mini-batches


def test_batches_cover_every_sample_once_in_the_order_of_the_generator():
    cache = gcfast.FeatureCache(in_phase_two()[0], data())
    passes = [list(cache.batches(8, generator=torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert [len(y) for _, y in passes[0]] == [8, 8, 8, 8, 5]
    for one, want in zip(passes, (order, order, None)):
        z, y = (torch.cat(part) for part in zip(*one))
        if want is not None:
            assert torch.equal(z, cache.features[want]) and torch.equal(y, cache.targets[want])
        assert sorted(map(tuple, z.tolist())) == sorted(map(tuple, cache.features.tolist()))
    assert not torch.equal(passes[0][0][0], passes[2][0][0])
    torch.manual_seed(1)
    assert torch.equal(next(cache.batches(8))[0], passes[0][0][0])
    plain = list(cache.batches(100, shuffle=False))
    assert len(plain) == 1 and torch.equal(plain[0][0], cache.features)
    assert [len(y) for _, y in cache.batches(8, drop_last=True)] == [8] * 4
    assert list(cache.batches(N + 1, drop_last=True)) == []


def test_dataloader():
    cache = gcfast.FeatureCache(in_phase_two()[0], data())
    assert len(cache) == N and torch.equal(cache[-1][0], cache.features[-1])
    assert torch.equal(cache[3:5][1], cache.targets[3:5])
    loader = DataLoader(cache, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    z, y = (torch.cat(part) for part in zip(*loader))
    same = DataLoader(range(N), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    order = torch.cat(list(same))
    assert torch.equal(z, cache.features[order]) and torch.equal(y, cache.targets[order])
    at_once = DataLoader(cache, sampler=BatchSampler(RandomSampler(cache), 8, False), batch_size=None)
    assert [tuple(z.shape) for z, _ in at_once] == [(8, 12)] * 4 + [(5, 12)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*data()))


def test_data_of_any_kind_give_the_same_rows():
    model, _ = in_phase_two()
    want = gcfast.FeatureCache(model, data())
    pairs = list(zip(*data(), strict=True))
    for given in (TensorDataset(*data()), DataLoader(Stream(), batch_size=7), DataLoader(pairs, 10)):
        cache = gcfast.FeatureCache(model, given, fixed=True)
        torch.testing.assert_close(cache.features, want.features)
        assert torch.equal(cache.targets, want.targets)
