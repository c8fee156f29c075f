from __future__ import annotations

import platform

import pytest
import torch


def pytest_report_header() -> str:
    import gcfast.ops

    notes = gcfast.ops.backends().notes
    return (
        f"bench: torch {torch.__version__}, {platform.processor() or platform.machine()}, cpu {notes['cpu']}"
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
