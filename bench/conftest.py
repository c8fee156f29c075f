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


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device"):
        os.environ["GCFAST_BENCH_DEVICE"] = config.getoption("--device")


def pytest_report_header() -> str:
    import _compare
    import _record

    run = _record.header()
    device = _compare.bench_device().type
    where = run["device"] if device == "cuda" else f"{run['cpu']}, {run['threads']} threads"
    return f"bench: {device} ({where}), torch {run['torch']}, commit {run['commit']}"


@pytest.fixture
def device() -> torch.device:
    """The device that is measured."""
    from _compare import bench_device

    return bench_device()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
