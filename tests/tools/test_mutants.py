"""tools/mutants.py: its list fits the sources; it tells faults that tests find from those that they miss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
TOOL = ROOT / "tools" / "mutants.py"
ROOMS = {"reference", "storage", "ops", "losses", "nn", "model", "optim", "features", "proofs"}
ROOMS |= {"certificate", "solve", "jacobian", "cli"}

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not TOOL.is_file() or sys.version_info < (3, 11), reason="needs tools/, Python 3.11"),
]


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import mutants

    return mutants


def test_every_fault_has_one_place(mutants):
    listed = mutants.read_list(TOOL.with_suffix(".toml"))
    assert len({m["id"] for m in listed}) == len(listed) >= 60
    assert {m["room"] for m in listed} == ROOMS
    sources = mutants.source_texts(ROOT)
    for mutant in listed:
        mutants.place_of(sources, mutant)  # raises where there is none, or another one, or it changes nothing
        assert not ("found_by" in mutant and mutant.get("survived"))


GOOD = """
[[mutant]]
id = "sign"
room = "numbers"
why = "the sign of a sum"
find = "return a + b"
replace = "return a - b"
"""
MISSED = """
[[mutant]]
id = "largest"
room = "numbers"
why = "an off-by-one"
find = "range(n)"
replace = "range(n + 1)"
"""


@pytest.fixture
def tree(tmp_path):
    """A package of two functions, of which tests look at one."""
    for folder in ("gcfast", "tests/numbers"):
        (tmp_path / folder).mkdir(parents=True)
    code = "def add(a, b):\n    return a + b\n\n\ndef upto(n):\n    return list(range(n))\n"
    (tmp_path / "gcfast" / "__init__.py").write_text(code)
    test = "from gcfast import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    (tmp_path / "tests" / "numbers" / "test_add.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(tree: Path, mutants: str, *options: str) -> subprocess.CompletedProcess[str]:
    listed = tree / "mutants.toml"
    listed.write_text("# kept\n" + mutants)
    command = [sys.executable, str(TOOL), "--root", str(tree), "--list", str(listed), *options]
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    return children.run(command, env=env)


def test_a_found_fault_and_a_survivor(tree, mutants):
    before = (tree / "gcfast" / "__init__.py").read_text()
    done = run(tree, GOOD + MISSED)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sign: tests/numbers/test_add.py::test_add" in done.stdout
    assert "1 found; survived: largest" in done.stdout
    assert (tree / "gcfast" / "__init__.py").read_text() == before
    results = json.loads((tree / "build" / "mutants-default.json").read_text())["mutants"]
    assert results["sign"]["by"] and not results["largest"]["by"]

    done = run(tree, GOOD + MISSED, "--record")  # goes on from the results
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tree / "mutants.toml").read_text().startswith("# kept\n")
    sign, largest = mutants.read_list(tree / "mutants.toml")
    assert sign["found_by"] == "tests/numbers/test_add.py::test_add" and largest["survived"]
    assert run(tree, GOOD + MISSED.strip() + '\nsurvives = "nobody calls it"\n').returncode == 0


@pytest.mark.parametrize(
    "recorded, found", [("add.py::test_add", "add.py::test_add"), ("gone.py", "a.py::test_a")]
)
def test_who_found_it_before_is_asked_first(tree, recorded, found):
    test = "from gcfast import add\n\n\ndef test_a():\n    assert add(1, 0) > 0\n"
    (tree / "tests" / "numbers" / "test_a.py").write_text(test)
    listed = GOOD.replace("return a - b", "return 0") + f'found_by = "tests/numbers/test_{recorded}"\n'
    done = run(tree, listed, "--no-check")
    assert done.returncode == 0 and f"sign: tests/numbers/test_{found}\n" in done.stdout, (
        done.stdout + done.stderr
    )


def test_a_fault_that_no_longer_has_its_place(tree):
    done = run(tree, GOOD.replace("return a + b", "return a * b"), "--no-check")
    assert done.returncode == 2 and "occurs 0 times" in done.stdout


def test_a_hang_is_found(tree):
    endless = GOOD.replace("return a - b", "while True: pass")
    done = run(tree, endless, "--no-check", "--limit", "5")
    assert done.returncode == 0 and "the time limit of 5 s" in done.stdout, done.stdout + done.stderr


PYTHON = """
def gap_bound(a: "list[3]", *, k=2):
    if a[0] <= -1.5:
        raise ValueError(f"{k + 1} < 3")
    return a[0] * 2.0**-53
"""
CPP = """
#define N 4
double bound(const double* x) {  // 1 + 2
  return x[0] < 0x1p-53 ? 2.0 * x[1] : std::min<double>(x[2], -x[0]);
}
"""


def test_faults_are_drawn_from_the_sources(mutants):
    draw = mutants._mutant_sample
    sources = {"gcfast/losses/a.py": PYTHON, "csrc/core/b.h": CPP, "gcfast/nn/c.py": PYTHON}
    found = draw.candidates(sources, 0)
    assert found == draw.candidates(sources, 0) != draw.candidates(sources, 1)
    places = [m["id"].split(" ->")[0].split(":", 1) for m in found]
    python = {"2:34 2", "3:13 <=", "3:16 -", "3:17 1.5", "5:17 *", "5:19 2.0", "5:24 -", "5:25 53"}
    cpp = {"4:12 0", "4:15 <", "4:17 0x1p-53", "4:27 2.0", "4:31 *", "4:35 1", "4:59 2", "4:66 0"}
    assert {p for file, p in places if "losses" in file} == python
    assert {p for file, p in places if "csrc" in file} == cpp and len(places) == len(python) + len(cpp)
    assert sum(m["bound"] for m in found) == 4
    chosen = draw.sample(found, 4, 0)
    assert {m["id"] for m in found if m["bound"]} < {m["id"] for m in chosen}


def test_faults_of_a_header_are_tried_on_the_programs_that_name_it(mutants):
    of = mutants._mutant_sample.programs_of
    for header, program in (("panel", "panel"), ("rank_bounds", "rank_bounds"), ("macros", "inertia")):
        found = of({"file": f"csrc/core/{header}.h"}, TOOL.parents[1])
        assert found == [f"tests/ops/test_core.py::test_core[native-{program}]"]


def test_generated_faults_are_tried_on_the_tests_that_run_them(tree):
    (tree / "gcfast" / "losses").mkdir()
    code = "def gap(a):\n    return a * 2.0\n\n\ndef error(a):\n    return a + 8.5\n"
    (tree / "gcfast" / "losses" / "__init__.py").write_text(code)
    (tree / "tests" / "losses").mkdir()
    for name, said in (("gap", "== 6"), ("error", "!= 7")):
        text = f"from gcfast.losses import {name}\n\n\ndef test_{name}():\n    assert {name}(3) {said}\n"
        (tree / "tests" / "losses" / f"test_{name}.py").write_text(text)
    (tree / "tools").mkdir()
    (tree / "tools" / "_calls.py").write_text((TOOL.parent / "_calls.py").read_text())
    reasons = tree / "reasons.toml"
    options = ("--generated", "8", "--room", "losses", "--reasons", str(reasons))
    done = run(tree, GOOD, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tests/losses/test_gap.py::test_gap" in done.stdout and "50.0 % survived" in done.stdout
    entry = (
        "[[survivor]]\nfile = 'gcfast/losses/__init__.py'\nline = 'return a + 8.5'\nreason = 'not called'\n"
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("survived ")]
    told = [line.split(": return")[0].split("py:")[1].split(" ", 1)[1] for line in lines]
    reasons.write_text("".join(f"{entry}change = '{change}'\n" for change in told))
    assert run(tree, GOOD, *options).returncode == 0


def test_every_reason_has_its_place():
    import tomllib

    for entry in tomllib.loads((TOOL.parent / "mutant_reasons.toml").read_text()).get("survivor", []):
        assert set(entry) == {"file", "line", "change", "reason"}
        assert entry["line"] in [line.strip() for line in (ROOT / entry["file"]).read_text().splitlines()]


def test_a_sample_goes_through_the_list(mutants):
    listed = [{"id": str(k), "room": "numbers"} for k in range(10)]
    seen: set[str] = set()
    for day in range(4):
        part = mutants.chosen(listed, mutants.arguments(["--sample", "3", "--seed", str(day)]))
        assert len(part) == 3
        seen |= {m["id"] for m in part}
    assert len(seen) == 10
