"""Build of the compiled modules. Everything else about the package is in pyproject.toml.

gcfast._cpu   always (a C++17 compiler with OpenMP is required)
gcfast._cuda  if nvcc is found; GCFAST_CUDA = auto (default) | 0 (never) | 1 (fail without it);
              GCFAST_CUDA_ARCHS = "80;90a;100" (default; PTX is added for the last)
MAX_JOBS limits how many compilers run at once. Objects stay in build/, and ninja compiles what has changed.
nvcc is looked for in CUDACXX, CUDA_HOME/bin, PATH, /usr/local/cuda/bin, in this order; a set but wrong
CUDACXX or CUDA_HOME ends the search. Torch is not needed here.
"""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Flags that let a compiler break the error bounds that proofs rest on: sums in another order, quotients by
# reciprocals, no NaN, shorter constants, longer registers, denormals flushed by the code or from its start.
# csrc/core/macros.h and the compiled module's self-test see what comes another way.
# "--" is g++'s other word for "-f", "--optimize=" for "-O"; clang hands "-menable..." to its inner compiler.
UNSAFE = re.compile(
    r"""(?:^|[,=\s"'+])(-Ofast|--optimize=fast|(?:-f|--)(?:fast-math|unsafe-math-optimizations|associative-math"""
    r"|reciprocal-math|finite-math-only|single-precision-constant|approx-func|no-honor-nans|no-honor-infinities)"
    r"|-ffp-model=(?:fast|aggressive)|-fp-model[=\s]fast(?:=[12])?|-fast|-Mflushz|-Mdaz|-Mfprelaxed"
    r"|-fdenormal-fp-math(?:-f32)?=(?!ieee(?:,ieee)?(?![\w,-]))[\w,-]+"
    r"|-mdaz-ftz|-mno-ieee-fp|-mrecip(?:=[\w!,-]+)?|-mlow-precision-[\w-]+"
    r"|-m(?:enable-(?:unsafe-fp-math|no-nans|no-inf\w*)|reassociate)"
    r"|-mfpmath=(?!sse(?:$|[,\s](?!387)))[\w+,]+|--?use[_-]fast[_-]math|--?ftz(?:[=\s]true)?"
    r"""|-no-prec-(?:div|sqrt)|--?prec-(?:div|sqrt)[=\s]false)(?=$|[,\s"'])"""
)
# Words that stand for those of a file.
FILES = re.compile(r"""(?:^|[,=\s"'])(?:@|(?:--?optf|--options-file|--config)[=\s])([^\s,"']+)""")
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


def max_jobs() -> list[str]:
    """ninja's option for MAX_JOBS; without it ninja goes by the number of processors."""
    jobs = os.environ.get("MAX_JOBS", "").strip()
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        raise SystemExit(f"gcfast: MAX_JOBS must be a positive whole number, not {jobs!r}")
    return ["-j", jobs] if jobs else []


def cpu_extension() -> Extension:
    flags = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    # Neither changes a value; without them comparisons and selects do not vectorise.
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    if X86:
        flags += ["-mprefer-vector-width=512"]
    return Extension(
        "gcfast._cpu",
        sources=sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
        language="c++",
    )


def refuse_unsafe_flags(commands: list[list[str]]) -> None:
    """End the build where a command, or what the environment tells compilers, has a flag of the above."""
    names = ["CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"]
    names += ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CCC_OVERRIDE_OPTIONS"]
    places = [(name, os.environ.get(name, "")) for name in names]
    places += [("the compiler's command", " ".join(command)) for command in commands]
    seen: set[str] = set()
    for place, words in places:
        if found := UNSAFE.search(words):
            raise SystemExit(
                f"gcfast: {found[1]} (in {place}) breaks the error bounds that proofs rest on: a rank "
                "could be certified that is not there. Build without it"
            )
        for name in FILES.findall(words):  # which may name files in turn
            if name not in seen and Path(name).is_file():
                seen.add(name)
                places.append((f"@{name}", Path(name).read_text(errors="replace")))


class Build(build_ext):
    """ninja runs the compilers. setuptools states the commands for C++; it knows no .cu files."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools proposes a temporary folder, where nothing is found again
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def build_extensions(self) -> None:
        self.ninja_options = max_jobs()
        # setuptools is to state every command, whatever is there: ninja decides which of them to run.
        self.from_nothing, self.force, self.compiler.force = self.force, True, True
        # pip unpacks pybind11 into a new folder for each build, and ninja would see new headers each time.
        source, self.pybind11 = Path(pybind11.get_include()), Path(self.build_temp, "include")
        for header in source.rglob("*.h"):
            copy = self.pybind11 / header.relative_to(source)
            if not copy.is_file() or not filecmp.cmp(header, copy, shallow=False):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(header, copy)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._cuda"):
            return self.build_cuda(ext)
        commands: list[list[str]] = []
        # What setuptools would run is only noted down. Its method has had both names.
        self.compiler.call = self.compiler.spawn = commands.append
        ext.include_dirs = [str(self.pybind11)]
        super().build_extension(ext)
        done = self.ninja(ext, commands)
        if done.returncode != 0:
            raise SystemExit(
                f"gcfast: building {ext.name} failed (code {done.returncode}). A C++17 compiler with OpenMP "
                "is required, for example g++ >= 9 (Debian/Ubuntu: apt install g++); see the output above."
            )

    def build_cuda(self, ext: Extension) -> None:
        nvcc, where = find_nvcc()
        if nvcc is None:
            self.without_cuda(ext, f"nvcc not found (looked in {where})")
            return
        archs = cuda_archs()
        options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        options.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        options += [f"-I{self.pybind11}", f"-I{sysconfig.get_path('include')}"]
        # What decides the machine code is in a file of options that tools/aot.py compiles with too. Denormals
        # kept and divisions rounded correctly are the defaults, said there because results rest on them.
        flags = "csrc/cuda/nvcc_flags.txt"
        command = [nvcc, "-optf", flags, "-cudart", "static", "-Xcompiler", "-fPIC"]
        command += ["-Xcompiler", "-fvisibility=hidden", f'-DGCFAST_CUDA_ARCHS="{";".join(archs)}"', *options]
        objects = {source: str(Path(self.build_temp, source).with_suffix(".o")) for source in ext.sources}
        target = self.get_ext_fullpath(ext.name)
        commands = [[*command, "-c", source, "-o", object] for source, object in objects.items()]
        commands.append([*command, "-shared", *objects.values(), "-o", target])
        done = self.ninja(ext, commands, flags, quiet=True)
        if done.returncode == 0:
            print(done.stdout, end="", flush=True)
        else:
            Path(target).unlink(missing_ok=True)
            self.without_cuda(ext, f"nvcc failed with code {done.returncode}", done.stdout + done.stderr)

    def ninja(
        self, ext: Extension, commands: list[list[str]], depends: str | None = None, quiet: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run what is out of date of commands that hold `SOURCE -o OBJECT`; the last is the linker's."""
        refuse_unsafe_flags(commands)
        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        # Linked in build/ as well, since the final path can be in a temporary folder.
        target = self.get_ext_fullpath(ext.name)
        module = str(folder / Path(target).name)
        *compile, link = ([module if word == target else word for word in command] for command in commands)
        objects = []
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            rules = ninja.Writer(file)
            rules.variable("builddir", str(folder))
            rules.rule("compile", "$run -MD -MF $out.d", depfile="$out.d", deps="gcc")
            rules.rule("link", "$run")
            for command in compile:
                source, _, object = command[(at := command.index("-o")) - 1 : at + 2]
                run = {"run": ninja.escape(shlex.join(command))}
                objects += rules.build(object, "compile", source, depends, variables=run)
            run = {"run": ninja.escape(shlex.join(link))}
            rules.build(module, "link", objects, depends, variables=run)
        run_ninja = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(folder / "build.ninja")]
        if self.from_nothing:
            subprocess.run([*run_ninja, "-t", "clean"], check=True)
        done = subprocess.run([*run_ninja, *self.ninja_options], text=True, capture_output=quiet)
        if done.returncode == 0:
            self.mkpath(os.path.dirname(target))
            self.copy_file(module, target)
        return done

    def without_cuda(self, ext: Extension, why: str, output: str = "") -> None:
        if cuda_mode() == "1":
            raise SystemExit(f"gcfast: GCFAST_CUDA=1 but {why}\n{output}")
        ext.optional = True
        reason = next((line for line in output.splitlines() if "error" in line.lower()), "")
        note = f"gcfast: {why}: installing without CUDA (GCFAST_CUDA=1 makes this an error)"
        print(f"{note} {reason}".rstrip(), file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [p for p in super().get_outputs() if "_cuda" not in os.path.basename(p) or os.path.exists(p)]


extensions = [cpu_extension()]
if cuda_mode() != "0":
    sources = sorted(str(p) for p in Path("csrc/cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    extensions.append(Extension("gcfast._cuda", sources=sources))

# triton_kernels/ lies beside the package; a developer's link into it may be there too.
packages = sorted({*find_packages(include=["gcfast", "gcfast.*"]), "gcfast.triton_kernels"})

setup(packages=packages, ext_modules=extensions, cmdclass={"build_ext": Build})
