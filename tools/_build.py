"""gcfast built for one GPU into a folder of its own, from a clean copy of the sources, without network."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from _record import ROOT

FOLDERS = ("csrc", "gcfast", "triton_kernels")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
Runner = Callable[[list[str], dict[str, str]], int]


def _skip(folder: str, names: list[str]) -> set[str]:
    """What is built, not written: modules of another Python, caches, links."""
    built = (".so", ".pyc", ".o")
    return {n for n in names if n == "__pycache__" or n.endswith(built) or Path(folder, n).is_symlink()}


def stage(source: Path, target: Path) -> None:
    """A copy, so that the source tree stays as it is and nothing left in its build/ gets into the wheel."""
    shutil.rmtree(target, ignore_errors=True)
    for name in FOLDERS:
        shutil.copytree(source / name, target / name, ignore=_skip)
    for name in FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    # the C++ and the CUDA module at the same time
    (target / "setup.cfg").write_text("[build_ext]\nparallel = 2\n", encoding="utf-8")


def work_folder(source: Path, arch: str) -> Path:
    """Named by what is built, so that a second run on the same machine finds the first one's build."""
    digest = hashlib.sha256(f"{arch} {sys.executable} {sys.version}".encode())
    for name in (*FOLDERS, *FILES):
        paths = [source / name] if name in FILES else sorted((source / name).rglob("*"))
        for path in paths:
            if (
                path.is_file()
                and "__pycache__" not in path.parts
                and path.suffix not in (".so", ".pyc", ".o")
            ):
                digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    return Path(tempfile.gettempdir()) / f"gcfast-device-{os.getuid()}-{digest.hexdigest()[:12]}"


def content_errors(wheel: Path, source: Path) -> list[str]:
    """What a wheel lacks, or holds and should not."""
    names = zipfile.ZipFile(wheel).namelist()
    kernels = (f"gcfast/triton_kernels/{p.name}" for p in sorted((source / "triton_kernels").glob("*.py")))
    wanted = ["gcfast/__init__.py", "gcfast/py.typed", "gcfast/cli/__init__.py", *kernels]
    errors = [f"{name} is missing" for name in wanted if name not in names]
    for module in ("_cpu", "_cuda"):
        if not any(n.startswith(f"gcfast/{module}.") and n.endswith(".so") for n in names):
            errors.append(f"gcfast/{module}.*.so is missing")
    strays = [n for n in names if not n.startswith(("gcfast/", "gcfast-"))]
    return errors + [f"{name} does not belong there" for name in strays]


def build(run: Runner, work: Path, arch: str) -> tuple[bool, str]:
    """Wheel and installation under work/site; (whether all is well, a note).

    Where the CUDA module does not build, gcfast is installed without it, and where nothing does, as plain
    Python, so that what is left can still be tested; that is a failure all the same.
    """
    if (work / "complete").exists():
        return True, "as built before from the same sources"
    source, site = work / "src", work / "site"
    pip = [sys.executable, "-m", "pip"]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    for mode in ("1", "0"):
        stage(ROOT, source)
        for folder in (site, work / "wheel"):
            shutil.rmtree(folder, ignore_errors=True)
        env = {**quiet, "GCFAST_CUDA": mode, "GCFAST_CUDA_ARCHS": arch}
        options = ["--no-build-isolation", "--no-deps", "--no-index"]
        if run([*pip, "wheel", *options, "-w", str(work / "wheel"), str(source)], env) != 0:
            continue
        (wheel,) = (work / "wheel").glob("*.whl")
        if run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], env) != 0:
            continue
        errors = content_errors(wheel, ROOT)
        if mode == "1" and not errors:
            (work / "complete").touch()
            return True, f"{wheel.name} for sm_{arch}"
        return False, "; ".join(errors)
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "gcfast", site / "gcfast", ignore=_skip)
    shutil.copytree(ROOT / "triton_kernels", site / "gcfast" / "triton_kernels", ignore=_skip)
    return False, "the compiled modules did not build, see the log: only the Python files are in place"
