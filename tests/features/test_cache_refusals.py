"""FeatureCache, where it says no: weights still trained, data that vary, a model that has changed since."""

from __future__ import annotations

import copy

import pytest
import torch
from test_cache import D, N, data, in_phase_two, train_cached
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gcfast


class Noisy(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return data()[0][i] + torch.rand(D), data()[1][i]


def short(pairs):
    x, y = zip(*pairs)
    return torch.stack(x), torch.stack(y)[1:]


@pytest.mark.parametrize(
    "given, message",
    [
        (Noisy(), "data: sample 0 is another one in the second reading, in its inputs"),
        (data()[0], "data: expected .*there are no targets"),
        ((data()[0][:0], data()[1][:0]), "data: the training set is empty"),
        (DataLoader(TensorDataset(*data()), 8, collate_fn=short), "a batch of 8 inputs came with 7 targets"),
        (DataLoader([], batch_size=8), "data: the training set is empty"),
        ((data()[0].clone().fill_(float("nan")), data()[1]), "features: not finite: nan at sample 0, unit 0"),
    ],
    ids=["augments", "no targets", "empty", "short", "empty loader", "nan"],
)
def test_data_are_refused(given, message):
    model, _ = in_phase_two()
    with pytest.raises(ValueError, match=message):
        gcfast.FeatureCache(model, given)


class Restless(nn.Module):
    """Noise from a generator of its own, which evaluation mode does not end."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, z):
        return z + 0.01 * torch.randn(z.shape, generator=self.generator)


@pytest.mark.parametrize("use", [gcfast.FeatureCache, gcfast.certify], ids=["FeatureCache", "certify"])
def test_features_that_are_others_each_time_are_refused(use):
    model = nn.Sequential(nn.Linear(D, 12), Restless(), nn.Linear(12, 3))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="model: the same inputs gave other features in a second look"):
        use(model, data())


def test_arguments_are_named():
    model, _ = in_phase_two("linear")
    with pytest.raises(ValueError, match="store: expected one of 'auto', 'below', 'features'; got 'z'"):
        gcfast.FeatureCache(model, data(), store="z")
    with pytest.raises(ValueError, match=r"store: expected a plain gcfast\.WideLayer"):
        gcfast.FeatureCache(model, data(), store="below")
    cache = gcfast.FeatureCache(model, data())
    for size in (0, 2.0, True):
        with pytest.raises((TypeError, ValueError), match="batch_size: expected a positive int"):
            cache.batches(size)


def test_memory_is_asked_for_beforehand():
    model, _ = in_phase_two("wide")
    below = N * (12 * 4 + 8)
    assert gcfast.FeatureCache(model, data(), max_bytes=below).nbytes == below
    with pytest.raises(MemoryError, match=rf"37 samples needs {below:,} bytes .* allows {below - 1:,}.*cpu"):
        gcfast.FeatureCache(model, data(), max_bytes=below - 1)
    with pytest.raises(MemoryError, match=f"needs {N * (41 * 4 + 8):,} bytes.*store='below'"):
        gcfast.FeatureCache(model, data(), store="features", max_bytes=below)


def test_weights_that_are_still_trained_are_named():
    model, opt = in_phase_two()
    opt.unfreeze()
    with pytest.raises(
        ValueError, match=r"model: '0\.weight' and 5 more below the head '4\.head' still require"
    ):
        gcfast.FeatureCache(model, data())


def test_a_hook_that_would_act_twice_is_noticed():
    model, _ = in_phase_two("wide")
    handle = model[-1].head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    with pytest.raises(ValueError, match=r"from its head.* on it gives other outputs than as a whole"):
        gcfast.FeatureCache(model, data(), store="features")
    handle.remove()
    assert len(gcfast.FeatureCache(model, data(), store="features")) == N


@pytest.mark.parametrize("what", ["0.weight", "1.running_mean", "1.num_batches_tracked", "4.wide.bias"])
def test_a_change_below_the_head_is_noticed(what):
    model, opt = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    train_cached(cache, opt, 8)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[what]
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(1)
    for use in (lambda: cache.head(cache.features), lambda: cache.batches(8), cache.check):
        with pytest.raises(RuntimeError, match=f"the cache is stale: '{what}' changed"):
            use()
    with torch.no_grad():
        tensor.copy_(kept)
    cache.check()
    assert len(cache.head(cache.features)) == N


def test_writing_what_is_there_already_is_no_change():
    model, opt = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for p in model.parameters():
        p.data = p.data.clone()
    train_cached(cache, opt, 8)
    gcfast.solve_head(model, data())
    cache.check()
    cache.head(cache.features)


def test_what_versions_do_not_tell_a_full_check_does():
    model, _ = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    model[0].bias.data.mul_(2)
    cache.head(cache.features)
    with pytest.raises(RuntimeError, match=r"'0\.bias' changed"):
        cache.check()
    model[0].bias.data.div_(2)
    cache.check()
    kept = model[0]
    model[0] = nn.Linear(D, 12)
    with pytest.raises(RuntimeError, match=r"'0\.weight' changed"):
        cache.check()
    model[0] = nn.Sequential(kept)
    with pytest.raises(RuntimeError, match=r"'0\.0\.bias' is new|'0\.bias' is gone"):
        cache.check()
    model[0] = kept
    model[-1].head = nn.Linear(41, 3)
    with pytest.raises(RuntimeError, match=r"the head .* is not there"):
        cache.check()


def test_a_full_check_sees_another_activation():
    model, _ = in_phase_two("wide")
    cache = gcfast.FeatureCache(model, data())
    wide, index = model[-1].wide, next(i for i, m in enumerate(model) if not list(m.parameters()))
    model[index], kept = nn.ReLU(), model[index]
    with pytest.raises(RuntimeError, match=f"'{index}' changed"):
        cache.check()
    model[index] = kept
    cache.check()
    for name, value in (("beta", 3.0), ("activation", "tanh")):
        before = getattr(wide, name)
        setattr(wide, name, value)
        with pytest.raises(RuntimeError, match=r"'\d\.wide' changed"):
            cache.check()
        setattr(wide, name, before)
    cache.check(copy.deepcopy(model))


def test_a_full_check_sees_another_option_of_torchs_layers():
    model = nn.Sequential(nn.Linear(D, 30), nn.LeakyReLU(0.1), nn.Linear(30, 3))
    model[0].requires_grad_(False)
    cache = gcfast.FeatureCache(model, data())
    cache.check(copy.deepcopy(model).train())
    model[1].negative_slope = 0.2
    with pytest.raises(RuntimeError, match="'1' changed"):
        cache.check()


def test_a_replaced_weight_is_noticed_at_once():
    model, _ = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    model[0].weight = nn.Parameter(torch.zeros(12, D), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"'0\.weight' changed"):
        cache.head(cache.features)


def test_a_weight_whose_memory_was_exchanged_is_noticed_at_once():
    """`p.data = ...`, by which averaged weights are swapped in: the same parameter, of the same version."""
    model, _ = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    own = model[0].weight.data
    model[0].weight.data = 0.5 * own
    for use in (lambda: cache.head(cache.features), lambda: cache.batches(8)):
        with pytest.raises(RuntimeError, match=r"'0\.weight' changed"):
            use()
    model[0].weight.data = own
    assert len(cache.head(cache.features)) == N


def test_another_model_can_be_compared_with():
    model, opt = in_phase_two()
    cache = gcfast.FeatureCache(model, data())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].head.weight.zero_()
    cache.check(other)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"'0\.weight' changed"):
        cache.check(other)
    assert opt.phase == 2


def test_a_non_persistent_buffer_counts():
    model, _ = in_phase_two("linear")
    model[0].register_buffer("shift", torch.zeros(12), persistent=False)
    cache = gcfast.FeatureCache(model, data())
    model[0].shift.add_(1)
    with pytest.raises(RuntimeError, match=r"'0\.shift' changed"):
        cache.head(cache.features)
