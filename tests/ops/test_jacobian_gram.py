"""The Gram of a Jacobian: exact sums, layouts, errors against float64, bits that nothing may change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import NEEDS_INTERPRETER, TARGETS

from gcfast import ops, reference
from gcfast.ops import dispatch

DTYPES = (torch.float32, torch.float64)
# n, C, T, n2, C2, T2, ends
SIZES = [
    (1, 1, 1, 1, 1, 1, (1,)),
    (5, 3, 2, 7, 4, 3, (2, 9)),
    (9, 1, 1, 70, 1, 1, (33, 33, 40)),
    (3, 17, 1, 2, 50, 1, (5, 300)),
    (2, 5, 9, 3, 26, 17, (7,)),
    (33, 4, 1, 33, 4, 1, (64, 128, 131)),
]
FEW = [(5, 3, 2, 7, 4, 3, (2, 9)), (23, 3, 1, 23, 3, 1, (16, 40, 77)), (2, 3, 2, 1, 70, 3, (64,))]
LAYOUTS = ("contiguous", "outputs first", "positions first", "spread", "o not last")
KERNELS = [p for p in TARGETS if p.values[0][0] in dispatch._KERNELS and p.values[0][0] != "cuda"]
on_each = pytest.mark.parametrize("target", KERNELS, indirect=True)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(*shape, high=4):
    """Small integers: every order of summation is exact."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def inputs(size, make=whole, dtype=torch.float32):
    n, c, t, n2, c2, t2, ends = size
    shapes = (n * c, n2 * c2), (n, c, t, ends[-1]), (n2, c2, t2, ends[-1]), (len(ends), n * t, n2 * t2)
    return [make(*shape).to(dtype) for shape in shapes]


def truth(out, g, h, scale, ends):
    """As it is written, in float64."""
    (n, _, t, _), (n2, _, t2, _) = g.shape, h.shape
    out, g, h, scale = (x.double().cpu() for x in (out, g, h, scale))
    total = out.clone()
    for layer, begin, end in zip(scale, (0, *ends), ends):
        gram = torch.einsum("icto,jeso->ictjes", g[..., begin:end], h[..., begin:end])
        total += (gram * layer.view(n, 1, t, n2, 1, t2)).sum((2, 5)).view(out.shape)
    return total


def extended(out, g, h, scale, ends):
    """`truth` from sums in extended precision, rounded to float64."""
    import numpy as np

    (n, c, t, _), (n2, c2, t2, _) = g.shape, h.shape
    out, g, h, scale = (x.numpy().astype(np.longdouble) for x in (out, g, h, scale))
    total = out.reshape(n, c, n2, c2)
    for layer, begin, end in zip(scale, (0, *ends), ends):
        rows, columns = g[..., begin:end].reshape(n * c * t, -1), h[..., begin:end].reshape(n2 * c2 * t2, -1)
        gram = (rows @ columns.T).reshape(n, c, t, n2, c2, t2)
        total = total + (gram * layer.reshape(n, 1, t, n2, 1, t2)).sum(axis=(2, 5))
    return torch.from_numpy(total.reshape(n * c, n2 * c2).astype(float))


def plain(out, g, h, scale, ends):
    """What one would write in torch, in the dtype of the inputs."""
    (n, c, t, _), (n2, c2, t2, _) = g.shape, h.shape
    total = out.clone()
    for layer, begin, end in zip(scale, (0, *ends), ends):
        gram = g[..., begin:end].flatten(0, 2) @ h[..., begin:end].flatten(0, 2).mT
        gram = gram.view(n, c, t, n2, c2, t2) * layer.view(n, 1, t, n2, 1, t2)
        total += gram.sum((2, 5)).view(out.shape)
    return total


def added(out, *args, **settings):
    """A copy of out, in out's own layout, with the Gram added."""
    copy = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
    ops.jacobian_gram(copy, *args, **settings)
    return copy


def laid(x, layout):
    """The values of x (n, C, T, R) in another layout; NaN in between."""
    order = {"outputs first": (1, 0, 2, 3), "positions first": (2, 0, 1, 3), "o not last": (3, 0, 2, 1)}
    if layout in order:
        back = [order[layout].index(d) for d in range(4)]
        return x.permute(order[layout]).contiguous().permute(back)
    steps = (2, 1, 3, 1) if layout == "spread" else (1, 1, 1, 1)
    around = x.new_full([size * step for size, step in zip(x.shape, steps)], math.nan)
    around = torch.cat([around, around[..., :1]], dim=3)[..., 1:] if layout == "spread" else around
    return around[tuple(slice(None, None, step) for step in steps)].copy_(x)


def turned(x, layout):
    """The values of a matrix in columns, or with gaps of NaN."""
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "gap":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)[..., 2:-3].copy_(x)
    wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), math.nan)
    return wide[..., ::2, ::3].copy_(x)


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_ragged_sizes(target, dtype, poison):
    for size in FEW if target.interpreted else SIZES:
        out, g, h, scale = (x.to(target.device) for x in inputs(size, dtype=dtype))
        want = truth(out, g, h, scale, size[-1])
        assert torch.equal(added(out, g, h, scale, ends=size[-1]).double().cpu(), want), size
        assert ops.last_backend("jacobian_gram") == target.backend


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_column_of_a_layer_is_lost(target, dtype, poison):
    """Layers of one column, and of one more or less than kernels take at a time."""
    ends = tuple(itertools.accumulate((1, 33, 17, 1, 15, 31, 65)))
    out, g, h, scale = (x.to(target.device) for x in inputs((3, 2, 1, 2, 2, 1, ends), dtype=dtype))
    want = truth(out, g, h, scale, ends)
    assert torch.equal(added(out, g, h, scale, ends=ends).double().cpu(), want)


@on_each
@pytest.mark.parametrize("size", [(7, 3, 2, (5, 21)), (29, 5, 1, (40,)), (3, 70, 1, (9,))], ids=str)
def test_lower_leaves_the_rest_alone(target, size, poison):
    *one, ends = size
    out, g, h, scale = (x.to(target.device) for x in inputs((*one, *one, ends)))
    above = torch.ones_like(out, dtype=torch.bool).triu_(1)
    want = truth(out, g, h, scale, ends)
    out[above], out[0, -1] = math.nan, -0.0
    for x in (out, turned(out, "columns"), turned(out, "gap")):
        got = added(x, g, h, scale, ends=ends, lower=True)
        assert torch.equal(got.tril().double().cpu(), want.tril())
        integers = torch.int32
        assert torch.equal(got.contiguous().view(integers)[above], out.view(integers)[above])


@on_each
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_factors(target, layout, poison):
    size = (6, 3, 2, 4, 5, 3, (10, 33))
    out, g, h, scale = (x.to(target.device) for x in inputs(size))
    want = truth(out, g, h, scale, size[-1])
    for x, y in ((laid(g, layout), h), (g, laid(h, layout)), (laid(g, layout), laid(h, layout))):
        assert torch.equal(added(out, x, y, scale, ends=size[-1]).double().cpu(), want)


@on_each
@pytest.mark.parametrize("layout", ["columns", "gap", "spread"])
def test_every_layout_of_out_and_scale(target, layout, poison):
    size = (6, 3, 2, 4, 5, 3, (10, 33))
    out, g, h, scale = (x.to(target.device) for x in inputs(size))
    want = truth(out, g, h, scale, size[-1])
    got = added(turned(out, layout), g, h, turned(scale, layout), ends=size[-1])
    assert torch.equal(got.double().cpu(), want)
    layers = scale.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(added(out, g, h, layers, ends=size[-1]).double().cpu(), want)
    same = scale[:1].expand(2, -1, -1)  # one for both layers
    want = truth(out, g, h, same, size[-1])
    assert torch.equal(added(out, g, h, same, ends=size[-1]).double().cpu(), want)


def test_what_lies_around_out_stays(device):
    storage = torch.full((90, 200), math.nan, device=device)
    g, scale = torch.ones(4, 9, 1, 3, device=device), torch.ones(1, 4, 4, device=device)
    for out in (storage[3:39, 5:41], storage.mT[7:43, 2:38], storage[:72:2, 3:111:3]):
        storage.fill_(math.nan)
        out.zero_()
        ops.jacobian_gram(out, g, g, scale)
        assert bool((out == 3).all()) and int((~storage.isnan()).sum()) == 36 * 36


@pytest.mark.one_in(3)
@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(40, 5, 1, (300, 611)), (6, 4, 5, (130,)), (3, 2, 17, (48, 50))], ids=str)
def test_error_no_worse_than_plain_torch(target, dtype, size):
    """Against float64, for that against extended precision; in eps of the sums of absolute terms."""
    *one, ends = size
    if target.interpreted:
        one[0] = min(one[0], 12)
    shapes = [x.shape for x in inputs((*one, *one, ends))]
    args = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    want = (truth if dtype == torch.float32 else extended)(*args, ends)
    terms = truth(*(x.abs() for x in args), ends)
    got = added(*(x.to(target.device) for x in args), ends=ends).cpu()
    ours, eager = (float(((x.double() - want).abs() / terms).max()) for x in (got, plain(*args, ends)))
    assert ours <= eager + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_threads_or_pieces(dtype):
    n, c, t, ends = 30, 5, 3, (140, 300)
    out, g, h, scale = (
        normal(*x.shape, dtype=dtype, seed=i) for i, x in enumerate(inputs((n, c, t, n, c, t, ends)))
    )
    want = added(out, g, h, scale, ends=ends)
    assert ops.last_backend("jacobian_gram") == "cpu"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(added(out, g, h, scale, ends=ends), want)
            lower = added(out, g, h, scale, ends=ends, lower=True)
            assert torch.equal(lower.tril(), want.tril()) and torch.equal(lower.triu(1), out.triu(1))
    finally:
        torch.set_num_threads(before)
    for layout in LAYOUTS:
        assert torch.equal(added(out, laid(g, layout), laid(h, layout), scale, ends=ends), want)
    assert torch.equal(added(turned(out, "columns"), g, h, scale, ends=ends), want)
    four, scales = want.view(n, c, n, c), scale.view(-1, n, t, n, t)
    for i, j in itertools.product((slice(0, 1), slice(3, 20)), (slice(29, 30), slice(0, 30))):
        piece = out.view(n, c, n, c)[i, 1:3, j].flatten(0, 1).flatten(1)
        part = scales[:, i, :, j].flatten(1, 2).flatten(2)
        got = added(piece, g[i, 1:3], h[j], part, ends=ends)
        assert torch.equal(got, four[i, 1:3, j].flatten(0, 1).flatten(1))


@NEEDS_INTERPRETER
@pytest.mark.parametrize("lower", [False, True])
def test_where_torch_allows_tf32(lower, poison):
    """Three products of TF32, which the interpreter makes as if they were float32's."""
    pytest.importorskip("triton")
    from gcfast.triton_kernels.jacobian_gram import jacobian_gram

    size = (23, 3, 1, 23, 3, 1, (16, 40, 77))
    out, g, h, scale = inputs(size)
    want = truth(out, g, h, scale, size[-1])
    kept = out.triu(1)
    jacobian_gram(out, g, h, scale, size[-1], lower, "tf32")
    assert torch.equal(out.tril().double(), want.tril())
    assert torch.equal(out.triu(1), kept if lower else want.triu(1).float())


@on_each
@pytest.mark.parametrize("which", ["samples", "outputs", "positions", "layers", "rows", "columns", "out"])
def test_offsets_beyond_32_bits(target, which):
    """Tensors spread over more than 2^31 elements, of which only the pages that they touch are ever there."""
    if target.device.type != "cpu":
        pytest.skip("their memory would be there")
    size = (3, 4, 5, 3, 4, 5, (9, 11))
    out, g, h, scale = inputs(size)
    strides = {
        "samples": (2**30 + 1, 55, 11, 1),
        "outputs": (55, 2**30 + 1, 165, 1),
        "positions": (44, 11, 2**30, 1),
    }
    scales = {"layers": (2**31 - 100, 15, 1), "rows": (15, 2**28 + 1, 1), "columns": (1, 2, 2**28)}
    try:
        store = torch.empty(2**32 + 2**10)
    except RuntimeError as error:
        pytest.skip(f"so much address space is not to be had: {error}")
    want = truth(out, g, h, scale, size[-1])
    if which in strides:
        g = store.as_strided(g.shape, strides[which]).copy_(g)
        h = store[1000:].as_strided(h.shape, strides[which]).copy_(h) if which != "positions" else h
    elif which in scales:
        scale = store.as_strided(scale.shape, scales[which]).copy_(scale)
    else:
        out = store.as_strided(out.shape, (2**28 + 1, 1)).copy_(out)
    ops.jacobian_gram(out, g, h, scale, ends=size[-1])
    assert torch.equal(out.double(), want)


@on_each
def test_nan_and_infinities_reach_what_they_meet(target):
    size = (6, 3, 2, 6, 3, 2, (10, 33))
    _, g, h, scale = (x.to(target.device) for x in inputs(size, lambda *shape: torch.ones(shape)))
    out = torch.zeros(18, 18, device=target.device)
    g[2, 1, 1, 32], h[3, 0, 0, 0], scale[0, 8, 11] = math.nan, math.inf, math.nan
    got = added(out, g, h, scale, ends=size[-1]).view(6, 3, 6, 3)
    nan = torch.zeros_like(got, dtype=torch.bool)
    nan[2, 1] = nan[4, :, 5] = True
    assert torch.equal(got.isnan(), nan)
    infinite = torch.zeros_like(nan)
    infinite[:, :, 3, 0] = True
    assert torch.equal(got.isinf(), infinite & ~nan)
    assert bool(added(torch.full_like(out, math.nan), g, h, scale, ends=size[-1]).isnan().all())  # it is read


@on_each
@pytest.mark.parametrize("zero", range(6))
def test_empty(target, zero):
    sizes = [4, 3, 2, 4, 3, 5]
    sizes[zero] = 0
    n, c, t, n2, c2, r = sizes
    out = torch.full((n * c, n2 * c2), math.nan, device=target.device)
    g, h = (torch.zeros(*s, r, device=target.device) for s in ((n, c, t), (n2, c2, 2)))
    ops.jacobian_gram(out, g, h, torch.zeros(1, n * t, n2 * 2, device=target.device))
    assert bool(out.isnan().all())
    if r == 0:
        ops.jacobian_gram(out, g, h, torch.zeros(0, n * t, n2 * 2, device=target.device), ends=())


def test_the_reference_by_blocks(monkeypatch):
    """Blocks of few samples and positions: the same sums, the upper half to the bit."""
    size = (9, 3, 4, 9, 3, 4, (5, 21))
    out, g, h, scale = inputs(size, dtype=torch.float64)
    want = truth(out, g, h, scale, size[-1])
    monkeypatch.setattr("gcfast.reference.jacobian._ROOM", {"cpu": 100})
    for lower in (False, True):
        got = out.clone()
        reference.jacobian_gram(got, g, h, scale, ends=size[-1], lower=lower)
        assert torch.equal(got.tril(), want.tril())
        assert torch.equal(got.triu(1), (out if lower else want).triu(1))


@on_each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_contract(target):
    size = (4, 3, 2, 4, 3, 2, (5, 8))
    out, g, h, scale = (x.to(target.device) for x in inputs(size))
    args = (out.clone(), g, h, scale, [5, 8], True)
    torch.library.opcheck(torch.ops.gcfast.jacobian_gram.default, args)

    def f(out, g, h, scale):
        out = out * 2
        ops.jacobian_gram(out, g, h, scale, ends=(5, 8))
        return out + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(out, g, h, scale), f(out, g, h, scale))


OUT, G = torch.zeros(6, 6), torch.zeros(2, 3, 2, 5)
SCALE = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("args", "settings", "error", "words"),
    [
        ((OUT.long(), G, G, SCALE), {}, TypeError, "out must have a floating dtype; got int64"),
        ((OUT.bfloat16(), G, G, SCALE), {}, TypeError, "out must be float32 or float64; got bfloat16"),
        ((OUT[0], G, G, SCALE), {}, ValueError, r"out must have shape \(n C, n2 C2\); got \(6,\)"),
        ((OUT[:1].expand(6, 6), G, G, SCALE), {}, ValueError, "out must not be expanded"),
        ((OUT[:5], G, G, SCALE), {}, ValueError, r"out must have shape \(6, 6\) .*; got \(5, 6\)"),
        ((OUT, G.double(), G, SCALE), {}, TypeError, "g must have the dtype of out, float32; got float64"),
        ((OUT, G, G, SCALE.double()), {}, TypeError, "scale must have the dtype of out"),
        ((OUT, G, G.to("meta"), SCALE), {}, ValueError, "h must be on the device of out, cpu; got meta"),
        ((OUT, G[0], G, SCALE), {}, ValueError, r"g must have shape \(n, C, T, R\); got \(3, 2, 5\)"),
        ((OUT, G, G[..., :4], SCALE), {}, ValueError, r"h must have shape \(n2, C2, T2, 5\), R from g"),
        ((OUT, G, G.view(3, 2, 2, 5), SCALE), {"lower": True}, ValueError, r"h must have g's shape, \(2, 3"),
        ((OUT, G, G, SCALE[0]), {}, ValueError, r"scale must have shape \(1, 4, 4\) .*; got \(4, 4\)"),
        ((OUT, G, G, SCALE), {"ends": (2, 5)}, ValueError, r"scale must have shape \(2, 4, 4\)"),
        ((OUT, G, G, SCALE), {"ends": (4,)}, ValueError, r"ends must .* last be R, 5 from g; got \(4,\)"),
        ((OUT, G, G, SCALE), {"ends": (3, 2, 5)}, ValueError, r"ends must not descend .*; got \(3, 2, 5\)"),
        ((OUT, G, G, SCALE), {"ends": ()}, ValueError, r"ends must .*; got \(\)"),
        ((OUT, G, G, SCALE.clone().requires_grad_()), {}, RuntimeError, "detach scale"),
    ],
)
def test_bad_input_is_named(args, settings, error, words):
    with pytest.raises(error, match=words):
        ops.jacobian_gram(*args, **settings)
