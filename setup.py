"""Build of the compiled modules. Everything else about the package is in pyproject.toml.

gcfast._cpu   always (a C++17 compiler with OpenMP is required)
gcfast._cuda  if nvcc is found; GCFAST_CUDA = auto (default) | 0 (never) | 1 (fail without it);
              GCFAST_CUDA_ARCHS = "80;90a;100" (default; PTX is added for the last)
nvcc is looked for in CUDACXX, CUDA_HOME/bin, PATH, /usr/local/cuda/bin, in this order; a set but wrong
CUDACXX or CUDA_HOME ends the search. Torch is not needed here.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))
X86 = platform.machine().lower() in ("x86_64", "amd64")


def cuda_mode() -> str:
    mode = os.environ.get("GCFAST_CUDA", "auto").strip().lower()
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"gcfast: GCFAST_CUDA must be auto, 0 or 1, not {mode!r}")
    return mode


def find_nvcc() -> tuple[str | None, str]:
    """The compiler, and where it was looked for."""
    if "CUDACXX" in os.environ:
        wanted = os.environ["CUDACXX"]
        return shutil.which(wanted), f"CUDACXX={wanted}"
    if "CUDA_HOME" in os.environ:
        home = os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc")
        return shutil.which(home), f"CUDA_HOME ({home})"
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or shutil.which(default), f"PATH and {default}"


def cuda_archs() -> list[str]:
    archs = os.environ.get("GCFAST_CUDA_ARCHS", "80;90a;100").replace(",", ";").split(";")
    archs = [a.strip() for a in archs if a.strip()]
    if not archs:
        raise SystemExit("gcfast: GCFAST_CUDA_ARCHS is empty; it takes architectures such as 80;90a;100")
    return archs


def cpu_extension() -> Extension:
    flags = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    # Neither changes a value; without them comparisons and selects do not vectorise.
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    if X86:
        flags += ["-mprefer-vector-width=512"]
    return Extension(
        "gcfast._cpu",
        sources=sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
        include_dirs=[pybind11.get_include()],
        depends=HEADERS,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        language="c++",
    )


class Build(build_ext):
    """C++ by setuptools; CUDA by one nvcc call, since setuptools knows no .cu files."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext)
            return
        try:
            super().build_extension(ext)
        except Exception as error:
            raise SystemExit(
                f"gcfast: building {ext.name} failed ({error}). A C++17 compiler with OpenMP is required, "
                "for example g++ >= 9 (Debian/Ubuntu: apt install g++); see the compiler's output above."
            ) from error

    def build_cuda(self, ext: Extension) -> None:
        mode = cuda_mode()
        nvcc, where = find_nvcc()
        if nvcc is None:
            self.without_cuda(ext, mode, f"nvcc not found (looked in {where})")
            return
        archs = cuda_archs()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        # What decides the machine code is in a file of options that tools/aot.py compiles with too. Denormals
        # kept and divisions rounded correctly are the defaults, said there because results rest on them.
        command = [nvcc, "-shared", "-optf", "csrc/cuda/nvcc_flags.txt", "-cudart", "static"]
        command += ["-Xcompiler", "-fPIC", "--threads", "0"]
        command += ["-Xcompiler", "-fvisibility=hidden", f'-DGCFAST_CUDA_ARCHS="{";".join(archs)}"']
        command += [*codes, *include, *ext.sources, "-o", str(target)]
        print(shlex.join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            target.unlink(missing_ok=True)
            output = done.stdout + done.stderr
            self.without_cuda(ext, mode, f"nvcc failed with code {done.returncode}", output)

    def without_cuda(self, ext: Extension, mode: str, why: str, output: str = "") -> None:
        if mode == "1":
            raise SystemExit(f"gcfast: GCFAST_CUDA=1 but {why}\n{output}")
        ext.optional = True
        reason = next((line for line in output.splitlines() if "error" in line.lower()), "")
        note = f"gcfast: {why}: installing without CUDA (GCFAST_CUDA=1 makes this an error)"
        print(f"{note} {reason}".rstrip(), file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; a missing CUDA module is not an error in auto mode.
        wanted = self.extensions
        self.extensions = [e for e in wanted if self.built_path(e).exists()]
        super().copy_extensions_to_source()
        self.extensions = wanted

    def built_path(self, ext: Extension) -> Path:
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return [p for p in outputs if "_cuda" not in os.path.basename(p) or os.path.exists(p)]


extensions = [cpu_extension()]
if cuda_mode() != "0":
    sources = sorted(str(p) for p in Path("csrc/cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    extensions.append(Extension("gcfast._cuda", sources=sources, depends=HEADERS, language="c++"))

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
