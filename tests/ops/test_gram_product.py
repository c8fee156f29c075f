"""Symmetric times skinny: against float64, sizes around every block edge, layouts, threads, errors."""

from __future__ import annotations

import pytest
import torch

from gcfast import ops

SIZES = [1, 2, 3, 31, 32, 33, 63, 65, 252, 255, 257, 290, 507, 801]
SIDES = [1, 2, 3, 4, 5, 6, 10, 19, 20, 21, 43]


def _problem(n, c, dtype, device="cpu"):
    g = torch.Generator().manual_seed(n * 100 + c)
    a = torch.randn((n, n), generator=g, dtype=torch.float64)
    x = torch.randn((n, c), generator=g, dtype=torch.float64)
    gram = (a + a.T).to(dtype)
    return gram.to(device), x.to(dtype).to(device)


def _check(gram, x):
    got = ops.gram_product(gram, x)
    truth = gram.double() @ x.double()
    size = gram.double().abs() @ x.double().abs()
    plain = ((gram @ x).double() - truth).abs().max()
    # no worse than torch's product, plus the rounding of a sum of n terms in another order
    slack = 4 * torch.finfo(gram.dtype).eps * size.max()
    assert got.shape == x.shape and got.dtype == x.dtype
    assert float((got.double() - truth).abs().max()) <= float(plain + slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_against_float64(device, n, dtype, poison):
    for c in SIDES:
        _check(*_problem(n, c, dtype, device))


def test_the_kernel_ran_and_reads_the_lower_triangle_only():
    gram, x = _problem(300, 4, torch.float32)
    expected = ops.gram_product(gram, x)
    assert ops.last_backend("gram_product") == "cpu"
    blocks = torch.arange(300) // 32
    upper = blocks[:, None] < blocks[None, :]
    assert torch.equal(ops.gram_product(gram.masked_fill(upper, float("nan")), x), expected)


def test_strided_and_transposed_inputs():
    gram, x = _problem(129, 7, torch.float64)
    wide = torch.full((129, 200), float("nan"), dtype=torch.float64)
    wide[:, :129] = gram
    expected = ops.gram_product(gram, x)
    assert torch.equal(ops.gram_product(wide[:, :129], x), expected)
    assert torch.equal(ops.gram_product(gram, x.T.contiguous().T), expected)
    spread = torch.full((258, 258), float("nan"), dtype=torch.float64)[::2, ::2].copy_(gram)
    assert torch.equal(ops.gram_product(spread, x), expected)
    assert torch.equal(ops.gram_product(gram[:1, :1].expand(1, 1), x[:1]), gram[:1, :1] * x[:1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_rounding_at_most(threads):
    before = torch.get_num_threads()
    gram, x = _problem(507, 10, torch.float64)
    try:
        torch.set_num_threads(threads)
        first = ops.gram_product(gram, x)
        assert torch.equal(first, ops.gram_product(gram, x))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(first, gram @ x, rtol=1e-12, atol=1e-10)


def test_empty_extreme_and_other_dtypes():
    assert ops.gram_product(torch.zeros(0, 0), torch.zeros(0, 3)).shape == (0, 3)
    assert ops.gram_product(torch.zeros(3, 3), torch.zeros(3, 0)).shape == (3, 0)
    gram, x = _problem(40, 3, torch.float64)
    assert bool(ops.gram_product(gram * float("nan"), x).isnan().all())
    torch.testing.assert_close(ops.gram_product(gram * 1e300, x * 1e-300), gram @ x)
    half = ops.gram_product(gram.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16 and ops.last_backend("gram_product") == "reference"


def test_library_contract():
    gram, x = _problem(33, 4, torch.float32)
    torch.library.opcheck(torch.ops.gcfast.gram_product.default, (gram, x))
    compiled = torch.compile(lambda g, v: ops.gram_product(g, v) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(gram, x), ops.gram_product(gram, x) + 1)


@pytest.mark.parametrize(
    ("gram", "x", "error", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 1), ValueError, r"gram must have shape \(n, n\); got \(3, 4\)"),
        (torch.zeros(3, 3), torch.zeros(4, 1), ValueError, r"x must have shape \(3, c\); got \(4, 1\)"),
        (torch.zeros(3, 3), torch.zeros(3, 1, dtype=torch.float64), TypeError, "dtype of gram"),
        (torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, 1), TypeError, "floating"),
        (torch.zeros(3, 3, requires_grad=True), torch.zeros(3, 1), RuntimeError, "differentiated"),
    ],
)
def test_bad_input_is_named(gram, x, error, words):
    with pytest.raises(error, match=words):
        ops.gram_product(gram, x)
