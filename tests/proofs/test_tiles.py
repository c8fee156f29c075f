"""Matrices in tiles against dense ones, in memory and on disk; a tile damaged on the disk is seen."""

from __future__ import annotations

import pytest
import torch

from gcfast.proofs import rounding
from gcfast.proofs import tiles as _tiles
from gcfast.proofs.rounding import Tiling
from gcfast.proofs.tiles import Tiles
from gcfast.storage.memory import Scratch

SIZES = [1, 7, 8, 9, 16, 37]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (rounding, _tiles):
        monkeypatch.setattr(module, "tiling", lambda device: Tiling(8, 4))


def _lower(n, seed=0):
    x = torch.randn((n, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tril()
    x.diagonal().copy_(2.0 + x.diagonal().abs())
    return x


def _tiled(x, scratch=None):
    tiles = Tiles(len(x), x.dtype, scratch=scratch)
    for i, j in tiles.pairs():
        tiles[i, j].copy_(x[tiles.spans[i], tiles.spans[j]])
    return tiles


@pytest.fixture(params=["memory", "disk"])
def scratch(request, tmp_path):
    return Scratch(str(tmp_path)) if request.param == "disk" else None


@pytest.mark.parametrize("n", SIZES)
def test_everything_agrees_with_dense_algebra(n, scratch):
    x, y = _lower(n), _lower(n, 1)
    tiles, other = _tiled(x, scratch), _tiled(y, scratch)
    assert torch.equal(tiles.dense(), x) and torch.equal(tiles.diagonal(), x.diagonal())
    b = torch.randn((n, 11), dtype=torch.float64)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(_tiles.times(tiles, b), x @ b, **close)
    torch.testing.assert_close(_tiles.matmul(tiles, b), x @ b, **close)
    torch.testing.assert_close(_tiles.matmul(tiles, b, transposed=True), x.mT @ b, **close)
    torch.testing.assert_close(_tiles.solve_triangular(tiles, b), torch.linalg.solve(x, b), **close)
    torch.testing.assert_close(
        _tiles.solve_triangular(tiles, b, transposed=True), torch.linalg.solve(x.mT, b), **close
    )
    torch.testing.assert_close(_tiles.triangular_gram(tiles, 4).dense(), (x @ x.mT).tril(), **close)
    g = Tiles(n, scratch=scratch)
    _tiles.add_gram_(g, b)
    torch.testing.assert_close(g.dense(), (b @ b.mT).tril(), **close)
    left, right = torch.rand(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    rows, columns = _tiles.abs_products(tiles, left, right)
    torch.testing.assert_close(rows, x.abs() @ right)
    torch.testing.assert_close(columns, left @ x.abs())
    torch.testing.assert_close(_tiles.abs_gram_sums(tiles), (x.abs() @ x.abs().mT).sum(1))
    torch.testing.assert_close(_tiles.row_maxima(tiles), x.abs().amax(1))
    symmetric = x + x.tril(-1).mT
    torch.testing.assert_close(_tiles.symmetric_row_sums(tiles), symmetric.abs().sum(1))
    fractions = []
    _tiles.compose_(other, tiles, fractions.append)
    torch.testing.assert_close(tiles.dense(), y @ x, **close)
    assert fractions[-1] == 1.0 and fractions == sorted(fractions)
    inverse = _tiles.invert_(other)
    torch.testing.assert_close(inverse.dense(), torch.linalg.inv(y), **close)
    assert bool((inverse.dense().triu(1) == 0).all())


@pytest.mark.parametrize("n", SIZES)
def test_cholesky_is_lapacks_and_fails_where_it_must(n, scratch):
    x = _lower(n)
    a = x @ x.mT
    low = Tiles(n, scratch=scratch)
    assert _tiles.cholesky(_tiled(a.tril(), scratch), 0.5, low)
    want = torch.linalg.cholesky(a + 0.5 * torch.eye(n))
    torch.testing.assert_close(low.dense(), want, rtol=1e-10, atol=1e-10)
    assert not _tiles.cholesky(_tiled(a.tril()), -2 * float(a.diagonal().amax()), low)
    least = float(torch.linalg.cholesky(a).diagonal().amin()) ** 2
    assert _tiles.cholesky(_tiled(a.tril()), 0.0, low, least=0.9 * least)
    assert not _tiles.cholesky(_tiled(a.tril()), 0.0, low, least=1.1 * least)
    a[n // 2, n // 2] = float("nan")
    assert not _tiles.cholesky(_tiled(a.tril()), 0.0, low)


def test_views_of_a_dense_matrix_write_its_lower_triangle_only():
    g = torch.full((20, 20), float("nan"), dtype=torch.float64)
    tiles = Tiles.of(g)
    for i, j in tiles.pairs():
        tiles[i, j].copy_(torch.where(torch.isnan(tiles[i, j].triu(1)), float("nan"), 0.0))
    for i in range(len(tiles.spans)):
        tiles[i, i].tril_()
    _tiles.add_gram_(tiles, torch.ones((20, 3), dtype=torch.float64))
    assert bool(torch.isnan(g[0, 8:]).all()) and float(g[19, 0]) == 3.0


def test_count_is_what_is_stored(tmp_path):
    for n in SIZES:
        tiles = Tiles(n)
        assert Tiles.count(n) == sum(tiles[key].numel() for key in tiles.pairs())


def test_a_damaged_tile_is_seen(tmp_path):
    tiles = _tiled(_lower(20), Scratch(str(tmp_path)))
    tiles.seal()
    tiles.check()  # nothing happened to it
    tiles.seal()
    tiles[2, 1][0, 0] += 2.0**-40
    with pytest.raises(RuntimeError, match=r"tile \(2, 1\) came back"):
        tiles.check()
    assert not list(tmp_path.iterdir())  # scratch files have no name


def test_nothing_is_left_when_tiles_are_released(tmp_path):
    tiles = _tiled(_lower(20))
    tiles.release()
    with pytest.raises(KeyError):
        tiles[0, 0]
