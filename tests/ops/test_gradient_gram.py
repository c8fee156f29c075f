"""The Gram of samples' gradients: exact sums, layouts, errors against float64, bits that nothing changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import TARGETS

from gcfast import ops, reference
from gcfast.ops import dispatch

DTYPES = (torch.float32, torch.float64)
# n, C, T, n2, C2, T2, R, S
SIZES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (5, 3, 2, 7, 4, 3, 7, 9),
    (3, 10, 65, 2, 11, 7, 40, 50),
    (2, 3, 300, 3, 1, 520, 17, 5),  # positions that are packed in slices
    (1, 70, 3, 9, 17, 1, 3, 200),
    (2, 1, 1, 60, 1, 2, 33, 49),
]
ORDERS = list(itertools.permutations(range(4)))
ON = [p for p in TARGETS if p.values[0][0] in ("cpu", "reference")]
on_each = pytest.mark.parametrize("target", ON, indirect=True)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(*shape, high=2):
    """Small integers: every order of summation is exact."""
    return torch.randint(-high, high + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def inputs(size, make=whole, dtype=torch.float32):
    n, c, t, n2, c2, t2, r, s = size
    shapes = (n * c, n2 * c2), (n, c, t, r), (n, t, s), (n2, c2, t2, r), (n2, t2, s)
    return [make(*shape).to(dtype) for shape in shapes]


def alone(n, c, t, r, s, **options):
    """out, g and a without the others."""
    return inputs((n, c, t, n, c, t, r, s), **options)[:3]


def jacobian(g, a):
    return torch.einsum("ictr,its->icrs", g, a).flatten(2).flatten(0, 1)


def truth(out, g, a, h=None, b=None):
    """As it is written, in float64."""
    out, g, a = (x.double().cpu() for x in (out, g, a))
    other = jacobian(g, a) if h is None else jacobian(h.double().cpu(), b.double().cpu())
    return out + jacobian(g, a) @ other.mT


def extended(out, g, a, h, b):
    """`truth` from sums in extended precision, rounded to float64."""
    import numpy as np

    def rows(g, a):
        g, a = (x.numpy().astype(np.longdouble) for x in (g, a))
        made = [[one.T @ y for one in x] for x, y in zip(g, a)]
        return np.array(made).reshape(g.shape[0] * g.shape[1], -1)

    return torch.from_numpy((out.numpy() + rows(g, a) @ rows(h, b).T).astype(float))


def added(out, *args):
    """A copy of out, in out's own layout, with the Gram added."""
    copy = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
    ops.gradient_gram(copy, *args)
    return copy


def laid(x, order):
    """The values of x, its dimensions in another order of memory."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def spread(x):
    """The values of x with gaps of NaN in every dimension."""
    around = x.new_full([2 * size for size in x.shape], math.nan)
    return around[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


def turned(x, layout):
    """The values of a matrix in columns, or with gaps of NaN."""
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "gap":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 5), math.nan)[..., 2:-3].copy_(x)
    return spread(x)


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_on_ragged_sizes(target, dtype, size, poison):
    args = [x.to(target.device) for x in inputs(size, dtype=dtype)]
    assert torch.equal(added(*args).double().cpu(), truth(*args))
    assert ops.last_backend("gradient_gram") == target.backend


@on_each
@pytest.mark.parametrize("size", [(7, 3, 2, 5, 21), (29, 5, 1, 20, 3), (2, 70, 9, 18, 50)], ids=str)
def test_alone_leaves_the_upper_half(target, size, poison):
    out, g, a = (x.to(target.device) for x in alone(*size))
    above = torch.ones_like(out, dtype=torch.bool).triu_(1)
    want = truth(out, g, a)
    out[above], out[0, -1] = math.nan, -0.0
    for x in (out, turned(out, "columns"), turned(out, "gap")):
        got = added(x, g, a)
        assert torch.equal(got.tril().double().cpu(), want.tril())
        assert torch.equal(got.contiguous().view(torch.int32)[above], out.view(torch.int32)[above])


@on_each
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_layout_of_the_factors(target, order, poison):
    out, g, a, h, b = (x.to(target.device) for x in inputs((6, 3, 20, 4, 5, 17, 50, 33)))
    want = truth(out, g, a, h, b)
    three = [d for d in order if d < 3]
    assert torch.equal(added(out, laid(g, order), laid(a, three), h, b).double().cpu(), want)
    assert torch.equal(added(out, g, a, laid(h, order), laid(b, three)).double().cpu(), want)


@on_each
@pytest.mark.parametrize("layout", ["columns", "gap", "spread"])
def test_every_layout_of_out_and_gaps(target, layout, poison):
    out, g, a, h, b = (x.to(target.device) for x in inputs((6, 3, 2, 4, 5, 3, 10, 33)))
    want = truth(out, g, a, h, b)
    got = added(turned(out, layout), *(spread(x) for x in (g, a, h, b)))
    assert torch.equal(got.double().cpu(), want)


@on_each
@pytest.mark.parametrize("dimension", [0, 1])
def test_expanded(target, dimension):
    """One a for all samples or positions, its stride zero, in slices of unlike length."""
    out, g, a, h, b = (x.to(target.device) for x in inputs((2, 2, 513, 1, 3, 2, 4, 5)))
    same = a.narrow(dimension, 0, 1).expand_as(a)
    assert torch.equal(added(out, g, same, h, b).double().cpu(), truth(out, g, same, h, b))


def test_what_lies_around_out_stays(device):
    storage = torch.full((90, 200), math.nan, device=device)
    g, a = torch.ones(4, 9, 1, 3, device=device), torch.ones(4, 1, 2, device=device)
    for out in (storage[3:39, 5:41], storage.mT[7:43, 2:38], storage[:72:2, 3:111:3]):
        storage.fill_(math.nan)
        out.zero_()
        ops.gradient_gram(out, g, a, g, a)
        assert bool((out == 6).all()) and int((~storage.isnan()).sum()) == 36 * 36


@on_each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 5, 17, 60, 70), (3, 10, 300, 16, 90), (20, 2, 1, 100, 100)], ids=str)
def test_error_no_worse_than_plain_torch(target, dtype, size):
    """Against float64, for that against extended precision; in eps of the sums of absolute terms."""
    out, g, a = (normal(*x.shape, dtype=dtype, seed=i) for i, x in enumerate(alone(*size)))
    h, b = normal(*g.shape, dtype=dtype, seed=5), normal(*a.shape, dtype=dtype, seed=6)
    args = (out, g, a, h, b)
    want = (truth if dtype == torch.float32 else extended)(*args)
    terms = truth(*(x.abs() for x in args))
    got = added(*(x.to(target.device) for x in args)).cpu()
    plain = out + jacobian(g, a) @ jacobian(h, b).mT
    ours, eager = (float(((x.double() - want).abs() / terms).max()) for x in (got, plain))
    assert ours <= eager + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(16, 10, 9, 70, 100), (2, 5, 300, 64, 200), (150, 16, 1, 8, 100), (1, 3, 2, 4, 5)], ids=str
)
def test_no_bit_depends_on_threads_or_layouts(dtype, size):
    """Groups of blocks side by side, or all threads at one group: (150, 16) has fewer groups than threads."""
    out, g, a = (normal(*x.shape, dtype=dtype, seed=i) for i, x in enumerate(alone(*size)))
    few = slice(0, 7)
    want, both = added(out, g, a), added(out[:, : 7 * size[1]], g, a, g[few], a[few])
    assert ops.last_backend("gradient_gram") == "cpu"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 17):
            torch.set_num_threads(threads)
            assert torch.equal(added(out, g, a), want)
            assert torch.equal(added(out[:, : 7 * size[1]], g, a, g[few], a[few]), both)
    finally:
        torch.set_num_threads(before)
    for order in ((1, 0, 3, 2), (1, 0, 2, 3)):
        assert torch.equal(added(out, laid(g, order), laid(a, (0, 2, 1))), want)
    assert torch.equal(added(turned(out, "columns"), g, a), want)


def test_more_rows_than_are_made_at_a_time():
    """Pieces of out, on the diagonal and below it."""
    out, g, a = alone(2100, 2, 1, 3, 2)
    want = truth(out, g, a).tril()
    got = added(out, g, a)
    assert torch.equal(got.tril().double(), want) and torch.equal(got.triu(1), out.triu(1))
    wide = added(out[:6], g[:3], a[:3], g, a)
    assert torch.equal(wide.double(), truth(out[:6], g[:3], a[:3], g, a))


@on_each
@pytest.mark.parametrize("which", ["samples", "outputs", "positions", "rows", "out"])
def test_offsets_beyond_32_bits(target, which):
    """Tensors spread over more than 2^31 elements, of which only the pages that they touch are ever there."""
    if target.device.type != "cpu":
        pytest.skip("their memory would be there")
    out, g, a, h, b = inputs((3, 4, 5, 3, 4, 5, 6, 7))
    of_g = {
        "samples": (2**30 + 1, 30, 6, 1),
        "outputs": (30, 2**30 + 1, 90, 1),
        "positions": (24, 6, 2**30, 1),
        "rows": (20, 5, 1, 2**29 + 100),
    }
    of_a = {"samples": (2**30 + 1, 7, 1), "positions": (7, 2**30, 1), "rows": (5, 1, 2**29 + 100)}
    try:
        store = torch.empty(2**32 + 2**13)
    except RuntimeError as error:
        pytest.skip(f"so much address space is not to be had: {error}")
    want = truth(out, g, a, h, b)
    if which == "out":
        out = store.as_strided(out.shape, (2**28 + 1, 1)).copy_(out)
    else:
        g = store.as_strided(g.shape, of_g[which]).copy_(g)
        a = store[2000:].as_strided(a.shape, of_a[which]).copy_(a) if which in of_a else a
    ops.gradient_gram(out, g, a, h, b)
    assert torch.equal(out.double(), want)


@on_each
def test_nan_and_infinities_reach_what_they_meet(target):
    _, g, a = (torch.ones_like(x).to(target.device) for x in alone(6, 3, 2, 10, 33))
    out = torch.zeros(18, 18, device=target.device)
    h, b = g.clone(), a.clone()
    g[2, 1, 1, 9], b[3, 0, 32] = math.nan, math.inf
    got = added(out, g, a, h, b).view(6, 3, 6, 3)
    nan, infinite = torch.zeros_like(got, dtype=torch.bool), torch.zeros_like(got, dtype=torch.bool)
    nan[2, 1] = infinite[:, :, 3] = True
    assert torch.equal(got.isnan(), nan) and torch.equal(got.isinf(), infinite & ~nan)
    assert bool(added(torch.full_like(out, math.nan), g, a, h, b).isnan().all())  # it is read


@on_each
@pytest.mark.parametrize("zero", range(8))
def test_empty(target, zero):
    sizes = [4, 3, 2, 4, 3, 5, 6, 7]
    sizes[zero] = 0
    out, g, a, h, b = (x.to(target.device) for x in inputs(sizes))
    for x in (out, out[: len(g) * g.shape[1], : len(g) * g.shape[1]]):
        kept = x.clone()
        if x is out:
            ops.gradient_gram(x, g, a, h, b)
        elif zero in (0, 1, 2, 6, 7):
            ops.gradient_gram(x.new_zeros(g.shape[0] * g.shape[1], g.shape[0] * g.shape[1]), g, a)
        assert torch.equal(x, kept)


def test_the_reference_by_blocks(monkeypatch):
    """Few rows of the weight at a time: the same sums, the upper half to the bit."""
    out, g, a = alone(9, 3, 4, 21, 5, dtype=torch.float64)
    want = truth(out, g, a)
    monkeypatch.setattr("gcfast.reference.jacobian._GRADIENTS", {"cpu": 1000})
    for others in ((), (g, a)):
        got = out.clone()
        reference.gradient_gram(got, g, a, *others)
        assert torch.equal(got.tril(), want.tril())
        assert torch.equal(got.triu(1), (want if others else out).triu(1))


@on_each
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_contract(target):
    out, g, a = (x.to(target.device) for x in alone(4, 3, 2, 5, 8))
    for others in ((None, None), (g.clone(), a.clone())):
        torch.library.opcheck(torch.ops.gcfast.gradient_gram.default, (out.clone(), g, a, *others))

    def f(out, g, a):
        out = out * 2
        ops.gradient_gram(out, g, a)
        return out + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(out, g, a), f(out, g, a))


def test_no_kernel_elsewhere():
    assert [b for b, served in dispatch._KERNELS.items() if "gradient_gram" in served] == [
        "cpu",
        "reference",
    ]


OUT, G, A = torch.zeros(6, 6), torch.zeros(2, 3, 2, 5), torch.zeros(2, 2, 4)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((OUT.long(), G, A), TypeError, "out must have a floating dtype; got int64"),
        ((OUT.bfloat16(), G, A), TypeError, "out must be float32 or float64; got bfloat16"),
        ((OUT[0], G, A), ValueError, r"out must have shape \(n C, n2 C2\); got \(6,\)"),
        ((OUT[:1].expand(6, 6), G, A), ValueError, "out must not be expanded"),
        ((OUT[:5], G, A), ValueError, r"out must have shape \(6, 6\) .*; got \(5, 6\)"),
        ((OUT, G.double(), A), TypeError, "g must have the dtype of out, float32; got float64"),
        ((OUT, G, A.to("meta")), ValueError, "a must be on the device of out, cpu; got meta"),
        ((OUT, G[0], A), ValueError, r"g must have shape \(n, C, T, R\); got \(3, 2, 5\)"),
        ((OUT, G, A[:, :1]), ValueError, r"a must have shape \(2, 2, S\), n and T from g; got \(2, 1, 4\)"),
        ((OUT, G, A, G), ValueError, "b must be given with h"),
        ((OUT, G, A, None, A), ValueError, "h must be given with b"),
        ((OUT, G, A, G[..., :4], A), ValueError, r"h must have shape \(n2, C2, T2, 5\), R from g"),
        (
            (OUT, G, A, G, A[..., :3]),
            ValueError,
            r"b must have shape \(2, 2, 4\) \(n2 and T2 from h, S from a",
        ),
        ((OUT, G, A, G[:1], A[:1]), ValueError, r"out must have shape \(6, 3\) .*; got \(6, 6\)"),
        ((OUT, G, A.clone().requires_grad_()), RuntimeError, "detach a"),
    ],
)
def test_bad_input_is_named(args, error, words):
    with pytest.raises(error, match=words):
        ops.gradient_gram(*args)
