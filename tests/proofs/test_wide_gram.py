"""wide_gram: the bound against exact arithmetic, bits, edges; proofs on features that are never stored."""

from __future__ import annotations

import sys
from fractions import Fraction

import children
import numpy as np
import pytest
import torch

import gcfast
from gcfast import ops, reference
from gcfast.features import FeaturesWithOnes
from gcfast.proofs import full_rank


def layer(n, m, d, dtype=torch.float64, scale=1.0):
    z, w, b = torch.randn(n, d), torch.randn(m, d) / d**0.5, torch.randn(m)
    return (scale * z).to(dtype), w.to(dtype), b.to(dtype)


def stored(args, ones, **options):
    h = ops.wide_panel(*args, **options)
    return torch.cat([h, h.new_ones(len(h), 1)], 1) if ones else h


@pytest.mark.parametrize(
    "n, m, d, ones",
    [(1, 1, 1, False), (2, 3, 1, False), (3, 2, 1, False), (30, 40, 2, True), (9, 1030, 4, False)],
)
def test_the_bound_holds_in_exact_arithmetic(n, m, d, ones):
    args = layer(n, m, d)
    k, bound = gcfast.wide_gram(*args, ones=ones)
    h = [[Fraction(x) for x in row] for row in stored(args, ones).tolist()]
    error = [
        [float(Fraction(k[i, j].item()) - sum(map(Fraction.__mul__, h[i], h[j]))) for j in range(n)]
        for i in range(n)
    ]
    true = np.linalg.norm(np.array(error), 2)
    assert true <= bound <= 1e-12 * float(torch.linalg.matrix_norm(k, 2))
    assert torch.equal(k, k.mT)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_is_the_gram_of_the_features(activation, dtype):
    args = layer(600, 1100, 6, dtype)
    k, bound = gcfast.wide_gram(*args, activation=activation, ones=True)
    h = reference.wide_features(*(t.double() for t in args), activation=activation)
    want = h @ h.mT + 1
    assert k.dtype == torch.float64
    torch.testing.assert_close(k, want, rtol=1e-11, atol=1e-11 * float(want.abs().max()))
    assert 0 < bound < 1e-9 * float(want.abs().max()) * len(k)


def test_repeats_bit_for_bit_on_any_threads_and_strides():
    z, w, b = layer(520, 1500, 9)
    first = gcfast.wide_gram(z, w, b)
    gaps = torch.full((520, 12), float("nan"), dtype=torch.float64)
    gaps[:, :9] = z
    again = gcfast.wide_gram(gaps[:, :9], w.mT.contiguous().mT, b)
    assert torch.equal(first.gram, again.gram) and first.error_bound == again.error_bound
    panels = FeaturesWithOnes(gcfast.WideFeatures(z, (w, b)), ones=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.cat(list(panels.panels()), 1)
        alone = gcfast.wide_gram(z, w, b)
        torch.set_num_threads(max(2, before))
        assert torch.equal(one, torch.cat(list(panels.panels(width=500)), 1))
        assert torch.equal(alone.gram, gcfast.wide_gram(z, w, b).gram)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, stored((z, w, b), True))


def test_extremes_are_bounded_or_infinite():
    z, w, b = layer(20, 30, 4, scale=1e4)
    k, bound = gcfast.wide_gram(z, w, b)
    assert bound < 1e-10 * float(k.max()) and k.isfinite().all()
    k, bound = gcfast.wide_gram(z * 1e160, w, b)
    assert bound == float("inf")
    with pytest.raises(ValueError, match="z must be finite"):
        gcfast.wide_gram(z / 0, w, b)


def test_nothing_to_multiply():
    z, w, b = layer(5, 3, 2)
    assert gcfast.wide_gram(z[:0], w, b).gram.shape == (0, 0)
    k, bound = gcfast.wide_gram(z, w[:0], b[:0])
    assert not k.any() and bound == 0.0
    assert torch.equal(
        gcfast.wide_gram(z, w[:0], b[:0], ones=True).gram, torch.ones(5, 5, dtype=torch.float64)
    )
    with pytest.raises(RuntimeError, match="detach weight"):
        gcfast.wide_gram(z, w.requires_grad_(), b)


@pytest.mark.parametrize("d, n", [(20, 300), (2, 120)])
def test_a_proof_needs_no_stored_features(d, n):
    """By the shift where that reaches, by whitening where the features are nearly dependent."""
    args = layer(n, 2 * n, d)
    panels = FeaturesWithOnes(gcfast.WideFeatures(args[0], args[1:], beta=4.0))
    proof = full_rank.prove_full_rank(panels)
    same = full_rank.prove_full_rank(stored(args, False, beta=4.0))
    assert proof.proved and (proof.route, proof.sigma_min_lower) == (same.route, same.sigma_min_lower)
    args[0][7] = args[0][3]
    assert not full_rank.prove_full_rank(panels).proved


MEMORY = """
import torch, gcfast
n, m, d = 5000, 6000, 16
z, w, b = torch.randn(n, d), torch.randn(m, d), torch.randn(m)
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
gcfast.wide_gram(z[:60], w, b)
before = peak()
gcfast.wide_gram(z, w, b)
print((peak() - before - 8 * n * n) / (8 * n * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_beside_the_result_is_a_few_panels(tmp_path):
    # Elsewhere than in the source tree, which would shadow the installed package.
    done = children.run([sys.executable, "-c", MEMORY], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4  # a second n x n matrix would be 4.9 panels, the features 5.9
