"""Shared fixtures: one suite over a device list, fixed seeds, poisoned memory, no process left behind."""

from __future__ import annotations

import itertools
import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")
# Workers that take all threads each would wait for one another, and so would the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Without a GPU Triton's interpreter runs the Triton kernels, on CPU tensors. It must be chosen before Triton
# is first imported; where there is a GPU the compiled kernels are tested instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import children
import launches

import gcfast
from gcfast import ops, reference
from gcfast.ops import dispatch

launches.watch()

GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.gpu
NEEDS_INTERPRETER = pytest.mark.skipif(
    not dispatch.interpreting(), reason="Triton compiles here: its kernels are tested on the GPU"
)
ANALYTIC = tuple(name for name in reference.ACTIVATIONS if name != "relu")
WORKERS = min(4, len(os.sched_getaffinity(0)))  # four take 3.5 GB


def on_gpu(*values: object, **options: Any) -> list[Any]:
    """One parameter of a test, where there is a GPU."""
    return [pytest.param(*values, **options, marks=NEEDS_GPU)] if GPU else []


DEVICES = ["cpu", *on_gpu("cuda")]


class Target(NamedTuple):
    """A backend, in force while the test runs, and the device that its tensors live on."""

    backend: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device.type == "cpu"


# Every backend of an op; a test of an op that some backend lacks filters this list.
TARGETS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), id="triton-interpreted", marks=NEEDS_INTERPRETER),
    *on_gpu(("triton", "cuda"), id="triton"),
    *on_gpu(("cuda", "cuda"), id="cuda"),
]
RANK_TARGETS = [p for p in TARGETS if "batched_rank" in dispatch._KERNELS[p.values[0][0]]]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test on each backend; parametrise it with ``indirect=True`` for fewer of them."""
    backend, device = request.param
    with ops.backend(backend):
        yield Target(backend, torch.device(device))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All the CPU's tests run in workers where pytest-xdist is, unless files, -n or --pdb were given."""
    option = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not option.usepdb
    if (
        whole
        and not GPU
        and "PYTEST_XDIST_WORKER" not in os.environ
        and getattr(option, "numprocesses", 0) is None
    ):
        option.numprocesses, option.dist = WORKERS, "worksteal"


def pytest_configure() -> None:
    # What a shell runs in the background ignores the interrupt, and so would all that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """Which gcfast is tested: the installed one, or a source tree that shadows it."""
    found = [f"gcfast {gcfast.__version__} from {Path(gcfast.__file__).parent}"]
    return found if GPU else [*found, "torch sees no CUDA device: no test of one is collected"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU as a whole are left out without one, as the parameters of others are.

    Of a test marked ``one_in(k)`` an even share of the cases runs by default, the same ones each time.
    """
    shared: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in"):
            shared.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in shared.values():
        mark = cases[0].get_closest_marker("one_in")
        assert mark is not None
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in cases[-(-len(cases) // mark.args[0]) :]:
            item.add_marker("slow")
    left_out = [] if GPU else [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    children.end()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20240501)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an element that a kernel forgot is seen."""
    was = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_deterministic_debug_mode(was)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was proved of the matrices of rank_stream.py, by route and by family, of all workers."""
    total: dict[str, Counter[str]] = {}
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", None) == "call":
            for key, count in dict(report.user_properties).get("ranks", {}).items():
                total.setdefault(key, Counter()).update(count)
    if total:
        terminalreporter.section("ranks")
    for key, count in sorted(total.items()):
        not_proved = count["full"] - count["proved"]
        terminalreporter.write_line(
            f"{key:<34} of full rank {count['full']}: {count['proved']} proved, {not_proved} not "
            f"(of condition <= 1e10: {count['easy_proved']} of {count['easy']}); deficient "
            f"{count['deficient']}; refused {count['refused']}; false {count['false']}"
        )
