"""The paper: cells that can be killed, statistics, augmentation, and pages that say what was measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing.util
import pickle
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from paper import findings, frozen, generalisation, pages, problem, running, statistics, suite
from paper.context import Context, OutOfTime
from paper.expressivity import Times, times
from torch import nn

import gcfast

pytestmark = pytest.mark.tools

RUN = generalisation.Run("digits", 150, "mlp", "adam", 1e-3, 4, 3, (0.4, 0.8), (0.4,))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupted(Context):
    """Stops at the given calls of pause and check, counted over all its lives."""

    def __init__(self, folder: Path, at: set[int]) -> None:
        super().__init__(folder)
        self.at, self.calls = at, 0

    def pause(self, state) -> None:
        self.calls += 1
        if self.calls in self.at:
            self.keep(state())
            raise OutOfTime

    def check(self) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise OutOfTime


def _without_seconds(value):
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return value


def test_a_run_that_is_stopped_goes_on_to_the_same_result(tmp_path):
    cell = dataclasses.replace(RUN, epochs=30)  # 60 steps: three chances to stop in base, more in phase two
    whole = generalisation.run(cell, Context(tmp_path / "whole"))
    context = Interrupted(tmp_path / "stopped", {1, 3, 5, 9})
    for _ in range(10):
        try:
            result = generalisation.run(cell, context)
            break
        except OutOfTime:
            continue
    assert context.calls > 9, "the run ended before it was stopped four times"
    assert _without_seconds(result) == _without_seconds(whole)
    context.clear()
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("model, augment", [("mlp", False), ("mlp", True), ("resnet18/4", True)])
def test_photos_of_base_give_what_two_phase_gives(tmp_path, model, augment):
    cell = dataclasses.replace(RUN, model=model, augment=augment, taus=(0.4,), prove=())
    found = generalisation.run(cell, Context(tmp_path))
    split = problem.load(cell.data, cell.n, cell.seed)
    plan = problem.schedule(len(split.y_train), cell.epochs, cell.seed, 0.4)
    torch.manual_seed(cell.seed)
    whole = problem.build(cell.model, split, problem.width(len(split.y_train))).train()
    opt = problem.optimizer(cell.base, whole.parameters(), cell.lr)
    two = gcfast.TwoPhase(
        opt, whole, switch_step=plan.switch, perturbation=problem.PERTURBATION, seed=cell.seed
    )
    stepper = generalisation.Stepper(split, plan, augment, "cpu")
    losses = []
    for step in range(plan.total):
        stepper(whole, two, step)
        if step + 1 in (plan.switch, plan.total):
            whole.eval()
            losses.append(problem.evaluate(whole, split.x_train, split.y_train)[0])
            whole.train()
    assert losses == pytest.approx([found["0.4"][k]["loss"] for k in ("switch", "paper")], rel=2e-4)
    assert found["0.4"]["paper"]["loss"] != found["base"]["loss"]
    assert found["0.4"]["nearest"]["gap"] <= problem.TARGET_GAP


def test_augmentation_shifts_and_mirrors_by_the_step_alone():
    images = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).view(2, 3, 5, 4) + 1
    change = problem.Augmentation(2, True, torch.tensor([-1.0, -2.0, -3.0]), seed=7)
    seen = set()
    for step in range(60):
        out = change(images, step)
        assert torch.equal(out, change(images, step))
        for image, before in zip(out, images):
            matches = []
            for down, right, turned in itertools.product(range(-2, 3), range(-2, 3), (False, True)):
                frame = change.background.view(3, 1, 1).expand(3, 9, 8).clone()
                frame[:, 2:7, 2:6] = before
                part = frame[:, 2 + down : 7 + down, 2 + right : 6 + right]
                if torch.equal(image, part.flip(2) if turned else part):
                    matches.append((down, right, turned))
            assert len(matches) == 1
            seen.add(matches[0])
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(-2, 3)) and {s[2] for s in seen} == {
        0,
        1,
    }


def test_wrong_labels_are_the_stated_share_and_always_another_class():
    split = problem.load("digits", 203, 0)
    other = frozen.noisy(split, 0.2, 5)
    changed = other.y_train != split.y_train
    assert int(changed.sum()) == 41 and int(other.y_train.max()) < 10
    assert torch.equal(other.y_test, split.y_test)
    assert not torch.equal(frozen.noisy(split, 0.2, 6).y_train, other.y_train)


def test_settled_statistics_are_those_of_the_data():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2)
    x = torch.randn(512, 2, 3, 3) * 3 + 1
    problem.settle(nn.Sequential(norm), x)
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=1e-2)
    assert not norm.training


def test_intervals_and_paired_tests():
    found = statistics.mean([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302652729749464 / math.sqrt(3), rel=1e-10)  # t(0.975; 2)
    assert str(found) == "2.00 ± 2.48" and str(statistics.mean([4])) == "4.00"
    with pytest.raises(ValueError, match="values: expected at least one"):
        statistics.mean([])
    # by hand: differences 1, 2, 3 have t = 2 sqrt 3, and P(|t_2| > t) = 1 - t / sqrt(2 + t^2)
    difference = statistics.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert str(difference) == "+2.00 ± 2.48"
    assert statistics.paired([1.0, 1.0], [1.0, 1.0]).p == 1.0
    assert str(statistics.paired([1.0, 1.1, 1.2], [0.0, 0.0, 0.1])).startswith("**+1.07")
    with pytest.raises(ValueError, match="others: expected 2 values"):
        statistics.paired([1, 2], [1])
    assert statistics.power_law([(n, 3 * n**2.5) for n in (1, 10, 200)]) == pytest.approx((2.5, 3))


def test_cells_have_names_of_their_own_and_travel_to_workers():
    cells = [*suite.cpu(), *suite.gpu()]
    assert len({c.name for c in cells}) == len(cells)
    assert all(pickle.loads(pickle.dumps(c)) == c and c.cost > 0 for c in cells)


def fails(params, context):
    raise ArithmeticError("of no use")


def late(params, context):
    context.check()


def test_finished_cells_stay_failed_ones_are_told_and_absent_data_are_passed_over(
    tmp_path, capsys, monkeypatch
):
    real, start = problem.available, multiprocessing.util.spawnv_passfds
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", lambda *given: children.adopt(start(*given)))
    monkeypatch.setattr(problem, "available", lambda name: "not here" if name == "svhn" else real(name))
    size = Times("digits", "mlp", (40,), 0)
    good = suite.Cell("times-good", times, size, 1.0, True)
    absent = suite.Cell("times-absent", times, dataclasses.replace(size, data="svhn"), 1.0)
    bad = suite.Cell("times-bad", fails, size, 1.0, True)
    assert running.run([good, absent, bad], tmp_path) == 1
    said = capsys.readouterr().out
    assert "svhn: its cells are passed over. not here" in said and "of no use" in said
    path = running.result(tmp_path, good)
    cell = json.loads(path.read_text())
    assert cell["params"] == {"data": "digits", "model": "mlp", "sizes": [40], "seed": 0}
    assert cell["result"]["points"][0]["status"] == "holds" and cell["machine"]["torch"] == torch.__version__
    path.write_text("{}")
    # a worker is not needed for what is done, nor past the deadline
    assert running.run([good], tmp_path) == 0 and path.read_text() == "{}"
    waiting = suite.Cell("times-late", late, size, 1.0)
    assert running.run([good, waiting], tmp_path, minutes=0) == 3
    assert running.work(waiting, tmp_path, "cpu", 0.0, "abc").startswith("stopped")
    unaware = dataclasses.replace(good, name="times-unaware")  # looks at no clock: not begun either
    assert running.work(unaware, tmp_path, "cpu", 0.0, "abc").startswith("stopped")
    assert sorted(running.read(tmp_path)) == ["times-good"]


@pytest.fixture(scope="module")
def cells():
    found = running.read(pages.CELLS)
    if not found:
        pytest.skip("no cells beside this copy of experiments/paper")
    return found


def test_committed_cells_are_those_of_the_suite(cells):
    wanted = {c.name: json.loads(json.dumps(dataclasses.asdict(c.params))) for c in suite.cpu()}
    assert {name: cell["params"] for name, cell in cells.items()} == {name: wanted[name] for name in cells}


def test_pages_are_what_the_cells_say(cells):
    assert pages.check() == 0


def test_verdicts_change_with_the_cells(cells):
    known = pages.values(cells)
    assert "onfirmed" in known["claim_expressivity"]

    def changed(kind: str, edit) -> dict[str, str]:
        other = json.loads(json.dumps(cells))
        for name in other:
            if name.startswith(kind):
                edit(other[name]["result"])
        return pages.values(other)

    def undecided(result) -> None:
        result.update(status="unknown", route=None)

    assert changed("table1-mnist-resnet18", undecided)["claim_expressivity"] != known["claim_expressivity"]
    assert "Not confirmed" in changed("table1", undecided)["claim_expressivity"]

    def worse(result) -> None:
        for tau in findings.TAUS:
            for way in ("paper", "nearest"):
                result[tau][way]["test_error"] = result["base"]["test_error"] + 2.0

    assert "Not confirmed" in changed("table2", worse)["claim_generalisation"]

    def far(result) -> None:
        result["0.6"]["nearest"]["gap"] = 1e-3

    assert "Not confirmed" in changed("table2-digits", far)["claim_minimum"]


def test_an_unknown_name_in_a_template_is_an_error(cells, tmp_path):
    template = tmp_path / "page.md"
    template.write_text("{made} {no_such_number}")
    with pytest.raises(KeyError, match="no_such_number"):
        pages.fill(template, cells)


def test_least_squares_of_the_committed_times_is_numpys(cells):
    points = [(p["n"], p["seconds"]) for p in cells["times-mnist"]["result"]["points"] if p["n"] >= 1000]
    x, y = np.log(np.array(points)).T
    assert findings.certificate_time(cells)[0] == pytest.approx(
        float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()), rel=1e-9
    )
