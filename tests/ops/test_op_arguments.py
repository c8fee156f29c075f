"""Operators defend themselves: called directly with whatever, each raises or is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import op_sweep
import pytest
import torch

from gcfast import ops

OPERATORS = sorted(set(op_sweep.CALLS) - {"capture_cotangent"})
SWEEP = [sys.executable, "-W", "ignore", str(Path(op_sweep.__file__))]


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    return children.run([*SWEEP, *map(str, arguments)], timeout=900)


def test_wrong_operands_raise_or_are_right():
    done = sweep(0, 40)
    tail = done.stdout.splitlines()[-12:]
    assert done.returncode == 0, "\n".join([*tail, done.stderr[-2000:]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_pairs_of_wrong_operands(seed):
    done = sweep(seed, 1500)
    assert done.returncode == 0, "\n".join([*done.stdout.splitlines()[-12:], done.stderr[-2000:]])


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.manual_seed(0)
    arguments = tuple(op_sweep.CALLS[name]().values())
    torch.library.opcheck(getattr(torch.ops.gcfast, name).default, arguments)


def test_what_is_written_to_is_marked_as_changed():
    for name in OPERATORS:
        op = getattr(torch.ops.gcfast, name).default
        arguments = op_sweep.CALLS[name]()
        versions = {k: v._version for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        op(*arguments.values())
        changed = [k for k, version in versions.items() if arguments[k]._version != version]
        assert changed == [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_kernels_check_as_well(name):
    """What a compiled call is told is what a call is told."""
    op = getattr(torch.ops.gcfast, name).default
    arguments = op_sweep.CALLS[name]()
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for key, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for wrong in (value[None], value.to(torch.int8)):
            if name == "activation" and key == "x" and wrong.dim() == 3:
                continue  # of any number of axes
            with pytest.raises((TypeError, ValueError)) as real:
                op(*{**arguments, key: wrong}.values())
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(str(real.value))}$"):
                op(*{**meta, key: wrong.to("meta")}.values())


def test_compiled_calls_are_told_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(ops.softmax_curvature, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"v must have shape \(2, 3\) \(as logits\); got \(2, 2\)"):
        compiled(torch.zeros(2, 3), torch.zeros(2, 2))


M = torch.zeros(8, 8)
ARRAY = np.zeros((8, 8), dtype=np.float32)  # tensors of its parts have storages of their own


def part(rows, columns):
    return torch.from_numpy(ARRAY[rows, columns])


@pytest.mark.parametrize(
    ("out", "a", "b"),
    [
        (M[4:, 4:], M[4:, :4], M[:4, 4:]),  # an elimination's
        (M[:, :4].T, M[:, 4:].T, torch.zeros(8, 8)),
        (M[::2], M[1::2], torch.zeros(8, 8)),
        (M[:, ::2], M[:, 1::2], torch.zeros(4, 4)),
        (part(slice(4, 8), slice(4, 8)), part(slice(4, 8), slice(4)), part(slice(4), slice(4, 8))),
        (M.view(64)[:16].view(4, 4), M.view(64)[16:32].view(2, 8).view(4, 4).T, torch.zeros(4, 4)),
    ],
)
def test_memory_of_one_tensor_without_a_common_element_is_taken(out, a, b):
    ops.add_product(out, a, b)


@pytest.mark.parametrize(
    ("out", "a", "b", "words"),
    [
        (M, M, M.clone(), "out must share no memory with a"),
        (M[4:, 4:], M[3:7, 3:7], torch.zeros(4, 4), "out must share no memory with a"),
        (part(slice(4, 8), slice(4, 8)), part(slice(3, 7), slice(3, 7)), M[:4, :4], "no memory with a"),
        (torch.from_numpy(ARRAY[1]).view(2, 4), M[:2], torch.from_numpy(ARRAY).view(16, 4)[1:9], "with b"),
        (M[:4, :4], M[4:, 4:], M[3:7, 3:7], "out must share no memory with b"),
        (M[:4], torch.zeros(4, 8), M.T, "out must share no memory with b"),
        (torch.as_strided(M, (4, 4), (2, 3)), torch.zeros(4, 4), torch.zeros(4, 4), "place of its own"),
        (torch.as_strided(M, (4, 4), (0, 1)), torch.zeros(4, 4), torch.zeros(4, 4), "must not be expanded"),
    ],
)
def test_overlaps_are_refused(out, a, b, words):
    with pytest.raises(ValueError, match=words):
        ops.add_product(out, a, b)


def test_features_into_the_weights_are_refused():
    z, w, b = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
    for name, out in (("z", z), ("weight", w)):
        with pytest.raises(ValueError, match=f"out must share no memory with {name}"):
            ops.wide_features(z, w, b, out=out)
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
        ops.activation(z, out=z.T)
    assert ops.activation(z, out=z) is z
