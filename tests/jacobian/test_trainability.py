"""trainability: proved bounds against float64 truth, the inequalities it promises, what it must never say."""

from __future__ import annotations

import importlib
import json
import math
import re
from fractions import Fraction

import pytest
import torch
from torch import nn

import gcfast
from gcfast.jacobian.layer_jacobians import LayerJacobians
from gcfast.jacobian.trainability_run import WORK, rank_bounds
from gcfast.losses import resolve_loss
from gcfast.proofs.shift import prove_least_eigenvalue

LOSSES = ["cross_entropy", "soft", "smoothed", "mse", "bce_with_logits", "soft_bce", "huber"]


def _net(c=3, width=24, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, width), nn.Softplus(), nn.Linear(width, c))
    return net.double().eval()


def _inputs(n=8, seed=1):
    return torch.randn((n, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _task(name, n, c, seed=2):
    """Loss and targets."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, c, (n,), generator=g)
    real = torch.randn((n, c), generator=g, dtype=torch.float64)
    return {
        "cross_entropy": ("cross_entropy", labels),
        "soft": ("cross_entropy", real.softmax(1)),
        "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), labels),
        "mse": ("mse", real),
        "bce_with_logits": ("bce_with_logits", (real > 0).double()),
        "soft_bce": ("bce_with_logits", real.sigmoid()),
        "huber": (nn.HuberLoss(delta=0.7), real),
    }[name]


def _jacobian(net, x, names):
    """(n C, p) by one backward pass an output."""
    parameters = [dict(net.named_parameters())[name] for name in names]
    rows = [torch.autograd.grad(out, parameters, retain_graph=True) for out in net(x).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def _trained(net, x, y, loss, steps):
    """Gradient steps by L-BFGS: towards small residuals, where the bounds are finite."""
    convex = resolve_loss(loss)
    prepared = convex.prepare(y, len(x), net(x).shape[1])
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = convex.value(net(x), prepared).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return net


def test_rows_agree_with_explicit_jacobians():
    net, x = _net(), _inputs()
    loss, y = _task("mse", 8, 3)
    found = gcfast.trainability(net, x, y, loss)
    value = nn.functional.mse_loss(net(x), y)
    loss_now = value.item()
    assert (found.n, found.c, found.dtype) == (8, 3, "float64")
    assert math.isclose(found.loss, loss_now, rel_tol=1e-12) and found.gap == found.loss
    assert [row.name for row in found.rows] == ["0", "2", "4"]
    for row, names in zip(
        [*found.rows, found.total],
        [
            ("0.weight", "0.bias"),
            ("2.weight", "2.bias"),
            ("4.weight", "4.bias"),
            list(dict(net.named_parameters())),
        ],
    ):
        jacobian = _jacobian(net, x, names)
        squares = torch.linalg.svdvals(jacobian) ** 2
        true = float(squares[-1])
        assert row.parameters == jacobian.shape[1] and row.rank == row.rank_lower == row.rank_upper == 24
        assert 0.75 * true <= row.lambda_min_lower <= true + row.rounding
        assert math.isclose(row.lambda_min, true, rel_tol=1e-6)
        assert math.isclose(row.lambda_max, float(squares[0]), rel_tol=1e-10)
        assert math.isclose(row.condition, row.lambda_max / row.lambda_min)
        parameters = [dict(net.named_parameters())[name] for name in names]
        gradient = torch.autograd.grad(value, parameters, retain_graph=True)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
        assert math.isclose(row.gradient_norm, norm, rel_tol=1e-10)
        # F.mse_loss is (1/n) sum (1/C)|t|^2: twice over C the half squares of 2 lambda_min / n
        assert math.isclose(row.pl, 4 * row.margin / (8 * 3), rel_tol=1e-12)
        assert norm**2 >= row.pl * found.gap and found.gap <= row.gap_bound
        assert math.isclose(row.gap_bound, norm**2 / row.pl, rel_tol=1e-9)
    assert found.carriers == ["0", "2", "4"]


@pytest.mark.parametrize("name", LOSSES)
def test_gap_bound_holds_along_training(name):
    finite = 0
    for seed in range(2):
        for steps in (5, 80):
            net, x = _net(width=100, seed=seed), _inputs(seed=seed)
            loss, y = _task(name, 8, 3, seed)
            found = gcfast.trainability(_trained(net, x, y, loss, steps), x, y, loss)
            for row in [*found.rows, found.total]:
                assert row.carries
                # what the bound rests on: the residuals are no larger than the gradient says
                residual = found.n * row.gradient_norm / math.sqrt(row.margin)
                assert found.residual_norm <= residual * (1 + 1e-9)
                assert found.gap <= row.gap_bound + 1e-14 and row.gap_bound >= 0
                finite += row.gap_bound < math.inf
    assert finite >= 8  # of 16: the inequality has been tried


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("c", [1, 2, 5])
def test_loss_of_a_residual_norm_is_never_above_its_bound(name, c):
    """Straight from outputs to bound, near and far, one sample or all of them off."""
    if name == "soft" and c == 1:
        c = 4
    for seed in range(40):
        n = 1 + seed % 5
        loss, y = _task(name, n, c, seed)
        convex = resolve_loss(loss)
        y = convex.prepare(y, n, c)
        g = torch.Generator().manual_seed(seed)
        near = convex.reachable(torch.zeros((n, c), dtype=torch.float64), y, 10.0 ** -(seed % 7))
        noise = torch.randn((n, c), generator=g, dtype=torch.float64) * 10.0 ** -(seed % 4)
        if seed % 2:
            noise[1:] = 0.0
        z = near + noise
        norm = float(torch.linalg.vector_norm(convex.residual(z, y)))
        gap = float((convex.value(z, y) - convex.infimum(y)).sum()) / n
        assert gap <= convex.gap_bound(y, c, norm) * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize(
    ("loss", "y", "z"),
    [
        # where a bound is attained: all error in one class, or the same error in all samples
        ("mse", torch.zeros(4, 3).double(), torch.full((4, 3), 0.3).double()),
        ("huber", torch.zeros(4, 3).double(), torch.full((4, 3), 0.1).double()),
        ("bce_with_logits", torch.ones(6, 1).double(), torch.full((6, 1), 6.0).double()),
        (
            "cross_entropy",
            torch.zeros(6, dtype=torch.int64),
            torch.tensor([[7.0, 0.0]]).double().expand(6, 2),
        ),
        (
            "cross_entropy",
            torch.tensor([[0.5, 0.5, 0.0, 0.0]]).double().expand(3, 4),
            torch.tensor([[0.498, 0.498, 0.002, 0.002]]).double().log().expand(3, 4),
        ),
    ],
)
def test_gap_bound_is_sharp(loss, y, z):
    convex = resolve_loss(loss)
    prepared = convex.prepare(y, *z.shape)
    bound = convex.gap_bound(
        prepared, z.shape[1], float(torch.linalg.vector_norm(convex.residual(z, prepared)))
    )
    gap = float((convex.value(z, prepared) - convex.infimum(prepared)).mean())
    assert gap * (1 - 1e-12) <= bound <= 1.01 * gap


def test_a_probability_may_be_zero_where_the_norm_allows_it():
    assert (
        resolve_loss("cross_entropy").gap_bound(torch.zeros(3, dtype=torch.int64), 2, math.sqrt(2))
        == math.inf
    )
    assert resolve_loss("bce_with_logits").gap_bound(torch.ones(3, 2).double(), 2, 0.5) == math.inf
    assert resolve_loss("huber").gap_bound(torch.ones(3, 2).double(), 2, 0.5) == math.inf


def test_own_loss_has_a_gradient_inequality_but_no_gap_bound():
    class Quartic(gcfast.ConvexLoss):
        def value(self, z, y):
            return ((z - y) ** 4).sum(1)

        def infimum(self, y):
            return torch.zeros(len(y), dtype=torch.float64)

    net, x = _net(), _inputs()
    found = gcfast.trainability(net, x, _task("mse", 8, 3)[1], Quartic())
    assert found.total.carries and found.total.gap_bound == math.inf and found.total.pl == 0
    assert found.total.gradient_norm**2 >= found.total.margin * found.residual_norm**2 / found.n**2


@pytest.mark.parametrize("spread", [0, 6, 12])
def test_least_eigenvalue_is_never_above_the_exact_one(spread):
    """Integers, so that K as stored is known exactly; its least eigenvalue by exact determinants' signs."""
    g = torch.Generator().manual_seed(spread)
    for n in (1, 2, 5, 9):
        a = torch.randint(-9, 10, (n, n + 1), generator=g).double()
        a[-1] = 2.0 ** (spread + 2) * a[0] + (torch.arange(n + 1) == 0)  # nearly dependent for large spread
        k = a @ a.mT
        bound = prove_least_eigenvalue(k)
        assert bound >= 0 and _positive_definite(k, bound)
        if spread == 0:
            assert bound > 0.5 * float(torch.linalg.eigvalsh(k)[0])


def _positive_definite(k, shift):
    """Whether k - shift I >= 0, by elimination in fractions."""
    rows = [[Fraction(v) for v in row] for row in k.tolist()]
    for i, row in enumerate(rows):
        row[i] -= Fraction(shift)
    for i, row in enumerate(rows):
        if row[i] <= 0:
            return False
        for other in rows[i + 1 :]:
            factor = other[i] / row[i]
            for j in range(i, len(rows)):
                other[j] -= factor * row[j]
    return True


@pytest.mark.parametrize(
    "matrix", [torch.zeros(1, 1), torch.ones(3, 3), torch.diag(torch.tensor([1.0, -1.0]))]
)
def test_nothing_is_proved_of_a_matrix_that_is_not_positive_definite(matrix):
    assert prove_least_eigenvalue(matrix.double()) == 0.0


def test_equal_samples_never_leave_a_positive_bound():
    net, x = _net(), _inputs()
    x[5] = x[2]
    loss, y = _task("cross_entropy", 8, 3)
    y[2], y[5] = 0, 1
    found = gcfast.trainability(net, x, y, loss)
    assert found.copies == [[2, 5]] and found.carriers == []
    for row in [*found.rows, found.total]:
        assert (row.lambda_min_lower, row.margin, row.pl, row.gap_bound) == (0.0, 0.0, 0.0, math.inf)
        assert row.rank == 21 and row.rank_lower <= 21 <= row.rank_upper and row.condition == math.inf
        assert row.reason == "no: equal samples"
    assert math.isclose(found.infimum, 2 * math.log(2) / 8)  # conflicting labels
    assert "equal samples: [2, 5]" in str(found)


def test_equal_samples_outweigh_what_is_proved_of_the_stored_gram(monkeypatch):
    net, x = _net(), _inputs()
    x[5] = x[2] = 0.0
    module = importlib.import_module("gcfast.jacobian.trainability_run")
    monkeypatch.setattr(module, "prove_least_eigenvalue", lambda k: 1.0)
    found = gcfast.trainability(net, x, torch.zeros(8, 3), "mse")
    assert found.copies == [[2, 5]] and found.carriers == [] and found.total.lambda_min_lower == 0.0


def test_rows_that_depend_in_exact_arithmetic_never_leave_a_positive_bound():
    """A linear model: J is [x, 1] for each output, of rank 4 at most, whatever rounding makes of K."""
    torch.manual_seed(0)
    for seed in range(10):
        net = nn.Sequential(nn.Linear(3, 30), nn.Linear(30, 2)).double()
        x = _inputs(9, seed)[:, :3]
        found = gcfast.trainability(net, x, torch.zeros(9, 2), "mse")
        assert found.total.rank == found.total.rank_upper == 8 and found.carriers == []
        assert [row.gap_bound for row in found.rows] == [math.inf, math.inf]
        assert found.rows[0].reason == "no: rank 8 < n C = 18 above rounding"


def test_a_dead_layer_has_rank_zero():
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 2)).double()
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    found = gcfast.trainability(net, _inputs(6), torch.zeros(6, 2), "mse")
    dead = found.rows[0]
    assert (dead.rank, dead.rank_lower, dead.rank_upper, dead.lambda_max, dead.rounding) == (
        0,
        0,
        0,
        0.0,
        0.0,
    )
    assert not dead.carries and dead.gradient_norm == 0.0 and dead.gap_bound == math.inf


def test_too_few_parameters_are_named_without_a_gram(monkeypatch):
    asked = []
    gram = LayerJacobians.gram
    monkeypatch.setattr(
        LayerJacobians, "gram", lambda self, layers=None, **k: asked.append(layers) or gram(self, layers, **k)
    )
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    loss, y = _task("cross_entropy", 9, 3)
    found = gcfast.trainability(net, _inputs(9), y, loss)
    narrow = found.rows[0]
    assert narrow.reason == "never: p_l = 24 < n C = 27" and narrow.rank is None and narrow.rank_upper == 24
    assert not narrow.carries and narrow.gap_bound == math.inf and narrow.gradient_norm > 0
    assert found.carriers == ["2", "4"] and found.total.parameters == 24 + 200 + 123
    alone = gcfast.trainability(net, _inputs(9), y, loss, layers=["0"])
    assert alone.total.reason.startswith("never") and alone.carriers == []
    assert asked == [["0"], ["2", "4"]]  # the second call needed no Gram at all


def test_frozen_parameters_are_left_out():
    net, x = _net(), _inputs()
    net[2].requires_grad_(False)
    loss, y = _task("cross_entropy", 8, 3)
    found = gcfast.trainability(net, x, y, loss)
    assert [row.name for row in found.rows] == ["0", "4"]
    assert found.total.parameters == sum(row.parameters for row in found.rows)
    with pytest.raises(ValueError, match=r"'2\.weight' has requires_grad=False"):
        gcfast.trainability(net, x, y, loss, layers=["2"])
    net[2].bias.requires_grad_(True)
    part = gcfast.trainability(net, x, y, loss).rows[1]
    assert (part.name, part.parameters) == ("2", 24)  # its bias alone
    assert not net[2].weight.requires_grad and all(p.grad is None for p in net.parameters())
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        gcfast.trainability(net, x, y, loss)


def test_several_inputs_and_a_parameter_used_twice():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(5, 40), nn.Linear(40, 2)

        def forward(self, left, right):
            return self.head(torch.tanh(self.shared(left)) - torch.tanh(self.shared(right)) ** 2)

    torch.manual_seed(0)
    net, left, right = Two().double(), _inputs(6, 1), _inputs(6, 2)
    right[4], left[4] = right[1], left[1]
    loss, y = _task("mse", 6, 2)
    assert gcfast.trainability(net, (left, right), y, loss).copies == [[1, 4]]
    left[4, 0] += 0.5  # one input alike, the other not
    found = gcfast.trainability(net, {"left": left, "right": right}, y, loss)
    assert found.copies == [] and found.carriers == ["shared", "head"]
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(o, list(net.shared.parameters()), retain_graph=True)
                ]
            )
            for o in net(left, right).flatten()
        ]
    )
    true = float(torch.linalg.svdvals(jacobian)[-1]) ** 2
    assert 0.75 * true <= found.rows[0].lambda_min_lower <= true * (1 + 1e-9)


@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 3), (7, 1)])
def test_one_sample_or_one_output(n, c):
    net, x = _net(c), _inputs(n)
    loss, y = _task("mse", n, c)
    found = gcfast.trainability(_trained(net, x, y, loss, 3), x, y, loss)
    assert found.total.rank == n * c and found.gap <= found.total.gap_bound
    assert found.total.carries


def test_head_is_the_kronecker_product_that_certify_proves_the_rank_of():
    """K of a linear head is (H1 H1^T) x I_C, H1 the features with a column of ones."""
    for n, width in ((12, 24), (12, 11), (12, 7)):
        net, x = _net(3, width), _inputs(n)
        features = torch.cat([net[:4](x), torch.ones(n, 1)], 1).detach()
        kron = torch.kron(features @ features.mT, torch.eye(3, dtype=torch.float64))
        gram = LayerJacobians(net, x).gram(["4"])
        assert torch.allclose(gram, kron, rtol=1e-12, atol=1e-12)
        certificate = gcfast.certify(net, (x, torch.zeros(n, 3)), loss="mse")
        row = gcfast.trainability(net, x, torch.zeros(n, 3), "mse").rows[-1]
        if width + 1 < n:
            assert (
                certificate.status == "fails"
                and row.reason.startswith("never")
                and row.rank_upper == 3 * (width + 1)
            )
            continue
        assert certificate.status == "holds" and row.carries
        assert row.rank_lower == row.rank_upper == 3 * certificate.rank_lower == 3 * n
        sigma = float(torch.linalg.svdvals(features)[-1])
        assert certificate.sigma_min_lower**2 <= sigma**2 * (1 + 1e-9)
        assert 0.7 * sigma**2 <= row.lambda_min_lower <= sigma**2 * (1 + 1e-9) + row.rounding


def test_rounding_is_not_underestimated():
    """In float32, where float64 knows the truth; an estimate that is also not absurdly large."""
    for seed, width in ((0, 24), (1, 100), (2, 400)):
        net, x = _net(3, width, seed).float(), _inputs(20, seed).float()
        loss, y = _task("cross_entropy", 20, 3)
        low = gcfast.trainability(net, x, y, loss, dtype=torch.float32)
        high = gcfast.trainability(net, x, y, loss)
        assert (low.dtype, high.dtype) == ("float32", "float64")
        assert math.isclose(low.total.rounding, 2.0**29 * high.total.rounding, rel_tol=1e-4)
        names = list(dict(net.named_parameters()))
        single, double = _jacobian(net, x, names), _jacobian(net.double(), x.double(), names)
        error = float(torch.linalg.matrix_norm((single @ single.mT).double() - double @ double.mT, 2))
        assert error <= low.total.rounding <= 3e4 * error
        if not low.total.carries:
            assert low.total.gap_bound == math.inf and not low.total.reason.startswith("could")


def test_rounding_of_a_long_sum_is_not_underestimated():
    """K of one sample is |x|^2 + 1: a sum of a million terms, of which float32 rounds every one."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(1_000_000, 1), torch.rand(1, 1_000_000), torch.ones(1, 1)
    low = gcfast.trainability(net, x, y, "mse", dtype=torch.float32).total
    exact = float(x.double().square().sum()) + 1
    assert abs(low.lambda_max - exact) <= low.rounding <= 1e-3 * exact


def test_model_is_left_as_it_was():
    net, x = _net().float(), _inputs().float()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss, y = _task("cross_entropy", 8, 3)
    found = gcfast.trainability(net, x, y, loss)
    assert found.dtype == "float64" and found.total.carries
    assert all(torch.equal(before[k], v) and v.dtype == torch.float32 for k, v in net.state_dict().items())
    assert math.isclose(found.loss, gcfast.trainability(net.double(), x, y, loss).loss, rel_tol=1e-15)


def test_layers_in_groups_where_memory_is_short(monkeypatch):
    asked = []
    gram = LayerJacobians.gram
    monkeypatch.setattr(
        LayerJacobians, "gram", lambda self, layers=None, **k: asked.append(layers) or gram(self, layers, **k)
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 150), nn.Tanh(), nn.Linear(150, 70), nn.Tanh(), nn.Linear(70, 6)
    ).double()
    loss, y = _task("cross_entropy", 130, 6)
    matrix = 8 * 780**2
    free, short = (
        gcfast.trainability(net, _inputs(130), y, loss, max_bytes=size)
        for size in (10**9, (WORK + 2) * matrix)
    )
    assert asked == [["4"], ["0", "2"], ["4"], ["0"], ["2"]]
    for row, other in zip([*free.rows, free.total], [*short.rows, short.total]):
        assert (row.name, row.rank, row.gap_bound) == (other.name, other.rank, other.gap_bound)
        assert (row.lambda_max or 0.0) == pytest.approx(other.lambda_max or 0.0, rel=1e-10)
    with pytest.raises(MemoryError, match=rf"n C = 780 outputs needs {(WORK + 2) * matrix:,} bytes.*Way out"):
        gcfast.trainability(net, _inputs(130), y, loss, max_bytes=(WORK + 2) * matrix - 1)


def test_printed_and_plain(tmp_path):
    net, x = _net(), _inputs()
    loss, y = _task("huber", 8, 3)
    found = gcfast.trainability(net, x, y, loss)
    text, plain = str(found), json.loads(found.to_json())
    assert "could carry a guarantee alone: 0, 2, 4" in text and f"{found.total.lambda_min_lower:.3e}" in text
    assert plain["carriers"] == ["0", "2", "4"] and plain["total"]["gap_bound"] is None
    assert plain["rows"][1]["lambda_min_lower"] == found.rows[1].lambda_min_lower
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "ranges.svg")
    svg = (tmp_path / "ranges.svg").read_text(encoding="utf-8")
    assert re.match(r'<svg xmlns="http://www.w3.org/2000/svg" style="--grid: #ccc"', svg) and svg.endswith(
        "</svg>"
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": lambda x: x}, TypeError, "model: expected a torch.nn.Module"),
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, or a tuple or dict of tensors; got list"),
        ({"y": [0]}, TypeError, "y: expected a tensor; got list"),
        ({"x": torch.zeros(0, 5)}, ValueError, r"x must hold at least one sample"),
        ({"x": torch.full((8, 5), math.nan)}, ValueError, "x must be finite"),
        (
            {"model": nn.Sequential(_net(), nn.BatchNorm1d(3).double())},
            ValueError,
            "takes statistics of the batch",
        ),
        ({"model": nn.Sequential(_net(), nn.Unflatten(1, (3, 1)))}, ValueError, r"outputs of shape \(n, C\)"),
        (
            {"y": torch.zeros(7, dtype=torch.int64)},
            ValueError,
            r"targets: class labels must have shape \(8,\)",
        ),
        ({"y": torch.full((8,), 3)}, ValueError, "label 3 of sample 0 is out of range for 3 outputs"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        ({"loss": "mse", "y": torch.zeros(8)}, ValueError, r"targets: expected shape \(8, 3\)"),
        ({"layers": ["5"]}, ValueError, "layers: '5' names no layer or parameter"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float64 or torch.float32"),
        ({"max_bytes": 0}, ValueError, "max_bytes: expected a positive number"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"model": _net(), "x": _inputs(), "y": torch.zeros(8, dtype=torch.int64), **change}
    with pytest.raises(error, match=match):
        gcfast.trainability(**arguments)


def test_rank_bounds_count_singular_values_of_either_sign():
    for values in ([1.0, -1.0, 0.0, 1e-3], [3.0, 1e-9, 0.2, 0.3], [0.05, 0.2, -0.05, -0.3]):
        q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        k = (q * torch.tensor(values, dtype=torch.float64)) @ q.mT
        k = k.tril() + k.tril(-1).mT
        for tolerance in (0.1, 1e-2, 1e-6):
            count = sum(abs(v) > tolerance for v in values)
            assert rank_bounds(k, tolerance) == (count, count)
    # what lies at the tolerance is left open
    lower, upper = rank_bounds(torch.diag(torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)), 0.1)
    assert lower == 1 and upper in (1, 2)


def test_ranks_of_larger_grams_are_closed_by_counts():
    a = torch.randn((300, 290), dtype=torch.float64)
    k = a @ a.mT
    k = k.tril() + k.tril(-1).mT
    assert rank_bounds(k, 1e-13 * float(k.trace())) == (290, 290)
