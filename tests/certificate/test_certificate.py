"""certify: three answers, never two; witnesses, L*, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gcfast
from gcfast.proofs.rank_proof import proof_bytes

N = 40


def _model(wide=60, activation=None, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), activation or nn.Softplus(), gcfast.WideLayer(5, wide), nn.Linear(wide, classes)
    )


def _data(n=N, seed=1, classes=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((n, 6), generator=g), torch.randint(0, classes, (n,), generator=g)


def test_direct_route_holds_with_everything_filled_in(device):
    model, data = _model().double().to(device), _data()
    cert = gcfast.certify(model, (data[0].double(), data[1]), loss="cross_entropy")
    assert (cert.status, cert.route, cert.n, cert.width, cert.rank_lower) == ("holds", "direct", N, 60, N)
    assert cert.offenders == [] and all(a.status == "holds" for a in cert.assumptions)
    assert cert.infimum == 0 and math.isclose(cert.gap, cert.loss)
    features = model[:3](data[0].double().to(device)).detach().cpu()
    true = torch.linalg.svdvals(torch.cat([features, torch.ones(N, 1, dtype=torch.float64)], 1))
    assert 0.85 * float(true[-1]) <= cert.sigma_min_lower <= float(true[-1])
    assert "HOLDS" in str(cert) and json.loads(cert.to_json())["rank_lower"] == N
    assert 0 < cert.steps_to(1e-2) < cert.steps_to(1e-3) < math.inf and cert.steps_to(cert.gap) == 0


def test_theorem_route_lists_its_assumptions():
    cert = gcfast.certify(_model(), _data(), route="theorem")
    assert (cert.status, cert.route, cert.rank_lower, cert.sigma_min_lower) == ("holds", "theorem", 0, 0.0)
    assert {"wide layer", "analytic in the hidden weights", "distinct rows below the wide layer"} <= {
        a.name for a in cert.assumptions
    }


def test_theorem_route_steps_in_where_memory_is_short():
    cert = gcfast.certify(_model(), _data(), max_bytes=1000)
    assert (cert.status, cert.route) == ("holds", "theorem")
    assert any("1,000" in a.reason for a in cert.assumptions)
    relu = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 3))
    with pytest.raises(MemoryError, match=r"bytes.*max_bytes allows 1,000\. Way out"):
        gcfast.certify(relu, _data(), max_bytes=1000)


def test_relu_is_served_by_the_direct_route_and_refused_by_the_theorem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 3))
    assert gcfast.certify(model, _data()).status == "holds"
    with pytest.raises(ValueError, match=r"relu.*'1'"):
        gcfast.certify(model, _data(), route="theorem")
    body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), gcfast.WideLayer(5, 60), nn.Linear(60, 3))
    with pytest.raises(ValueError, match="real analytic"):
        gcfast.certify(body, _data(), route="theorem")


class _Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda h: h / (1 + h.amax(1, keepdim=True)), "amax"),
        (lambda h: torch.stack([r * float(r.sum()) for r in h]), "local_scalar"),
    ],
    ids=["analytic only somewhere", "unknown"],
)
def test_the_theorem_is_not_applied_where_analyticity_is_in_doubt(function, operator):
    model = _model(activation=_Between(function))
    with pytest.raises(ValueError, match=f"real analytic in the hidden weights; .*{operator}"):
        gcfast.certify(model, _data(), route="theorem")
    with pytest.raises(MemoryError):  # nor does it step in where the direct route has no room
        gcfast.certify(model, _data(), max_bytes=1000)
    assert gcfast.certify(model, _data()).route == "direct"


def test_conflicting_copies_are_named_and_enter_the_infimum():
    x, y = _data()
    x[7] = x[3]
    y[7], y[3] = 0, 2
    x[20] = x[11]
    y[20] = y[11]
    cert = gcfast.certify(_model(), (x, y), loss="cross_entropy")
    assert cert.status == "fails" and cert.rank_lower == N - 2
    first = cert.offenders[0]
    assert (first.samples, first.targets, first.conflicting) == ([3, 7], [2, 0], True)
    assert cert.offenders[1].samples == [11, 20] and cert.offenders[1].conflicting is False
    assert math.isclose(cert.infimum, 2 * math.log(2) / N, rel_tol=1e-12)


def test_negative_zero_is_zero():
    x, y = _data()
    x[4] = 0.0
    x[5] = -0.0
    assert gcfast.certify(_model(), (x, y)).offenders[0].samples == [4, 5]


def test_too_few_features_fails_with_both_numbers():
    cert = gcfast.certify(_model(wide=30), _data(), loss="cross_entropy")
    assert cert.status == "fails" and "40" in cert.reason and "31" in cert.reason and "widen" in cert.reason


@pytest.mark.parametrize("head_bias", [True, False])
def test_the_ones_column_belongs_to_the_bias(head_bias):
    model = nn.Sequential(nn.Linear(6, N - 1), nn.Tanh(), nn.Linear(N - 1, 3, bias=head_bias))
    cert = gcfast.certify(model.double(), (_data()[0].double(), _data()[1]))
    assert cert.status == ("holds" if head_bias else "fails")


def test_features_alone():
    h = torch.randn((20, 30), generator=torch.Generator().manual_seed(0))
    assert gcfast.certify(h).status == "holds"
    h[4] = h[9]
    cert = gcfast.certify(h, torch.arange(20) % 2, loss="cross_entropy")
    assert cert.status == "fails" and cert.offenders[0].samples == [4, 9] and cert.offenders[0].conflicting
    assert math.isclose(cert.infimum, 2 * math.log(2) / 20)
    h = torch.randint(-9, 9, (20, 30), generator=torch.Generator().manual_seed(0)).double()
    h[3] = h[1] + h[2] - h[0]
    cert = gcfast.certify(h)
    assert (
        cert.status == "fails"
        and sorted(cert.offenders[0].samples) == [0, 1, 2, 3]
        and cert.offenders[0].kind == "dependency"
    )
    assert cert.rank_lower == 19 and any(
        "19 rows are proved independent (shift)" in a.reason for a in cert.assumptions
    )


@pytest.mark.parametrize(
    ("condition", "route"), [(1e2, "shift:"), (1e9, "whitening:"), (1e13, "whitening in doubled")]
)
def test_the_route_of_the_proof_is_told(condition, route):
    n = 200
    q = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2)]
    h = (q[0] * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ q[1]
    cert = gcfast.certify(h)
    assert cert.status == "holds" and f"proved in floating point: {route}" in str(cert)


def test_the_rank_that_is_left_is_proved():
    g = torch.Generator().manual_seed(0)
    h = (
        torch.randint(-9, 9, (60, 20), generator=g).double()
        @ torch.randint(-9, 9, (20, 80), generator=g).double()
    )
    cert = gcfast.certify(h)
    assert (cert.status, cert.rank_lower) == ("fails", 21)  # and the ones column
    assert len(cert.offenders[0].samples) == 22 and cert.sigma_min_lower == 0
    h[7] = h[31]
    cert = gcfast.certify(h)
    assert (cert.status, cert.rank_lower) == ("fails", 21)
    assert "only 59 of 60 rows can be independent; 21 rows are proved independent" in str(cert)
    with_room_for_the_proof_only = gcfast.certify(h[:31], max_bytes=proof_bytes(31, 80) + 100)
    assert with_room_for_the_proof_only.rank_lower == 0


def test_an_undecided_matrix_is_unknown_and_says_what_would_decide():
    h = torch.randn((20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h[3] = (h[1] + h[2] + h[0]) / 3
    cert = gcfast.certify(h)
    assert cert.status == "unknown" and "would decide" in cert.reason
    assert sorted(cert.offenders[0].samples) == [0, 1, 2, 3] and cert.offenders[0].residual < 1e-14
    assert cert.rank_lower == 19


def test_float32_features_where_torch_is_wrong():
    # what a wide softplus layer gives: float32 matrix_rank loses a quarter of the rank, the proof does not
    torch.manual_seed(0)
    h = gcfast.WideLayer(16, 440).double()(0.5 * torch.randn(400, 16, dtype=torch.float64)).detach().float()
    h1 = torch.cat([h, torch.ones(400, 1)], 1)
    assert int(torch.linalg.matrix_rank(h1)) < 350 and int(torch.linalg.matrix_rank(h1.double())) == 400
    assert gcfast.certify(h).rank_lower == 400


@pytest.mark.parametrize("kind", ["tuple", "dataset", "loader"])
def test_ways_to_give_the_data(kind):
    x, y = _data()
    data = {
        "tuple": (x, y),
        "dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=7),
    }[kind]
    assert gcfast.certify(_model(), data, loss=nn.CrossEntropyLoss()).status == "holds"


class _Noisy(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.randn(6), i % 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_Noisy(), "shuffles or augments"),
        ((torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), "empty"),
        ((_data()[0], _data()[1][:-1]), "differ in length: 40, 39"),
        ((torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.long)), "not finite: nan at sample 0"),
        ((_data()[0].double(), _data()[1]), "differ in dtype: torch.float64 and torch.float32"),
        ((_data()[0], torch.full((N,), 3)), "label 3 of sample 0 is out of range for 3 outputs"),
    ],
)
def test_bad_data_is_named(data, words):
    with pytest.raises(ValueError, match=words):
        gcfast.certify(_model(), data, loss="cross_entropy")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gcfast.certify(_model()), ValueError, "needs its training set"),
        (lambda: gcfast.certify(torch.ones(3, 4), route="theorem"), ValueError, "needs the model"),
        (lambda: gcfast.certify(_model(), _data(), route="both"), ValueError, "route"),
        (lambda: gcfast.certify(torch.ones(3)), ValueError, r"\(n, m\)"),
        (lambda: gcfast.certify(torch.ones(3, 4, dtype=torch.long)), TypeError, "int64"),
        (lambda: gcfast.certify(torch.tensor([[1.0, math.inf]])), ValueError, "sample 0, unit 1"),
        (lambda: gcfast.certify([1, 2]), TypeError, "list"),
        (lambda: gcfast.certify(_model(), _data()).steps_to(1e-3), ValueError, "loss"),
        (lambda: gcfast.certify(_model(), _data(), max_bytes=0), ValueError, "max_bytes"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


class _Sums(nn.Module):
    """A sample is the sum of its nodes, of which there are several."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.head = gcfast.WideLayer(4, 60), nn.Linear(60, 2)

    def forward(self, nodes, owner):
        z = nodes.new_zeros(int(owner.max()) + 1, 4).index_add(0, owner, nodes)
        return self.head(self.wide(z))


class _Tokens(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(0, 1))


def test_inputs_that_are_not_one_row_a_sample_have_no_copies_by_row_numbers():
    x = torch.randn((8, 3, 4), generator=torch.Generator().manual_seed(0))
    x[0, 1] = x[0, 0]  # two nodes of one sample, which are rows 0 and 1 as well
    graphs = {"nodes": x.flatten(0, 1), "owner": torch.arange(8).repeat_interleave(3)}
    y = torch.arange(8) % 2
    cert = gcfast.certify(_Sums(), [(graphs, y)], loss="cross_entropy")
    assert (cert.status, cert.infimum, cert.offenders) == ("holds", 0, [])
    assert any((a.name, a.status) == ("distinct inputs", "not checked") for a in cert.assumptions)
    single = {"nodes": x[:, 2], "owner": torch.arange(8)}  # of one node each: as many rows as samples
    other = {**graphs, "nodes": graphs["nodes"] + 1}
    batches = [(graphs, y), (single, y), (other, y)]
    assert gcfast.certify(_Sums(), batches, loss="cross_entropy").status == "holds"
    assert gcfast.solve_head(_Sums(), batches).converged
    x[0, 1] += 1
    x[1] = x[0]  # samples 0 and 1, of three rows each
    tokens = _Tokens(gcfast.WideLayer(4, 60), nn.Linear(60, 2))
    for data in ([(x, torch.arange(24) % 2)], x):
        cert = gcfast.certify(tokens, data, loss="cross_entropy" if data is not x else None)
        assert cert.status == "fails" and not cert.infimum
        assert [o.samples for o in cert.offenders] == [[0, 3], [1, 4], [2, 5]]


def test_steps_bound_gradient_descent_truly():
    # mean squared error, linear rate: run the promised number of steps and look
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn((8, 6), generator=g).double(), torch.randn((8, 2), generator=g).double()
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    cert = gcfast.certify(model, (x, y), loss="mse")
    steps = cert.steps_to(1e-4)
    assert steps < 1e6
    solution = gcfast.solve_head(
        model, (x, y), loss="mse", method="gd", target_gap=1e-300, max_iterations=int(steps)
    )
    assert solution.gap <= 1e-4
