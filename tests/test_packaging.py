"""What an installation must hold: version, typed marker, compiled modules, build switches of setup.py."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata, resources
from pathlib import Path

import children
import pytest

from gcfast import _native
from gcfast._version import __version__

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def test_version_and_markers():
    assert metadata.version("gcfast") == __version__
    assert resources.files("gcfast").joinpath("py.typed").is_file()


def test_triton_kernels_live_inside_the_package():
    import gcfast.triton_kernels

    assert gcfast.triton_kernels.__doc__


def test_console_script():
    (entry,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "gcfast"]
    assert entry.value == "gcfast.cli:main"


def test_compiled_module_loaded():
    assert _native.cpu is not None, _native.cpu_error
    assert _native.cpu_instruction_set() in ("x86-64-v4", "x86-64-v3", "baseline")


def test_cuda_status_is_honest():
    status = _native.cuda_status()
    assert bool(status["devices"]) == (status["why"] == "")
    if status["built"]:
        assert status["runtime"] >= 11000 and status["archs"]
    else:
        assert status["why"].startswith("not built: ")


def setup_py(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return children.run([sys.executable, "setup.py", *args], cwd=ROOT, env={**os.environ, **env})


@needs_source
def test_unknown_cuda_mode_is_refused():
    pytest.importorskip("pybind11")
    done = setup_py("--version", GCFAST_CUDA="yes")
    assert done.returncode != 0
    assert "GCFAST_CUDA must be auto, 0 or 1, not 'yes'" in done.stderr


@needs_source
@pytest.mark.parametrize("mode, code", [("auto", 0), ("1", 1)])
def test_without_nvcc(mode, code, tmp_path):
    # Only the CUDA module: the missing compiler is found before anything is compiled.
    pytest.importorskip("pybind11")
    script = (
        "import sys; sys.argv = ['setup.py', '--name']\n"
        "space = {'__name__': '__main__', '__file__': 'setup.py'}\n"
        "exec(open('setup.py').read(), space)\n"
        "from setuptools import Distribution\n"
        "ext = next(e for e in space['extensions'] if e.name.endswith('_cuda'))\n"
        "build = space['Build'](Distribution({'ext_modules': [ext]}))\n"
        f"build.build_lib = build.build_temp = {str(tmp_path)!r}\n"
        "build.ensure_finalized(); build.run()\n"
        "print('outputs', build.get_outputs())\n"
    )
    env = {**os.environ, "GCFAST_CUDA": mode, "CUDACXX": "/nonexistent/nvcc"}
    done = children.run([sys.executable, "-c", script], cwd=ROOT, env=env)
    assert (done.returncode != 0) == bool(code), done.stderr
    assert "nvcc not found (looked in CUDACXX=/nonexistent/nvcc)" in done.stderr
    if not code:
        assert "outputs []" in done.stdout
        assert sum("without CUDA" in line for line in done.stderr.splitlines()) == 1


@needs_source
@pytest.mark.parametrize("folder", ["csrc", "triton_kernels", "tests", "bench"])
def test_a_source_distribution_leaves_nothing_out(folder):
    """MANIFEST.in has a pattern for every file: what it misses breaks the build of an sdist alone."""
    lines = (line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines())
    (patterns,) = [words[2:] for words in lines if words[:2] == ["recursive-include", folder]]
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert files
    assert not [str(p) for p in files if not any(fnmatch(p.name, pattern) for pattern in patterns)]
