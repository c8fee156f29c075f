from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        help="where benchmarks run (GCFAST_BENCH_DEVICE; default: the GPU if there is one)",
    )
    parser.addoption(
        "--smallest",
        action="store_true",
        help="run every benchmark once at its smallest size: whether it works, not how fast",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device"):
        os.environ["GCFAST_BENCH_DEVICE"] = config.getoption("--device")
    if config.getoption("--smallest"):  # before the benchmarks are imported, which choose their sizes then
        if os.environ.get("GCFAST_BENCH_OUT", "").strip():
            raise pytest.UsageError("--smallest measures nothing: GCFAST_BENCH_OUT must not be set")
        os.environ["GCFAST_BENCH_SMALLEST"] = "1"


def pytest_report_header() -> str:
    import _compare
    import _record

    run = _record.header()
    device = _compare.bench_device().type
    where = run["device"] if device == "cuda" else f"{run['cpu']}, {run['threads']} threads"
    sizes = ", smallest sizes, once" if _compare.only_smallest() else ""
    return f"bench: {device} ({where}), torch {run['torch']}, commit {run['commit']}{sizes}"


@pytest.fixture
def device() -> torch.device:
    """The device that is measured."""
    from _compare import bench_device

    return bench_device()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
