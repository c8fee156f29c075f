"""Features from tensors, files, blocks and wide layers: the same numbers, products and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gcfast
from gcfast import ops
from gcfast.features import matrix, reading
from gcfast.features.checks import as_features
from gcfast.features.matrix import StoredFeatures
from gcfast.features.wide import WideFeatures


def _layer(n=90, d=5, m=140, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn((n, d), generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn((m, d), generator=g, dtype=torch.float64) / d**0.5).to(dtype)
    return z, weight, torch.randn(m, generator=g, dtype=torch.float64).to(dtype)


def _wide(dtype=torch.float64, activation="softplus", beta=4.0):
    z, weight, bias = _layer(dtype=dtype)
    return WideFeatures(z, (weight, bias), activation=activation, beta=beta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["softplus", "tanh", "relu"])
def test_recomputed_features_are_the_stored_ones(dtype, activation):
    beta = 4.0 if activation == "softplus" else 1.0
    wide = _wide(dtype, activation, beta)
    z, weight, bias = (t.double() for t in (wide.z, wide.weight, wide.bias))
    h = ops.wide_panel(z, weight, bias, activation=activation, beta=beta)
    exact = h.to(dtype).double()
    assert torch.equal(wide.panel(0, wide.m), exact) and torch.equal(wide.panel(30, 71), exact[:, 30:71])
    index = torch.tensor([3, 77, 4])
    assert torch.equal(wide.exact_rows(index), exact[index])
    stored, g = StoredFeatures(h), torch.Generator().manual_seed(1)
    a = torch.randn((90, 3), generator=g, dtype=torch.float64)
    w = torch.randn((3, 140), generator=g, dtype=torch.float64)
    for kind, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        options = {"rtol": close, "atol": 100 * close}
        for name, x in (("times", w), ("transposed_times", a), ("gram_times", a)):
            ours = getattr(wide, name)(x.to(kind))
            assert ours.dtype == kind
            torch.testing.assert_close(ours.double(), getattr(stored, name)(x), **options)
        torch.testing.assert_close(wide.rows(index, kind).double(), h[index], **options)
        torch.testing.assert_close(wide.columns(5, 60, kind).double(), h[:, 5:60], **options)
        part = wide.select(torch.arange(10, 40))
        torch.testing.assert_close(wide.block(index, part, kind).double(), h[index] @ h[10:40].mT, **options)
    squares, cross = wide.square_norms(h.mean(0))
    torch.testing.assert_close(squares, (h * h).sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cross, h @ h.mean(0), rtol=1e-5, atol=1e-4)


def test_strips_and_panels_of_any_size_give_the_same(monkeypatch):
    wide = _wide()
    index = torch.arange(0, 90, 7)
    whole = wide.block(index, wide, torch.float64)
    norms = wide.square_norms(torch.ones(140))
    monkeypatch.setattr(matrix, "STRIP", 1)
    torch.testing.assert_close(wide.block(index, wide, torch.float64), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(wide.square_norms(torch.ones(140))[1], norms[1])


KINDS = ("tensor", "array", "map", "read-only map", "blocks", "generator", "turned over", "other byte order")


@pytest.mark.parametrize("kind", (*KINDS, "negated view"))
def test_certify_and_solve_take_features_from_anywhere(kind, tmp_path):
    z, weight, bias = _layer(dtype=torch.float32)
    h = ops.wide_features(z, weight, bias, activation="softplus", beta=4.0)
    y = torch.arange(90) % 3
    path = tmp_path / "h.npy"
    np.save(path, h.numpy())
    data = {
        "tensor": lambda: h,
        "array": lambda: h.numpy(),
        "map": lambda: np.load(path, mmap_mode="r+"),
        "read-only map": lambda: np.load(path, mmap_mode="r"),
        "blocks": lambda: list(h.split(40)),
        "generator": lambda: (block.numpy() for block in h.split(40)),
        "turned over": lambda: h.numpy()[::-1].copy()[::-1],
        "other byte order": lambda: h.numpy().astype(h.numpy().dtype.newbyteorder()),
        "negated view": lambda: torch.complex(h, -h).conj().imag,
    }[kind]
    cert = gcfast.certify(data(), y, loss="cross_entropy")
    plain = gcfast.certify(h, y, loss="cross_entropy")
    assert cert.status == "holds" and cert.sigma_min_lower == plain.sigma_min_lower
    found, same = gcfast.solve_head(data(), y), gcfast.solve_head(h, y)
    assert found.converged and torch.equal(found.weight, same.weight)
    assert np.array_equal(np.load(path), h.numpy())  # a map is only read
    features = as_features(data())
    assert features.mapped == ("map" in kind) and (features.nbytes == 0) == features.mapped


def test_blocks_go_to_a_file_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(reading, "available", lambda device: 4000)
    h = torch.randn((200, 7), dtype=torch.float64)
    features = as_features(h.split(33))
    assert features.mapped and torch.equal(features.matrix, h)
    half = as_features([b.bfloat16() for b in h.split(33)])
    assert half.dtype == torch.bfloat16 and torch.equal(half.matrix, h.bfloat16())


def test_a_wide_layer_is_solved_and_certified_without_its_features():
    layer = gcfast.WideLayer(6, 300, beta=4.0)
    z = torch.randn((250, 6), generator=torch.Generator().manual_seed(3))
    y = torch.arange(250) % 4
    wide = gcfast.WideFeatures(z, layer)
    cert = gcfast.certify(wide, y, loss="cross_entropy")
    assert (cert.status, cert.route, cert.rank_lower) == ("holds", "direct", 250)
    assert any("never stored" in a.reason for a in cert.assumptions)
    h = torch.cat([wide.panel(0, 300), torch.ones((250, 1), dtype=torch.float64)], 1)
    true = float(torch.linalg.svdvals(h)[-1])
    assert 0.8 * true <= cert.sigma_min_lower <= true * (1 + 1e-9)
    solution = gcfast.solve_head(wide, y, target_gap=1e-6)
    logits = h[:, :-1] @ solution.weight.double().mT + solution.bias.double()
    assert solution.converged
    assert abs(float(nn.functional.cross_entropy(logits, y)) - solution.loss) <= 1e-3 * solution.loss
    stored = gcfast.solve_head(wide.panel(0, 300).float(), y, target_gap=1e-6)
    torch.testing.assert_close(
        solution.weight, stored.weight, rtol=0, atol=2e-2 * float(stored.weight.abs().max())
    )


def test_the_theorem_needs_no_model_but_the_wide_layer():
    z, weight, bias = _layer()
    cert = gcfast.certify(WideFeatures(z, (weight, bias)), route="theorem")
    assert (cert.status, cert.route) == ("holds", "theorem")
    z[7] = z[3]
    y = torch.zeros(90, dtype=torch.long)
    y[7] = 1
    cert = gcfast.certify(WideFeatures(z, (weight, bias)), y, loss="cross_entropy", route="theorem")
    assert cert.status == "fails" and next(o.samples for o in cert.offenders if o.conflicting) == [3, 7]
    assert cert.infimum == pytest.approx(2 * np.log(2) / 90)
    relu = WideFeatures(_layer()[0], (weight, bias), activation="relu")
    with pytest.raises(ValueError, match="relu is not analytic"):
        gcfast.certify(relu, route="theorem")
    narrow = WideFeatures(_layer()[0], (weight[:50], bias[:50]))
    assert gcfast.certify(narrow, route="theorem").status == "fails"


def test_a_model_whose_features_are_too_large_is_recomputed(monkeypatch):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    model = nn.Sequential(body, gcfast.WideHead(gcfast.WideLayer(6, 200, beta=4.0), nn.Linear(200, 3)))
    x, y = torch.randn(150, 4), torch.arange(150) % 3
    small = 200 * 150 * 4  # the features alone
    plain = gcfast.certify(model, (x, y), loss="cross_entropy", route="direct")
    assert not any("never stored" in a.reason for a in plain.assumptions)
    cert = gcfast.certify(model, (x, y), loss="cross_entropy", max_bytes=400 * small, route="direct")
    assert not any("never stored" in a.reason for a in cert.assumptions)
    from gcfast.features import collection

    monkeypatch.setattr(collection, "allowed_bytes", lambda max_bytes, device: 3 * small)
    cert = gcfast.certify(model, (x, y), loss="cross_entropy", route="direct")
    assert cert.status == "holds" and any("never stored" in a.reason for a in cert.assumptions)
    assert cert.loss == pytest.approx(plain.loss) and cert.gap == pytest.approx(plain.gap)
    assert 0.5 < cert.sigma_min_lower / plain.sigma_min_lower < 2
    solution = gcfast.solve_head(model, (x, y))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x).double(), y))
    assert solution.converged and loss <= 1.1e-6


def test_rows_that_numpy_writes_to_are_looked_at_anew():
    z = np.arange(1, 21, dtype=np.float32)[:, None]
    wide = WideFeatures(z, (torch.ones(30, 1), 0.5 - torch.arange(30.0)), activation="relu")
    assert gcfast.certify(wide).status == "holds"
    z *= -1  # no version of a tensor tells of it; no unit is active any more
    assert gcfast.certify(wide).status == "fails"


@pytest.mark.slow
def test_more_features_than_32_bits_can_count():
    n = m = 47_000  # 2.2e9 features, none of them stored
    z = torch.linspace(-2, 2, n)[:, None]
    layer = torch.linspace(-1, 1, m)[:, None], torch.linspace(0, 1, m)
    wide = WideFeatures(z, layer, activation="tanh")
    ends = torch.tensor([0, 1, n // 2, n - 2, n - 1])
    w, a = torch.linspace(0, 1, m)[None] / m, torch.linspace(1, 2, n)[:, None] / n
    rows = wide.select(ends).panel(0, m)
    torch.testing.assert_close(wide.times(w)[ends].double(), rows @ w.mT.double(), rtol=1e-4, atol=1e-5)
    columns = torch.cat([wide.panel(j, j + 1) for j in ends.tolist()], 1)
    got = wide.transposed_times(a)[:, ends].double()
    torch.testing.assert_close(got, a.mT.double() @ columns, rtol=1e-4, atol=1e-5)
    product = wide.gram_times(a)[ends].double()
    u = wide.transposed_times(a.double())
    torch.testing.assert_close(product, rows @ u.mT, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: np.rec.fromarrays([x[:, 0], np.zeros(len(x), "b")] * 2)["f2"][:, None],
        lambda x: torch._neg_view(torch.from_numpy(-x)),
        lambda x: [x[:4, ::-1].copy()[:, ::-1], x[4:].astype(x.dtype.newbyteorder())],
    ],
    ids=["backwards", "the other byte order", "a field of a record", "negated", "blocks"],
)
def test_numbers_that_torch_cannot_read_where_they_lie(laid_out):
    x = np.random.default_rng(0).standard_normal((9, 12))
    given = laid_out(x)
    found = as_features(given).rows(slice(0, 9), torch.float64)
    assert torch.equal(found, torch.from_numpy(x)[:, : found.shape[1]])
    assert gcfast.certify(given).status == ("holds" if found.shape[1] == 12 else "fails")
    if not isinstance(given, list):
        head = [gcfast.solve_head(torch.eye(9).double(), y, loss="mse").weight for y in (given, found)]
        assert torch.equal(*head)


BAD = [
    (lambda: as_features(np.array([["a"]])), TypeError, "features: expected numbers"),
    (lambda: as_features(np.ma.ones((2, 2))), TypeError, "features: .* masked array"),
    (lambda: as_features(np.ones((2, 2), np.longdouble)), TypeError, "features: .* that torch knows"),
    (lambda: as_features([np.array([["a"]])]), TypeError, "features: block 0: expected numbers"),
    (
        lambda: as_features(torch.ones(2, 2).to(torch.float8_e5m2)),
        TypeError,
        "features: .* of 16 bits or more",
    ),
    (
        lambda: gcfast.solve_head(torch.eye(2), np.ma.ones((2, 2)), loss="mse"),
        TypeError,
        "targets: .* masked array",
    ),
    (lambda: as_features(np.zeros((2, 2), dtype=np.int64)), TypeError, "floating point"),
    (lambda: as_features([]), ValueError, "no blocks came"),
    (lambda: as_features([torch.ones(2, 3), torch.ones(2, 4)]), ValueError, r"block 1 is \(2, 4\)"),
    (
        lambda: as_features([torch.ones(2, 3), torch.ones(2, 3).double()]),
        TypeError,
        "block 1 is torch.float64",
    ),
    (lambda: as_features(["a"]), TypeError, "block 0 of this list is a str"),
    (lambda: as_features(3.0), TypeError, "float"),
    (lambda: WideFeatures(torch.ones(3), _layer()[1:]), ValueError, r"z: expected shape \(n, d\)"),
    (lambda: WideFeatures(_layer()[0][:, :2], _layer()[1:]), ValueError, "weight"),
    (
        lambda: WideFeatures(_layer()[0], nn.Linear(5, 6)),
        TypeError,
        r"WideLayer or \(weight, bias\); got Linear",
    ),
    (lambda: WideFeatures(_layer()[0], _layer()[1]), TypeError, "layer: expected .* got Tensor"),
    (lambda: WideFeatures(_layer()[0], _layer()[1:], activation="swish"), ValueError, "activation"),
    (lambda: gcfast.certify(WideFeatures(_layer()[0] / 0, _layer()[1:])), ValueError, "z: not finite"),
    (
        lambda: gcfast.certify(WideFeatures(_layer()[0], (_layer()[1] / 0, _layer()[2]))),
        ValueError,
        "weight: the wide layer's weight is not finite",
    ),
    (lambda: gcfast.certify(torch.ones(3, 4), route="theorem"), ValueError, "gcfast.WideFeatures"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
