"""The rules of the house, of the linter and beyond it, each with a planted fault that must be found."""

from __future__ import annotations

import ast
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree"),
]

# Modules that other rooms take whole, beside what a room's face names.
WHOLE = {
    "gcfast.ops.arguments": "checks of arguments that every public function makes in the same words",
    "gcfast.ops.dispatch": "the policy that says where an op will run; proofs ask it",
}
# What only the room that opens it may import: in triton_kernels a file is an op, and the rest is compiled.
OPENED = {"triton_kernels": "ops", "_cpu": "ops", "_cuda": "ops"}
MOST_LINES, MEDIAN_LINES, FEWEST_WORDS = 400, 160, 4


def sources(tree: Path) -> dict[str, ast.Module]:
    """Every module of tree/gcfast by its dotted name; a package by that of its __init__."""
    out = {}
    for path in sorted((tree / "gcfast").rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        if "triton_kernels" not in parts:  # a room beside gcfast/, here through a developer's link
            out[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return out


def room_of(module: str) -> str:
    return module.split(".")[1]


def offered(tree: Path) -> dict[str, set[str]]:
    """``__all__`` of each package, by the package's dotted name."""
    faces = {}
    for name, source in sources(tree).items():
        if name.endswith(".__init__"):
            values = [s.value for s in source.body if isinstance(s, ast.Assign) and "__all__" in ast.dump(s)]
            faces[name.removesuffix(".__init__")] = set(ast.literal_eval(values[0])) if values else set()
    return faces


def imports(source: ast.Module) -> Iterator[tuple[int, str, str, str]]:
    """(line, module, name, what it is called here) of every import from gcfast; ``import x`` has no name."""
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module.startswith(".") or module.split(".")[0] == "gcfast":
                for alias in node.names:
                    yield node.lineno, module, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gcfast":
                    yield node.lineno, alias.name, "", alias.asname or ""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def face_faults(tree: Path) -> list[str]:
    """Imports that go past what a room offers, in the words of a linter."""
    modules, faces = sources(tree), offered(tree)
    packages = {f"gcfast.{room_of(face)}" for face in faces if face != "gcfast"}
    rooms = packages | {name for name in modules if name.count(".") == 1}
    out = []

    def fault_of(here: str, module: str, name: str) -> str:
        if module.startswith("."):
            return "a relative import hides which room it means"
        target = f"{module}.{name}" if module == "gcfast" or f"{module}.{name}" in WHOLE else module
        if target == "gcfast":
            return "the package's face is for users; import the room"
        if target in WHOLE or (room := room_of(target)) == here:
            return ""
        if room in OPENED:
            return "" if here == OPENED[room] else f"only {OPENED[room]} opens {room}"
        if target not in rooms:
            return f"a file inside {room}; take what gcfast.{room} names"
        if not name or target == f"gcfast.{name}":
            return ""
        if is_private(name):
            return f"a private name of {room}"
        return f"gcfast.{room} does not name it" if target in packages and name not in faces[target] else ""

    for importer, source in modules.items():
        here, whole = room_of(importer), {}
        for line, module, name, called in imports(source):
            if fault := fault_of(here, module, name):
                out.append(f"{importer}:{line}: {module} {name}".rstrip() + f": {fault}")
            target = f"{module}.{name}" if name else module
            if (target in rooms or target in WHOLE) and room_of(target) != here:
                whole[called] = target
        for node in ast.walk(source):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in whole
            ):
                target = whole[node.value.id]
                unnamed = target in packages and node.attr not in faces[target]
                if is_private(node.attr) or unnamed:
                    out.append(f"{importer}:{node.lineno}: {target}.{node.attr}: not offered")
    return out


def name_faults(tree: Path) -> list[str]:
    """Modules that bear the name of something that their package exports, which would hide one of the two."""
    return [
        f"{name}: {face} exports a name like it"
        for face, names in offered(tree).items()
        for name in sources(tree)
        if name.rpartition(".")[0] == face and name.rpartition(".")[2] in names
    ]


def size_faults(tree: Path) -> list[str]:
    """Files that are too long, and a median that is."""
    paths = [p for p in (tree / "gcfast").rglob("*.py") if "triton_kernels" not in p.relative_to(tree).parts]
    lines = {path: len(path.read_text().splitlines()) for path in sorted(paths)}
    out = [f"{path.relative_to(tree)}: {n} lines" for path, n in lines.items() if n > MOST_LINES]
    median = statistics.median([n for path, n in lines.items() if n and path.name != "__init__.py"])
    return [*out, f"median: {median:g} lines"] if median > MEDIAN_LINES else out


def docstring_faults(tree: Path) -> list[str]:
    """Modules that do not say in a sentence what they are for. The version is read by a program only."""
    out = []
    for name, source in sources(tree).items():
        first = (ast.get_docstring(source) or "").partition("\n")[0]
        if name != "gcfast._version" and (len(first.split()) < FEWEST_WORDS or first[-1] not in ".:"):
            out.append(f"{name}: {first!r} is no sentence")
    return out


# What makes a tensor out of nothing puts it where torch.set_default_device says.
MAKERS = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "zeros", "Generator"),
}


def device_faults(tree: Path) -> list[str]:
    """Tensors and generators that are made without a word about the device they belong on.

    The command line is a process of its own, in which nobody else has set a default.
    """
    out = []
    for name, source in sources(tree).items():
        if name.startswith("gcfast.cli"):
            continue
        for node in ast.walk(source):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = any(k.arg in ("device", None) for k in node.keywords)
            if (
                of_torch
                and node.func.attr in MAKERS
                and not (named or (node.func.attr == "Generator" and node.args))
            ):
                out.append(f"{name}:{node.lineno}: torch.{node.func.attr} without a device")
    return out


def folder_faults(tree: Path) -> list[str]:
    """Tests that lie in no room's folder."""
    rooms = {room_of(name) for name in sources(tree)} | {"tools", "core"}
    known = {path: path.name in rooms for path in (tree / "tests").iterdir() if path.name != "__pycache__"}
    out = [f"tests/{path.name} is no room" for path in known if path.is_dir() and not known[path]]
    return out + [f"tests/{path.name} belongs into a folder" for path in known if path.match("test_*.py")]


CHECKS = (face_faults, name_faults, size_faults, docstring_faults, device_faults, folder_faults)


@pytest.mark.parametrize("check", CHECKS)
def test_the_house(check):
    assert check(ROOT) == []


@pytest.fixture
def small(tmp_path) -> Path:
    """A house of three rooms, in which everything is as it should be."""
    files = {
        "gcfast/__init__.py": '"""What a user of this imports."""\nfrom gcfast.solve import solve_head\n',
        "gcfast/nn.py": '"""Layers of a small house."""\nfrom gcfast import ops\nbig = ops.add\n',
        "gcfast/ops/__init__.py": '"""Ops that others may call."""\nfrom gcfast.ops.sums import add\n'
        '__all__ = ["add"]\n',
        "gcfast/ops/sums.py": '"""Sums, one after the other."""\ndef add(): ...\ndef _carry(): ...\n',
        "gcfast/ops/arguments.py": '"""Checks of arguments for everyone."""\n',
        "gcfast/solve/__init__.py": '"""Solves it all well."""\nfrom gcfast.solve.head import solve_head\n'
        '__all__ = ["solve_head"]\n',
        "gcfast/solve/head.py": '"""The head, and its solution."""\nfrom gcfast.ops import add, arguments\n'
        "from gcfast.nn import big\ndef solve_head(): ...\n",
        "tests/ops/test_sums.py": "",
        "tests/tools/test_house.py": "",
        "tests/conftest.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_small_house(small):
    assert [fault for check in CHECKS for fault in check(small)] == []


@pytest.mark.parametrize(
    "check, path, line, said",
    [
        (face_faults, "gcfast/solve/head.py", "from gcfast.ops.sums import add", "a file inside ops"),
        (face_faults, "gcfast/solve/head.py", "import gcfast.ops.sums", "a file inside ops"),
        (
            face_faults,
            "gcfast/solve/head.py",
            "def f():\n    from gcfast.ops import sums",
            "does not name it",
        ),
        (face_faults, "gcfast/solve/head.py", "from ..ops.sums import add", "a relative import"),
        (face_faults, "gcfast/solve/head.py", "from gcfast import solve_head", "a file inside solve_head"),
        (face_faults, "gcfast/solve/head.py", "from gcfast.nn import _hidden", "a private name of nn"),
        (face_faults, "gcfast/solve/head.py", "from gcfast import _cpu", "only ops opens _cpu"),
        (face_faults, "gcfast/solve/head.py", "import gcfast.triton_kernels.wide", "only ops opens"),
        (face_faults, "gcfast/nn.py", "ops._carry()", "not offered"),
        (face_faults, "gcfast/nn.py", "ops.sums.add()", "not offered"),
        (face_faults, "gcfast/solve/head.py", "arguments._check()", "not offered"),
        (name_faults, "gcfast/ops/add.py", '"""A file like a function."""', "exports a name like it"),
        (size_faults, "gcfast/nn.py", "\n" * MOST_LINES, "nn.py: 404 lines"),
        (docstring_faults, "gcfast/ops/more.py", "x = 1", "is no sentence"),
        (docstring_faults, "gcfast/ops/more.py", '"""More of ops."""', "is no sentence"),
        (docstring_faults, "gcfast/ops/more.py", '"""More ops, and no stop"""', "is no sentence"),
        (device_faults, "gcfast/ops/add.py", "import torch; x = torch.zeros(3)", "zeros without a device"),
        (device_faults, "gcfast/ops/add.py", "import torch; x = torch.Generator()", "Generator without"),
        (folder_faults, "tests/attic/test_old.py", "", "tests/attic is no room"),
        (folder_faults, "tests/test_nowhere.py", "", "belongs into a folder"),
    ],
)
def test_a_planted_fault_is_found(small, check, path, line, said):
    place = small / path
    place.parent.mkdir(exist_ok=True)
    with place.open("a") as file:
        file.write(line + "\n")
    (fault,) = check(small)
    assert said in fault


def test_a_median_too_high_is_found(small):
    for path in (small / "gcfast").rglob("*.py"):
        path.write_text(path.read_text() + "\n" * MEDIAN_LINES)
    (fault,) = size_faults(small)
    assert fault.startswith("median: ")


@pytest.fixture(scope="module")
def linted(tmp_path_factory):
    """Runs the linter on a copy of the package as it is when installed, with a line added to one file."""
    pytest.importorskip("importlinter")
    tree = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", tree)
    skipped = shutil.ignore_patterns("triton_kernels", "__pycache__", "*.so")
    shutil.copytree(ROOT / "gcfast", tree / "gcfast", ignore=skipped)
    shutil.copytree(ROOT / "triton_kernels", tree / "gcfast" / "triton_kernels", ignore=skipped)

    def run(path: str = "", line: str = "") -> subprocess.CompletedProcess[str]:
        place = tree / (path or "nothing.py")
        before = place.read_text() if place.is_file() else None
        place.write_text(f"{before or ''}\n{line}\n")
        code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
        try:
            return children.run([sys.executable, "-c", code], cwd=tree)
        finally:
            place.unlink() if before is None else place.write_text(before)

    return run


def test_the_contracts_are_kept(linted):
    done = linted()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "path, line, contract, named",
    [
        (
            *("gcfast/storage/files.py", "from gcfast.solve import solve_head"),
            *(
                "A room imports only from rooms on the floors below it",
                "gcfast.storage.files -> gcfast.solve",
            ),
        ),
        (
            *("gcfast/certificate/certificate.py", "from gcfast.jacobian import trainability"),
            *("A room imports only from", "gcfast.certificate.certificate -> gcfast.jacobian"),
        ),
        ("gcfast/attic.py", "", "A room imports only from", "attic"),
        (
            *("gcfast/losses/base.py", "from gcfast.losses.resolve import resolve_loss"),
            *("No circle among the files of a room", "gcfast.losses"),
        ),
        (
            *("gcfast/reference/rank.py", "import triton"),
            *("The reference is plain PyTorch", "gcfast.reference.rank -> triton"),
        ),
    ],
)
def test_a_contract_can_be_broken(linted, path, line, contract, named):
    done = linted(path, line)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 kept, 1 broken" in done.stdout and named in done.stdout
    assert any(contract in text and "BROKEN" in text for text in done.stdout.splitlines())
