"""What is proved of ten thousand matrices made to deceive, and by hand of a million; see rank_stream.py."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import children
import pytest
import rank_stream
import resumable
import torch
from rank_stream import SURROUNDINGS, at_risk, groups, judged
from resumable import ROOT

pytest.importorskip("flint")

FROZEN = Path(__file__).with_name("proved.json")  # by block what was proved, as bits behind a one
CHUNK = 10  # blocks of a test of the million


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices gain nothing from more, and on a busy machine lose much; test_rank.py varies them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """What pytest-xdist can send from one process to another."""
    return {key: dict(count) for key, count in counts.items()}


def powerless(counts: dict[str, dict[str, int]]) -> dict[str, tuple[int, int]]:
    """Where fewer than 99.9 % of the easy ones of full rank are proved: how many, and of how many."""
    pairs = {key: (c.get("easy_proved", 0), c.get("easy", 0)) for key, c in counts.items()}
    return {key: (proved, easy) for key, (proved, easy) in pairs.items() if proved < 0.999 * easy}


@pytest.mark.parametrize("block", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 10))])
def test_ten_thousand_matrices(block, record_property):
    tally = judged(groups(block))
    record_property("ranks", plain(tally.counts))
    false = tally.false + judged(at_risk(block), calls=2 * len(rank_stream.ROUTES)).false
    assert not false, "\n".join(false)
    full = sum(c["full"] for key, c in tally.counts.items() if key == "matrix_rank")
    assert full >= 0.3 * rank_stream.PER_BLOCK
    assert not powerless(tally.counts)
    before = bin(int(json.loads(FROZEN.read_text())[block], 16))[3:]
    assert len(before) == len(tally.proved)
    lost = [k for k, (was, proved) in enumerate(zip(before, tally.proved)) if was == "1" and not proved]
    assert not lost, f"no longer proved, of {before.count('1')}: {lost}"


def in_a_state(state: str, *blocks_and_sizes: int) -> list[dict]:
    """The tallies of a process of its own, whose threads keep what they are started with."""
    command = [sys.executable, ROOT / "tests" / "rank_stream.py", state, *blocks_and_sizes]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = children.run(command, env=env, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "state", [SURROUNDINGS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SURROUNDINGS[1:])]
)
def test_the_state_of_the_processor(state, record_property):
    """It is put right, or refused by name: no false statement in any."""
    (tally,) = in_a_state(state, 0, 1, 1)
    record_property("ranks", tally["counts"])
    assert not tally["false"], "\n".join(tally["false"])


@pytest.mark.soundness
@pytest.mark.parametrize("state", [None, *SURROUNDINGS])
@pytest.mark.parametrize("chunk", range(100))
def test_a_million_matrices(chunk, state, record_property):
    """By hand, with -m soundness. What is done is not done again for the same code."""

    def make() -> list[dict]:
        if state is not None:  # of the blocks beyond the million, a few sizes each
            return in_a_state(state, 1000 + chunk, 1001 + chunk, 25)
        blocks = range(CHUNK * chunk, CHUNK * (chunk + 1))
        return [judged(itertools.chain(groups(block), at_risk(block))).as_json() for block in blocks]

    tallies = resumable.kept(f"ranks {chunk} {state or 'as ever'}", make)
    total: dict[str, Counter[str]] = {}
    for tally in tallies:
        for key, count in tally["counts"].items():
            total.setdefault(key, Counter()).update(count)
    record_property("ranks", plain(total))
    false = [line for tally in tallies for line in tally["false"]]
    assert not false, "\n".join(false)
    if state is None:
        assert not powerless({"all": total["matrix_rank"]})
