"""Shared fixtures: one suite over a device list, fixed seeds, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# Without a GPU Triton's interpreter runs the Triton kernels, on CPU tensors. It must be chosen before Triton
# is first imported; where there is a GPU the compiled kernels are tested instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import launches

import gcfast
from gcfast import ops, reference
from gcfast.ops import dispatch

launches.watch()

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NEEDS_INTERPRETER = pytest.mark.skipif(
    not dispatch.interpreting(), reason="Triton compiles here: its kernels are tested on the GPU"
)
ANALYTIC = tuple(name for name in reference.ACTIVATIONS if name != "relu")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


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
    pytest.param(("triton", "cuda"), id="triton", marks=NEEDS_GPU),
    pytest.param(("cuda", "cuda"), id="cuda", marks=NEEDS_GPU),
]
RANK_TARGETS = [p for p in TARGETS if "batched_rank" in dispatch._KERNELS[p.values[0][0]]]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test on each backend; parametrise it with ``indirect=True`` for fewer of them."""
    backend, device = request.param
    with ops.backend(backend):
        yield Target(backend, torch.device(device))


def pytest_report_header() -> str:
    """Which gcfast is tested: the installed one, or a source tree that shadows it."""
    return f"gcfast {gcfast.__version__} from {Path(gcfast.__file__).parent}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A million matrices take minutes: on request only."""
    if os.environ.get("GCFAST_SOUNDNESS", "0") in ("", "0") and "soundness" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("soundness"):
                item.add_marker(pytest.mark.skip(reason="minutes: GCFAST_SOUNDNESS=1 or -m soundness"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20240501)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh uninitialised tensor with NaN, so that an element a kernel forgot is seen."""

    def filled(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapped

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
