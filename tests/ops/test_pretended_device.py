"""Device logic without a GPU: the main work on tensors that pretend to live on another device.

One process runs every flow (a pretended device is registered once and for all); here each has its verdict.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import children
import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).parents[1] / "pretended_flows.py"


def flow_names() -> list[str]:
    """The keys of FLOWS; importing the script would register the device in this process."""
    tree = ast.parse(SCRIPT.read_text())
    (flows,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "FLOWS")
    return [key.value for key in flows.keys]


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device from Python")
    done = children.run([sys.executable, SCRIPT])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flow", [name for name in flow_names() if name != "planted mistake"])
def test_flow(flow, outcome):
    assert outcome[flow] == "", outcome[flow]


def test_a_mistake_is_seen(outcome):
    assert "expected all tensors on one device, found pretend:0 and cpu" in outcome["planted mistake"]
