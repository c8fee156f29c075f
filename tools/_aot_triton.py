"""The Triton side of tools/aot.py: the kernels' specialisations found, completed and compiled."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tools._machine_code import Row, output, read_ptx, read_ptxas, read_sass

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str, path: Path) -> ModuleType:
    """The module of a file, or the package of a folder, under the name that it has when installed."""
    folder = [str(path)] if path.is_dir() else None
    file = path / "__init__.py" if folder else path
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_modules(files: list[Path]) -> list[ModuleType]:
    """The modules with kernels: these files', or all of triton_kernels/ of this tree, installed or not."""
    package = _load("gcfast.triton_kernels", ROOT / "triton_kernels")
    if files:
        return [_load(path.stem, path) for path in files]
    found = sorted(m.name for m in pkgutil.iter_modules(package.__path__, package.__name__ + "."))
    return [importlib.import_module(name) for name in found]


def unlisted(module: ModuleType, listed: list[Any]) -> list[str]:
    """The module's own ``*_kernel`` functions that its ``specializations()`` lacks, an offence each."""
    from triton.runtime.jit import JITFunction

    own = [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
        and value.fn.__module__ == module.__name__
        and name.endswith("_kernel")
    ]
    missing = [name for name, value in own if not any(s.kernel is value for s in listed)]
    return [f"{module.__name__}.{name}: not in {module.__name__}.specializations()" for name in missing]


def _key(s: Any) -> tuple[Any, ...]:
    constants = sorted((k, str(v)) for k, v in s.constants.items())
    return (s.kernel, *sorted(s.signature.items()), *constants, str(s.launch), s.divisible)


def _switches(s: Any) -> tuple[Any, ...]:
    """What decides which of a kernel's branches are compiled: its switches, the arguments that are there."""
    values = [(k, str(v)) for k, v in s.constants.items() if v is None or isinstance(v, bool)]
    return (s.kernel, *sorted(values))


def completed(listed: list[Any], architectures: list[int]) -> Iterator[tuple[Any, int, str]]:
    """What to compile, and what to call it beyond the configuration.

    Each listed specialisation for each of its architectures. Then what Triton can find out about arguments
    besides (``variants``), for one architecture, for every kernel and setting of its switches: the other end
    of alignment, for every tile and type; all integers 1, and all of 64 bits, where the types that a kernel
    computes with change, and it may fail to compile.
    """
    from gcfast.triton_kernels._launch import variants

    done = set()
    for s in listed:
        for arch in s.architectures:
            if arch in architectures and (key := (_key(s), arch)) not in done:
                done |= {key, _key(s)}
                yield s, arch, ""
    for s in listed:
        arch = next((a for a in s.architectures if a in architectures), None)
        if arch is None:
            continue
        for name, variant in variants(s).items():
            key: tuple[Any, ...] = (_switches(s), name)
            if name in ("aligned", "unaligned"):
                if (_key(variant), arch) in done:
                    continue
                key = (*key, str(s.launch), *sorted(s.signature.items()))
            if name != ("aligned" if s.divisible else "unaligned") and key not in done:
                done.add(key)
                yield variant, arch, name


def _alignment(s: Any) -> str:
    """How much Triton is told about multiples of 16, in a word or two."""
    told = {k for k, t in s.signature.items() if t.startswith("*") or t in ("i32", "i64")}
    told -= {p.name for p in s.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    untold = told - s.divisible
    if not untold:
        return "aligned"
    return "unaligned" if untold == told else f"aligned but {', '.join(sorted(untold))}"


def config(s: Any, variant: str) -> str:
    """A configuration in one line: pointer types, constants, blocks, warps and stages, alignment, variant."""
    pointers = sorted({t for t in s.signature.values() if t.startswith("*")})
    constants = [f"{k}={v}" for k, v in s.constants.items() if v is not None]
    absent = [f"no {k}" for k, v in s.constants.items() if v is None]
    blocks = [f"{k}={v}" for k, v in s.launch.blocks.items()]
    launch = f"{s.launch.num_warps} warps, {s.launch.num_stages} stages"
    note = variant if variant in ("ones", "64-bit") else ""
    parts = (
        " ".join(pointers),
        ", ".join(constants + absent),
        ", ".join(blocks),
        launch,
        _alignment(s),
        note,
    )
    return "; ".join(p for p in parts if p)


def source(s: Any) -> Any:
    """What Triton compiles for a specialisation; raises where it does not fit the kernel's arguments."""
    from triton.compiler import ASTSource

    values = {**s.launch.blocks, **s.constants}
    parameters = inspect.signature(s.kernel.fn).parameters
    defaults = {
        k: p.default for k, p in parameters.items() if p.default is not p.empty and k not in s.signature
    }
    values = {**defaults, **values}
    if unknown := (set(values) | set(s.signature)) - set(parameters):
        raise ValueError(f"{s.kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    if lacking := set(parameters) - set(values) - set(s.signature):
        raise ValueError(f"neither signature nor constants give {', '.join(sorted(lacking))}")
    if double := set(values) & set(s.signature):
        raise ValueError(f"both signature and constants give {', '.join(sorted(double))}")
    blind = {p.name for p in s.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    if wrong := s.divisible & (blind | set(values)):
        raise ValueError(f"divisible names {', '.join(sorted(wrong))}, on which Triton does not specialise")
    names = list(parameters)
    return ASTSource(
        s.kernel,
        {name: s.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in s.divisible},
    )


def _why(error: BaseException) -> str:
    """The text of an error and of its causes, the first cause's last: that one says what is wrong."""
    texts = []
    now: BaseException | None = error
    while now is not None:
        lines = [line.strip() for line in str(now).splitlines() if line.strip("^ ")]
        texts.append(f"{now}\n{type(now).__name__}: {lines[-1] if lines else ''}")
        now = now.__cause__
    return "\n".join(texts)


def compile_one(s: Any, arch: int, variant: str) -> list[Row]:
    """Compile, with Triton's own call of ptxas, and read its log and the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    row = Row(s.kernel.__name__, config(s, variant), arch)
    if variant != "ones":  # of size 1 nothing need go to the tensor cores
        row.expected = s.instruction.get(arch, "")
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    began = time.perf_counter()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source(s), target=GPUTarget("cuda", arch, 32), options=s.launch.options()
            )
        (figures,) = read_ptxas(log.getvalue()).values()
        for key, value in figures.items():
            setattr(row, key, value)
        row.shared = max(row.shared, compiled.metadata.shared)
        row.threads = 32 * compiled.metadata.num_warps
        read_ptx(row, compiled.asm["ptx"])
        if row.matrix:  # takes as long as the compilation, so only where ptxas may have replaced them
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                read_sass(row, output(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin.name))
    except Exception as error:  # anything: a kernel that does not compile is what this looks for
        row.error = f"{log.getvalue()[:2000]}\n{_why(error)}"
    row.seconds = time.perf_counter() - began
    return [row]
