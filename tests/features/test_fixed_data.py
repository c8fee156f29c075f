"""The data are the data: whatever gives other samples at a second reading, or not all of them, is refused."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import gcfast

N, D, M, C = 50, 6, 70, 3


def xy():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=g), torch.arange(N) % C


def model():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(D, M), nn.Tanh(), nn.Linear(M, C))
    return body.requires_grad_(False)


def certify(data, **options):
    return gcfast.certify(model(), data, loss="cross_entropy", **options)


def solve(data, **options):
    return gcfast.solve_head(model(), data, target_gap=0.5, **options)


def cache(data, **options):
    return gcfast.FeatureCache(model(), data, **options)


USES = [certify, solve, cache]


class Samples(Dataset):
    """A map-style dataset, which changes what it gives as `change(i, x, y)` says."""

    def __init__(self, change=lambda i, x, y: (x, y)):
        self.x, self.y = xy()
        self.change = change

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.change(i, self.x[i], self.y[i])


class Stream(IterableDataset):
    """An iterable dataset with a length; `order(turn)` gives the samples of each reading."""

    def __init__(self, order=lambda turn: range(N)):
        self.order, self.turn = order, 0

    def __len__(self):
        return N

    def __iter__(self):
        self.turn += 1
        x, y = xy()
        return ((x[i], y[i]) for i in self.order(self.turn))


class StreamOfBatches(IterableDataset):
    """Its length is the number of its batches."""

    def __len__(self):
        return 5

    def __iter__(self):
        return iter(Batches())


class Endless(Stream):
    __len__ = None


class Batches:
    """Batches of ten from an iterable of one's own, of the samples that `order(turn)` gives."""

    def __init__(self, order=lambda turn: range(N), length=N // 10):
        self.order, self.length, self.turn = order, length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        self.turn += 1
        x, y = xy()
        index = torch.tensor(list(self.order(self.turn)))
        return iter([(x[i], y[i]) for i in index.split(10)])


class Backwards(Sampler):
    def __iter__(self):
        return iter(reversed(range(N)))

    def __len__(self):
        return N


class Restless(Sampler):
    """The first batch stays, what follows is shuffled."""

    def __iter__(self):
        return iter([*range(10), *(10 + torch.randperm(N - 10)).tolist()])


def loader(dataset=None, **options):
    return DataLoader(Samples() if dataset is None else dataset, **{"batch_size": 8, **options})


# -- read as they are, or in the dataset's order


READ_WHOLE = {
    "in order": lambda: loader(),
    "shuffle": lambda: loader(shuffle=True),
    "shuffle, tensors": lambda: loader(TensorDataset(*xy()), shuffle=True, drop_last=True),
    "random sampler": lambda: loader(sampler=RandomSampler(range(N))),
    "few draws": lambda: loader(sampler=RandomSampler(range(N), replacement=True, num_samples=20)),
    "weights": lambda: loader(sampler=WeightedRandomSampler(torch.rand(N), 30)),
    "batch sampler": lambda: DataLoader(
        Samples(), batch_sampler=BatchSampler(RandomSampler(range(N)), 8, True)
    ),
    "no collation": lambda: DataLoader(
        TensorDataset(*xy()), sampler=BatchSampler(RandomSampler(range(N)), 8, True), batch_size=None
    ),
    "drop_last": lambda: loader(drop_last=True),
    "distributed": lambda: loader(sampler=DistributedSampler(Samples(), num_replicas=4, rank=1)),
    "own order": lambda: loader(sampler=Backwards()),
    "own order that changes": lambda: loader(sampler=Restless(), drop_last=True),
    "one-shot sampler": lambda: loader(sampler=iter(torch.randperm(N))),
    "own batches": lambda: DataLoader(Samples(), batch_sampler=torch.randperm(N).split(7)),
    "workers": lambda: loader(num_workers=2, shuffle=True),
    "persistent workers": lambda: loader(num_workers=2, persistent_workers=True, in_order=False),
    "iterable": lambda: loader(Stream()),
    "iterable, drop_last": lambda: loader(Stream(), drop_last=True),
    "iterable of batches": lambda: DataLoader(StreamOfBatches(), batch_size=None),
    "dataset": Samples,
    "batches": Batches,
    "list of batches": lambda: list(loader()),
    "length in samples": lambda: Batches(length=N),
}


@pytest.mark.parametrize("kind", READ_WHOLE)
def test_every_sample_is_read_once(kind, caplog):
    found = cache(READ_WHOLE[kind]())
    x, y = xy()
    with torch.no_grad():
        h = model()[:2](x)
    assert len(found) == N
    order = list(range(N))
    if kind.startswith("own") or kind == "one-shot sampler":
        order = torch.cdist(found.features, h).argmin(1).tolist()
        assert sorted(order) == list(range(N))
    torch.testing.assert_close(found.features, h[order])
    assert torch.equal(found.targets, y[order])
    said = [record for record in caplog.records if record.name == "gcfast" and record.levelname == "WARNING"]
    quiet = ("in order", "persistent workers", "iterable", "iterable of batches", "dataset", "batches")
    assert len(said) == (kind not in (*quiet, "list of batches", "length in samples"))
    assert all(record.getMessage().startswith("data: this DataLoader") for record in said)
    assert kind != "few draws" or "draws samples again or leaves some out" in said[0].getMessage()


@pytest.mark.parametrize("kind", ["shuffle", "drop_last", "iterable", "batches", "workers"])
def test_certify_and_solve_head_read_them_too(kind):
    cert = certify(READ_WHOLE[kind]())
    assert (cert.status, cert.n) == ("holds", N)
    assert cert.loss == pytest.approx(certify(xy()).loss)
    assert solve(READ_WHOLE[kind]()).converged


def test_a_subset_sampler_means_its_subset():
    chosen = [40, 3, 17, 9]
    found = cache(loader(sampler=SubsetRandomSampler(chosen)))
    assert torch.equal(found.targets, xy()[1][sorted(chosen)])
    assert len(cache(loader(Subset(Samples(), chosen), shuffle=True))) == 4


def test_a_users_loader_stays_as_it_is():
    given = loader(shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
    before = dict(vars(given))
    cache(given)
    assert vars(given) == before


class Augmenting(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x + torch.rand_like(x), y


# -- others at the second reading, or not all


def few(draw):
    """A random transform of sample 33 alone."""
    return Samples(lambda i, x, y: (x + draw() if i == 33 else x, y))


class Seen(Samples):
    """Sample 20 is another one whenever it is read again."""

    times = 0

    def __getitem__(self, i):
        self.times += i == 20
        return self.x[i] + self.times * (i == 20), self.y[i]


def labels(i, x, y):
    return x, (y + torch.randint(C, ())) % C if i > 10 else y


CHANGES = {
    "torch noise": (lambda: few(lambda: torch.rand(())), "sample 33 .* its inputs"),
    "numpy noise": (lambda: few(lambda: float(np.random.rand())), "sample 33 .* its inputs"),
    "python noise": (lambda: few(random.random), "sample 33 .* its inputs"),
    "noise in workers": (lambda: loader(few(lambda: torch.rand(())), num_workers=2), "sample 33"),
    "noise in workers that stay": (
        lambda: loader(few(random.random), num_workers=1, persistent_workers=True),
        "sample 33",
    ),
    "noise and shuffling": (lambda: loader(few(random.random), shuffle=True), "sample 33"),
    "a loader that augments": (lambda: Augmenting(Samples(), batch_size=8), "sample 0"),
    "a state that grows": (Seen, "sample 20 .* its inputs"),
    "targets": (lambda: Samples(labels), "sample 1[1-9] .* its target"),
    "reversed": (lambda: Batches(lambda turn: range(N)[:: (-1) ** turn]), "sample 0"),
    "order after the first batch": (
        lambda: loader(Stream(lambda turn: [*range(10), *(10 + torch.randperm(40)).tolist()])),
        "sample 1[0-9]",
    ),
    "two samples change places": (
        lambda: loader(Stream(lambda turn: [*range(48), *([48, 49] if turn % 2 else [49, 48])])),
        "sample 48",
    ),
    "ends early": (lambda: loader(Stream(lambda turn: range(N - 3 * (turn > 1)))), "ended after 47 samples"),
    "goes on": (lambda: Batches(lambda turn: range(N - 10 * (turn < 2)), length=4), "goes on after the 40"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", CHANGES)
def test_data_that_change_are_refused_naming_the_first_sample(kind, use):
    data, words = CHANGES[kind]
    with pytest.raises(ValueError, match=f"^data: .*{words}"):
        use(data())


def dropping(pairs):
    return default_collate([pair for pair in pairs if pair[0][0] > -1])


INCOMPLETE = {
    "batch sampler": (
        lambda: DataLoader(Samples(), batch_sampler=[list(range(k, k + 10)) for k in range(0, 40, 10)]),
        "40 of 50 samples and leaves out sample 40",
    ),
    "sampler of another set": (
        lambda: loader(sampler=SequentialSampler(range(20))),
        "20 of 50 samples and leaves out sample 20",
    ),
    "random sampler of another set": (lambda: loader(sampler=RandomSampler(range(20))), "20 of 50 samples"),
    "negative indices": (lambda: loader(sampler=range(-N, 0)), "leaves out sample 0"),
    "repeats": (lambda: loader(sampler=[*range(N), 7]), "gives sample 7 twice"),
    "without an end": (lambda: loader(sampler=iter(lambda: 0, 1)), "gives sample 0 twice"),
    "collate_fn": (lambda: loader(collate_fn=dropping), "where the dataset has 50: .* drops"),
    "iterable": (lambda: loader(Stream(lambda turn: range(48))), "48 samples where the dataset has 50"),
    "workers that all read all": (
        lambda: loader(Stream(), num_workers=2),
        "100 samples where the dataset has 50: .* repeats",
    ),
    "batches": (lambda: Batches(lambda turn: range(40)), "ended after 4 batches of 40 samples"),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", INCOMPLETE)
def test_samples_that_are_left_out_or_repeated_are_refused(kind, use):
    data, words = INCOMPLETE[kind]
    with pytest.raises(ValueError, match=f"^data: .*{words}.*fixed=True"):
        use(data())


def test_what_no_second_reading_can_tell_is_tried_often_enough():
    """Every single sample that changes is seen, the last one as the first."""
    for i in range(0, N, 7):
        with pytest.raises(ValueError, match=f"data: sample {i} is another one"):
            cache(Samples(lambda j, x, y, i=i: (x + random.random() * (i == j), y)))


def test_numbers_that_are_the_same_are_the_same():
    """NaN in half precision, minus zero, infinity: what is equal bit by bit is no change."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = xy()[0].to(dtype)
        x[3, 2], x[4, 1], x[5], x[6, 0] = float("nan"), -0.0, float("inf"), -float("nan")

        class Cleaned(nn.Module):
            def forward(self, x):
                return torch.nan_to_num(x, 1.0, 2.0, -2.0).float()

        whole = nn.Sequential(Cleaned(), model()).requires_grad_(False)
        pairs = list(zip(x, xy()[1], strict=True))
        assert len(gcfast.FeatureCache(whole, DataLoader(pairs, batch_size=7))) == N
        assert gcfast.certify(whole, DataLoader(pairs, batch_size=7)).status == "holds"


# -- kinds of batches


class Structured(nn.Module):
    """Takes dicts, tuples and strings."""

    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x=None, *, a=None, b=None, words=None):
        if words is not None:
            x = torch.tensor([[float(word)] * D for word in words]) + torch.arange(D) ** 2
        return self.body(x if x is not None else torch.cat([a, b], 1))


def structured(kind, change=0.0):
    x, y = xy()

    def sample(i):
        noise = change * random.random() if i == 33 else 0.0
        if kind == "dict":
            return {"a": x[i, :2], "b": x[i, 2:] + noise}, y[i]
        if kind == "strings":
            return {"words": str(i / N + noise)}, y[i]
        if kind == "ints":
            return i + int(2**40 * noise), int(y[i])
        return (x[i] + noise,), y[i]

    class Set(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return sample(i)

    return Set()


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, i):
        return self.body((i[:, None] % 97 / 97) * torch.arange(1, D + 1) ** 2)


@pytest.mark.parametrize("kind", ["dict", "tuple", "strings", "ints"])
def test_batches_of_every_kind(kind):
    whole = Embedded() if kind == "ints" else Structured()
    whole.requires_grad_(False)
    for size in (50, 7):
        cert = gcfast.certify(whole, DataLoader(structured(kind), batch_size=size), loss="cross_entropy")
        assert (cert.status, cert.n) == ("holds", N)
    with pytest.raises(ValueError, match=r"^data: sample 33 is another one"):
        gcfast.certify(whole, DataLoader(structured(kind, 1.0), batch_size=7))
    with pytest.raises(ValueError, match=r"^data: sample 33 is another one"):
        gcfast.FeatureCache(whole, DataLoader(structured(kind, 1.0), batch_size=7))


def test_equal_strings_are_equal_samples():
    class Twice(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return {"words": str(i % 49)}, i % C

    cert = gcfast.certify(Structured(), DataLoader(Twice(), batch_size=7))
    assert cert.status == "fails" and cert.offenders[0].samples == [0, 49]


class Thing:
    pass


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda pairs: (t for t in pairs), "data: expected batches .*; got generator"),
        (lambda pairs: {"x": 1}, "data: expected batches .*; got dict"),
        (lambda pairs: default_collate(pairs)[:1] * 3, "data: expected batches .*; got list of length 3"),
        (lambda pairs: (torch.ones(8, D), ["a"] * 8), "data: expected targets"),
        (lambda pairs: (torch.ones(8, D), 3), "data: .* a target without a dimension"),
        (
            lambda pairs: ({"x": torch.ones(8, D), "y": Thing()}, torch.ones(8)),
            "data: expected inputs of .*Thing",
        ),
    ],
    ids=["generator", "dict", "three", "strings", "number", "object"],
)
@pytest.mark.parametrize("use", USES)
def test_batches_that_are_none_are_named(batch, words, use):
    with pytest.raises((TypeError, ValueError), match=words):
        use(loader(collate_fn=batch))


class Promises(Samples):
    """Says that it has another number of samples than it has."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i >= N:
            raise IndexError(f"no sample {i}")
        return super().__getitem__(i)


class SameAgain(Batches):
    def __iter__(self):
        return itertools.repeat((xy()[0][:10], xy()[1][:10]))


def uneven(change):
    x, y = xy()
    return [(x[:20], y[:20]), change(x[20:], y[20:])]


ODD = {
    "too long": (lambda: Promises(N + 1), {}, "IndexError .*no sample 50.* beyond its samples"),
    "endless stream": (
        lambda: loader(Stream(lambda turn: itertools.cycle(range(N)))),
        {},
        "goes on after .* is 50",
    ),
    "endless batches": (SameAgain, {}, "goes on after .* is 5"),
    "no length": (lambda: Promises(-1), {}, "length of this Promises is none"),
    "subset twice": (lambda: loader(sampler=SubsetRandomSampler([3, 3])), {}, "got 3, 2 times"),
    "subset beyond": (lambda: loader(sampler=SubsetRandomSampler([0, N])), {}, "got 50, 1 times"),
    "subset from behind": (lambda: loader(sampler=SubsetRandomSampler([0, -1])), {}, "got -1, 1 times"),
    "no targets": (lambda: uneven(lambda x, y: x), {"fixed": True}, "batch 1 no targets"),
    "targets of another shape": (lambda: uneven(lambda x, y: (x, y[:, None])), {}, r"batch 1 targets \(1,\)"),
    "of another dtype": (lambda: uneven(lambda x, y: (x, 0.5 * y)), {"fixed": True}, "torch.float32 each"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ODD)
def test_data_that_do_not_fit_together_are_named(kind, use):
    data, options, words = ODD[kind]
    with pytest.raises(ValueError, match=f"^data: .*{words}"):
        use(data(), **options)


@pytest.mark.parametrize("use", USES)
def test_batches_without_samples_change_nothing(use):
    x, y = xy()
    batches = [(x[:0], y[:0]), (x[:20], y[:20]), (x[:0], y[:0]), (x[20:], y[20:]), (x[:0], y[:0])]
    use(batches)
    assert certify(batches).loss == pytest.approx(certify(xy()).loss)


def test_memory_that_a_loader_uses_again_is_copied():
    class Reusing(Batches):
        def __iter__(self):
            x, y = torch.empty(10, D), torch.empty(10, dtype=torch.long)
            for a, b in super().__iter__():
                yield x.copy_(a), y.copy_(b)

    plain = certify(xy())
    assert certify(Reusing()).loss == pytest.approx(plain.loss)
    assert solve(Reusing()).loss == pytest.approx(solve(xy()).loss)


# -- fixed=True


UNKNOWN = {
    "generator": lambda: (batch for batch in loader()),
    "iterator": lambda: iter(loader()),
    "without a length": lambda: loader(Endless()),
    "without a length, bare": Endless,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_has_no_length_needs_fixed(kind, use):
    with pytest.raises(ValueError, match=r"^data: .*fixed=True"):
        use(UNKNOWN[kind]())
    found = use(UNKNOWN[kind](), fixed=True)
    assert (len(found) if use is cache else getattr(found, "n", N)) == N


def test_the_certificate_lists_what_the_user_says():
    def assumption(data, **options):
        found = [a for a in certify(data, **options).assumptions if a.name == "fixed data"]
        return found[0] if found else None

    assert assumption(xy()) is assumption(TensorDataset(*xy())) is None
    said = assumption(loader(), fixed=True)
    assert said.status == "not checked" and "the user says that the 50 samples" in said.reason
    read = assumption(loader())
    assert read.status == "holds" and "read twice, the second time without the model" in read.reason
    assert "[not checked] fixed data" in str(certify(loader(), fixed=True))


@pytest.mark.parametrize("use", USES)
def test_fixed_data_are_read_once(use):
    given = Batches()
    use(given, fixed=True)
    assert given.turn == 1
    use(given)
    assert given.turn == 3  # one reading before, and two


def test_copies_in_what_is_read_once_cannot_be_confirmed():
    x, y = xy()
    x[7] = x[3]
    pairs = [(x, y)]
    with pytest.raises(
        ValueError, match=r"^data: samples 3 and 7 seem equal, .* this generator can be read only"
    ):
        certify((pair for pair in pairs), fixed=True)
    cert = certify(pairs, fixed=True)
    assert cert.status == "fails" and cert.offenders[0].samples == [3, 7]


@pytest.mark.parametrize("use", [*USES, lambda data, **options: gcfast.plan(model(), data, **options)])
def test_fixed_is_true_or_false(use):
    with pytest.raises(TypeError, match="fixed: expected True or False; got 'yes'"):
        use(xy(), fixed="yes")


# -- what a second reading costs


def test_the_second_reading_is_told_and_runs_no_model():
    calls, steps = [], []
    whole = model()
    whole[0].register_forward_hook(lambda m, args, out: calls.append(len(out)))
    gcfast.certify(whole, xy(), callback=lambda step, share: None)
    plain = len(calls)
    gcfast.certify(whole, loader(batch_size=N), callback=lambda step, share: steps.append((step, share)))
    assert len(calls) == 2 * plain
    assert [share for step, share in steps if step == "second reading"] == [1.0]


def test_plan_counts_the_second_reading():
    class Slow(Samples):
        def __getitem__(self, i):
            torch.zeros(1 << 20).sum()
            return super().__getitem__(i)

    stage = gcfast.plan(model(), Slow(), rates="h100")["data"]
    assert stage.bytes == 16 * N and stage.seconds > 0 and "50 samples compared" in str(stage)
    for given, options in ((xy(), {}), (TensorDataset(*xy()), {}), (Slow(), {"fixed": True})):
        found = gcfast.plan(model(), given, rates="h100", **options)
        assert [s.name for s in found.stages] == ["certify", "solve"]
    with pytest.raises(ValueError, match=r"^data: .*fixed=True"):
        gcfast.plan(model(), UNKNOWN["generator"]())
    with pytest.raises(ValueError, match=r"^data: expected data that say how many"):
        gcfast.plan(model(), UNKNOWN["generator"](), fixed=True)


def test_no_random_number_of_the_users_is_used_up():
    state = torch.get_rng_state()
    whole = model()
    torch.set_rng_state(state)
    gcfast.FeatureCache(whole, loader(shuffle=True))
    gcfast.plan(whole, loader(), rates="h100")
    assert torch.equal(state, torch.get_rng_state())
