"""LayerJacobians as a whole: choice of layers, plans, memory, precision, random models."""

from __future__ import annotations

import json
import sys

import children
import pytest
import torch
from jacobian_cases import CASES, explicit, rand, read
from random_models import random_model
from torch import nn

import gcfast
from gcfast import LayerJacobians
from gcfast.jacobian.factors import EmbeddingFactor, Factor, OuterFactor
from gcfast.jacobian.groups import Tile


def close(found, true, tolerance=1e-10):
    assert found.shape == true.shape
    return float((found - true).abs().max()) <= tolerance * max(float(true.abs().max()), 1e-300)


def rows_of(model, x, jac):
    j = explicit(model, x)
    return torch.cat([j[name] for name in jac.parameters], 1)


# --- layers


def vit():
    return CASES["vit"]()


@pytest.mark.parametrize(
    "layers, chosen",
    [
        ("patch", {"patch"}),
        ("block.*", {"block.self_attn", "block.self_attn.out_proj", "block.linear1", "block.linear2",
                     "block.norm1", "block.norm2"}),
        ("block.linear?", {"block.linear1", "block.linear2"}),
        (nn.LayerNorm, {"block.norm1", "block.norm2"}),
        ([nn.Conv2d, "head", "cls"], {"patch", "head", "cls"}),
        ("*.weight", {"patch", "place", "head", "block.self_attn.out_proj", "block.linear1", "block.linear2",
                      "block.norm1", "block.norm2"}),
        (["*"], None),
    ],
)  # fmt: skip
def test_layers_by_name_pattern_class_and_list(layers, chosen):
    model, x = vit()
    jac = LayerJacobians(model, x, layers=layers)
    whole = LayerJacobians(model, x)
    assert set(jac.layers) == (set(whole.layers) if chosen is None else chosen)
    if layers == "*.weight":
        assert all(name.endswith("weight") for name in jac.parameters)
    full = rows_of(model, x, jac)
    assert jac.shape == tuple(full.shape) and close(jac.gram(), full @ full.T)
    v = rand(full.shape[1])
    assert close(jac.jvp(v).flatten(), full @ v)
    some = list(jac.layers)[:2]
    part = jac.gram(some, per_layer=True)
    assert list(part) == some and close(sum(part.values()), jac.gram(some))
    assert close(sum(jac.diag(some, per_layer=True).values()), jac.diag(some))


def test_aliases_of_tied_parameters():
    model, x = CASES["used twice"]()
    k = LayerJacobians(model, x, layers="embedding").gram()
    for alias in ("head", "head.weight", nn.Embedding):
        assert torch.equal(LayerJacobians(model, x, layers=alias).gram(), k)
    assert "head" not in LayerJacobians(model, x).layers
    model, x = CASES["tied weights, own biases"]()
    jac = LayerJacobians(model, x)
    assert jac.layers == {"a": ("a.weight", "a.bias"), "b": ("b.bias",)}
    assert close(jac.gram("a") + jac.gram("b"), jac.gram())


def test_wrapped_models():
    model, x = CASES["mlp"]()
    k = LayerJacobians(model, x).gram()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        jac = LayerJacobians(wrapped, x)
        assert torch.equal(jac.gram(), k) and set(jac.layers) == {"0", "2"}


def test_frozen_parameters_are_left_out():
    model, x = CASES["mlp"]()
    model[0].weight.requires_grad_(False)
    jac = LayerJacobians(model, x)
    assert jac.layers == {"0": ("0.bias",), "2": ("2.weight", "2.bias")}
    full = rows_of(model, x, jac)
    assert close(jac.gram(), full @ full.T) and close(
        jac.matvec(rand(5, 3) * 0 + 1).flatten(), full @ full.sum(0)
    )


def test_other_samples_of_another_length():
    """Sequences of 3 and of 2 tokens."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.f = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

        def forward(self, x):
            z = torch.tanh(self.f(x)) * self.scale
            return torch.tanh(self.f(z)).sum(1)

    torch.manual_seed(0)
    model, x, y = Sequence().double(), rand(4, 3, 3), rand(2, 2, 3)
    jac = LayerJacobians(model, x)
    a, b = rows_of(model, x, jac), rows_of(model, y, jac)
    assert close(jac.gram(other=y), a @ b.T)


# --- sketches


def test_sketches_are_unbiased():
    model, x = CASES["mlp"]()
    jac = LayerJacobians(model, x)
    k = jac.gram()
    d = k.diagonal()
    for method in ("gaussian", "sparse"):
        seeds, width = 300, 8
        sketches = [jac.sketch(width, seed=seed, method=method) for seed in range(seeds)]
        mean = sum(s @ s.T for s in sketches) / seeds
        # Var (S S^T)[a,b] <= (K[a,b]^2 + K[a,a] K[b,b]) / width: six standard deviations of the mean
        bound = 6 * ((k.square() + torch.outer(d, d)) / (width * seeds)).sqrt()
        assert bool(((mean - k).abs() <= bound).all()), method
        assert float((sketches[0] @ sketches[0].T - k).abs().max()) > 1e-3 * float(k.max())


def test_sketches_of_samples_that_leave_layers_dead():
    """Omega is that of the layers, also where the first samples do not reach one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.abs_()
    alive, dead = 5 + rand(4, 3).abs(), -5 - rand(4, 3).abs()
    one, two = torch.cat([alive, dead]), torch.cat([dead, alive])
    for method in ("gaussian", "sparse"):
        a = LayerJacobians(model, one).sketch(5, method=method)
        b = LayerJacobians(model, two).sketch(5, method=method)
        assert close(a.view(2, -1).flip(0).flatten(), b.flatten()), method


def test_sketches_do_not_depend_on_defaults():
    model, x = CASES["mlp"]()
    a = LayerJacobians(model, x).sketch(3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(LayerJacobians(model, x).sketch(3), a)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sketch_of_some_layers():
    model, x = CASES["mlp"]()
    jac = LayerJacobians(model, x)
    parts = [jac.sketch(3, layers=layer) for layer in jac.layers]
    assert close(sum(parts), jac.sketch(3)) and float(parts[0].abs().max()) > 0


def test_scipy_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    model, x = CASES["conv2d"]()
    jac = LayerJacobians(model, x)
    full = rows_of(model, x, jac)
    operator = jac.operator()
    assert operator.shape == jac.shape and operator.dtype == "float64"
    v, u = rand(jac.shape[1]), rand(jac.shape[0])
    assert close(torch.from_numpy(operator @ v.numpy()), full @ v)
    assert close(torch.from_numpy(operator.T @ u.numpy()), full.T @ u)
    values = linalg.svds(operator, k=3, return_singular_vectors=False)
    assert close(torch.tensor(sorted(values)), torch.linalg.svdvals(full)[:3].flip(0), 1e-8)


# --- tiles, plans, memory


@pytest.mark.parametrize("name", ["residual network", "vit", "used twice", "weight norm"])
def test_tiles_of_a_small_budget(name):
    model, x = CASES[name]()
    whole = LayerJacobians(model, x)
    k = whole.gram()
    seen = set()
    for budget in (10**8, 5 * 10**7, 3 * 10**7, 2 * 10**7):
        jac = LayerJacobians(model, x, max_bytes=budget)
        try:
            plan = jac.plan()
        except MemoryError:
            continue
        seen.add(plan.tiles)
        assert plan.bytes <= budget and close(jac.gram(), k) and close(jac.diag(), whole.diag())
    engine = whole._engine
    for least in range(2**24, 2**25, 2**19):  # just above what cannot be done without
        engine_budget = least
        try:
            tiles = LayerJacobians(model, x, max_bytes=engine_budget)._tiles(engine, stored=True)
        except MemoryError:
            continue
        seen.add(len(tiles))
        break
    assert seen


def test_small_budgets_give_more_and_smaller_tiles(monkeypatch):
    monkeypatch.setitem(gcfast.jacobian.plan.BLOCK_BYTES, "cpu", 1 << 10)
    model, x = CASES["residual network"]()
    whole = LayerJacobians(model, x)
    k, u = whole.gram(), rand(5, 3)
    counts = []
    for budget in (10**6, 10**5, 50_000, 30_000):
        jac = LayerJacobians(model, x, max_bytes=budget)
        plan = jac.plan()
        counts.append(plan.tiles)
        assert plan.bytes <= budget and plan.room == budget
        assert plan.passes == plan.tiles * (plan.tiles + 1) // 2
        assert close(jac.gram(), k) and close(jac.gram(trace=True), whole.gram(trace=True))
        assert close(jac.diag(), whole.diag()) and close(jac.sketch(3), whole.sketch(3))
        assert close(jac.matvec(u), whole.matvec(u)) and close(jac.gram(other=x[:2]), k[:, :6])
    assert counts[0] == 1 and counts == sorted(counts) and counts[-1] > 3


def test_a_plan_says_what_gram_does(monkeypatch):
    taken = {}

    def spy(kind, cls, name):
        real = getattr(cls, name)

        def spied(self, other, out, lower):
            taken[id(self)] = kind
            return real(self, other, out, lower)

        monkeypatch.setattr(cls, name, spied)

    spy("hadamard", OuterFactor, "hadamard")
    spy("hadamard", EmbeddingFactor, "hadamard")
    for kind in (Factor, OuterFactor):
        spy("rows", kind, "by_rows")
    forms = set()
    for model, x in (
        CASES["vit"](),
        CASES["embedding"](),
        CASES["weight norm"](),
        (read(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 40)).double(), rand(5, 2, 8, 8)),
    ):
        jac = LayerJacobians(model, x)
        plan = jac.plan()
        order = []
        run = jac._engine.run

        def watched(tile, receive, run=run, order=order):
            def both(number, factor):
                taken.clear()
                receive(number, factor)
                order.append((number, *taken.values()))

            run(tile, both)

        monkeypatch.setattr(jac._engine, "run", watched)
        jac.gram()
        assert sorted(order) == [(i, group.form) for i, group in enumerate(plan.groups)]
        forms |= {group.form for group in plan.groups}
        assert all(g.operations > 0 and g.bytes > 0 and g.numel > 0 and g.positions > 0 for g in plan.groups)
        assert 0 <= jac.shape[1] - sum(g.numel for g in plan.groups) <= 24  # parts of tables not used
        assert plan.gram_bytes == 8 * jac.shape[0] ** 2 and plan.operations > 0
        assert json.loads(json.dumps(plan.to_dict()))["groups"][0]["layer"] == plan.groups[0].layer
        text = str(plan)
        assert all(any(line.startswith(layer) for line in text.splitlines()) for layer in jac.layers)
        assert f"{jac.n} samples x {jac.c} outputs" in text
    assert forms == {"hadamard", "rows"}


MEMORY = """
import sys, torch, gcfast
from torch import nn
torch.manual_seed(0)
n, c, budget = 48, 10, {budget}
net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                    nn.Linear(1024, 3584), nn.ReLU(), nn.Linear(3584, 128), nn.ReLU(), nn.Linear(128, c))
p = sum(q.numel() for q in net.parameters())
x = torch.randn(n, 3, 16, 16)
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
gcfast.LayerJacobians(net, x[:3]).gram()
jac = gcfast.LayerJacobians(net, x, max_bytes=budget)
plan = jac.plan()
before = peak()
{call}
print(peak() - before, 4 * n * c * p, plan.tiles, plan.bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "budget, call", [(400 << 20, "jac.gram()"), (150 << 20, "jac.gram()"), (150 << 20, "jac.diag()")]
)
def test_memory_is_that_of_a_tile(budget, call, tmp_path):
    # Elsewhere than in the source tree, which would shadow the installed package.
    code = MEMORY.format(budget=budget, call=call)
    done = children.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    grown, stored, tiles, planned = map(int, done.stdout.split())
    assert stored > 7e9  # the Jacobian
    assert planned <= budget and (tiles > 1) == (budget < 200 << 20)
    assert grown < 1.25 * budget + 30e6  # the Gram lies beside it


# --- precision


def test_float32_is_as_good_as_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    with torch.no_grad():
        net(3 + 2 * torch.randn(50, 3, 9, 9))  # statistics
    net.eval()
    x = 3 + 2 * torch.randn(6, 3, 9, 9)
    found = LayerJacobians(net, x)

    def rows(model, x):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        one = lambda p, v: torch.func.functional_call(model, p, (v[None],))[0]  # noqa: E731
        j = torch.func.vmap(torch.func.jacrev(one), (None, 0))(parameters, x)
        return torch.cat([part.flatten(2) for part in j.values()], 2).flatten(0, 1)

    single, triple = rows(net, x), gcfast.LayerJacobians(net.double(), x.double()).gram()
    scale = triple.abs().max()
    full = rows(net, x.double())
    assert close(triple, full @ full.T)
    net.float()
    theirs = float(((single @ single.T).double() - triple).abs().max() / scale)
    k = found.gram()
    assert k.dtype == torch.float32
    assert float((k.double() - triple).abs().max() / scale) <= theirs + 1e-6
    v = torch.randn(found.shape[1])
    assert float((found.jvp(v).flatten().double() - full @ v.double()).abs().max()) < 1e-4 * float(
        full.norm()
    )


# --- random models

SEEDS = (*range(20), 34, 111, 285)  # and three that torch.func gave wrong numbers for


@pytest.mark.one_in(3)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_models(seed, monkeypatch):
    model, x = random_model(seed)
    jac = LayerJacobians(model, x)
    j = explicit(model, x)
    full = rows_of(model, x, jac)
    k = full @ full.T
    assert close(jac.gram(), k)
    for layer, part in jac.gram(per_layer=True).items():
        own = torch.cat([j[name] for name in jac.layers[layer]], 1)
        # of layers that hardly matter the rounding of the whole counts
        assert float((part - own @ own.T).abs().max()) <= 1e-10 * float(k.abs().max()), layer
    assert close(jac.diag().flatten(), k.diagonal())
    v = rand(full.shape[1])
    assert close(jac.jvp(v).flatten(), full @ v)
    sketch = jac.sketch(3)
    tiles = [Tile(i, i + 1, c, c + 1) for c in range(jac.c) for i in range(jac.n)]
    monkeypatch.setattr(jac, "_tiles", lambda *_, **__: tiles)
    assert close(jac.gram(), k) and close(jac.sketch(3), sketch)


class _OneToken(nn.Module):
    """A block on every token, a position table of which a slice is used, and a head that reads one token."""

    def __init__(self, token: int = 0) -> None:
        super().__init__()
        self.token = token
        self.position = nn.Parameter(rand(1, 12, 4))
        self.mix, self.last, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        z = x + self.position[:, : x.shape[1]]
        z = z + torch.tanh(self.mix(z)).mean(1, keepdim=True)
        return self.head(torch.tanh(self.last(z))[:, self.token])


def test_positions_without_cotangents_are_left_out():
    model, x = _OneToken(), rand(5, 7, 4)
    jac = LayerJacobians(model, x)
    found = {group.layer: (group.kind, group.positions) for group in jac.plan().groups}
    # with 7 tokens, 1 modulo 2 and 3, the zeros of two or three samples fit two layouts
    assert found["mix"] == ("outer", 7) and found["last"] == ("outer", 1)
    j = explicit(model, x)
    k = sum(rows @ rows.T for rows in j.values())
    assert float((jac.gram() - k).abs().max() / k.abs().max()) < 1e-10


@pytest.mark.parametrize("token", [0, -1])
@pytest.mark.parametrize("length", [5, 10])
def test_trimmed_positions_are_those_of_samples_of_one_length(length, token):
    model = _OneToken(token)
    x, other = rand(5, 7, 4), rand(3, length, 4)
    chosen = ("mix.", "last.", "head.")  # without the table, of which another length takes another part
    jac = LayerJacobians(model, x, layers=[name + "*" for name in chosen])
    first, second = explicit(model, x), explicit(model, other)
    k = sum(first[name] @ second[name].T for name in first if name.startswith(chosen))
    assert float((jac.gram(other=other) - k).abs().max() / k.abs().max()) < 1e-10


def test_another_part_of_a_parameter_is_told():
    jac = LayerJacobians(_OneToken(), rand(5, 7, 4))
    with pytest.raises(ValueError, match="layer 'position': another part of 'position'"):
        jac.gram(other=rand(2, 5, 4))


def test_a_plan_counts_bytes_in_the_dtype_of_the_model():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    single = LayerJacobians(model.float(), rand(5, 4).float()).plan()
    double = LayerJacobians(model.double(), rand(5, 4)).plan()
    assert [2 * group.bytes for group in single.groups] == [group.bytes for group in double.groups]
