from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

import children
import pytest
import torch

from gcfast.storage import check_memory
from gcfast.storage.files import atomic_write, save_torch, write_json, write_text


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert write_text(path, "old") == path
    write_text(path, "nüw")
    assert path.read_text(encoding="utf-8") == "nüw" and os.listdir(tmp_path) == ["a.txt"]


def test_new_files_have_the_usual_mode_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "a.txt"
    plain.touch()
    write_text(path, "x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o600)
    write_text(path, "y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")

    def fails(stream: BinaryIO) -> None:
        stream.write(b"half of the new one")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses the bytes: a limit on file size stands in for a full disk."""
    path = tmp_path / "checkpoint.pt"
    save_torch(path, {"weight": torch.zeros(3)})
    program = (
        "import resource, signal, sys, torch\n"
        "from gcfast.storage.files import save_torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    save_torch(sys.argv[1], {'weight': torch.ones(100_000)})\n"
        "except (OSError, RuntimeError) as error:\n"
        "    print('refused:', error)\n"
    )
    done = children.run([sys.executable, "-c", program, path])
    assert "refused:" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.zeros(3))


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"gap": 1e-7})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"gap": float("nan")})
    assert json.loads(path.read_text()) == {"gap": 1e-7} and os.listdir(tmp_path) == ["a.json"]


def test_a_byte_more_than_is_allowed_is_refused_with_the_way_out() -> None:
    cpu = torch.device("cpu")
    check_memory("the Gram", 5000, 5000, cpu, "fewer samples")
    with pytest.raises(
        MemoryError, match=r"the Gram needs 5,001 bytes .*max_bytes allows 5,000\. Way out: fewer samples\."
    ):
        check_memory("the Gram", 5001, 5000, cpu, "fewer samples")


def test_more_than_the_machine_has_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcfast.storage.memory.available", lambda device: 5000)
    cpu = torch.device("cpu")
    check_memory("the Gram", 5000, None, cpu, "fewer samples")
    with pytest.raises(MemoryError, match=r"needs 5,001 bytes .*cpu has free 5,000"):
        check_memory("the Gram", 5001, None, cpu, "fewer samples")
