"""widen: where the layer goes, what it keeps, and when it stays away."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import gcfast


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.Tanh())
        self.classify = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.classify(self.body(x))


def test_widened_model_is_certified_and_trains():
    torch.manual_seed(0)
    x, y = torch.randn(50, 4, 4), torch.randint(0, 3, (50,))
    model = _Net().double()
    assert gcfast.widen(model, 50, inputs=x.double()) is model
    assert model.classify.wide.weight.shape == (55, 7) and model.classify.head.bias is None
    assert model.classify.head.weight.dtype == torch.float64
    model(x.double()).sum().backward()
    assert model.classify.wide.weight.grad is not None
    assert gcfast.certify(model, (x.double(), y)).status == "holds"


def test_widened_model_through_both_phases_and_the_solver():
    torch.manual_seed(0)
    x, y = torch.randn(40, 16, dtype=torch.float64), torch.randint(0, 3, (40,))
    model = gcfast.widen(_Net().double(), 40, inputs=x)
    pair = model.classify
    assert type(pair) is gcfast.WideHead
    opt = gcfast.TwoPhase(torch.optim.SGD(model.parameters(), lr=0.01), model, switch_step=3)
    frozen, losses = None, []
    for step in range(8):
        if step == 4:  # the switch is made by the third step
            frozen = pair.wide.weight.detach().clone()
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert torch.equal(pair.wide.weight, frozen) and losses[-1] < losses[0]
    assert gcfast.find_head(model, x).name == "classify.head"
    found = gcfast.model.wide_layer.wide_activation(model, None, x)
    assert found.module is pair.wide and found.analytic
    with gcfast.model.FeatureTap(model, "classify.head") as tap:
        h, out = tap(x)
    torch.testing.assert_close(h, pair.wide(model.body(x)))
    torch.testing.assert_close(out, pair.head(h))
    solution = gcfast.solve_head(model, (x, y), loss="cross_entropy", target_gap=1e-3)
    assert solution.loss < losses[-1]


@pytest.mark.parametrize("compiled", [False, True])
def test_phase_one_of_a_widened_model_is_the_base_optimizer_to_the_bit(compiled):
    """TwoPhase looks at the first pass for the head; that pass is fused like any other."""
    x, y = torch.randn(40, 16), torch.randint(0, 3, (40,))
    ends, graphs = [], []
    for two_phase in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        root = nn.Sequential(gcfast.widen(_Net(), 40, head="classify"))
        seen = []
        backend = lambda graph, inputs: seen.append(str(graph.graph)) or graph.forward  # noqa: B023, E731
        model = torch.compile(root, backend=backend, fullgraph=True) if compiled else root
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        if two_phase:
            opt = gcfast.TwoPhase(opt, model, switch_step=99)
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        ends.append([p.detach().clone() for p in root.parameters()])
        graphs.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all("wide_forward" in g for seen in graphs for g in seen)


def test_a_state_saved_before_there_was_a_wide_head_loads():
    model = gcfast.widen(_Net(), 20, head="classify")
    pair = model.classify
    old = _Net()
    old.classify = nn.Sequential(OrderedDict(wide=gcfast.WideLayer(7, 22), head=nn.Linear(22, 3, bias=False)))
    assert list(old.state_dict()) == list(model.state_dict())
    model.load_state_dict(old.state_dict())
    z = torch.randn(5, 7)
    torch.testing.assert_close(pair(z), old.classify(z))


def test_a_wide_enough_layer_is_not_widened_again():
    model = _Net()
    gcfast.widen(model, 20, head="classify")
    layer = model.classify.wide
    gcfast.widen(model, 20, head="classify.head")
    assert model.classify.wide is layer


def test_torchvision_resnet():
    models = pytest.importorskip("torchvision.models")
    model = gcfast.widen(models.resnet18(num_classes=10), 600)
    assert model.fc.wide.weight.shape == (660, 512) and model.fc.head.out_features == 10
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_generator_makes_it_repeatable():
    a, b = (
        gcfast.widen(nn.Sequential(nn.Linear(4, 2)), 9, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("n", "width"), [(2, 3), (10, 11), (11, 13), (19, 21), (20, 22), (100, 110)])
def test_the_default_width_is_rounded_up(n, width):
    model = gcfast.widen(nn.Sequential(nn.Linear(1, 2)), n)
    assert model[0].wide.m == width


@pytest.mark.parametrize(
    ("n", "width", "words"),
    [
        (0, None, "n_samples: expected a positive int"),
        (2.5, None, "n_samples: expected a positive int"),
        (10, 9, "width: expected an int of at least 10; got 9"),
    ],
)
def test_bad_numbers(n, width, words):
    with pytest.raises((TypeError, ValueError), match=words):
        gcfast.widen(nn.Linear(3, 2), n, width=width)


def test_an_ambiguous_head_lists_the_candidates():
    with pytest.raises(gcfast.HeadError, match="classify"):
        gcfast.widen(_Net(), 30)
