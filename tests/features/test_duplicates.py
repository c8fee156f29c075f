"""Equal rows and samples: every planted copy is found, nothing else, whatever the keys do."""

from __future__ import annotations

import sys
import time

import children
import numpy as np
import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from gcfast.features import duplicates
from gcfast.features.duplicates import RowKeys, equal_rows, equal_samples

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
real_keys = duplicates._keys


@pytest.fixture(params=["hash", "two bits", "constant"])
def keys(request, monkeypatch):
    """The hash as it is, and hashes that collide: they may cost time only."""
    if request.param != "hash":
        mask = 3 if request.param == "two bits" else 0
        monkeypatch.setattr(duplicates, "_keys", lambda parts, index=None: real_keys(parts, index) & mask)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Every loop over chunks takes several turns."""
    monkeypatch.setattr(duplicates, "_chunk", lambda device, words: 3)


def brute(parts):
    """Groups of equal samples by comparing all pairs."""
    n = len(parts[0])
    left, groups = list(range(n)), []
    while left:
        i, *rest = left
        same = [j for j in rest if all(bool((p[i] == p[j]).all()) for p in parts)]
        if same and all(bool((p[i] == p[i]).all()) for p in parts):
            groups.append([i, *same])
        left = [j for j in rest if j not in same]
    return groups


def in_blocks(parts, sizes):
    """The samples in blocks of the sizes given, in turn."""
    start = turn = 0
    while start < len(parts[0]):
        yield [p[start : start + sizes[turn % len(sizes)]] for p in parts]
        start += sizes[turn % len(sizes)]
        turn += 1


def by_passes(parts, first=(3, 1, 4), second=(2, 5)):
    keys = RowKeys()
    for block in in_blocks(parts, first):
        keys.add(block)
    assert len(keys) == len(parts[0])
    found = keys.confirm(in_blocks(parts, second))
    proposed = {i: g for g, group in enumerate(keys.candidates()) for i in group}
    assert all(len({proposed[i] for i in group}) == 1 for group in found)
    return found


def planted(n, d, dtype, seed=0, copies=None):
    """Random rows, a quarter of them copies of others, and the groups."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=g).mul(40).to(dtype)
    if dtype == torch.bool:
        rows = torch.rand(n, d, generator=g) < 0.5
    to = torch.randperm(n, generator=g)[: copies or n // 4]
    rows[to] = rows[torch.randint(n, (len(to),), generator=g)]
    return rows


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 1), (40, 7), (60, 33), (50, 300)], ids=str)
def test_every_dtype_and_width(dtype, shape, keys, small_chunks):
    rows = planted(*shape, dtype)
    expected = brute([rows])
    assert expected
    assert equal_rows(rows) == expected
    assert by_passes([rows]) == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 2, 5, 520])
def test_signed_zero_and_nan(dtype, d, keys):
    zero, nan = torch.zeros(d, dtype=dtype), torch.full((d,), float("nan"), dtype=dtype)
    inf = torch.full((d,), float("inf"), dtype=dtype)
    mixed = torch.ones(d, dtype=dtype)
    mixed[-1] = float("nan")
    rows = torch.stack([nan, zero, mixed, -zero, inf, nan, mixed, -inf, inf, zero])
    assert torch.signbit(rows[3]).all()
    assert equal_rows(rows) == by_passes([rows]) == [[1, 3, 9], [4, 8]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_small_matrices_as_compared_pair_by_pair(data):
    n, d = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 5))
    value = st.sampled_from([0.0, -0.0, 1.0, 2.0**-149, -1.0, float("nan"), float("inf")])
    dtype = data.draw(st.sampled_from(FLOATS))
    entries = data.draw(st.lists(value, min_size=n * d, max_size=n * d))
    rows = torch.tensor(entries, dtype=torch.float64).reshape(n, d).to(dtype)
    mask = data.draw(st.sampled_from([-1, 1, 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_keys", lambda parts, index=None: real_keys(parts, index) & mask)
        patch.setattr(duplicates, "_chunk", lambda device, words: data.draw(st.integers(1, 4)))
        expected = brute([rows])
        assert equal_rows(rows) == expected
        first, second = (tuple(data.draw(st.lists(st.integers(1, 6), min_size=1))) for _ in range(2))
        assert by_passes([rows], first, second) == expected


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: torch.stack([x, torch.rand_like(x)], 2).flatten(1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "shifted": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x], 1)[:, 1:],
    "wants a gradient": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [9, 400])
def test_layouts_and_devices(layout, d, device, keys):
    rows = planted(80, d, torch.float32)
    expected = brute([rows])
    laid = LAYOUTS[layout](rows.to(device))
    assert torch.equal(real_keys([laid.detach()]).cpu(), real_keys([rows]))
    assert equal_rows(laid) == by_passes([laid]) == expected


def test_expanded_rows():
    assert equal_rows(torch.rand(1, 300).expand(5, 300)) == [[0, 1, 2, 3, 4]]
    assert equal_rows(torch.rand(5, 1).expand(5, 300)) == []


def test_memory_mapped_rows(tmp_path):
    rows = planted(100, 300, torch.float32)
    stored = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(100, 300))
    stored[:] = rows.numpy()
    assert equal_rows(torch.from_numpy(stored)) == brute([rows])


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_and_no_columns(n, dtype, keys):
    expected = [list(range(n))] if n > 1 else []
    assert equal_rows(torch.zeros(n, 0, dtype=dtype)) == expected
    assert by_passes([torch.zeros(n, 0, dtype=dtype)]) == expected
    assert equal_rows(torch.zeros(n, 3, dtype=dtype)) == expected
    assert RowKeys().candidates() == RowKeys().confirm([]) == []


def test_samples_of_several_tensors(keys, small_chunks):
    g = torch.Generator().manual_seed(1)
    parts = [
        torch.randint(0, 2, (60, 2, 1, 2), generator=g).double(),
        torch.randint(0, 2, (60,), generator=g),
        torch.randint(0, 2, (60, 3), generator=g).bool(),
        torch.complex(*torch.randint(0, 2, (2, 60, 1), generator=g).float()).conj(),
    ]
    expected = brute(parts)
    assert expected and expected != brute(parts[:1])
    assert equal_samples(parts) == by_passes(parts) == expected
    assert equal_samples([p.flip(0) for p in parts]) == brute([p.flip(0) for p in parts])


def test_which_tensor_holds_what_counts():
    """Samples whose numbers are the same ones, but in other tensors or places, are different."""
    a, b = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0], [1.0], [2.0]])
    assert equal_samples([a, b]) == [[0, 2]]
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [1.0]])
    assert len(real_keys([x, y]).unique()) == 2 and equal_samples([x, y]) == []


def test_samples_of_several_shapes_in_a_pass(keys):
    keys = RowKeys()
    blocks = [torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(1, 3), torch.zeros(1, 2, 2), torch.ones(2, 3)]
    for block in blocks:
        keys.add(block)
    assert keys.confirm(blocks) == [[0, 1, 4], [2, 3], [6, 7]]


def test_keys_do_not_depend_on_chunks(monkeypatch):
    rows = planted(50, 37, torch.float16)
    whole = real_keys([rows])
    index = torch.tensor([3, 0, 49])
    assert torch.equal(real_keys([rows], index), whole[index])
    for step in (1, 7, 49):
        monkeypatch.setattr(duplicates, "_chunk", lambda device, words, step=step: step)
        assert torch.equal(real_keys([rows]), whole)
    assert torch.equal(torch.cat([real_keys([r]) for r in rows.split(11)]), whole)


def test_keys_are_these():
    """Keys that are stored in one process are compared in another: they must not change with it."""
    rows = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    code = (
        "import torch; from gcfast.features.duplicates import _keys; "
        "print(_keys([torch.arange(6, dtype=torch.float32).reshape(2, 3)]).tolist())"
    )
    out = children.run([sys.executable, "-c", code])
    assert out.returncode == 0 and out.stdout.strip() == str(real_keys([rows]).tolist())


@pytest.mark.parametrize(
    "kind", ["signs", "signs twice", "high words", "powers", "small integers", "one hot"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_keys_of_coarse_numbers_rarely_collide(kind, dtype):
    """Numbers that differ in a few high bits only are what a plain sum of products would confuse."""
    n, g = 30_000, torch.Generator().manual_seed(2)
    if kind == "one hot":
        rows = torch.eye(1000)
    else:
        rows = torch.randint(0, 2, (n, 40), generator=g).float() * 2 - 1
        if kind == "signs twice":
            rows = rows.repeat_interleave(4, 1)
        if kind == "high words":
            rows = torch.stack([torch.zeros_like(rows)] * 3 + [rows], 2).flatten(1)
        if kind == "powers":
            rows = rows.exp2()
        if kind == "small integers":
            rows = torch.randint(0, 256, (n, 8), generator=g).float()
    distinct = len(rows.unique(dim=0))
    assert len(real_keys([rows.to(dtype)]).unique()) >= distinct - 3


def test_a_first_look_settles_most_rows(monkeypatch):
    """Rows that differ in the columns first looked at are not read again."""
    rows = torch.rand(200, 1000)
    rows[150] = rows[20]
    asked = []

    def spy(parts, index=None):
        asked.append(None if index is None else index.tolist())
        return real_keys(parts, index)

    monkeypatch.setattr(duplicates, "_keys", spy)
    assert equal_rows(rows) == [[20, 150]]
    assert asked == [None, [20, 150]]
    # and where those columns are all equal, everything is
    rows[:, 1:] = 0.0
    assert equal_rows(rows) == [[20, 150]]


def test_confirm_keeps_one_row_of_each_value(monkeypatch):
    monkeypatch.setattr(duplicates, "COMPACT_BYTES", 64)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [float("nan"), 0.0], [5.0, 6.0]]).repeat(50, 1)
    most = 0
    compact = duplicates._Kept._compact

    def watched(self):
        nonlocal most
        compact(self)
        most = max(most, sum(len(row[0]) for row in self.rows))

    monkeypatch.setattr(duplicates._Kept, "_compact", watched)
    expected = [list(range(k, 200, 4)) for k in (0, 1, 3)]
    assert by_passes([rows], (8,), (5, 7)) == expected
    assert most == 3, "NaN cannot be equal to what comes later"


def test_confirm_says_when_the_samples_change():
    rows = planted(60, 4, torch.float32)
    keys = RowKeys()
    keys.add(rows)
    assert keys.confirm([rows]) == brute([rows])
    with pytest.raises(ValueError, match="others than in the first pass"):
        keys.confirm([rows + 1])
    with pytest.raises(ValueError, match="others than in the first pass"):
        keys.confirm([rows.flip(0)])
    with pytest.raises(ValueError, match="10 samples, where the first pass had 60"):
        keys.confirm([rows[:10]])


def test_confirm_does_not_read_on_where_no_candidate_is_left():
    keys = RowKeys()
    keys.add(torch.arange(10.0)[:, None])

    def blocks():
        raise AssertionError("read")
        yield

    assert keys.confirm(blocks()) == []


def test_errors():
    with pytest.raises(TypeError, match=r"rows: expected a tensor \(n, d\); got list"):
        equal_rows([[1.0]])
    with pytest.raises(ValueError, match=r"rows: expected shape \(n, d\); got \(3,\)"):
        equal_rows(torch.zeros(3))
    with pytest.raises(ValueError, match="parts: expected at least one tensor"):
        equal_samples([])
    with pytest.raises(ValueError, match="as many samples in every tensor; got 2, 3"):
        equal_samples([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="got a scalar"):
        equal_samples([torch.tensor(1.0)])
    keys = RowKeys()
    with pytest.raises(TypeError, match="data: expected tensors with samples first; got str"):
        keys.add(["a"])
    keys.add(torch.zeros(2, 3))
    for other in (torch.zeros(2, 3).double(), [torch.zeros(2, 3)] * 2):
        with pytest.raises(ValueError, match="dtypes"):
            keys.add(other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["distinct", "all equal", "all nan", "pairs", "half equal"])
def test_many_rows_take_no_loop_over_them(case, device):
    n = 100_000
    rows = torch.rand(n, 24, generator=torch.Generator().manual_seed(3))
    other = torch.randperm(n, generator=torch.Generator().manual_seed(4))
    if case == "all equal":
        rows[:] = 1.0
    elif case == "all nan":
        rows[:] = float("nan")
    elif case == "pairs":
        rows[other[n // 2 :]] = rows[other[: n // 2]]
    elif case == "half equal":
        rows[other[n // 2 :]] = 0.0
    expected = {
        "all equal": [list(range(n))],
        "pairs": sorted(sorted(pair) for pair in zip(other[: n // 2].tolist(), other[n // 2 :].tolist())),
        "half equal": [other[n // 2 :].sort()[0].tolist()],
    }.get(case, [])
    rows = rows.to(device)
    start = time.perf_counter()
    assert equal_rows(rows) == expected
    assert by_passes([rows], (n // 8,), (n // 5,)) == expected
    assert time.perf_counter() - start < 60  # a loop over pairs of members would take hours
