"""Runs that are killed with kill -9 at any moment and taken up again end as if nothing had happened."""

from __future__ import annotations

import json
import random
import sys
import time

import children
import pytest
import torch

import gcfast
from gcfast.storage.file_format import CheckpointError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill -9 and flock")

# Features that need whitening: a wide layer on two numbers a sample.
CERTIFY = """
import json, sys, torch, gcfast
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
z = torch.randn((900, 2), generator=g)
layer = torch.randn((9000, 2), generator=g) / 2**0.5, torch.randn(9000, generator=g)
features = gcfast.WideFeatures(z, layer, beta=4.0)
print("ready", flush=True)
c = gcfast.certify(features, checkpoint=sys.argv[1], checkpoint_seconds=0.0, sharp=False, route="direct")
print(json.dumps([c.status, c.rank_lower, c.sigma_min_lower, c.sigma_max_upper]), flush=True)
"""

SOLVE = """
import json, sys, torch, gcfast
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
centres = torch.randn((5, 20), generator=g)
y = torch.randint(0, 5, (1500,), generator=g)
z = 0.7 * centres[y] + torch.randn((1500, 20), generator=g)
layer = torch.randn((1700, 20), generator=g) / 20**0.5, torch.randn(1700, generator=g)
features = gcfast.WideFeatures(z, layer, beta=4.0)
kind = sys.argv[2]
loss, targets = ("cross_entropy", y) if kind == "set" else ("mse", torch.nn.functional.one_hot(y, 5).float())
print("ready", flush=True)
s = gcfast.solve_head(features, targets, loss=loss, target_gap=1e-5, checkpoint=sys.argv[1],
                      checkpoint_seconds=0.0)
print(json.dumps([s.converged, s.loss, float(s.weight.norm()), s.distance_bound]), flush=True)
"""


def _start(program, arguments, tmp_path):
    command = [sys.executable, "-c", program, *arguments]
    # Elsewhere than in the source tree, which would shadow the installed package.
    return children.start(command, cwd=tmp_path)


def _through_kills(program, arguments, tmp_path, kills, longest):
    """The answer of a run that was killed ``kills`` times at random moments, and how often it was in time."""
    moments = random.Random(0)
    killed = 0
    while True:
        child = _start(program, arguments, tmp_path)
        assert child.stdout is not None and child.stdout.readline() == "ready\n", child.communicate()[1]
        if killed < kills:
            time.sleep(moments.uniform(0.0, longest))
            if child.poll() is None:
                child.kill()
                child.communicate()
                killed += 1
                continue
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        return json.loads(out.strip().splitlines()[-1]), killed


def _alone(program, arguments, tmp_path):
    began = time.monotonic()
    answer, _ = _through_kills(program, arguments, tmp_path, 0, 0.0)
    return answer, time.monotonic() - began


@pytest.mark.slow
def test_a_certificate_survives_kill_9(tmp_path):
    plain, _ = _alone(CERTIFY, [tmp_path / "plain"], tmp_path)
    assert plain[0] == "holds" and plain[1] == 900
    path = tmp_path / "proof"
    answer, killed = _through_kills(CERTIFY, [path], tmp_path, 8, 0.8)
    assert answer == plain and killed >= 3
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["set", "all"])
def test_a_solved_head_survives_kill_9(kind, tmp_path):
    plain, _ = _alone(SOLVE, [tmp_path / "plain", kind], tmp_path)
    path = tmp_path / "path"
    answer, killed = _through_kills(SOLVE, [path, kind], tmp_path, 8, 0.5)
    assert killed >= 3 and answer[0] and plain[0]
    assert abs(answer[1] - plain[1]) <= 0.05 * plain[1] and abs(answer[2] - plain[2]) <= 0.01 * plain[2]
    assert answer[3] < 0.2 and not path.exists()


class _Stop(Exception):
    pass


def _problem():
    g = torch.Generator().manual_seed(0)
    h = torch.randn((300, 330), generator=g)
    return h, torch.randint(0, 3, (300,), generator=g)


def _interrupted(path, h, y, **options):
    def stop(progress):
        if progress.iteration == 3:
            raise _Stop

    with pytest.raises(_Stop):
        gcfast.solve_head(h, y, checkpoint=path, checkpoint_seconds=0.0, callback=stop, **options)


def test_a_checkpoint_of_another_problem_is_refused_by_name(tmp_path):
    path, (h, y) = tmp_path / "state", _problem()
    _interrupted(path, h, y)
    kept = path.read_bytes()
    for other in (
        {"weight_decay": 1e-3},
        {"target_gap": 1e-3},
        {"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)},
    ):
        with pytest.raises(CheckpointError, match=r"state.*other data, weights or settings"):
            gcfast.solve_head(h, y, checkpoint=path, **other)
    with pytest.raises(CheckpointError, match="other data"):
        gcfast.solve_head(h + 1, y, checkpoint=path)
    with pytest.raises(CheckpointError, match="'solve_head', not of 'certify'"):
        gcfast.certify(h, checkpoint=path)
    assert path.read_bytes() == kept
    path.write_bytes(kept[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        gcfast.solve_head(h, y, checkpoint=path)


def test_a_run_takes_up_where_it_was(tmp_path):
    path, (h, y) = tmp_path / "state", _problem()
    _interrupted(path, h, y)
    seen = []
    solution = gcfast.solve_head(h, y, checkpoint=path, callback=lambda p: seen.append(p.iteration))
    assert solution.converged and seen[0] == 3 and not path.exists()
    assert len(solution.path) == seen[-1]


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    path, (h, y) = tmp_path / "state", _problem()
    _interrupted(path, h, y)
    kept = path.read_bytes()
    monkeypatch.setattr("gcfast.storage.checkpoint.shutil.disk_usage", lambda folder: _Usage)
    with pytest.raises(OSError, match=r"solve_head.*last checkpoint is intact"):
        gcfast.solve_head(h, y, checkpoint=path, checkpoint_seconds=0.0)
    monkeypatch.undo()
    assert path.read_bytes() == kept
    assert gcfast.solve_head(h, y, checkpoint=path).converged


class _Usage:
    total, free = 1, 0


@pytest.mark.parametrize("condition", [1e3, 1e9])
def test_tiles_on_disk_prove_what_tiles_in_memory_do(condition):
    g = torch.Generator().manual_seed(0)
    h = torch.randn((700, 800), generator=g, dtype=torch.float64)
    h *= torch.logspace(0, -torch.tensor(condition).log10().item(), 700, dtype=torch.float64)[:, None]
    inside = gcfast.certify(h, sharp=False)
    room = gcfast.proofs.proof_bytes(700, 800, disk=True) + 1000
    on_disk = gcfast.certify(h, sharp=False, max_bytes=room)
    assert inside.status == "holds" and on_disk.to_dict() == inside.to_dict()
    with pytest.raises(MemoryError, match="700 needs"):
        gcfast.certify(h, max_bytes=room - 2000)


MEMORY = """
import torch, gcfast
from gcfast.proofs import proof_bytes
n, m, d = 3000, 3300, 3
g = torch.Generator().manual_seed(0)
layer = torch.randn((m, d), generator=g) / d**0.5, torch.randn(m, generator=g)
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
def prove(n):
    z = torch.randn((n, d), generator=g)
    return gcfast.certify(gcfast.WideFeatures(z, layer, beta=4.0), sharp=False)
assert prove(300).status == "holds"
before = peak()
found = prove(n)
assert found.status == "holds" and "whitening" in str(found), str(found)
print((peak() - before) / proof_bytes(n, m))
"""


@pytest.mark.slow
def test_a_proof_holds_what_it_says(tmp_path):
    done = children.run([sys.executable, "-c", MEMORY], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.1


def test_scratch_files_without_room_are_refused(monkeypatch):
    def full(fd, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gcfast.storage.memory.os.posix_fallocate", full)
    h = torch.randn((700, 800), dtype=torch.float64)
    with pytest.raises(OSError, match=r"scratch tiles: [\d,]+ bytes do not fit on the disk of .*TMPDIR"):
        gcfast.certify(h, max_bytes=gcfast.proofs.proof_bytes(700, 800, disk=True) + 1000)
