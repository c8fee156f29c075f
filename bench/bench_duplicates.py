"""Groups of equal rows: numpy, torch and Python's sets beside keys in chunks and an exact comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _compare import compare, copy_bandwidth, show, sized

from gcfast.features.duplicates import RowKeys, equal_rows

N, D = sized((200_000, 512), smallest=(600, 8))


def _rows(copies: int, device: torch.device) -> torch.Tensor:
    rows = torch.randn(N, D)
    places = torch.randperm(N)
    rows[places[:copies]] = rows[places[copies : 2 * copies]]
    return rows.to(device)


def _keys(rows: torch.Tensor) -> torch.Tensor:
    keys = RowKeys()
    for block in rows.split(512):
        keys.add(block)
    return keys._all()


def _set(host: np.ndarray) -> int:
    return len({row.tobytes() for row in host})


@pytest.mark.parametrize("copies", [0, N // 2], ids=["distinct", "pairs"])
def bench_table(benchmark, device, copies):
    rows = _rows(copies, device)
    found = equal_rows(rows)
    assert len(found) == copies
    candidates = {"torch.unique": lambda: torch.unique(rows, dim=0, return_inverse=True)[1]}
    if device.type == "cpu":
        host = rows.numpy()
        assert _set(host) == N - copies
        candidates["numpy.unique"] = lambda: np.unique(host, axis=0, return_inverse=True)
        candidates["set of bytes"] = lambda: _set(host)
    candidates |= {
        "read": lambda: rows.amax(),
        "keys of blocks": lambda: _keys(rows),
        "gcfast": lambda: equal_rows(rows),
    }
    slow = ("torch.unique", "numpy.unique", "set of bytes")
    timings = benchmark.pedantic(
        lambda: compare(candidates, repeats=9, device=device, once=slow if device.type == "cpu" else ()),
        rounds=1,
    )
    what = "pairs" if copies else "distinct"
    limit = rows.nbytes / copy_bandwidth()
    show(f"equal_rows of {what}, {N} x {D}, torch.float32", timings, limit, "one read at copy bandwidth")
