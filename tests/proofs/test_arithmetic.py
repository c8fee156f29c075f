"""What proofs assume of arithmetic: each assumption is broken alone, and mended, or refused by name."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
import threading
from fractions import Fraction

import children
import pytest
import torch

import gcfast
from gcfast import ops
from gcfast.features import equal_rows
from gcfast.features.duplicates import RowKeys
from gcfast.ops import arithmetic, native
from gcfast.proofs import exact_products, near_dependency, prove_full_rank, prove_least_eigenvalue, wide_gram

MODES = {"x86_64": {"up": 0x800, "down": 0x400, "zero": 0xC00}}
MODES["aarch64"] = {"up": 0x400000, "down": 0x800000, "zero": 0xC00000}
HERE = {**MODES.get(platform.machine(), {}), "flush": None}
needs_kernels = pytest.mark.skipif(native.cpu is None, reason="needs the compiled CPU module")
libm = ctypes.CDLL(None)


def leave_plain(mode: str) -> None:
    if mode == "flush":
        assert torch.set_flush_denormal(True)
    else:
        assert libm.fesetround(HERE[mode]) == 0


def is_set(mode: str) -> bool:
    """Asked of the arithmetic: libm's fegetround tells of another unit than the one that we set."""
    if mode == "flush":
        return native.flushes()
    left = [a + b != a for a, b in arithmetic._FACTS]
    return (
        left == {"up": [True, False, False], "down": [False, True, True], "zero": [False, False, True]}[mode]
    )


@pytest.fixture(params=[pytest.param(m, marks=[] if m in HERE else pytest.mark.skip) for m in HERE])
def mode(request):
    """The name of an arithmetic that is not plain; whatever a test sets in its thread is put back."""
    yield request.param
    libm.fesetround(0)
    torch.set_flush_denormal(False)


def _bits(*patterns: int) -> torch.Tensor:
    """float64 numbers by their bits."""
    return torch.tensor(patterns, dtype=torch.int64).view(torch.float64)


def _deficient(n: int, m: int, seed: int) -> torch.Tensor:
    """Of rank n - 1 exactly: products of small integers, summed without a rounding."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(-9, 10, (n, n - 1), generator=g).double()
    return left @ torch.randint(-9, 10, (n - 1, m), generator=g).double()


@needs_kernels
def test_deficient_matrices_are_not_proved_whatever_the_rounding_mode(mode):
    cases = [_deficient(n, m, seed) for n, m in ((132, 139), (282, 331), (40, 60)) for seed in range(4)]
    leave_plain(mode)
    for h in cases:
        assert not prove_full_rank(h, ones=False).proved
        assert not prove_full_rank(h, ones=False, sharp=False).proved
        assert int(gcfast.matrix_rank(h).lower) < len(h)
    assert is_set(mode)


@needs_kernels
def test_nothing_that_is_proved_depends_on_the_mode(mode):
    g = torch.Generator().manual_seed(3)
    h = torch.randn((30, 50), generator=g, dtype=torch.float64)
    large = torch.randn((260, 270), generator=g, dtype=torch.float64)
    close = torch.eye(4, dtype=torch.float64) * 2.0**-40
    z, w = torch.randn((20, 5), generator=g), torch.randn((70, 5), generator=g)
    copies = torch.cat([h, h[3:4]])
    numbers = torch.cat([h @ h.mT, h[:, :30]]).contiguous()[:30]

    def everything():
        layer = wide_gram(z, w, w[:, 0].clone())
        found = near_dependency(copies)
        return [
            prove_full_rank(h),
            prove_full_rank(h * 2.0**400),
            [t.tolist() for t in vars(gcfast.matrix_rank(large)).values()],
            [t.tolist() for t in vars(gcfast.matrix_rank(close, atol=2.0**-40)).values()],
            prove_least_eigenvalue(numbers),
            (layer.gram.tolist(), layer.error_bound),
            (found.samples, found.exact),
        ]

    want = everything()
    leave_plain(mode)
    assert everything() == want
    assert is_set(mode)


@needs_kernels
@pytest.mark.parametrize("where", ["cpu", "reference"])
def test_denormal_numbers_are_numbers(mode, where):
    tiny = torch.diag(_bits(*[2 * 10**13] * 3))
    units = torch.tensor([[5e6, 1e7], [1e7, 2e7]], dtype=torch.float64)
    single = (units * 2.0**-149).float()  # of rank 1: its first entry is denormal
    rows = torch.zeros((4, 70), dtype=torch.float64)
    rows[:3, 3] = _bits(0, 5, 6)
    rows[3, 2] = -0.0
    halves = rows.clone().half()
    halves[:3, 3] = torch.tensor([0, 5, 6], dtype=torch.int16).view(torch.float16)
    atol = math.ldexp(1.0, -1060)
    leave_plain(mode)
    with ops.backend(where):
        found = gcfast.matrix_rank(tiny, atol=atol)
        assert int(found.rank) == 3 and int(found.upper) == 3
        assert where == "reference" or int(found.lower) == 3
        assert int(gcfast.matrix_rank(single).rank) == int(gcfast.matrix_rank(single).upper) == 1
    assert equal_rows(rows) == equal_rows(halves) == [[0, 3]]
    keys = RowKeys()
    keys.add(rows)
    assert keys.candidates() == keys.confirm([rows]) == [[0, 3]]
    assert is_set(mode)


def test_a_denormal_atol_is_not_none(mode):
    atol = math.ldexp(1.0, -1060)
    values = torch.diag(torch.tensor([1.0, 2.0**-60], dtype=torch.float64))  # rtol by default would drop it
    tensor = _bits(2**14)[0]
    leave_plain(mode)
    assert int(gcfast.matrix_rank(values, atol=atol).rank) == 2
    assert int(gcfast.matrix_rank(values, atol=tensor).rank) == 2


WORKERS = """
import ctypes, torch
torch.set_num_threads(2)
{state}
torch.randn(1 << 17).add(1.0)  # the pool's workers begin, as this thread is
torch.set_flush_denormal(False)
ctypes.CDLL(None).fesetround(0)
import gcfast
from gcfast.features import equal_rows
from gcfast.ops import arithmetic, native
from gcfast.proofs import exact_products, prove_full_rank
x, y, bits = arithmetic._known_sums(2)
assert not torch.equal((x + y).view(torch.int64), bits)  # so it is
{then}
"""
PUT_RIGHT = """
for seed in range(3):
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(-9, 10, (282, 281), generator=g).double()
    h = left @ torch.randint(-9, 10, (281, 331), generator=g).double()
    assert not prove_full_rank(h, ones=False).proved
    assert int(gcfast.matrix_rank(h).lower) < 282
    assert int(gcfast.matrix_rank(h.repeat(8, 1, 1)[:, :132, :139]).lower[0]) <= 132
h = torch.randn((282, 331), dtype=torch.float64)
assert prove_full_rank(h).proved
rows = torch.zeros((1 << 12, 40), dtype=torch.float64)
rows.view(torch.int64)[:, 3] = torch.arange(1 << 12)
assert equal_rows(rows) == []
assert not torch.equal((x + y).view(torch.int64), bits)  # and put back
"""
REFUSED = """
arithmetic._exchange = lambda words, threads: []  # workers that our module does not share with torch
try:
    prove_full_rank(torch.randn((282, 331), dtype=torch.float64))
except RuntimeError as error:
    assert "a worker thread of torch does not round to nearest, or flushes" in str(error)
    assert "torch.set_num_threads(1)" in str(error)
else:
    raise AssertionError("not refused")
# sums that pass are not enough: a product is asked, too
one = torch.ones(1, dtype=torch.float64)
arithmetic._known_sums = lambda threads: (one, 0 * one, one.view(torch.int64))
try:
    prove_full_rank(torch.randn((282, 331), dtype=torch.float64))
except RuntimeError as error:
    assert "less exact than IEEE" in str(error) and "a thread of the library's" in str(error)
else:
    raise AssertionError("not refused")
"""


def _child(script: str) -> None:
    done = children.run([sys.executable, "-c", script], env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    assert done.returncode == 0, done.stdout + done.stderr


@needs_kernels
@pytest.mark.parametrize("state", [state for state in HERE if state in ("flush", "up")])
def test_workers_that_began_otherwise_are_put_right_or_refused(state):
    flush = "torch.set_flush_denormal(True)"
    _child(
        WORKERS.format(
            state=flush if state == "flush" else f"ctypes.CDLL(None).fesetround({HERE[state]})",
            then=PUT_RIGHT + REFUSED,
        )
    )


@needs_kernels
def test_a_forked_child_proves_in_one_thread():
    _child("""
import os, torch
torch.set_num_threads(2)
torch.randn(1 << 17).add(1.0)
from gcfast.proofs import exact_products, prove_full_rank
h = torch.randn((300, 320), dtype=torch.float64)
assert prove_full_rank(h).proved
pid = os.fork()
if pid == 0:
    with exact_products():
        ok = torch.get_num_threads() == 1
    os._exit(0 if ok and torch.get_num_threads() == 2 and prove_full_rank(h[:20, :30]).proved else 1)
assert os.waitpid(pid, 0)[1] == 0
""")


def test_without_kernels_another_arithmetic_is_refused_by_name(mode, monkeypatch):
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cpu_error", "not built")
    h = torch.randn((5, 8), dtype=torch.float64)
    assert prove_full_rank(h).proved
    leave_plain(mode)
    said = (
        "flushes denormal numbers.*set_flush_denormal" if mode == "flush" else "round to nearest.*fesetround"
    )
    with pytest.raises(RuntimeError, match=said):
        prove_full_rank(h)


@needs_kernels
def test_a_mode_that_is_changed_while_a_proof_runs_is_noticed(mode):
    h = torch.randn((20, 30), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"this thread|changed while a proof ran"):
        prove_full_rank(h, progress=lambda step, fraction: leave_plain(mode))
    assert not is_set(mode)  # what it was before
    assert prove_full_rank(h).proved


def test_a_mode_of_workers_that_is_changed_while_a_proof_runs_is_named(monkeypatch):
    if native.cpu is None:
        pytest.skip("needs the compiled CPU module")
    found = iter([[0], [native.cpu.flush_bits | native.cpu.rounding_bits]])
    monkeypatch.setattr(arithmetic, "_exchange", lambda words, threads: next(found))
    said = r"^rounding and flush to zero of this thread or of its workers was"
    with pytest.raises(RuntimeError, match=said), exact_products():
        pass


def _precisions() -> list[str]:
    return [switch.fp32_precision for _, switch in arithmetic._precision_switches()]


@pytest.fixture
def tf32():
    switches = [(s, s.fp32_precision) for _, s in arithmetic._precision_switches()]
    if not switches:
        pytest.skip("this torch has no such switches")
    for switch, _ in switches:
        switch.fp32_precision = "tf32"
    yield [switch for switch, _ in switches]
    for switch, before in switches:
        switch.fp32_precision = before


def test_two_proofs_at_once_end_when_the_last_one_does(tf32):
    begun, ended = threading.Event(), threading.Event()
    seen: list[list[str]] = []

    def second() -> None:
        with exact_products(torch.device("cpu")):
            begun.set()
            assert ended.wait(60)
            seen.append(_precisions())
            seen.append([str(prove_full_rank(torch.eye(5, dtype=torch.float64)).proved)])

    thread = threading.Thread(target=second)
    with exact_products():
        thread.start()
        assert begun.wait(60)
    ended.set()
    thread.join(60)
    assert seen == [["ieee"] * len(tf32), ["True"]]
    assert _precisions() == ["tf32"] * len(tf32)


def test_many_proofs_in_many_threads_leave_the_switches_as_they_were(tf32):
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(50):
                with exact_products():
                    if _precisions() != ["ieee"] * len(tf32):
                        wrong.append(_precisions())
        except RuntimeError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and _precisions() == ["tf32"] * len(tf32)


def test_switches_that_are_set_while_a_proof_runs_are_noticed(tf32):
    said = "precision of float32 products was changed while a proof ran"
    with pytest.raises(RuntimeError, match=said), exact_products():
        tf32[0].fp32_precision = "tf32"
    assert _precisions() == ["tf32"] * len(tf32)
    # another proof, begun and ended meanwhile, hides nothing
    with pytest.raises(RuntimeError, match=said), exact_products():
        tf32[0].fp32_precision = "tf32"
        with exact_products():
            assert _precisions() == ["ieee"] * len(tf32)
    with pytest.raises(KeyError), exact_products():  # what ends a block otherwise is not replaced
        tf32[0].fp32_precision = "tf32"
        raise KeyError
    assert _precisions() == ["tf32"] * len(tf32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("flush", [True, False])
def test_known_answers_are_the_exact_products_rounded(dtype, threads, flush):
    a, b, want = arithmetic._known_product(dtype, threads, flush)
    assert a.dtype == b.dtype == want.dtype == dtype and len(a) >= 64 * threads
    digits, least = (53, -1074) if dtype == torch.float64 else (24, -149)
    rows, columns = a[:: len(a) // 16].tolist(), list(zip(*b[:, :6].tolist(), strict=True))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            exact = sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True))
            size = abs(exact)
            exponent = size.numerator.bit_length() - size.denominator.bit_length()
            exponent -= size < Fraction(2) ** exponent
            unit = Fraction(2) ** max(exponent - digits + 1, least)
            nearest = round(exact / unit) * unit
            assert Fraction(float(want[i * (len(a) // 16), j])) == nearest
            if j % 2 == 0 and j != 2:
                assert abs(exact - nearest) == unit / 4
