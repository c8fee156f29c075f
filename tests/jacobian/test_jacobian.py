"""LayerJacobians against the Jacobian written out row by row, whatever form, tiles and passes it takes."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from jacobian_cases import CASES, explicit, rand, select

import gcfast
from gcfast.jacobian.factors import EmbeddingFactor, Factor, OuterFactor
from gcfast.jacobian.groups import Tile
from gcfast.jacobian.plan import GroupPlan

CLOSE = 1e-10  # relative to the largest entry


@functools.cache
def built(name):
    """The model, its inputs, J (n C, p_l) by parameter; not to be changed."""
    model, x = CASES[name]()
    return model, x, explicit(model, x)


class Truth:
    """What the products of a case's Jacobian should be."""

    def __init__(self, name):
        self.model, self.x, self.j = built(name)
        self.jac = gcfast.LayerJacobians(self.model, self.x)
        self.full = torch.cat([self.j[p] for p in self.jac.parameters], 1)
        self.n, self.c = self.jac.n, self.jac.c

    def layer(self, name):
        return torch.cat([self.j[p] for p in self.jac.layers[name]], 1)

    def blocks(self, k):
        return k.view(self.n, self.c, -1, self.c)


def far(found, true):
    """The largest error, relative to the largest entry of what is true."""
    assert found.shape == true.shape and found.dtype == true.dtype
    scale = float(true.abs().max())
    return float((found - true).abs().max()) / (scale if scale > 0 else 1.0)


def traced(k, c):
    return torch.einsum("icjc->ij", k.view(k.shape[0] // c, c, -1, c))


def label(name):
    return name.replace(" ", "-").replace(",", "")


@pytest.fixture(params=CASES, ids=label)
def truth(request):
    return Truth(request.param)


def test_grams(truth):
    jac, full = truth.jac, truth.full
    k = full @ full.T
    found = jac.gram()
    assert far(found, k) < CLOSE and torch.equal(found, found.T)
    by_layer = jac.gram(per_layer=True)
    assert list(by_layer) == list(jac.layers)
    for layer, part in by_layer.items():
        j = truth.layer(layer)
        assert far(part, j @ j.T) < CLOSE, layer
        assert jac.numel[layer] == j.shape[1]
    some = list(jac.layers)[-1]
    assert far(jac.gram(some), truth.layer(some) @ truth.layer(some).T) < CLOSE
    assert far(jac.gram(trace=True), traced(k, truth.c)) < CLOSE
    assert far(jac.diag().flatten(), k.diagonal()) < CLOSE
    for layer, part in jac.diag(per_layer=True).items():
        assert far(part.flatten(), truth.layer(layer).square().sum(1)) < CLOSE, layer
    assert jac.shape == tuple(full.shape)


@pytest.mark.one_in(3)
def test_cross_grams(truth):
    """Of samples in another order and number, and of new ones."""
    order = [3, 1, 1, 0]
    other = select(truth.x, order)
    rows = truth.full.view(truth.n, truth.c, -1)[order].flatten(0, 1)
    k = truth.full @ rows.T
    assert far(truth.jac.gram(other=other), k) < CLOSE
    assert far(truth.jac.gram(other=other, trace=True), traced(k, truth.c)) < CLOSE
    one = truth.jac.gram(other=select(truth.x, slice(2, 3)), per_layer=True)
    for layer, part in one.items():
        j = truth.layer(layer)
        assert far(part, j @ j[2 * truth.c : 3 * truth.c].T) < CLOSE, layer


def test_products_with_vectors(truth):
    jac, full = truth.jac, truth.full
    v, u = rand(full.shape[1]), rand(truth.n, truth.c)
    ju = jac.vjp(u)
    assert {name: g.shape for name, g in ju.items()} == {n: p.shape for n, p in jac.parameters.items()}
    assert far(jac.jvp(v).flatten(), full @ v) < CLOSE
    assert far(jac.as_vector(ju), full.T @ u.flatten()) < CLOSE
    assert torch.equal(jac.as_vector(jac.vjp(u.flatten())), jac.as_vector(ju))
    assert far(jac.matvec(u).flatten(), full @ (full.T @ u.flatten())) < CLOSE
    assert jac.matvec(u.flatten()).shape == (truth.n * truth.c,)
    scale = float(v.norm() * u.norm() * full.norm())
    assert abs(float(jac.as_vector(ju) @ v - (u * jac.jvp(v)).sum())) <= 1e-12 * scale
    assert torch.equal(jac.as_vector(jac.as_dict(v)), v)
    last = list(jac.parameters)[-1]
    p = jac.parameters[last].numel()
    assert far(jac.jvp({last: jac.as_dict(v)[last]}).flatten(), full[:, -p:] @ v[-p:]) < CLOSE


@pytest.mark.one_in(3)
def test_sketches_have_one_omega(truth):
    """J Omega = (J Omega) for an Omega found from the sketches themselves, whatever the samples and tiles."""
    jac, full = truth.jac, truth.full
    for method in ("gaussian", "sparse"):
        s = jac.sketch(4, seed=3, method=method)
        assert s.shape == (truth.n * truth.c, 4) and torch.equal(s, jac.sketch(4, seed=3, method=method))
        assert not torch.equal(s, jac.sketch(4, seed=3 + truth.n, method="gaussian"))
        order = [4, 2]
        other = gcfast.LayerJacobians(truth.model, select(truth.x, order)).sketch(4, seed=3, method=method)
        assert far(other, s.view(truth.n, truth.c, 4)[order].flatten(0, 1)) < CLOSE
        # linear in the rows of J: where combinations of rows vanish, those of the sketch do
        left = torch.linalg.svd(full, full_matrices=True)
        null = left.U[:, int((1e-9 * left.S[0] < left.S).sum()) :]
        assert not null.numel() or float((null.T @ s).abs().max()) < 1e-8 * float(s.abs().max() + 1e-30)


FORMS = {"hadamard": (OuterFactor, EmbeddingFactor), "rows": Factor}
# Of every kind of factor that has two forms one case or more: its blocks, positions, order and bias.
TWO_FORMS = [
    *("linear", "linear, 3-d", "linear, no bias", "linear, strided 4-d", "linear, one output"),
    *("x @ w", "w @ x", "einsum, heads", "lora", "attention, cross", "first token only"),
    *("conv1d, same, groups", "conv1d, dilated, strided", "conv2d", "conv2d, no bias", "conv2d, 1 x 1"),
    *("conv2d, all at once", "conv2d, depthwise", "conv3d, groups, padded"),
    *("transposed 1d", "transposed 2d", "transposed 2d, no bias"),
    *("embedding", "embedding, repeated", "embedding, one a sample"),
    *("used twice", "tied weights, own biases", "residual network"),
]
FORMED = [(name, form) for name in TWO_FORMS for form in FORMS]
FORMED += [(name, "chosen") for name in CASES if name not in TWO_FORMS]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("truth", "form"), FORMED, indirect=["truth"], ids=[f"{form}-{label(name)}" for name, form in FORMED]
)
def test_both_forms_and_all_tiles(truth, form, monkeypatch):
    plan = GroupPlan.of

    def forced(group, a, b, lower):
        kind = form if isinstance(a, FORMS[form]) and isinstance(b, FORMS[form]) else "rows"
        return dataclasses.replace(plan(group, a, b, lower), form=kind)

    if form != "chosen":
        monkeypatch.setattr(GroupPlan, "of", forced)
    jac, n, c = truth.jac, truth.n, truth.c
    k = truth.full @ truth.full.T
    assert far(jac.gram(), k) < CLOSE and far(jac.gram(trace=True), traced(k, c)) < CLOSE
    sketch = jac.sketch(3)
    ends = (0, 1, n)
    outputs = (0, 1, c) if c > 1 else (0, 1)
    tiles = [Tile(i, j, d, e) for d, e in itertools.pairwise(outputs) for i, j in itertools.pairwise(ends)]
    monkeypatch.setattr(jac, "_tiles", lambda *_, **__: tiles)
    found = jac.gram()
    assert far(found, k) < CLOSE and torch.equal(found, found.T)
    assert far(jac.gram(trace=True), traced(k, c)) < CLOSE
    assert far(jac.diag().flatten(), k.diagonal()) < CLOSE
    assert far(jac.sketch(3), sketch) < CLOSE
    if form != "chosen":
        assert far(jac.gram(other=truth.x), k) < CLOSE
        assert far(jac.gram(other=truth.x, trace=True), traced(k, c)) < CLOSE
    jac._engine._batched = False
    assert far(jac.gram(), k) < CLOSE and far(jac.diag().flatten(), k.diagonal()) < CLOSE


@pytest.mark.one_in(3)
@pytest.mark.parametrize("count", [1, 2])
def test_few_samples(truth, count):
    x = select(truth.x, slice(0, count))
    full = truth.full[: count * truth.c]
    jac = gcfast.LayerJacobians(truth.model, x)
    k = full @ full.T
    assert far(jac.gram(), k) < CLOSE and far(jac.diag().flatten(), k.diagonal()) < CLOSE
    v = rand(full.shape[1])
    assert far(jac.jvp(v).flatten(), full @ v) < CLOSE
