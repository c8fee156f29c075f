"""The benchmarks' machinery: timing in turn, records, and README's table made from them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import _compare
import _record
import children
import pytest
import table
import torch
from conftest import NEEDS_GPU
from scaling import measure as scaling_cells
from scaling import page as scaling_page

from gcfast import ops

pytestmark = pytest.mark.tools


class Clock:
    """Time that only the candidates spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def candidate(self, name: str, seconds: list[float]):
        waiting = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(waiting)

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_compare.time, "perf_counter", lambda: clock.now)
    monkeypatch.delenv(_record.OUT, raising=False)
    return clock


@pytest.fixture
def out(monkeypatch, tmp_path) -> Path:
    path = tmp_path / "new folder" / "run.json"
    monkeypatch.setenv(_record.OUT, str(path))
    return path


def test_candidates_take_turns_and_ratios_are_round_by_round(clock):
    a = clock.candidate("a", [9, 2, 6, 4])
    b = clock.candidate("b", [9, 1, 2, 4])
    slow, fast = _compare.compare({"a": a, "b": b}, repeats=3, warmup=1, device="cpu")
    assert clock.calls == ["b", "a", "a", "b", "a", "b", "a", "b"]
    assert (slow.best, slow.median, fast.best, fast.median) == (2, 4, 1, 2)
    assert slow.speedup == 1 and slow.ratios["b"] == (1 / 3, 0.5, 1.0)
    # rounds give 2/1, 6/2, 4/4: the ratio of the medians would be 2 as well, their quartiles 1 and 3
    assert (fast.speedup_low, fast.speedup, fast.speedup_high) == (1, 2, 3) == fast.ratios["a"]
    assert fast.best_speedup == 2 and fast.rounds == 3 and fast.peak_bytes is None


def test_a_slow_peer_can_run_once(clock):
    a, b = clock.candidate("a", [1] * 4), clock.candidate("b", [30])
    first, peer = _compare.compare({"a": a, "b": b}, repeats=4, warmup=0, device="cpu", once=("b",))
    assert clock.calls == ["a", "b", "a", "a", "a"]
    assert (first.rounds, peer.rounds, peer.median) == (4, 1, 30)
    assert first.ratios["b"] == (30, 30, 30)


def test_the_smallest_sizes_run_once(clock, monkeypatch):
    assert _compare.sized(8, smallest=2) == 8
    monkeypatch.setenv(_compare.SMALLEST, "1")
    a, b = clock.candidate("a", [1]), clock.candidate("b", [2])
    first, peer = _compare.compare({"a": a, "b": b}, repeats=4, warmup=3, device="cpu", once=("b",))
    assert clock.calls == ["a", "b"] and first.rounds == peer.rounds == 1
    assert _compare.sized(8, smallest=2) == 2


def test_the_smallest_sizes_are_not_recorded(tmp_path):
    command = [sys.executable, "-m", "pytest", str(table.ROOT / "bench"), "--smallest", "--collect-only"]
    env = {**os.environ, _record.OUT: str(tmp_path / "run.json")}
    done = children.run(command, env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 4
    assert f"--smallest measures nothing: {_record.OUT} must not be set" in done.stderr
    assert not list(tmp_path.iterdir())


def test_part_of_the_work_is_scaled_to_the_whole(clock):
    a, b = clock.candidate("a", [6] * 3), clock.candidate("b", [1, 2, 3])
    whole, part = _compare.compare({"a": a, "b": b}, repeats=3, warmup=0, device="cpu", scale={"b": 4.0})
    assert (whole.median, part.best, part.median) == (6, 4, 8)
    assert part.ratios["a"] == (0.5, 0.75, 1.5)


def test_the_clock_is_that_of_the_results_device():
    (timing,) = _compare.compare({"a": lambda: (1, [torch.zeros(2)])}, repeats=2, warmup=1)
    assert timing.device == "cpu"


def test_what_ran_is_seen():
    x = torch.ones(3)

    def by_reference():
        with ops.backend("reference"):
            return ops.activation(x)

    candidates = {"torch": lambda: x.exp(), "reference": by_reference, "auto": lambda: ops.activation(x)}
    plain, reference, auto = _compare.compare(candidates, repeats=2, device="cpu")
    assert plain.backends == {} and reference.backends == {"activation": "reference"}
    assert auto.backends == {"activation": "cpu"}


@NEEDS_GPU
def test_events_and_memory_on_the_gpu():
    a = torch.rand(1 << 26, device="cuda")
    copy, twice = _compare.compare({"copy": a.clone, "twice": lambda: (a.clone(), a.clone())}, repeats=5)
    assert copy.device == "cuda" and copy.peak_bytes == a.nbytes and twice.peak_bytes == 2 * a.nbytes
    assert 2 * a.nbytes / 20e12 < copy.best < 0.1 and 1.5 < twice.median / copy.median < 3


@pytest.mark.parametrize("name", ["tpu", "cuda:1"])
def test_unknown_bench_device_is_named(monkeypatch, name):
    monkeypatch.setenv(_compare.DEVICE, name)
    with pytest.raises(ValueError, match=f"GCFAST_BENCH_DEVICE must be cpu or cuda; got '{name}'"):
        _compare.bench_device()


@pytest.mark.parametrize(
    "title, parts",
    [
        ("softplus, 1048576 elements, torch.float32", ("softplus", "1048576 elements", "float32")),
        (
            "gram_product, n = 4000, 10 sides, torch.float64",
            ("gram_product", "n = 4000, 10 sides", "float64"),
        ),
        ("softplus into a fresh tensor, bfloat16", ("softplus into a fresh tensor", "", "bfloat16")),
        ("certified rank, 4096 x 4506", ("certified rank", "4096 x 4506", "")),
    ],
)
def test_title(title, parts):
    assert _record.from_title(title) == parts


def measure(clock: Clock, seconds: float, title: str = "op, 8 elements, torch.float32", **options) -> None:
    candidates = {"torch": clock.candidate("torch", [4.0] * 3), "cpu": clock.candidate("cpu", [seconds] * 3)}
    timings = _compare.compare(candidates, repeats=3, warmup=0, device="cpu")
    _compare.show(title, timings, 0.5, "bytes", **options)


def test_nothing_is_recorded_unless_asked(clock, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    measure(clock, 2.0)
    assert not list(tmp_path.iterdir()) and "2.00x" in capsys.readouterr().out


def test_records(clock, out):
    measure(clock, 2.0)
    measure(clock, 1.0, dtype=torch.float64, extra={"cpu": {"loss": 1e-7}})
    measure(clock, 1.0)  # once more: the newer one stays
    data = json.loads(out.read_text())
    assert data["header"]["torch"] == torch.__version__ and data["header"]["commit"]
    for name in ("device", "capability", "driver", "cuda", "triton", "python", "cpu", "threads", "date"):
        assert name in data["header"]
    assert [_record.key(r) for r in data["results"]] == [
        ("op", "8 elements", "float64", "cpu"),
        ("op", "8 elements", "float32", "cpu"),
    ]
    first, ours = data["results"][1]["candidates"]
    assert (first["name"], first["median"], first["of_limit"]) == ("torch", 4.0, 0.125)
    assert (ours["best"], ours["spread"], ours["rounds"], ours["of_limit"]) == (1.0, 0.0, 3, 0.5)
    assert ours["ratios"] == {"torch": [4.0, 4.0, 4.0]}
    assert data["results"][0]["candidates"][1]["extra"] == {"loss": 1e-7}
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_few_rounds_have_no_quartiles(clock, out):
    a, b = clock.candidate("a", [2, 4]), clock.candidate("b", [1, 1])
    _compare.show("op, x", _compare.compare({"a": a, "b": b}, repeats=2, warmup=0, device="cpu"))
    (result,) = _record.read(out)["results"]
    assert result["candidates"][1]["ratios"]["a"] == [None, 3.0, None]
    assert result["candidates"][1]["of_limit"] is None


def test_a_failing_write_leaves_the_old_file(clock, out, monkeypatch):
    measure(clock, 2.0)
    before = out.read_text()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(_record.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        measure(clock, 1.0)
    assert out.read_text() == before


def test_a_torn_file_is_kept_aside(clock, out, capsys):
    out.parent.mkdir()
    out.write_text('{"header": {}, "resul')
    measure(clock, 2.0)
    assert len(_record.read(out)["results"]) == 1
    assert out.with_name("run.json.broken").read_text() == '{"header": {}, "resul'
    assert "cannot be read" in capsys.readouterr().err


def test_another_commit_needs_another_file(clock, out, monkeypatch):
    measure(clock, 2.0)
    monkeypatch.setattr(_record, "header", lambda: {**_record.read(out)["header"], "commit": "feed123"})
    with pytest.raises(RuntimeError, match=r"commit .*, this one has feed123: name another file"):
        measure(clock, 2.0)


def test_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("GCFAST_BENCH_COMMIT", "abc1234")
    assert _record.commit() == "abc1234"


def a_run(path: Path, day: int, commit: str, results: list[tuple[str, str, str, float]]) -> Path:
    header = {
        "device": "NVIDIA H100 80GB HBM3", "driver": "1", "torch": "2.11", "triton": "3.6", "cpu": "A CPU",
        "instruction_set": "x86-64-v4", "threads": 2, "commit": commit, "date": f"2026-01-{day:02}T00:00:00",
    }  # fmt: skip
    full = []
    for op, dtype, device, ratio in results:
        ours = {
            "name": "triton" if device == "cuda" else "cpu", "best": 1.0, "median": 1.0, "spread": 0.1,
            "rounds": 9, "ratios": {"torch": [ratio, ratio, ratio]}, "of_limit": 0.5, "peak_bytes": None,
            "backends": {},
        }  # fmt: skip
        torch_ = {**ours, "name": "torch", "ratios": {}}
        common = {"op": op, "size": "99999 elements", "dtype": dtype, "device": device}
        full.append({**common, "limit": "", "limit_seconds": 0.5, "candidates": [torch_, ours]})
    _record.write(path, {"header": header, "ceilings": {"cuda": {"copy": 3e12}}, "results": full})
    return path


def test_merge_keeps_the_newest_of_each(tmp_path):
    folder = tmp_path / "results"
    old = a_run(
        tmp_path / "old.json",
        1,
        "aaaaaaa",
        [("softplus", "float32", "cuda", 2.0), ("silu", "float32", "cuda", 2.5)],
    )
    new = a_run(
        tmp_path / "new.json",
        2,
        "bbbbbbb",
        [("softplus", "float32", "cuda", 3.0), ("softplus", "float32", "cpu", 5.0)],
    )
    table.merge([new], folder)
    table.merge([old], folder)  # later, but older
    assert sorted(p.name for p in folder.iterdir()) == ["a-cpu-x86-64-v4.json", "nvidia-h100-80gb-hbm3.json"]
    cpu, gpu = table.load(folder)
    assert (cpu["name"], gpu["name"]) == ("A CPU, x86-64-v4", "NVIDIA H100 80GB HBM3")
    found = {(r["op"], r["run"].split()[1]) for r in gpu["results"]}
    assert found == {("softplus", "bbbbbbb"), ("silu", "aaaaaaa")}
    assert [run["commit"] for run in gpu["runs"]] == ["aaaaaaa", "bbbbbbb"]
    assert gpu["runs"][0]["ceilings"] == {"copy": 3e12} and cpu["runs"][0]["ceilings"] == {}
    # a run of which nothing is left is forgotten
    table.merge([a_run(tmp_path / "newer.json", 3, "ccccccc", [("silu", "float32", "cuda", 4.0)])], folder)
    assert [run["commit"] for run in table.load(folder)[1]["runs"]] == ["bbbbbbb", "ccccccc"]


def test_table_says_where_what_and_of_which_commit(tmp_path):
    run = [
        ("softplus", "float32", "cuda", 2.26),
        ("softplus", "float64", "cuda", 1.0),
        ("silu", "float32", "cpu", 0.5),
    ]
    table.merge([a_run(tmp_path / "run.json", 1, "aaaaaaa", run)], tmp_path / "results")
    text = table.table(table.load(tmp_path / "results"))
    assert (
        "| `softplus`, 99,999 elements | NVIDIA H100 80GB HBM3 | torch: 2.3× (2.3–2.3) float32 by triton, "
        "1.00× (1.00–1.00) float64 by triton | 50 %, 50 % | aaaaaaa |"
    ) in text
    assert "| `silu`, 99,999 elements | A CPU | torch: 0.50× (0.50–0.50) float32 | 50 % | aaaaaaa |" in text
    # of two CPUs the one measured last
    other = a_run(tmp_path / "other.json", 2, "bbbbbbb", [("silu", "float32", "cpu", 2.0)])
    record = _record.read(other)
    record["header"]["cpu"] = "Another"
    _record.write(other, record)
    table.merge([other], tmp_path / "results")
    both = table.table(table.load(tmp_path / "results"))
    assert "| Another | torch: 2.0× (2.0–2.0) float32" in both and "| A CPU |" not in both
    assert "`bench/results` also has A CPU, x86-64-v4." in both
    missing = text.split("Not yet measured on a GPU: ")[1].split(", ")
    assert "`silu`" in missing and "`softplus`" not in missing


def test_show_lists_every_candidate_of_ours(clock, out):
    measure(clock, 2.0)
    (line,) = table.show(_record.read(out)).splitlines()[1:]
    assert line.split()[4:] == ["cpu", "2000.000", "ms", "25%", "torch", "2.0×", "(2.0–2.0)"]


def test_the_scaling_page_is_what_was_measured():
    page = scaling_page.PAGE.read_text()
    assert scaling_page.text(scaling_cells.RESULTS) == page
    assert "None" not in page and "nan" not in page


def test_exponents_are_fitted():
    points = [(n, 3e-9 * n**2.5) for n in (500, 2000, 4000, 8000)]
    slope, at = scaling_page._fit(points)
    assert slope == pytest.approx(2.5) and at == pytest.approx(3e-9 * 1e10)
    assert scaling_page._fit(points[:3]) is None  # too few beyond the least size


def test_readme_is_what_the_results_say():
    assert table.main(["--check"]) == 0


def test_a_tampered_readme_is_caught(tmp_path, monkeypatch, capsys):
    text = table.README.read_text(encoding="utf-8")
    figure = next(line for line in text.splitlines() if line.startswith("| `softplus`")).split("|")[3]
    readme = tmp_path / "README.md"
    readme.write_text(text.replace(figure, figure.replace("×", "0×", 1)), encoding="utf-8")
    monkeypatch.setattr(table, "README", readme)
    assert table.main(["--check"]) == 1
    assert "-| `softplus`" in capsys.readouterr().out
    assert table.main([]) == 0 and readme.read_text(encoding="utf-8") == text
    readme.write_text(text.replace(table.END, ""), encoding="utf-8")
    with pytest.raises(SystemExit, match="must hold"):
        table.main(["--check"])


def test_results_are_of_named_commits():
    for device in table.load():
        assert device["results"] and {r["run"] for r in device["results"]} == {
            r["label"] for r in device["runs"]
        }


def test_not_a_record(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no benchmark results"):
        _record.read(path)
    assert os.listdir(tmp_path) == ["other.json"]
