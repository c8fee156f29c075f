"""tools/aot.py reports what it must of kernels made for it, and the test session's watch on launches too."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import children
import launches
import pytest
import torch

pytestmark = pytest.mark.tools
ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
import triton
import triton.language as tl
from gcfast.triton_kernels._launch import Launch, Specialization


@triton.jit
def fine_kernel(x, y, n, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n)
    tl.store(y + i, v * 2 if SCALED else v, mask=i < n)


@triton.jit
def product_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a.T, input_precision="ieee"))


@triton.jit
def spilling_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)  # 256 values a thread, needed again after the reduction
    tl.store(y + i, v - tl.max(v, 0))


@triton.jit
def broken_kernel(x, n):
    tl.store(x, n.no_such_attribute)


@triton.jit
def only_ones_kernel(x, n):
    tl.store(x, n.to(tl.int64))  # n = 1 is a constant, which has no such method


@triton.jit
def unlisted_kernel(x):
    tl.store(x, 0.0)


def helper():
    pass


def specializations():
    n, both = {"n": "i32"}, {"x": "*fp32", "y": "*fp32"}
    aligned = frozenset({"x", "y", "n"})
    blocks = Launch({"BLOCK": 1024}, 4)
    yield Specialization(fine_kernel, both | n, {"SCALED": True}, blocks, divisible=aligned)
    half, full = {"x": "*fp16", "y": "*fp32"}, {"x": "*fp32", "y": "*fp32"}
    tensor_cores = {80: "HMMA", 90: "wgmma"}
    small = Launch({"BLOCK": 64}, 4)
    yield Specialization(product_kernel, half, {}, small, (80, 90), frozenset({"x", "y"}), tensor_cores)
    tiny = Launch({"BLOCK": 16}, 4)
    yield Specialization(product_kernel, full, {}, tiny, (90,), frozenset({"x", "y"}), tensor_cores)
    yield Specialization(spilling_kernel, full, {}, Launch({"BLOCK": 8192}, 1), (90,), frozenset({"x", "y"}))
    yield Specialization(broken_kernel, {"x": "*fp32", "n": "fp32"}, {}, Launch({}, 1), (90,))
    yield Specialization(only_ones_kernel, {"x": "*fp32", "n": "i32"}, {}, Launch({}, 1), (90,))
"""

CUDA = """
__global__ void __launch_bounds__(128) fine(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] *= 2.0f; }
__global__ void __launch_bounds__(1024) spills(float* x, int n) {
  float a[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) a[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 128; ++i) a[i] = a[i] * a[(i + 1) % 128] + x[k];
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = a[i];
}
"""


def _tools_missing() -> str:
    if not (ROOT / "tools" / "aot.py").is_file():
        return "needs the source tree"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return "" if bundled.is_file() else "this Triton brings no ptxas"


needs_compiler = pytest.mark.skipif(bool(_tools_missing()), reason=_tools_missing() or "-")


def aot(*args: object) -> subprocess.CompletedProcess[str]:
    """The tool as a user starts it; the interpreter, on for the tests, must not hinder it."""
    return children.run([sys.executable, ROOT / "tools" / "aot.py", *args], cwd=ROOT, timeout=120)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict], list[str], str]:
    """Exit status, rows, offences and standard error of one run over all of KERNELS."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "some_kernels.py").write_text(KERNELS)
    done = aot("--kernels", folder / "some_kernels.py", "--json", folder / "out.json")
    assert (folder / "out.json").is_file(), done.stderr
    record = json.loads((folder / "out.json").read_text())
    return done.returncode, record["rows"], record["offences"], done.stderr


def about(lines: list[str], *words: str) -> list[str]:
    return [line for line in lines if all(word in line for word in words)]


@pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="needs the source tree")
def test_what_a_row_may_need(monkeypatch):
    spec = importlib.util.spec_from_file_location("machine_code", ROOT / "tools" / "_machine_code.py")
    code = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "machine_code", code)
    spec.loader.exec_module(code)

    def row(arch=90, **figures):
        return code.Row("k", "c", arch, **{"registers": 64, "threads": 1024} | figures)

    assert row().offences() == []
    assert about(row(registers=65).offences(), "k[c] sm_90: 65 registers in 1024 threads cannot be launched")
    assert row(registers=128, threads=512).offences() == []
    assert row(threads=1056, registers=8).offences()
    assert row(shared=227 << 10).offences() == []
    assert about(row(80, shared=227 << 10).offences(), "232448 bytes of shared memory, sm_80 has 166912")
    assert about(row(stack=8).offences(), "a stack frame of 8")
    monkeypatch.setitem(code.MAY_SPILL, "k[c] sm_90", (8, "for the test"))
    assert row(stack=8).offences() == [] and row(stack=16).offences() and row(80, stack=8).offences()
    assert row(expected="HMMA", matrix=["HMMA"]).offences() == []
    assert about(row(expected="tcgen05", matrix=["HMMA"]).offences(), "expected tcgen05, found HMMA")


@needs_compiler
def test_offences_are_reported_one_line_each(compiled):
    status, _, offences, stderr = compiled
    assert status == 1
    assert all(f"tools.aot: {line}\n" in stderr for line in offences) and all("\n" not in o for o in offences)


@needs_compiler
def test_a_fine_kernel_passes_everywhere(compiled):
    _, rows, offences, _ = compiled
    assert not about(offences, "fine_kernel")
    fine = [r for r in rows if r["kernel"] == "fine_kernel"]
    aligned = [r for r in fine if r["config"].endswith("; aligned")]
    assert [r["arch"] for r in aligned] == [80, 90, 100]
    assert all(r["registers"] > 0 and r["threads"] == 128 and r["load_bits"] == 128 for r in aligned)
    (unaligned,) = [r for r in fine if r["config"].endswith("; unaligned")]
    assert unaligned["load_bits"] == 32
    assert {r["config"].rsplit("; ", 1)[1] for r in fine} == {"aligned", "unaligned", "ones", "64-bit"}


@needs_compiler
def test_a_sample_has_one_compilation_of_each_kind_another_with_each_seed(tmp_path):
    (tmp_path / "some_kernels.py").write_text(KERNELS)

    def names(*options: object) -> list[str]:
        done = aot("--kernels", tmp_path / "some_kernels.py", "--list", *options)
        assert "unlisted_kernel: not in" in done.stderr  # whatever is sampled
        return done.stdout.splitlines()

    def kind(name: str) -> tuple[str, str, str]:
        kernel, _, config = name.partition("[")
        return kernel, config.partition(";")[0], name.rpartition(" ")[2]

    whole = names()
    kinds = Counter(map(kind, whole))
    first, second = (names("--sample", seed) for seed in (0, 1))
    for sample in (first, second):
        assert Counter(map(kind, sample)) == dict.fromkeys(kinds, 1) and set(sample) <= set(whole)
    alone = {kind(name) for name in set(first) & set(second)}
    assert alone == {name for name, count in kinds.items() if count == 1}


@needs_compiler
def test_spills_are_reported(compiled):
    _, rows, offences, _ = compiled
    spilling = [r for r in rows if r["kernel"] == "spilling_kernel"]
    assert spilling and all(r["spill_stores"] > 0 and r["spill_loads"] > 0 for r in spilling)
    assert about(
        offences, "spilling_kernel", "aligned] sm_90", f"{spilling[0]['spill_stores']} bytes of spill stores"
    )


@needs_compiler
def test_a_missing_matrix_instruction_is_reported(compiled):
    _, rows, offences, _ = compiled
    found = {(r["arch"], r["config"].split(";")[0]): r["matrix"] for r in rows if "; aligned" in r["config"]}
    assert "HMMA" in found[80, "*fp16 *fp32"] and "wgmma.mma_async" in found[90, "*fp16 *fp32"]
    assert about(offences, "product_kernel[*fp32;", "sm_90", "expected wgmma, found no matrix instruction")
    assert not about(offences, "product_kernel[*fp16")


@needs_compiler
def test_a_failed_compilation_is_reported(compiled):
    _, _, offences, _ = compiled
    assert about(offences, "broken_kernel", "no_such_attribute")
    assert [line for line in about(offences, "only_ones_kernel") if "; ones]" in line]


@needs_compiler
def test_an_unlisted_kernel_is_reported(compiled):
    _, _, offences, _ = compiled
    assert about(offences, "some_kernels.unlisted_kernel: not in some_kernels.specializations()")
    assert not about(offences, "helper")


@needs_compiler
def test_the_list_alone_and_wrong_options(tmp_path):
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    listed = aot("--kernels", tmp_path / "some_kernels.py", "--list", "--only", "fine_kernel", "--arch", "90")
    assert listed.returncode == 0, listed.stderr
    assert len(listed.stdout.splitlines()) == 4 and "sm_80" not in listed.stdout
    wrong = aot("--arch", "91")
    assert wrong.returncode == 2 and "--arch takes 80, 90, 100; got 91" in wrong.stderr


@needs_compiler
def test_cuda_kernels(tmp_path):
    (tmp_path / "some.cu").write_text(CUDA)
    done = aot("--kernels", tmp_path / "some.cu", "--arch", "90", "--json", tmp_path / "out.json")
    if "skipped: no nvcc" in done.stderr:
        pytest.skip("no nvcc")
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {r["kernel"].split("(")[0]: r for r in record["rows"]}
    assert rows["some.cu:fine"]["threads"] == 128 and rows["some.cu:fine"]["load_bits"] == 32
    assert done.returncode == 1 and len(record["offences"]) == 1
    assert about(record["offences"], "some.cu:spills", "bytes of spill stores")


@needs_compiler
def test_every_cuda_source_is_compiled_everywhere():
    done = aot("--list", "--only", ".cu ")
    if "skipped: no nvcc" in done.stderr:
        pytest.skip("no nvcc")
    sources = sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert "batched_rank.cu" in sources
    assert sorted(done.stdout.splitlines()) == sorted(f"{s} sm_{a}" for s in sources for a in (80, 90, 100))


@needs_compiler
def test_nvcc_missing_is_said_and_can_be_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    (tmp_path / "some.cu").write_text(CUDA)
    assert "skipped: no nvcc" in aot("--kernels", tmp_path / "some.cu").stderr
    required = aot("--kernels", tmp_path / "some.cu", "--require-nvcc")
    assert required.returncode == 1 and "no nvcc to compile them with" in required.stderr


@pytest.fixture
def kernels(tmp_path):
    """The module of KERNELS, under the mode that the tests run Triton in."""
    pytest.importorskip("triton")
    (tmp_path / "watched_kernels.py").write_text(KERNELS)
    spec = importlib.util.spec_from_file_location("watched_kernels", tmp_path / "watched_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["watched_kernels"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["watched_kernels"]
    launches._listed.cache_clear()


def test_the_session_watches_launches():
    pytest.importorskip("triton")
    from gcfast.triton_kernels import _launch

    assert _launch.run.__wrapped__ is not None


def test_listed_launches_pass_and_others_do_not(kernels):
    launch = kernels.Launch({"BLOCK": 1024}, 4)
    no_blocks = kernels.Launch({}, 1)
    x = torch.zeros(8)
    launches.check(kernels.fine_kernel, launch, 80, (x, x, 8), {"SCALED": True})
    launches.check(kernels.fine_kernel, launch, 80, (x[1:], x, 1), {"SCALED": True})  # values do not matter

    def refused(match, args=(x, x, 8), launch=launch, arch=80, scaled=True, kernel=kernels.fine_kernel):
        with pytest.raises(AssertionError, match=match):
            launches.check(kernel, launch, arch, args, {"SCALED": scaled} if scaled is not None else {})

    refused("differs in x", args=(x.double(), x, 8))
    refused("differs in n", args=(x, x, 1 << 40))
    refused("differs in n", args=(x, x, 8.0))
    refused("differs in y", args=(x, None, 8))
    refused("differs in SCALED", scaled=False)
    refused("differs in SCALED", scaled=1)
    refused("launch configuration", launch=kernels.Launch({"BLOCK": 1024}, 8))
    refused("launch configuration", launch=kernels.Launch({"BLOCK": 512}, 4))
    refused("launch configuration", args=(x.half(), x), arch=100, scaled=None, kernel=kernels.product_kernel)
    refused("of its 0 entries", args=(x,), launch=no_blocks, scaled=None, kernel=kernels.unlisted_kernel)
    refused("was launched with x, BLOCK", args=(x,), scaled=None, kernel=kernels.unlisted_kernel)
