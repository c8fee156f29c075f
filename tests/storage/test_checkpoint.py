from __future__ import annotations

import errno
import fcntl
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import torch
from conftest import DEVICES
from torch import Tensor

import gcfast.storage.checkpoint as module
from gcfast.storage.checkpoint import StateFile
from gcfast.storage.digest import fingerprint
from gcfast.storage.file_format import CheckpointError

DTYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
    *(torch.complex64, torch.complex128),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.ck"


@pytest.fixture
def checkpoint(path: Path) -> Iterator[StateFile]:
    with StateFile(path, "certify", "0123") as opened:
        yield opened


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def restored(checkpoint: StateFile, name: str = "x") -> Tensor:
    state = checkpoint.load()
    assert state is not None
    with state:
        return state.tensors(name)


def random_bits(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    if dtype == torch.bool:
        return torch.rand(*shape, device=device) < 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, device=device)
    return raw.view(dtype).reshape(shape)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return children.run([sys.executable, "-c", textwrap.dedent(program), *arguments], timeout=100)


def start(program: str, *arguments: object) -> children.Child:
    return children.start([sys.executable, "-c", textwrap.dedent(program), *arguments], stderr=None)


# What comes back


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(checkpoint: StateFile, dtype: torch.dtype, device: str) -> None:
    tensors = {
        "whole": random_bits(7, 5, 3, dtype=dtype, device=device),
        "scalar": random_bits(1, dtype=dtype, device=device)[0],
        "empty": random_bits(0, dtype=dtype, device=device).reshape(3, 0, 2),
        "transposed": random_bits(6, 5, dtype=dtype, device=device).T,
        "permuted": random_bits(3, 1, 4, 5, dtype=dtype, device=device).permute(3, 0, 1, 2),
        "every other": random_bits(9, 9, dtype=dtype, device=device)[1::2, ::3],
        "expanded": random_bits(4, 1, dtype=dtype, device=device).expand(4, 6),
    }
    checkpoint.save({}, tensors)
    with checkpoint.load() as state:
        assert state.names == tuple(tensors)
        for name in reversed(state.names):
            found = state.tensors(name)
            assert same(found, tensors[name]) and found.device.type == "cpu"
            if name in ("transposed", "permuted"):
                assert found.stride() == tensors[name].stride()
            else:
                assert found.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_several_pieces(
    checkpoint: StateFile, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Digests and order do not depend on how a tensor lies in memory, whatever the size of the pieces."""
    for name in ("digest", "file_format"):
        monkeypatch.setattr(f"gcfast.storage.{name}.PIECE", 256)
    monkeypatch.setattr("gcfast.storage.digest._BLOCK", 64)
    base = random_bits(11, 13, 17, dtype=torch.float64, device=device)
    views = {
        "contiguous": base,
        "permuted": base.permute(2, 0, 1),
        "turned": base.permute(1, 2, 0),
        "long rows": base.reshape(11, -1)[:, 1::2],
        "column": base.reshape(-1, 17)[:, 3],
        "expanded": base[:, :1, :].expand(11, 13, 17),
        "conjugate": torch.complex(base, base).mT.conj(),
        "negative": torch.complex(base, base).conj().imag,
        "parameter": torch.nn.Parameter(base.clone()),
    }
    checkpoint.save({}, views.items())
    with checkpoint.load() as state:
        for name, view in views.items():
            assert same(state.tensors(name), view), name
            assert fingerprint(view) == fingerprint(view.detach().cpu().resolve_conj().clone().contiguous())


def test_values_come_back_exact(checkpoint: StateFile) -> None:
    floats = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.pi, 1 / 3]
    values = {
        "floats": floats,
        "ints": [2**53 + 1, -(10**40), 0],
        "nested": {"": [None, True, False, {"ü\n\ud800": "text"}], "more": (1, (2.0,))},
    }
    checkpoint.save({**values, "nan": math.nan}, {})
    with checkpoint.load() as state:
        nan = state.values.pop("nan")
        assert math.isnan(nan)
        assert state.values == {**values, "nested": {**values["nested"], "more": [1, [2.0]]}}
        assert [struct.pack("d", x) for x in state.values["floats"]] == [struct.pack("d", x) for x in floats]
        assert [type(item) for item in state.values["nested"]["more"][1]] == [float]
        assert state.names == ()


def test_nothing_is_there_at_first_and_after_the_end(checkpoint: StateFile, path: Path) -> None:
    assert checkpoint.load() is None
    checkpoint.save({"step": 1}, {})
    with checkpoint.load() as state:
        assert state.values == {"step": 1}
    checkpoint.remove()
    checkpoint.remove()
    assert os.listdir(path.parent) == []
    assert checkpoint.load() is None
    checkpoint.close()
    assert os.listdir(path.parent) == []


def test_a_state_outlives_newer_checkpoints(checkpoint: StateFile) -> None:
    checkpoint.save({"step": 1}, {"x": torch.full((5,), 1)})
    state = checkpoint.load()
    checkpoint.save({"step": 2}, {"x": torch.full((5,), 2)})
    assert state.tensors("x").tolist() == [1] * 5
    assert restored(checkpoint).tolist() == [2] * 5
    with pytest.raises(KeyError):
        state.tensors("y")
    state.close()
    with pytest.raises(ValueError):
        state.tensors("x")


def test_a_tensor_of_a_dtype_that_this_torch_lacks(
    checkpoint: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save({}, {"x": torch.zeros(2, dtype=torch.uint16)})
    monkeypatch.delattr(torch, "uint16")
    with pytest.raises(CheckpointError, match=r"'x' has dtype uint16, which torch .* lacks"):
        restored(checkpoint)


@pytest.mark.parametrize(
    ("values", "tensors", "error", "words"),
    [
        ({1: 2}, {}, TypeError, r"values: expected strings as keys; got 1"),
        ({"a": [0, {"b": torch.zeros(1)}]}, {}, TypeError, r"values\['a'\]\[1\]\['b'\]: .*Tensor"),
        ({"a": b""}, {}, TypeError, r"values\['a'\]"),
        ({"a": 10**5000}, {}, ValueError, "digits"),
        ({}, {"x": [1.0]}, TypeError, r"tensors\['x'\]: expected a tensor"),
        ({}, {"x": torch.eye(3).to_sparse()}, TypeError, "dense tensor"),
        ({}, {"x": torch.empty(3, device="meta")}, TypeError, "a meta one"),
        ({}, {3: torch.zeros(1)}, ValueError, "distinct strings"),
        ({}, [("x", torch.zeros(1)), ("x", torch.zeros(1))], ValueError, "distinct strings"),
    ],
)
def test_what_cannot_be_saved(
    checkpoint: StateFile, values: dict, tensors: object, error: type[Exception], words: str
) -> None:
    checkpoint.save({"old": True}, {})
    with pytest.raises(error, match=words):
        checkpoint.save(values, tensors)
    with checkpoint.load() as state:
        assert state.values == {"old": True}


# What is refused


def small(path: Path, kind: str = "certify", fingerprint: str = "0123") -> bytes:
    tensors = {"x": torch.arange(37, dtype=torch.float64), "e": torch.empty(0), "y": torch.ones(5).bool()}
    with StateFile(path, kind, fingerprint) as checkpoint:
        checkpoint.save({"step": 3}, tensors)
    return path.read_bytes()


def read_all(checkpoint: StateFile) -> None:
    with checkpoint.load() as state:
        for name in state.names:
            state.tensors(name)


def test_truncated_at_every_length(checkpoint: StateFile, path: Path) -> None:
    content = small(path)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="is truncated") as caught:
            read_all(checkpoint)
        assert str(path) in str(caught.value) and "Delete the file or give another path" in str(caught.value)
    path.write_bytes(content + bytes(64))
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_all(checkpoint)
    path.write_bytes(content)
    read_all(checkpoint)


def test_every_flipped_byte_is_seen(checkpoint: StateFile, path: Path) -> None:
    content = small(path)
    start = len(content) - (320 + 64)
    with open(path, "r+b", buffering=0) as stream:
        for position, byte in enumerate(content):
            os.pwrite(stream.fileno(), bytes([byte ^ random.Random(position).randrange(1, 256)]), position)
            with pytest.raises(CheckpointError) as caught:
                read_all(checkpoint)
            if position >= start:
                name = "x" if position < start + 320 else "y"
                assert f"is corrupt: tensor {name!r} does not match its digest" in str(caught.value)
            os.pwrite(stream.fileno(), bytes([byte]), position)
    read_all(checkpoint)


def test_flipped_bytes_in_large_tensors(checkpoint: StateFile, path: Path) -> None:
    checkpoint.save({}, {"x": torch.arange(3 << 20), "y": torch.zeros(5 << 20, dtype=torch.uint8)})
    source = random.Random(0)
    for _ in range(30):
        position = source.randrange(4096, path.stat().st_size)
        with open(path, "r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)[0]
            stream.seek(position)
            stream.write(bytes([byte ^ 1 << source.randrange(8)]))
        damaged = 0
        with checkpoint.load() as state:
            for name in state.names:
                try:
                    state.tensors(name)
                except CheckpointError as error:
                    damaged += 1
                    assert f"tensor {name!r}" in str(error)
        assert damaged == 1
        with open(path, "r+b") as stream:
            stream.seek(position)
            stream.write(bytes([byte]))
    assert torch.equal(restored(checkpoint), torch.arange(3 << 20))


def test_a_file_cut_after_it_was_opened(checkpoint: StateFile, path: Path) -> None:
    checkpoint.save({}, {"x": torch.zeros(1 << 20)})
    with checkpoint.load() as state:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="truncated within tensor 'x'"):
            state.tensors("x")


@pytest.mark.parametrize("content", [b"x", b"%PDF-1.7" * 40, bytes(200), b"gcfast, but something else" * 9])
def test_foreign_files_are_refused_and_kept(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    words = rf"{path}: it is not a checkpoint of gcfast\. Delete the file or give another path\."
    with StateFile(path, "certify", "0123") as checkpoint:
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load()
        with pytest.raises(CheckpointError, match=words):
            checkpoint.save({}, {})
        with pytest.raises(CheckpointError, match=words):
            checkpoint.remove()
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]


def test_a_torch_file_is_foreign(path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, path)
    with (
        StateFile(path, "certify", "0123") as checkpoint,
        pytest.raises(CheckpointError, match="not a check"),
    ):
        checkpoint.load()


def test_other_things_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with StateFile(path, "certify", "0123") as checkpoint:
            for act in (checkpoint.load, checkpoint.remove, lambda c=checkpoint: c.save({}, {})):
                with pytest.raises(CheckpointError, match="not a regular file"):
                    act()
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with StateFile("/dev/null", "certify", "0123") as checkpoint, pytest.raises((CheckpointError, OSError)):
        checkpoint.save({}, {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (2, "newer"), (2**32 - 1, "newer")])
def test_other_format_versions(path: Path, version: int, age: str) -> None:
    content = bytearray(small(path))
    content[16:20] = version.to_bytes(4, "little")
    path.write_bytes(content)
    words = rf"{path}: it has format version {version}, {age} than 1.*delete"
    with StateFile(path, "certify", "0123") as checkpoint, pytest.raises(CheckpointError, match=words):
        checkpoint.load()


@pytest.mark.parametrize(
    ("kind", "digest", "words"),
    [
        ("solve_head", "0123", "a checkpoint of 'solve_head', not of 'certify'"),
        ("certify", "0124", r"made from other data, weights or settings \(fingerprint 0124, here 0123\)"),
    ],
)
def test_other_computations(path: Path, kind: str, digest: str, words: str) -> None:
    content = small(path, kind, digest)
    with StateFile(path, "certify", "0123") as checkpoint:
        for act in (checkpoint.load, checkpoint.remove, lambda: checkpoint.save({}, {})):
            with pytest.raises(CheckpointError, match=words + r"\. Delete the file or give another path"):
                act()
    assert path.read_bytes() == content


def test_a_new_computation_replaces_its_own_file_without_loading(path: Path) -> None:
    small(path)
    with StateFile(path, "certify", "0123") as checkpoint:
        checkpoint.save({"step": 9}, {})
        with checkpoint.load() as state:
            assert state.values == {"step": 9}


# Whole or not there


SAVES_FOR_EVER = """
    import sys, torch
    from gcfast.storage.checkpoint import StateFile
    torch.set_num_threads(1)
    with StateFile(sys.argv[1], "certify", "0123") as checkpoint:
        step = int(sys.argv[2])
        print("ready", flush=True)
        while True:
            step += 1
            tensors = {"a": torch.full((150_000,), step), "b": torch.full((700, 9), step).T}
            checkpoint.save({"step": step}, tensors)
"""

SAVES_FROM_FORKS = """
    import os, random, signal, sys, time, torch
    from gcfast.storage.checkpoint import StateFile
    torch.set_num_threads(1)
    path, rounds = sys.argv[1], int(sys.argv[2])
    source = random.Random(5)
    last = leftovers = 0
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            checkpoint = StateFile(path, "certify", "0123")
            step = last
            while True:
                step += 1
                tensors = {"a": torch.full((150_000,), step), "b": torch.full((700, 9), step).T}
                checkpoint.save({"step": step}, tensors)
        time.sleep(source.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftovers += any(name.endswith(".tmp") for name in os.listdir(os.path.dirname(path)))
        with StateFile(path, "certify", "0123") as checkpoint:
            state = checkpoint.load()
            assert not any(name.endswith(".tmp") for name in os.listdir(os.path.dirname(path)))
            if state is None:
                assert last == 0
                continue
            with state:
                step = state.values["step"]
                assert step >= last, (step, last)
                for name in state.names:
                    assert (state.tensors(name) == step).all()
                last = step
    print(last, leftovers)
"""


@pytest.mark.slow
def test_killed_at_any_moment(path: Path) -> None:
    """The state is one that was saved, whole, and never older than one seen before."""
    done = run(SAVES_FROM_FORKS, path, 60)
    assert done.returncode == 0, done.stderr
    last, leftovers = map(int, done.stdout.split())
    assert last > 30 and leftovers > 5


def test_killed_from_outside_and_continued(path: Path) -> None:
    process = start(SAVES_FOR_EVER, path, 0)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while not path.exists():
        time.sleep(0.01)
    with (
        StateFile(path, "certify", "0123") as other,
        pytest.raises(
            CheckpointError, match=rf"another process \(pid {process.pid}\) is using it.*another path"
        ),
    ):
        other.load()
    with StateFile(path, "certify", "0123") as other, pytest.raises(CheckpointError, match="is using it"):
        other.save({}, {})
    process.kill()
    process.communicate()
    with StateFile(path, "certify", "0123") as checkpoint:
        with checkpoint.load() as state:
            assert state.values["step"] >= 1
        checkpoint.save({}, {})
    assert os.listdir(path.parent) == [path.name]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(path: Path) -> None:
    with children.start(["true"]) as ended:
        dead = ended.pid
    with children.start(["sleep", "60"]) as living:
        kept = [f".{path.name}.{living.pid}.tmp", ".other.ck.1.tmp", f".{path.name}.x.tmp", f".{path.name}.9"]
        gone = [f".{path.name}.{dead}.tmp", f".{path.name}.{os.getpid()}.tmp", f".{path.name}.{10**30}.tmp"]
        with StateFile(path, "certify", "0123") as checkpoint:
            for act in (checkpoint.load, lambda: checkpoint.save({}, {})):
                for name in kept + gone:
                    (path.parent / name).write_bytes(b"left")
                act()
                assert set(os.listdir(path.parent)) - {path.name, f"{path.name}.lock"} == set(kept)
        living.kill()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EDQUOT, "Disk quota exceeded"), ValueError()]
)
def test_a_failure_while_writing(
    checkpoint: StateFile, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    checkpoint.save({"step": 1}, {"x": torch.zeros(100)})
    before = path.read_bytes()

    def fails(tensor: Tensor) -> Iterator[object]:
        yield bits(tensor).numpy()
        raise error

    monkeypatch.setattr(module, "pieces_of", fails)
    with pytest.raises(type(error)) as caught:
        checkpoint.save({"step": 2}, {"x": torch.ones(100)})
    assert path.read_bytes() == before
    assert set(os.listdir(path.parent)) == {path.name, f"{path.name}.lock"}
    if isinstance(error, OSError):
        assert caught.value.errno == errno.EDQUOT
        for words in (
            str(path),
            "'certify'",
            "Disk quota exceeded",
            " are free in ",
            "last checkpoint is intact",
        ):
            assert words in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_the_end(
    checkpoint: StateFile, path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint.save({"step": 1}, {})
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match=r"Input/output error.*intact"):
        checkpoint.save({"step": 2}, {})
    assert path.read_bytes() == before
    assert set(os.listdir(path.parent)) == {path.name, f"{path.name}.lock"}


def test_the_file_is_on_the_disk_before_its_name(
    checkpoint: StateFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def logged_replace(old: Path, new: Path) -> None:
        assert old.parent == new.parent and str(os.getpid()) in old.name
        calls.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    checkpoint.save({}, {"x": torch.zeros(3)})
    assert calls == ["file", "replace", "folder"]


def test_too_little_room_is_seen_beforehand(
    checkpoint: StateFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "pieces_of", lambda _: pytest.fail("nothing is to be written"))
    with pytest.raises(OSError) as caught:
        checkpoint.save({}, {"x": torch.zeros(1000, dtype=torch.float64)})
    assert caught.value.errno == errno.ENOSPC
    assert "it needs 8," in str(caught.value) and "1,000 are free" in str(caught.value)
    assert "no checkpoint was there before" in str(caught.value)
    assert os.listdir(path.parent) == [f"{path.name}.lock"]
    monkeypatch.undo()
    usage.total = usage.free = 0  # as reported where nothing is known
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    checkpoint.save({}, {"x": torch.zeros(1000)})


FILLS_THE_DISK = """
    import os, resource, sys, torch
    from gcfast.storage.checkpoint import StateFile
    path, limits = sys.argv[1], map(int, sys.argv[2:])
    folder, name = os.path.split(path)
    checkpoint = StateFile(path, "certify", "0123")
    checkpoint.save({"step": 1}, {"x": torch.zeros(1000)})
    for limit in limits:
        if limit == 0:  # as where the system reports more room than there is
            StateFile._free = lambda *_: 10**12
        elif limit > 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            checkpoint.save({"step": 2}, {"x": torch.zeros(20 << 20, dtype=torch.uint8).reshape(2048, -1).T})
        except OSError as error:
            print(error)
        with checkpoint.load() as state:
            assert state.values == {"step": 1} and state.tensors("x").sum() == 0
        assert sorted(os.listdir(folder)) == [name, name + ".lock"]
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(path: Path) -> None:
    done = run(FILLS_THE_DISK, path, 1 << 16, 9 << 20, (20 << 20) + 100)
    assert done.returncode == 0, done.stderr
    for words in ("File too large", "20,97", " are free", "the last checkpoint is intact", str(path)):
        assert done.stdout.count(words) == 3


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = children.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        assert children.run(["umount", folder]).returncode == 0


@pytest.mark.slow
def test_a_full_disk(tiny_disk: Path) -> None:
    """Seen beforehand, and where the system reports more room than there is."""
    done = run(FILLS_THE_DISK, tiny_disk / "state.ck", -1, 0)
    assert done.returncode == 0, done.stderr
    for words in ("No space left on device", "20,97", "the last checkpoint is intact"):
        assert done.stdout.count(words) == 2


def test_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "state.ck"
    for act in (StateFile.load, StateFile.remove, lambda c: c.save({}, {})):
        with StateFile(path, "certify", "0123") as checkpoint, pytest.raises(FileNotFoundError) as caught:
            act(checkpoint)
        assert str(path) in str(caught.value) and "lock file" in str(caught.value)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with StateFile(folder / "state.ck", "certify", "0123") as checkpoint:
        assert checkpoint.load() is None
        (folder / "state.ck.lock").unlink()
        folder.rmdir()
        with pytest.raises(
            FileNotFoundError, match=r"state\.ck: could not write.*free bytes unknown.*no check"
        ):
            checkpoint.save({}, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    with StateFile(tmp_path / "state.ck", "certify", "0123") as checkpoint:
        checkpoint.save({}, {})
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match="last checkpoint is intact"):
                checkpoint.save({}, {})
        finally:
            tmp_path.chmod(0o700)


def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    real, link, plain = tmp_path / "real.ck", tmp_path / "link.ck", tmp_path / "plain"
    link.symlink_to(real)
    plain.touch()
    with StateFile(link, "certify", "0123") as checkpoint:
        checkpoint.save({}, {})
        assert real.stat().st_mode == plain.stat().st_mode
        real.chmod(0o600)
        checkpoint.save({}, {})
        assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o600
        with (
            StateFile(real, "certify", "0123") as other,
            pytest.raises(CheckpointError, match="this process itself is using it"),
        ):
            other.load()


# The lock


def test_the_lock_is_released(path: Path) -> None:
    first = StateFile(path, "certify", "0123")
    first.save({"step": 1}, {})
    with StateFile(path, "certify", "0123") as second:
        with pytest.raises(
            CheckpointError, match=r"this process itself is using it\. Close its first Checkpoint"
        ):
            second.load()
        first.close()
        second.load().close()
        with pytest.raises(CheckpointError, match="is using it"):
            first.load()
    third = StateFile(path, "certify", "0123")
    third.load().close()
    del third
    first.load().close()
    first.remove()
    assert os.listdir(path.parent) == []


def test_a_stale_lock_file_does_no_harm(checkpoint: StateFile, path: Path) -> None:
    Path(f"{path}.lock").write_text("1")
    checkpoint.save({}, {})
    assert Path(f"{path}.lock").read_text() == str(os.getpid())


def test_a_lock_file_deleted_before_it_was_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder deletes it between our opening and locking: a lock on what has no name keeps nobody out."""
    flock, lock = fcntl.flock, Path(f"{path}.lock")
    calls = []

    def after_the_holder_left(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_holder_left)
    with StateFile(path, "certify", "0123") as first, StateFile(path, "certify", "0123") as second:
        first.save({}, {})
        assert len(calls) == 2 and lock.exists()
        with pytest.raises(CheckpointError, match="is using it"):
            second.load()


def test_children_neither_hold_nor_release_the_lock(path: Path) -> None:
    program = """
        import os, signal, sys, time
        from gcfast.storage.checkpoint import StateFile
        from gcfast.storage.file_format import CheckpointError
        checkpoint = StateFile(sys.argv[1], "certify", "0123")
        checkpoint.save({}, {})
        leaver = os.fork()
        if leaver == 0:
            checkpoint.close()
            try:
                checkpoint.load()
                os._exit(1)
            except CheckpointError:
                sys.exit(0)
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print(os.waitpid(leaver, 0)[1], flush=True)
        time.sleep(30)
    """
    process = start(program, path)
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    with StateFile(path, "certify", "0123") as checkpoint:
        with pytest.raises(CheckpointError, match=f"pid {process.pid}"):
            checkpoint.load()
        process.kill()
        process.wait()
        checkpoint.load().close()
    process.stdout.close()


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", fails)
    with StateFile(path, "certify", "0123") as checkpoint:
        with pytest.warns(UserWarning, match="this file system has no locks"):
            checkpoint.save({}, {})
        checkpoint.load().close()


# Cost


@pytest.mark.slow
def test_memory_is_bounded(path: Path) -> None:
    """A tensor of 300 MB, transposed, raises the peak by a few pieces only; so does a contiguous one."""
    program = """
        import resource, sys, torch
        from gcfast.storage.checkpoint import StateFile
        from gcfast.storage.digest import fingerprint
        torch.set_num_threads(2)
        base = torch.ones(5000, 7500, dtype=torch.float64)
        small = torch.ones(700, 700).T.contiguous()
        checkpoint = StateFile(sys.argv[1], "certify", "0123")
        checkpoint.save({}, {"x": small})
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        checkpoint.save({}, {"x": base.T})
        checkpoint.save({}, {"x": base.T[:, :-1]})
        fingerprint(base.T[:, ::2])
        checkpoint.save({}, {"x": base})
        print((peak() - before) / 1024)
        del base
        checkpoint.load().tensors("x")
        print((peak() - before) / 1024)
    """
    done = run(program, path)
    assert done.returncode == 0, done.stderr
    saving, loading = map(float, done.stdout.split())
    assert saving < 64 and loading < 96


def test_due(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StateFile(path, "certify", "0123", every=60) as checkpoint:
        assert not checkpoint.due()
        now += 59.9
        assert not checkpoint.due()
        now += 0.2
        assert checkpoint.due() and checkpoint.due()
        checkpoint.save({}, {})
        assert not checkpoint.due()
        now += 60
        assert checkpoint.due()
    assert StateFile(path, "certify", "0123", every=0).due()
    never = StateFile(path, "certify", "0123", every=math.inf)
    now += 1e12
    assert not never.due()
    assert StateFile(path, "certify", "0123").every == 120.0
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="every: expected seconds"):
            StateFile(path, "certify", "0123", every=wrong)


# Fingerprints


def test_fingerprints_tell_types_boundaries_and_contents_apart() -> None:
    x = torch.arange(6, dtype=torch.float32)
    things: list[tuple[object, ...]] = [
        *((), (None,), (1,), (1.0,), ("1",), (b"1",), (True,), (False,), (0,), (0.0,), (-0.0,), (1 + 0j,)),
        *((255,), (-1,), (256,), (2**64,), (-(2**64),), (math.inf,), (math.nan,), ("",), ("None",)),
        *(
            ((),),
            ([],),
            ({},),
            ((1,),),
            ([1],),
            (1, 1),
            ((1, 1),),
            ((1,), 1),
            (1, (1,)),
            ("ab", "c"),
            ("a", "bc"),
        ),
        *(({"a": 1},), ({"a": 1.0},), ({1: "a"},), ({"a": 1, "b": 2},), ({"a": 2, "b": 1},), ((("a", 1),),)),
        *((x,), (x.double(),), (x.reshape(2, 3),), (x.reshape(2, 3).T,), (x.view(torch.int32),), (-x,)),
        *(
            (x[:5],),
            (x, x),
            ([x],),
            (x.tolist(),),
            (torch.tensor(1),),
            (torch.tensor([1]),),
            (torch.empty(0),),
        ),
        *((torch.empty(0, 2),), (torch.empty(2, 0),), (torch.empty(0).double(),)),
    ]
    found = [fingerprint(*thing) for thing in things]
    assert len(set(found)) == len(things)
    assert found == [fingerprint(*thing) for thing in things]
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in found)


def test_fingerprints_do_not_depend_on_layout_order_or_process() -> None:
    x = torch.arange(35.0).reshape(5, 7)
    assert fingerprint(x.T) == fingerprint(x.T.contiguous()) == fingerprint(torch.nn.Parameter(x.T))
    assert fingerprint({"a": 1, "b": x}) == fingerprint({"b": x, "a": 1})
    settings = ("certify", 0.1, 3, None, {"tol": 1e-6}, True)
    done = run(f"from gcfast.storage import fingerprint; print(fingerprint(*{settings!r}))")
    assert done.stdout.strip() == fingerprint(*settings)


@pytest.mark.parametrize("position", [0, (2 << 20) - 1, 2 << 20, 9 << 20, (21 << 20) - 1])
def test_fingerprints_see_every_byte(position: int) -> None:
    x = torch.zeros(21 << 20, dtype=torch.uint8)
    before = fingerprint(x)
    x[position] = 1
    assert fingerprint(x) != before


@pytest.mark.parametrize("thing", [object(), {1, 2}, torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_fingerprints_of_other_things(thing: object) -> None:
    with pytest.raises(TypeError, match="fingerprint: expected"):
        fingerprint([thing])


def test_interrupted_by_a_signal(path: Path) -> None:
    """Ctrl-C while saving: the state is whole, the lock free and nothing left."""
    process = start(SAVES_FOR_EVER, path, 0)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while not path.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert os.listdir(path.parent) == [path.name]
    with StateFile(path, "certify", "0123") as checkpoint, checkpoint.load() as state:
        step = state.values["step"]
        assert (state.tensors("a") == step).all()
