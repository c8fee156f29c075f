"""What an installation must hold: version, typed marker, compiled modules, build switches of setup.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import timeit
from fnmatch import fnmatch
from importlib import metadata, resources
from pathlib import Path

import children
import pytest
import torch

import gcfast
from gcfast._version import __version__
from gcfast.ops import native

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def test_version_and_markers():
    assert metadata.version("gcfast") == __version__
    assert resources.files("gcfast").joinpath("py.typed").is_file()


def test_triton_kernels_live_inside_the_package():
    import gcfast.triton_kernels

    assert gcfast.triton_kernels.__doc__


@needs_source
def test_every_room_is_installed():
    installed = Path(gcfast.__file__).parent
    files = {p.relative_to(ROOT / "gcfast") for p in (ROOT / "gcfast").rglob("*.py")}
    assert len(files) > 100
    assert not [str(p) for p in sorted(files) if not (installed / p).is_file()]


def test_console_script():
    (entry,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "gcfast"]
    assert entry.value == "gcfast.cli:main"


def test_compiled_module_loaded():
    assert native.cpu is not None, native.cpu_error
    assert native.cpu_instruction_set() in ("x86-64-v4", "x86-64-v3", "baseline")


def test_cuda_status_is_honest():
    status = native.cuda_status()
    assert bool(status["devices"]) == (status["why"] == "")
    if status["built"]:
        assert status["runtime"] >= 11000 and status["archs"]
    else:
        assert status["why"].startswith("not built: ")


def needs_build_system() -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")


def setup_py(*args: str, tree: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return children.run([sys.executable, "setup.py", *args], cwd=tree, env={**os.environ, **env})


@needs_source
def test_unknown_cuda_mode_is_refused():
    needs_build_system()
    done = setup_py("--version", GCFAST_CUDA="yes")
    assert done.returncode != 0
    assert "GCFAST_CUDA must be auto, 0 or 1, not 'yes'" in done.stderr


@needs_source
@pytest.mark.parametrize("mode, code", [("auto", 0), ("1", 1)])
def test_without_nvcc(mode, code, tmp_path):
    # Only the CUDA module: the missing compiler is found before anything is compiled.
    needs_build_system()
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


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A source tree of three tiny files, with setup.py as it is."""
    needs_build_system()
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    for name in ("CXX", "CXXFLAGS", "CFLAGS", "CPPFLAGS", "LDFLAGS", "MAX_JOBS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCFAST_CUDA", "0")
    for language, suffix in (("cpu", "cpp"), ("cuda", "cu")):
        folder = tmp_path / "csrc" / language
        folder.mkdir(parents=True)
        # pybind11's headers are new in each build, by their times
        includes = {"one": "#include <pybind11/detail/common.h>\n", "three": '#include "three.h"\n'}
        for name in ("one", "two", "three"):
            text = f"{includes.get(name, '')}int {name}() {{ return 1; }}\n"
            (folder / f"{name}.{suffix}").write_text(text)
        (folder / "three.h").write_text("int three();\n")
    (tmp_path / "csrc" / "cuda" / "nvcc_flags.txt").write_text("-O3")
    (tmp_path / "gcfast").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def fake_nvcc(tree: Path, monkeypatch, last: str) -> None:
    """A compiler that leaves empty objects and lists what they were made from; it ends as `last` says."""
    script = tree / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do case "$1" in -c) in=$2;; -o) out=$2;; -MF) made=$2;; esac; shift; done\n'
        '[ -z "$in" ] || echo "$out: $in $(grep -q three.h "$in" && echo csrc/cuda/three.h)" >"$made"\n'
        f'echo >"$out"; {last}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(script))
    monkeypatch.setenv("GCFAST_CUDA", "auto")


def build(tree: Path, **env: str) -> set[str]:
    """Build the tree, and the names of what was compiled or linked anew."""
    began = {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.*o") if path.is_file()}
    done = setup_py("build_ext", tree=tree, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [p for p in (tree / "build").glob("temp.*/**/*.*o") if p.is_file()]
    return {f"{p.parent.name}/{p.name.split('.')[0]}" for p in made if began.get(p) != p.stat().st_mtime_ns}


@needs_source
def test_a_second_build_compiles_what_changed(tree):
    module = "gcfast._cpu/_cpu"
    assert build(tree) == {"cpu/one", "cpu/two", "cpu/three", module}
    assert build(tree) == set()
    (tree / "csrc/cpu/three.h").write_text("int three(); int four();\n")
    assert build(tree) == {"cpu/three", module}
    assert build(tree, CXXFLAGS="-DANYTHING='a b$c'") == {"cpu/one", "cpu/two", "cpu/three", module}
    assert build(tree, CXXFLAGS="-DANYTHING='a b$c'") == set()


@needs_source
def test_nvcc_compiles_what_changed(tree, monkeypatch):
    fake_nvcc(tree, monkeypatch, "exit 0")
    everything = {"cuda/one", "cuda/two", "cuda/three", "gcfast._cuda/_cuda"}
    assert build(tree) >= everything
    assert build(tree) == set()
    (tree / "csrc/cuda/three.h").write_text("int three(); int four();\n")
    assert build(tree) == {"cuda/three", "gcfast._cuda/_cuda"}
    (tree / "csrc/cuda/nvcc_flags.txt").write_text("-O2")
    assert build(tree) == everything
    assert build(tree, GCFAST_CUDA_ARCHS="80") == everything


@needs_source
def test_a_failing_nvcc_leaves_the_cpu_module(tree, monkeypatch):
    fake_nvcc(tree, monkeypatch, "echo 'one.cu(1): error: no such thing'; exit 2")
    done = setup_py("build_ext", "--inplace", tree=tree)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gcfast: ")]
    assert "nvcc failed with code" in line and line.endswith("one.cu(1): error: no such thing")
    assert {p.name.split(".")[0] for p in (tree / "gcfast").iterdir()} == {"_cpu"}
    refused = setup_py("build_ext", tree=tree, GCFAST_CUDA="1")
    assert refused.returncode != 0 and "GCFAST_CUDA=1 but nvcc failed with code" in refused.stderr


@needs_source
def test_a_failing_compiler_is_heard(tree):
    (tree / "csrc/cpu/one.cpp").write_text("int one() { return nothing; }\n")
    for done, said in (
        (setup_py("build_ext", tree=tree), "'nothing' was not declared"),
        (setup_py("build_ext", tree=tree, CXX="/nonexistent/g++", LC_ALL="C"), "/nonexistent/g++"),
    ):
        assert done.returncode != 0 and said.replace("'", "") in done.stdout.translate(
            dict.fromkeys(map(ord, "'‘’"))
        )
        (line,) = done.stderr.splitlines()[-1:]
        assert "building gcfast._cpu failed" in line and "A C++17 compiler with OpenMP is required" in line


UNSAFE = [  # where a flag may come from, and what must be named
    ("CXXFLAGS", "-O2 -ffast-math", "-ffast-math"),
    ("CXXFLAGS", "-Ofast", "-Ofast"),
    ("CXXFLAGS", "-fassociative-math", "-fassociative-math"),
    ("CXXFLAGS", "-mfpmath=387", "-mfpmath=387"),
    ("CFLAGS", "-funsafe-math-optimizations", "-funsafe-math-optimizations"),
    ("CFLAGS", "-ffinite-math-only", "-ffinite-math-only"),
    ("CPPFLAGS", "-freciprocal-math", "-freciprocal-math"),
    ("LDFLAGS", "-mdaz-ftz", "-mdaz-ftz"),
    ("CXX", "g++ -ffast-math", "-ffast-math"),
    ("CXXFLAGS", "--fast-math", "--fast-math"),
    ("CXXFLAGS", "'-O2' '--optimize=fast'", "--optimize=fast"),
    ("CXXFLAGS", "-fdenormal-fp-math=ieee,preserve-sign", "-fdenormal-fp-math=ieee,preserve-sign"),
    ("CXXFLAGS", "-no-prec-div", "-no-prec-div"),
    ("CXXFLAGS", "@more", "-fsingle-precision-constant"),
    ("CXXFLAGS", "@most", "-fsingle-precision-constant"),
    ("NVCC_PREPEND_FLAGS", "--options-file more", "-fsingle-precision-constant"),
    ("NVCC_APPEND_FLAGS", '-Xcompiler "-ffast-math"', "-ffast-math"),
    ("NVCC_APPEND_FLAGS", "--use_fast_math", "--use_fast_math"),
]


@needs_source
@pytest.mark.parametrize(("variable", "value", "flag"), UNSAFE)
def test_flags_that_break_the_bounds_stop_the_build(tree, variable, value, flag):
    (tree / "more").write_text("-DX=1\n-fsingle-precision-constant\n")
    (tree / "most").write_text("-DY=1 @more @most")
    done = setup_py("build_ext", tree=tree, **{variable: value})
    assert done.returncode != 0
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"gcfast: {flag} (in ") and "breaks the error bounds" in line
    assert (variable if flag in value else "@more") in line
    assert not list((tree / "build").rglob("*.o"))


@needs_source
def test_flags_that_look_like_those_do_not(tree):
    harmless = "-fno-fast-math -ffp-contract=off -fno-associative-math -DNAME=-Ofaster -mfpmath=sse"
    assert build(tree, CXXFLAGS=harmless)


FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return children.run(["g++", *FLAGS, *arguments], cwd=ROOT)


@needs_source
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
@pytest.mark.parametrize("source", ["add_product", "gram_error_bound", "batched_rank", "wide", "arithmetic"])
def test_sources_refuse_such_flags_themselves(source, flag):
    done = compiled("-fsyntax-only", flag, f"csrc/cpu/{source}.cpp")
    assert done.returncode != 0 and "gcfast: -f" in done.stderr and "build without it" in done.stderr


@needs_source
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", ""),
        ("-ffp-contract=off", ""),
        ("-fassociative-math -fno-signed-zeros", "sums are reordered"),
        ("-freciprocal-math", "quotients are products with a reciprocal"),
        ("-ffinite-math-only", "a NaN equals itself"),
        ("-fsingle-precision-constant", "constants are rounded to float"),
        ("-ffast-math", "sums are reordered"),
    ],
)
def test_the_self_test_sees_what_slips_through(tmp_path, flags, said):
    """The macros by which the sources know of a flag are taken away."""
    main = tmp_path / "main.cpp"
    main.write_text(
        f'#include "{ROOT}/csrc/cpu/arithmetic.h"\n#include <cstdio>\n'
        "int main() { std::puts(gcfast::cpu::self_test()); }\n"
    )
    macros = ("FAST_MATH", "FINITE_MATH_ONLY", "ASSOCIATIVE_MATH", "RECIPROCAL_MATH")
    hidden = [f"-U__{name}__" for name in macros]
    program = str(tmp_path / "main")
    done = compiled(*flags.split(), *hidden, str(main), "csrc/cpu/arithmetic.cpp", "-o", program)
    assert done.returncode == 0, done.stderr
    assert children.run([program]).stdout.strip().startswith(said)
    assert bool(said) == bool(children.run([program]).stdout.strip())


class _Module:
    """A compiled module that says of itself what it is told to."""

    api = native._API

    def __init__(self, said: str, flushes: bool = False) -> None:
        self.said, self.flushes = said, flushes

    def self_test(self) -> str:
        if self.flushes:
            torch.set_flush_denormal(True)
        return self.said

    def exchange_control_words(self, words: list[int], threads: int) -> None:
        torch.set_flush_denormal(False)


def test_a_module_that_fails_its_self_test_is_refused_with_the_reason(monkeypatch):
    modules = {"gcfast._wrong": _Module("sums are reordered"), "gcfast._flushing": _Module("", flushes=True)}
    monkeypatch.setattr(native.importlib, "import_module", modules.__getitem__)
    module, why = native.load("_wrong")
    assert module is None and "sums are reordered; build it without such flags" in why
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cpu_error", why)
    assert why in repr(gcfast.backends())
    try:
        module, why = native.load("_flushing")
        assert module is None and "loading it makes this thread flush denormal numbers to zero" in why
        assert not native.flushes()
    finally:
        torch.set_flush_denormal(False)


def test_the_self_test_takes_less_than_a_millisecond():
    assert native.cpu is not None and native.cpu.self_test() == ""
    assert min(timeit.repeat(native.cpu.self_test, number=1, repeat=20)) < 1e-3


@needs_source
@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_max_jobs_is_refused(tree, jobs):
    done = setup_py("build_ext", tree=tree, MAX_JOBS=jobs)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"gcfast: MAX_JOBS must be a positive whole number, not {jobs!r}"


@needs_source
@pytest.mark.parametrize("jobs", [1, 3])
def test_max_jobs_is_obeyed(tree, jobs):
    compiler = tree / "compiler"
    # Each waits, for half a minute at most, until as many have begun as are to run at once.
    compiler.write_text(
        "#!/bin/sh\necho begun >>log\n"
        f"for i in $(seq 300); do [ $(grep -c begun log) -ge {jobs} ] && break; sleep 0.1; done\n"
        'g++ "$@" || exit\necho ended >>log\n'
    )
    compiler.chmod(0o755)
    build(tree, CXX=str(compiler), MAX_JOBS=str(jobs))
    log = (tree / "log").read_text().split()
    assert log == (["begun"] * jobs + ["ended"] * jobs) * (3 // jobs) + ["begun", "ended"]


@needs_source
@pytest.mark.parametrize("folder", ["csrc", "triton_kernels", "tests", "bench", "tools", "experiments"])
def test_a_source_distribution_leaves_nothing_out(folder):
    """MANIFEST.in has a pattern for every file: what it misses breaks the build of an sdist alone."""
    lines = (line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines())
    (patterns,) = [words[2:] for words in lines if words[:2] == ["recursive-include", folder]]
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert files
    assert not [str(p) for p in files if not any(fnmatch(p.name, pattern) for pattern in patterns)]
