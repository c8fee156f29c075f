"""The CUDA C++ side of tools/aot.py: csrc/cuda/*.cu compiled with setup.py's flags, kernel by kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from tools._machine_code import Row, output, read_ptxas, read_sass

ROOT = Path(__file__).resolve().parent.parent
CODE = {80: "80", 90: "90a", 100: "100"}  # what setup.py builds for an architecture


def find_nvcc() -> str | None:
    """Where setup.py looks, in its order; a set but wrong CUDACXX or CUDA_HOME ends the search."""
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    if "CUDA_HOME" in os.environ:
        return shutil.which(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, else Triton's."""
    beside = Path(nvcc).resolve().with_name("cuobjdump")
    triton = importlib.util.find_spec("triton")
    bundled = (
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else beside
    )
    return next((str(p) for p in (beside, bundled) if p.is_file()), None)


def command(nvcc: str, source: Path, arch: int, out: str) -> list[str]:
    flags = ["-optf", str(ROOT / "csrc" / "cuda" / "nvcc_flags.txt")]  # setup.py's
    include = [f"-I{sysconfig.get_path('include')}"]
    if importlib.util.find_spec("pybind11"):
        import pybind11

        include.append(f"-I{pybind11.get_include()}")
    code = f"-gencode=arch=compute_{CODE[arch]},code=sm_{CODE[arch]}"
    return [nvcc, *flags, *include, code, "-Xptxas", "-v", "-cubin", str(source), "-o", out]


def _readable(names: list[str]) -> dict[str, str]:
    """Demangled where c++filt is there, without return type, arguments and namespaces."""
    if not shutil.which("c++filt"):
        return {n: n for n in names}
    text = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|\bgcfast::|\bcuda::|^void ", "", t) for t in text]
    return dict(zip(names, short))


def compile_one(source: Path, arch: int) -> list[Row]:
    """A row for each kernel of the file; one row if it does not compile, none if it has no kernel."""
    nvcc = find_nvcc()
    assert nvcc is not None
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        done = subprocess.run(command(nvcc, source, arch, cubin), capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
            reason = errors[0] if errors else f"nvcc failed with code {done.returncode}"
            return [Row(source.name, "", arch, seconds=seconds, error=f"{done.stderr}\n{reason}")]
        figures = read_ptxas(done.stderr + done.stdout)
        cuobjdump = _find_cuobjdump(nvcc)
        code = output(cuobjdump, "-sass", "-elf", cubin) if cuobjdump and figures else ""
    names = _readable(list(figures))
    return [
        _row(source, arch, name, names[name], figures[name], code, seconds / len(figures)) for name in figures
    ]


def _row(
    source: Path, arch: int, name: str, readable: str, figures: dict[str, int], code: str, seconds: float
) -> Row:
    kernel, _, template = readable.partition("<")
    row = Row(f"{source.name}:{kernel}", template.removesuffix(">"), arch, seconds=seconds)
    for key, value in figures.items():
        setattr(row, key, value)
    if not code:
        return row
    # Without __launch_bounds__ a kernel may be launched with 1024 threads, so it must fit them.
    info = code.partition(f"\n.nv.info.{name}\n")[2].partition("\n.nv.")[0]
    bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+(\w+) (\w+) (\w+)", info)
    row.threads = 1024
    if bound:
        x, y, z = (int(v, 16) for v in bound.groups())
        row.threads = x * y * z
    read_sass(row, code.partition(f"Function : {name}\n")[2].partition("Function : ")[0])
    return row
