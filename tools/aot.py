"""Every GPU kernel, compiled for every architecture without a GPU, and what the compiler made of it.

    python -m tools.aot [--only NAME] [--arch 80,90,100] [--sample SEED] [--jobs N] [--json FILE] [--list]
                        [--require-nvcc]

Reading the table, a line a compilation: registers a thread; bytes of spill stores and loads; bytes of stack
frame (local memory; 1 where the machine code uses some that ptxas does not count); bytes of shared memory a
block; the matrix instructions, by their names in SASS and PTX ("-": none); the widest load from global memory
in bits (128 is the widest before Blackwell's 256; "async" is cp.async, "TMA" the bulk copies, whose width is
not in the instruction); seconds.

The exit status is 1, with a line on stderr for each reason, if a compilation fails, local memory is used (and
``MAY_SPILL`` in tools/_machine_code.py does not allow it), a matrix instruction that a specialisation expects
is missing, shared memory or registers times threads exceed the architecture's, or a kernel is not listed. A
narrow load is shown only: whether it matters is for the reader to judge.

A Triton kernel is added by naming it ``*_kernel`` in a module of triton_kernels/ and yielding its
compilations from that module's ``specializations()``. Besides those this compiles, for one architecture
each, what Triton specialises by the values of arguments: "unaligned" (no pointer or integer a known
multiple of 16) or "aligned" (every pointer is), whichever is not listed, "ones" (every integer 1, which
makes it a constant) and "64-bit" (every integer beyond 32 bits). A CUDA kernel is found by itself in
csrc/cuda/*.cu; without ``__launch_bounds__`` it is taken to be launched with 1024 threads.

A compilation takes about half a second of one core, a CUDA file ten. ``--sample SEED`` compiles one for each
kernel, architecture and set of element types, and each CUDA file for one architecture. The next seed takes
the next ones, so that seeds that count days go through all. That every kernel is listed is still checked.

Triton's own ptxas log and machine code are read, so the figures are those of the installed version of Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import _aot_cuda, _aot_triton  # noqa: E402
from tools._machine_code import SHARED_LIMIT, Row  # noqa: E402

ARCHITECTURES = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Job:
    kernel: str
    config: str
    arch: int
    kind: tuple[object, ...]  # of which --sample takes one
    compile: Callable[[], list[Row]]

    @property
    def name(self) -> str:
        return (
            f"{self.kernel}[{self.config}] sm_{self.arch}" if self.config else f"{self.kernel} sm_{self.arch}"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def triton_jobs(files: list[Path], architectures: list[int]) -> tuple[list[Job], list[str]]:
    """The compilations of the kernel modules, and the offences of kernels not listed."""
    import triton

    if triton.knobs.runtime.interpret:
        raise SystemExit("tools.aot: Triton's interpreter is on: unset TRITON_INTERPRET")
    jobs, offences = [], []
    for module in _aot_triton.kernel_modules(files):
        listed = list(getattr(module, "specializations", list)())
        offences += _aot_triton.unlisted(module, listed)
        for s, arch, variant in _aot_triton.completed(listed, architectures):
            config = _aot_triton.config(s, variant)
            job = partial(_aot_triton.compile_one, s, arch, variant)
            types = frozenset(t for t in s.signature.values() if t.startswith("*"))
            jobs.append(Job(s.kernel.__name__, config, arch, (s.kernel.__name__, arch, types), job))
    return jobs, offences


def cuda_jobs(files: list[Path], architectures: list[int]) -> list[Job]:
    sources = files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    pairs = [(s, a) for s in sources for a in architectures]
    return [Job(s.name, "", a, (s.name,), partial(_aot_cuda.compile_one, s, a)) for s, a in pairs]


def sample(jobs: list[Job], seed: int) -> list[Job]:
    """One job of each kind; seed by seed all of them."""
    kinds: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    return [same[seed % len(same)] for same in kinds.values()]


_jobs: list[Job] = []  # inherited by the worker processes: kernels cannot be pickled


def _work(index: int) -> list[Row]:
    return _jobs[index].compile()


def compile_all(jobs: list[Job], workers: int) -> Generator[tuple[int, list[Row]], None, None]:
    """Rows by job, as they come. A crash of the compiler takes its pool along: what is left then runs one by
    one, in a process each, so that the crash is put down to its kernel."""
    _jobs[:] = jobs
    context = multiprocessing.get_context("fork")
    left = set(range(len(jobs)))
    try:
        with ProcessPoolExecutor(workers, context) as pool:
            futures = {pool.submit(_work, i): i for i in left}
            try:
                for future in as_completed(futures):
                    rows = future.result()
                    left.discard(futures[future])
                    yield futures[future], rows
            finally:  # an interrupt ends with the compilations under way, not with all that are queued
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool:
        say("a compiler process died: what is left is compiled one by one")
    for i in sorted(left):
        try:
            with ProcessPoolExecutor(1, context) as pool:
                yield i, pool.submit(_work, i).result()
        except BrokenProcessPool:
            job = jobs[i]
            yield i, [Row(job.kernel, job.config, job.arch, error="the compiler process died")]


def table(rows: list[Row]) -> str:
    """A block of lines a kernel; sizes in bytes."""
    head = f"{'sm':>5} {'regs':>5} {'spill st/ld':>12} {'stack':>6} {'shared':>7} {'matrix':<24} "
    head += f"{'load':>9} {'s':>6}  configuration"
    lines = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel]
        lines += ["", f"{kernel}: {len(mine)} compilations, {sum(r.seconds for r in mine):.0f} s", head]
        for r in mine:
            if r.error:
                lines.append(f"{r.arch:>5} {'failed':<85}  {r.config}")
                continue
            load = f"{r.load_bits or '-'} {r.load_kind}".strip()
            lines.append(
                f"{r.arch:>5} {r.registers:>5} {f'{r.spill_stores}/{r.spill_loads}':>12} {r.stack:>6} "
                f"{r.shared:>7} {' '.join(r.matrix) or '-':<24} {load:>9} {r.seconds:>6.2f}  {r.config}"
            )
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools.aot", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="NAME", help="kernels whose name or configuration has this"
    )
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="default: %(default)s")
    parser.add_argument("--sample", type=int, metavar="SEED", help="one compilation of each kind only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and offences")
    parser.add_argument("--list", action="store_true", help="name the compilations, compile nothing")
    parser.add_argument("--require-nvcc", action="store_true", help="fail where nvcc is missing")
    help_files = "these .py and .cu files instead of triton_kernels/ and csrc/cuda/"
    parser.add_argument("--kernels", type=Path, nargs="+", default=[], metavar="FILE", help=help_files)
    args = parser.parse_args(argv)
    chosen = args.arch.split(",")
    if not set(chosen) <= {str(a) for a in ARCHITECTURES}:
        parser.error(f"--arch takes {', '.join(map(str, ARCHITECTURES))}; got {args.arch}")
    args.arch = [int(a) for a in chosen]
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {args.jobs}")
    for file in args.kernels:
        if file.suffix not in (".py", ".cu") or not file.is_file():
            parser.error(f"--kernels takes .py and .cu files; got {file}")
    return args


def collect(args: argparse.Namespace) -> tuple[list[Job], list[str]]:
    python, cuda = ([f for f in args.kernels if f.suffix == suffix] for suffix in (".py", ".cu"))
    jobs: list[Job] = []
    offences: list[str] = []
    if python or not args.kernels:
        if importlib.util.find_spec("triton") is None:
            raise SystemExit("tools.aot: Triton is not installed")
        jobs, offences = triton_jobs(python, args.arch)
    if cuda or not args.kernels:
        if _aot_cuda.find_nvcc() is not None:
            jobs += cuda_jobs(cuda, args.arch)
        elif args.require_nvcc:
            offences.append("csrc/cuda/*.cu: no nvcc to compile them with (looked where setup.py looks)")
        else:
            say("csrc/cuda/*.cu skipped: no nvcc")
    jobs = [job for job in jobs if args.only in job.name]
    if args.sample is not None:
        jobs = sample(jobs, args.sample)
    return jobs, [line for line in offences if args.only in line]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported, which nothing has done yet
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder below goes
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gcfast-aot.") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing stale is measured, nothing is left
        jobs, offences = collect(args)
        if args.list:
            print("\n".join(job.name for job in jobs))
        else:
            results: dict[int, list[Row]] = {}
            with contextlib.closing(compile_all(jobs, args.jobs)) as compiled:
                for index, rows in compiled:
                    results[index] = rows
                    if len(results) % 50 == 0 or len(results) == len(jobs):
                        say(
                            f"{len(results)} of {len(jobs)} compilations, {time.perf_counter() - began:.0f} s"
                        )
            rows = [row for index in sorted(results) for row in results[index]]
            offences += [line for row in rows for line in row.offences()]
            print(table(rows), flush=True)
            if args.json:
                record = {"rows": [dataclasses.asdict(row) for row in rows], "offences": offences}
                args.json.write_text(json.dumps(record, indent=1) + "\n")
            if not jobs:
                offences.append(f"nothing to compile{f' matches {args.only!r}' if args.only else ''}")
            bad = f"{len(offences)} offence{'s' * (len(offences) != 1)}"
            print(
                f"\n{len(rows)} kernels in {len(jobs)} compilations: {bad if offences else 'nothing wrong'}",
                flush=True,
            )
    for line in offences:
        say(f"tools.aot: {line}")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
