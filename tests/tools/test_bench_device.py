"""tools/device.sh without a GPU: it says so at once. Its sections, limits and verdicts, with stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import _build
import _session
import children
import device
import pytest
import torch

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "device.sh"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
GPU = {"name": "A GPU", "torch": "2.11", "cuda": "13.0", "capability": (9, 0)}


def device_sh(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return children.run(
        ["bash", SCRIPT, *args], env={**os.environ, "PYTHON": sys.executable, **env}, timeout=150
    )


def assert_no_device(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tools/device.sh: no CUDA device: ")
    return line


def fake_smi(folder: Path, body: str) -> str:
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{body}\n")
    smi.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@needs_no_gpu
def test_without_nvidia_smi(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    began = time.monotonic()
    line = assert_no_device(device_sh(PATH=str(tmp_path), OUT=str(tmp_path / "out")))
    assert line.endswith("nvidia-smi is not on the PATH")
    assert time.monotonic() - began < 10 and not (tmp_path / "out").exists()


@needs_no_gpu
@pytest.mark.parametrize(
    "body, why",
    [
        ("echo 'No devices were found'; exit 6", "nvidia-smi lists none: No devices were found"),
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'", "sees none"),
    ],
)
def test_with_a_driver_but_no_device(tmp_path, body, why):
    assert assert_no_device(device_sh(PATH=fake_smi(tmp_path, body))).endswith(why)


def test_list_and_wrong_options():
    done = device_sh("--list")
    assert done.returncode == 0 and "sanitize" in done.stdout and "softmax_residual" in done.stdout
    done = device_sh("--only", "tests,typo")
    assert done.returncode == 2 and "--only: typo is none of build, backends" in done.stderr


@pytest.mark.parametrize(
    "only, sections, benchmarks",
    [
        ("tests", ["build", "tests", "table"], None),
        ("rank_proof,wide", ["build", "bench", "table"], ["rank_proof", "wide"]),
        ("activation tests", ["build", "tests", "bench", "table"], ["activation"]),
        ("sanitize,bench", ["build", "sanitize", "bench", "table"], None),
        (None, list(device.SECTIONS), None),
    ],
)
def test_only(only, sections, benchmarks):
    assert device.select(only) == (sections, benchmarks or device.benchmarks())
    assert "activation" in device.benchmarks() and "rank_proof" in device.benchmarks()


@pytest.mark.parametrize("only", ["", ",", "nonsense"])
def test_only_refuses(only):
    with pytest.raises(ValueError, match="--only: "):
        device.select(only)


def test_shares_add_up_and_unused_time_goes_on():
    names, left = list(device.SECTIONS), 540.0
    shares = {}
    for i, name in enumerate(names):
        shares[name] = device.share(left, name, names[i + 1 :])
        left -= shares[name]
    assert left == pytest.approx(0) and sum(shares.values()) == pytest.approx(540)
    assert all(s > _session.LEAST for name, s in shares.items() if name != "table")
    assert shares["bench"] == pytest.approx(540 * device.SECTIONS["bench"] / sum(device.SECTIONS.values()))
    # a section before it that took nothing
    assert device.share(540, "bench", ["table"]) == pytest.approx(540 * 160 / 161)


@pytest.fixture
def session(tmp_path, monkeypatch) -> device.Session:
    monkeypatch.setattr(_build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_session.subprocess, "Popen", children.Child)
    return device.Session(tmp_path / "out", 100.0, GPU)


def test_environment_of_commands(session, monkeypatch):
    assert session.arch == "90a" and not {"TRITON_INTERPRET", "PYTEST_ADDOPTS"} & set(session.env)
    script = "import os, sys; print(os.getcwd()); print(sys.path[1]); print(repr(sys.stdin.read()))"
    assert session.run([sys.executable, "-c", script], 60) == 0
    assert session.tail(0, 3) == [str(session.cwd), str(session.work / "site"), "''"]


def test_a_command_that_hangs_is_ended_with_its_children(session, monkeypatch):
    monkeypatch.setattr(_session, "GRACE", 1.0)
    monkeypatch.setattr(_session, "LEAST", 0.0)
    pid = session.out / "pid"
    began = time.monotonic()
    assert session.run(["sh", "-c", f"trap '' INT; sleep 300 & echo $! > {pid}; wait"], 3.0) == 124
    assert time.monotonic() - began < 20
    child = Path("/proc", pid.read_text().strip(), "stat")
    for _ in range(100):  # gone, or dead and not yet reaped
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child still runs")


def test_an_interrupt_lets_a_command_report(session, monkeypatch):
    monkeypatch.setattr(_session, "LEAST", 0.0)
    script = "import time\ntry: time.sleep(300)\nexcept KeyboardInterrupt: print('3 passed', flush=True)"
    assert session.run([sys.executable, "-c", script], 8.0) == 124
    assert session.tail(0, 1) == ["3 passed"]


def test_nothing_begins_without_time(session):
    assert session.run(["touch", str(session.out / "ran")], 1.0) == 124
    assert not (session.out / "ran").exists()


def test_all_sections_run_whatever_fails(session, monkeypatch, capsys):
    def passes(session, limit):
        session.run(["echo", "fine"], limit)
        return 0, "as it should"

    def breaks(session, limit):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(device, "_script", lambda name: breaks)
    for name, function in (("build", passes), ("tests", lambda s, limit: (124, "12 passed"))):
        monkeypatch.setattr(device, name, function)
    device.work(session, ["build", "backends", "tests", "table"], [])
    assert device.finish(session) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[-4:]] == [
        ["build", "passed"],
        ["backends", "FAILED"],
        ["tests", "timed"],
        ["table", "passed"],
    ]
    assert "ZeroDivisionError: oh no" in printed[-3]
    verdicts = json.loads((session.out / "summary.json").read_text())["verdicts"]
    assert [v["verdict"] for v in verdicts] == ["passed", "FAILED", "timed out", "passed"]
    assert {p.name for p in session.out.iterdir()} <= {"device.log", "summary.json"}


def test_what_there_is_no_time_for_is_said(session, monkeypatch, capsys):
    session.deadline = time.monotonic() + 1
    device.work(session, ["build", "tests"], [])
    assert [v.verdict for v in session.verdicts] == ["skipped", "skipped"] and device.finish(session) == 1


def test_tests_that_are_all_skipped_prove_nothing(session, monkeypatch):
    for closing, code in (("5 skipped in 1.00s", 1), ("1 passed, 5 skipped in 1.00s", 0)):
        monkeypatch.setattr(device, "_pytest", lambda *args, line=closing: ["echo", line])
        assert device.tests(session, 50) == (code, closing)


def test_earlier_results_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_build.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    device.Session(tmp_path / "out", 100.0, GPU)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["device.log", "results-previous.json"]


def a_wheel(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    return path


def test_wheel_content(tmp_path):
    kernels = [f"gcfast/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")]
    good = ["gcfast/__init__.py", "gcfast/py.typed", "gcfast/cli/__init__.py", *kernels]
    good += ["gcfast/_cpu.cpython-312.so", "gcfast/_cuda.cpython-312.so", "gcfast-1.dist-info/METADATA"]
    assert _build.content_errors(a_wheel(tmp_path / "good.whl", good), ROOT) == []
    bad = [n for n in good if "_cuda" not in n and "_launch" not in n] + ["bench/table.py"]
    assert _build.content_errors(a_wheel(tmp_path / "bad.whl", bad), ROOT) == [
        "gcfast/triton_kernels/_launch.py is missing",
        "gcfast/_cuda.*.so is missing",
        "bench/table.py does not belong there",
    ]


def test_stage_copies_sources_only(tmp_path):
    _build.stage(ROOT, tmp_path / "src")
    copied = {str(p.relative_to(tmp_path / "src")) for p in (tmp_path / "src").rglob("*")}
    assert {
        "setup.py",
        "csrc/core/activations.h",
        "gcfast/ops/__init__.py",
        "triton_kernels/_launch.py",
    } <= copied
    assert not [p for p in copied if p.endswith(".so") or "__pycache__" in p or p == "gcfast/triton_kernels"]


@pytest.mark.parametrize("working", ["0", None], ids=["without-cuda", "not-at-all"])
def test_a_failed_build_leaves_what_it_can(session, monkeypatch, working):
    modes = []

    def run(command, env):
        modes.append(env["GCFAST_CUDA"])
        if env["GCFAST_CUDA"] != working:
            return 1
        if "wheel" in command:
            (session.work / "wheel").mkdir(exist_ok=True)
            a_wheel(session.work / "wheel" / "gcfast-1.whl", ["gcfast/__init__.py"])
        return 0

    good, note = _build.build(run, session.work, "90a")
    assert not good and modes[:2] == ["1", "0"]
    assert ("_cuda" in note) == (working == "0")
    if working is None:
        assert (session.work / "site/gcfast/ops/__init__.py").is_file()
        assert (session.work / "site/gcfast/triton_kernels/_launch.py").is_file()
