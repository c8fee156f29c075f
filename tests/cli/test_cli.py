from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from image_files import folder_images, write_mnist_raw, write_tree

import gcfast.features.cache
from gcfast import cli
from gcfast.cli.training.checkpoint import RunCheckpoint
from gcfast.cli.training.train import Diverged, Schedule, Trainer

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = ["train", "digits", "--limit", "120", "--test-limit", "60", "--hidden", "32,16", "--epochs", "5"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main([*SMALL, "--out", str(out), "--quiet"]) == 0
    return out


def result_of(out: Path) -> dict[str, Any]:
    values = json.loads((out / "result.json").read_text())
    assert isinstance(values, dict)
    return values


def test_result_has_the_documented_keys(finished: Path) -> None:
    values = result_of(finished)
    documented = {
        "certificate": {"status", "route", "rank_lower", "sigma_min_lower", "offenders"},
        "loss": {"switch", "final", "infimum", "gap"},
        "test_error": {"base", "two_phase", "nearest"},
        "seconds": {"phase_one", "phase_two", "base", "certify", "solve"},
    }
    for key, inner in documented.items():
        assert set(values[key]) == inner
    assert (values["dataset"], values["n"], values["n_test"], values["seed"]) == ("digits", 120, 60, 0)
    assert values["width"] == 132 and values["status"] == "complete"


def test_run_reaches_the_global_minimum(finished: Path) -> None:
    values = result_of(finished)
    loss = values["loss"]
    assert values["certificate"]["status"] == "holds" and values["certificate"]["rank_lower"] == 120
    assert 0 < loss["final"] - loss["infimum"] <= loss["gap"] <= 1e-6 < loss["switch"]
    assert all(value > 0 for value in values["seconds"].values())
    assert all(0 <= value < 60 for value in values["test_error"].values())
    path = [point for _, point in values["path"]]
    assert path[-1] <= 1e-6 and path == sorted(path, reverse=True)


def test_base_and_two_phase_are_one_until_tau(finished: Path) -> None:
    """Same initial weights, same batches in the same order: only the Gaussian step parts them."""
    values = result_of(finished)
    steps = values["steps"]
    assert (steps["total"], steps["switch"], steps["per_epoch"]) == (10, 6, 2)
    before = [
        [point for point in values["curves"][name] if point["step"] < 6] for name in ("base", "two_phase")
    ]
    assert before[0] == before[1] and [point["step"] for point in before[0]] == [0, 2, 4]
    last = [values["curves"][name][-1] for name in ("base", "two_phase")]
    assert last[0]["step"] == last[1]["step"] == 10 and last[0]["loss"] != last[1]["loss"]


def test_phase_two_runs_from_a_cache(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run as with the whole model at every step, which is what is left where memory is short."""
    first = result_of(finished)
    held = first["cache"]
    assert (held["stored"], held["width"], held["bytes"]) == ("features", 132, 120 * (132 * 4 + 8))
    assert 0 < held["seconds"] < first["seconds"]["phase_two"]
    assert "ran from a cache: the 132 numbers" in (finished / "report.html").read_text(encoding="utf-8")
    real = gcfast.features.cache.FeatureCache
    for allowed in ("auto", "none"):

        def short(*arguments: Any, store: str = "auto", allowed: str = allowed, **options: Any) -> Any:
            if store != allowed:
                raise MemoryError("the memory is short")
            return real(*arguments, store=store, **options)

        monkeypatch.setattr(gcfast.features, "FeatureCache", short)
        out = tmp_path / allowed
        assert cli.main([*SMALL, "--out", str(out), "--quiet", "--no-compare"]) == 0
        again = result_of(out)
        for one, other in zip(first["curves"]["two_phase"], again["curves"]["two_phase"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert (one["step"], one["test_error"]) == (other["step"], other["test_error"])
        if allowed == "auto":
            assert (again["cache"]["stored"], again["cache"]["width"], again["notes"]) == ("below", 16, [])
        else:
            assert again["cache"] is None and "the memory is short" in again["notes"][0]
            assert "ran from a cache" not in (out / "report.html").read_text(encoding="utf-8")


def test_checkpoint_holds_the_reported_minimum(finished: Path) -> None:
    """Reloaded from nothing but the file, the model has the loss and the test error of the result."""
    values = result_of(finished)
    checkpoint = RunCheckpoint.load(finished / "checkpoint.pt")
    assert checkpoint.stage == "nearest" and set(checkpoint.heads) == {"switch", "nearest", "two_phase"}
    data = checkpoint.data.load(None)
    assert data.fingerprint() == checkpoint.data.fingerprint
    model = checkpoint.build()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(data.x_train).double(), data.y_train)
        wrong = (model(data.x_test).argmax(1) != data.y_test).double().mean() * 100
    assert loss.item() == pytest.approx(values["loss"]["final"], rel=1e-3)
    assert wrong.item() == pytest.approx(values["test_error"]["nearest"])


def test_report_is_there_and_self_contained(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 6 and "://" not in text and "Global minimum reached" in text
    assert sorted(os.listdir(finished)) == ["checkpoint.pt", "report.html", "result.json"]


def test_same_seed_same_run(finished: Path, tmp_path: Path) -> None:
    first = result_of(finished)
    assert cli.main([*SMALL, "--out", str(tmp_path), "--quiet", "--no-compare"]) == 0
    again = result_of(tmp_path)
    assert again["curves"]["two_phase"] == first["curves"]["two_phase"]
    assert again["test_error"]["base"] is None and again["seconds"]["base"] is None


def test_summary_on_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, *SMALL, "--out", tmp_path, "--base", "adam", "--loss", "mse")
    assert code == 0
    for expected in (
        "120 training",
        "certificate  holds",
        "L - L* =",
        "adam alone",
        "A(adam)",
        "report.html",
    ):
        assert expected in out, expected
    assert "phase one" in err and "phase two (solved)" in err


def test_certify_command(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    code, out, err = run(capsys, "certify", finished / "checkpoint.pt", "digits")
    assert code == 0 and "HOLDS (route: direct)" in out and "gap L - L*" in out and "certificate" in err
    code, out, _ = run(capsys, "certify", finished / "checkpoint.pt", "digits", "--json")
    values = json.loads(out)
    assert code == 0 and values["rank_lower"] == 120 and values["sigma_min_lower"] > 0
    kept = finished / "proof.gcfast"
    code, _, _ = run(capsys, "certify", finished / "checkpoint.pt", "digits", "--keep", kept)
    assert code == 0 and not kept.exists()  # the work is done
    kept.write_bytes(b"something else")
    code, _, err = run(capsys, "certify", finished / "checkpoint.pt", "digits", "--keep", kept)
    assert code == 2 and "not a checkpoint of gcfast" in err and kept.read_bytes() == b"something else"
    kept.unlink()
    # More samples than the wide layer can tell apart: refuted, and told by the exit code as well.
    code, out, err = run(capsys, "certify", finished / "checkpoint.pt", "digits", "--limit", "400", "--sharp")
    assert code == 1 and "FAILS" in out and "n = 400 exceeds" in out and "not the samples" in err


def test_info_names_backends(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0 and "torch" in out and torch.__version__ in out and "reference" in out


def test_mnist_and_folder_and_resnet(tmp_path: Path) -> None:
    write_mnist_raw(tmp_path)
    arguments = [
        "--data-root",
        str(tmp_path),
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--quiet",
        "--no-compare",
    ]
    assert cli.main(["train", "mnist", *arguments, "--hidden", "8", "--out", str(tmp_path / "a")]) == 0
    assert result_of(tmp_path / "a")["dataset"] == "mnist"
    pytest.importorskip("PIL")
    root = write_tree(tmp_path / "images", folder_images(size=8))
    arguments[1] = str(root)
    arguments += ["--model", "resnet18", "--hidden", "4", "--out", str(tmp_path / "b")]
    assert cli.main(["train", "folder", *arguments]) == 0
    values = result_of(tmp_path / "b")
    assert values["certificate"]["status"] == "holds" and values["loss"]["gap"] <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "fashion"], "DATA: invalid choice: 'fashion'"),
        (["train", "mnist"], "--data-root: expected the place of mnist"),
        (["train", "digits", "--width", "100"], "--width: 100 is less than the n = 1257"),
        (["train", "digits", "--tau", "1"], "--tau: expected a number between 0 and 1, got '1'"),
        (["train", "digits", "--lr", "nan"], "--lr: expected a positive number, got 'nan'"),
        (["train", "digits", "--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["train", "digits", "--seed", "-1"], "--seed: expected a whole number from 0"),
        (["train", "digits", "--hidden", "8,x"], "--hidden: expected a whole number of at least 1, got 'x'"),
        (
            ["train", "digits", "--base", "adam", "--momentum", "0.5"],
            "--momentum: only sgd and rmsprop take one",
        ),
        (["train", "digits", "--device", "tpu9"], "--device: expected cpu, cuda or cuda:1, got 'tpu9'"),
        (
            ["train", "digits", "--model", "resnet18", "--hidden", "8,8"],
            "--hidden: resnet18 takes one number",
        ),
        (["train", "digits", "--out", __file__], "--out: expected a folder"),
        (["train", "digits", "--limit", "10", "--epochs", "1"], "a single step"),
        (["certify", "nowhere.pt", "digits"], "CHECKPOINT: expected a file written by gcfast train"),
        (["certify", __file__, "digits"], "is not a readable checkpoint"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err, err


def test_checkpoint_of_other_data(capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path) -> None:
    write_mnist_raw(tmp_path)
    code, _, err = run(capsys, "certify", finished / "checkpoint.pt", "mnist", "--data-root", tmp_path)
    assert code == 2 and "DATA: inputs are (1, 28, 28), the checkpoint's model takes (1, 8, 8)" in err
    code, _, err = run(capsys, "certify", finished / "checkpoint.pt", "digits", "--seed", "9")
    assert code == 0 and "not the samples the checkpoint was trained on" in err


def test_damaged_checkpoint(capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path) -> None:
    whole = (finished / "checkpoint.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for content in (whole[:1000], whole[:-300], b""):
        path.write_bytes(content)
        code, _, err = run(capsys, "certify", path, "digits")
        assert code == 2 and "not a readable checkpoint" in err and err.count("\n") == 1
    torch.save({"weight": torch.zeros(2)}, path)
    code, _, err = run(capsys, "certify", path, "digits")
    assert code == 2 and "was not written by gcfast train" in err


def test_checkpoint_of_another_format_version(
    capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    content = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save({**content, "version": content["version"] + 1}, tmp_path / "later.pt")
    code, _, err = run(capsys, "certify", tmp_path / "later.pt", "digits")
    assert code == 2 and "later.pt has format version 2, this gcfast reads 1" in err and err.count("\n") == 1


@pytest.mark.parametrize("module", ["matplotlib.figure", "sklearn.datasets"])
def test_missing_package_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(capsys, *SMALL, "--out", tmp_path / "x")
    assert code == 2 and "pip install 'gcfast[cli]'" in err and not (tmp_path / "x").exists()


def test_divergence_stops_with_advice_and_saves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, *SMALL, "--out", tmp_path, "--lr", "1e30")
    assert code == 1 and "Training diverged" in err and "--lr 2.5e+29" in err
    values = result_of(tmp_path)
    assert values["status"] == "diverged" and values["stage"] == "phase_one"
    assert "Training diverged" in (tmp_path / "report.html").read_text()


def test_a_diverging_comparison_costs_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []
    real = Trainer.run

    def run_or_diverge(self: Trainer, *arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) > 1:  # the paper's phase two, and the base optimizer alone
            raise Diverged("the loss is nan at step 7 of 10")
        real(self, *arguments)

    monkeypatch.setattr(Trainer, "run", run_or_diverge)
    assert cli.main([*SMALL, "--out", str(tmp_path), "--quiet"]) == 0
    values = result_of(tmp_path)
    assert calls == [0, 1, 2] and values["loss"]["gap"] <= 1e-6
    assert values["test_error"]["base"] is None and values["test_error"]["two_phase"] is None
    assert len(values["notes"]) == 2


def test_interruption_of_the_solver_keeps_what_was_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import gcfast.solve.head_solver

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gcfast.solve, "solve_head", interrupted)
    code, _, err = run(capsys, *SMALL, "--out", tmp_path)
    values = result_of(tmp_path)
    assert code == 130 and "Interrupted during the solving of phase two" in err
    assert values["status"] == "interrupted" and values["certificate"]["status"] == "holds"
    assert RunCheckpoint.load(tmp_path / "checkpoint.pt").stage == "switch"


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_control_c_in_phase_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gcfast", *SMALL[:-1], "5000", "--out", str(tmp_path)]
    process = children.start(command, cwd=tmp_path)  # where no source tree shadows what is installed
    assert process.stdout is not None and process.stderr is not None
    assert "120 training" in process.stdout.readline()
    assert "phase one" in process.stderr.readline()  # a fifth of it is done, and two seconds have passed
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "Interrupted during phase one; what was finished is here." in err
    assert result_of(tmp_path)["status"] == "interrupted"
    assert RunCheckpoint.load(tmp_path / "checkpoint.pt").stage == "phase one"


def test_a_full_disk_spares_the_old_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text("old")
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[1].startswith(".report.html"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is being written")
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(capsys, *SMALL, "--out", tmp_path, "--no-compare")
    assert code == 1 and "No space left on device" in err
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "report.html", "result.json"]


def test_schedule_covers_every_sample_once_an_epoch() -> None:
    for n, size in ((120, 64), (129, 64), (10, 64), (5, 1), (64, 64), (3, 2)):
        schedule = Schedule(n, size, 4, 0.6, 0)
        batches = schedule.batches(1)
        assert len(batches) == schedule.batches_per_epoch
        assert sorted(torch.cat(list(batches)).tolist()) == list(range(n))
        assert size == 1 or n == 1 or min(len(batch) for batch in batches) > 1
        assert 1 <= schedule.switch < schedule.total
    assert not torch.equal(schedule.batches(0)[0], schedule.batches(1)[0])
