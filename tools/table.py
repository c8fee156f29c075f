"""README's table of speed, made from bench/results.

python -m tools.table                 write the table between README's markers
python -m tools.table --check         exit code 1 and a diff if README is not what the results say
python -m tools.table --merge FILE…   take recorded runs (GCFAST_BENCH_OUT) into bench/results, then the table
python -m tools.table --show FILE     the comparisons of one recorded run

Needs the standard library only. bench/results has a file a device: its runs, and of every op, size and dtype
the newest comparison, with the run that it is from.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # the modules that benchmarks share

import _record
from _record import ROOT

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: written by python -m tools.table -->", "<!-- speed: end -->"

PEERS = ("reference", "torch.compile", "scikit-learn")


@dataclass(frozen=True)
class Row:
    """A line of the table for every device and size that was measured.

    ``op`` and ``size`` (regular expressions) say which comparisons, ``ours`` which candidates are gcfast's:
    the fastest one of these is shown, by name, against each of ``against`` ("" is the first candidate).
    """

    work: str  # {size} is filled in
    op: str
    size: str = ".*"
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")
    ours: tuple[str, ...] = ("cpu", "triton", "cuda", "gcfast")
    against: tuple[str, ...] = ("", "torch.compile")
    kernels: bool = True  # whether GPU kernels of gcfast do it: what is missing is then said


ROWS = (
    Row(
        "phase two to loss 1e-6, {size}",
        "phase two",
        ours=("nearest",),
        against=("torch L-BFGS", "scikit-learn"),
        kernels=False,
    ),
    Row(
        "an epoch of phase two from `FeatureCache`, {size}",
        "phase two epoch",
        ours=("cache, features", "cache, below"),
        kernels=False,
    ),
    Row("rank *proved*, {size}", "certified rank", ours=("proof",), kernels=False),
    Row(
        "the same with a sharp bound of σ_min, {size}",
        "certified rank",
        ours=("proof, sharp sigma",),
        kernels=False,
    ),
    *(
        Row(
            f"rank *proved* at condition number {condition}, {{size}}",
            f"certified rank of condition {condition}",
            ours=("proof",),
            kernels=False,
        )
        for condition in ("1e6", "1e10")
    ),
    Row(
        "`LayerJacobians.gram`, {size}",
        "empirical NTK",
        ours=("gcfast",),
        against=("", "neural-tangents, structured", "BackPACK SqrtGGN"),
        kernels=False,
    ),
    Row("`matrix_rank`, {size}", "matrix_rank"),
    *(Row(f"`{name}`, {{size}}", name) for name in ("softplus", "sigmoid", "tanh", "gelu", "silu")),
    *(Row(f"`{name}` and its gradients, {{size}}", f"{name} and gradients") for name in ("softplus", "gelu")),
    Row("`softmax_residual`, {size}", "softmax_residual"),
    Row("`softmax_curvature`, {size}", "softmax_curvature"),
    Row("`gram_error_bound`, {size}", "gram_error_bound"),
    Row("`abs_products`, {size}", "abs_products"),
    Row("`WideHead`, a training step, {size}", "WideHead training step"),
    Row("`wide_forward`, {size}", "wide_forward"),
    Row("`wide_forward` and its gradients, {size}", "wide_forward and gradients"),
    Row("`wide_forward`, then `wide_head_grad`, {size}", "wide_forward and wide_head_grad"),
    Row("`wide_gram_product`, {size}", "wide_gram_product"),
    Row("the same with bf16 products allowed, {size}", "wide_gram_product with bf16 products"),
    Row("`wide_gram`, {size}", "wide_gram", kernels=False),
    Row("`gram_product`, {size}", "gram_product", ours=("cpu",), kernels=False),
    Row("`jacobian_gram`, {size}", "jacobian_gram", against=("", "reference")),
    Row("`gradient_gram`, {size}", "gradient_gram", ours=("cpu",), against=("", "reference"), kernels=False),
    Row("`add_product`, {size}", "add_product", ours=("cpu",), kernels=False),
)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The devices, CPUs first."""
    devices = [_record.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(devices, key=lambda d: (d["device"] == "cuda", d["name"]))


def merge(files: list[Path], folder: Path = RESULTS) -> list[Path]:
    """Take runs into the devices' files: a newer comparison of the same work replaces the older one."""
    written = []
    for path in files:
        run = _record.read(path)
        for device in sorted({r["device"] for r in run["results"]}):
            header = {**run["header"], "ceilings": run["ceilings"].get(device, {})}
            slug = _record.slug(header, device)
            target = folder / f"{slug}.json"
            name = header["device"] if device == "cuda" else f"{header['cpu']}, {header['instruction_set']}"
            empty = {"name": name, "device": device, "runs": [], "results": []}
            held = _record.read(target) if target.exists() else empty
            label = f"{header['date']} {header['commit']}"
            fresh = [{**r, "run": label} for r in run["results"] if r["device"] == device]
            newest: dict[Any, dict[str, Any]] = {}
            for result in sorted(held["results"] + fresh, key=lambda r: r["run"]):  # by date
                newest[_record.key(result)] = result
            runs = {r["label"]: r for r in held["runs"]} | {label: {"label": label, **header}}
            used = {r["run"] for r in newest.values()}
            held["runs"] = [runs[k] for k in sorted(used)]
            held["results"] = [newest[k] for k in sorted(newest)]
            _record.write(target, held)
            written.append(target)
    return written


def _interval(ratio: list[float | None]) -> str:
    """Median and quartiles, to the digits that the median deserves."""
    low, middle, high = ratio
    assert middle is not None
    digits = 2 if middle < 2 else 1 if middle < 10 else 0
    between = "" if low is None or high is None else f" ({low:.{digits}f}–{high:.{digits}f})"
    return f"{middle:.{digits}f}×{between}"


def _cell(result: dict[str, Any], ours: dict[str, Any], against: str, backend: bool) -> str:
    text = f"{_interval(ours['ratios'][against])} {result['dtype']}"
    if backend:
        text += f" by {ours['name']}"
    peer = next(c for c in result["candidates"] if c["name"] == against)
    if "test_error" in ours.get("extra", {}) and "test_error" in peer.get("extra", {}):
        errors = [c["extra"]["test_error"] for c in (ours, peer)]
        text += f"; test error {errors[0]:.2f} % against {errors[1]:.2f} %"
    if "memory" in ours.get("extra", {}) and "memory" in peer.get("extra", {}):
        share = ours["extra"]["memory"] / peer["extra"]["memory"]
        text += f" in {100 * share:.1f} % of the memory"
    return text


def _order(result: dict[str, Any]) -> tuple[int, ...]:
    """Sizes by their numbers."""
    return tuple(int(n) for n in re.findall(r"\d+", result["size"]))


def _lines(row: Row, device: dict[str, Any]) -> list[str]:
    found = [
        r
        for r in device["results"]
        if re.fullmatch(row.op, r["op"]) and re.fullmatch(row.size, r["size"]) and r["dtype"] in row.dtypes
    ]
    found.sort(key=lambda r: (_order(r), r["size"], row.dtypes.index(r["dtype"])))
    commits = {run["label"]: run["commit"] for run in device["runs"]}
    sizes: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for result in found:
        candidates = [c for c in result["candidates"] if c["name"] in row.ours]
        if candidates:
            sizes.setdefault(result["size"], []).append((result, min(candidates, key=lambda c: c["median"])))
    lines = []
    for size, group in sizes.items():
        work = row.work.format(size=re.sub(r"\d{5,}", lambda n: f"{int(n[0]):,}", size)).rstrip(", ")
        cells = []
        for wanted in row.against:
            by = device["device"] == "cuda" and row.kernels
            peers = [(r, ours, wanted or r["candidates"][0]["name"]) for r, ours in group]
            figures = [_cell(r, ours, peer, by) for r, ours, peer in peers if peer in ours["ratios"]]
            if figures:
                cells.append(f"{re.sub(r'^torch (?=[a-z])', 'torch’s ', peers[0][2])}: {', '.join(figures)}")
        shares = [
            f"{ours['of_limit']:.0%}".replace("%", " %") for _, ours in group if ours["of_limit"] is not None
        ]
        commit = ", ".join(dict.fromkeys(commits[r["run"]] for r, _ in group))
        where = device["name"].split(",")[0]
        lines.append(f"| {work} | {where} | {'<br>'.join(cells)} | {', '.join(shares)} | {commit} |")
    return lines


def _machine(device: dict[str, Any]) -> str:
    run = device["runs"][-1]
    if device["device"] == "cuda":
        return f"{device['name']}: driver {run['driver']}, torch {run['torch']}, triton {run['triton']}."
    threads = f"{run['threads']} thread{'s' if run['threads'] != 1 else ''}"
    return f"{device['name']}: {threads}, torch {run['torch']}."


def table(devices: list[dict[str, Any]]) -> str:
    """What stands between README's markers: every GPU, and of the CPUs the one measured last."""
    processors = sorted((d for d in devices if d["device"] == "cpu"), key=lambda d: d["runs"][-1]["date"])
    older, devices = processors[:-1], [d for d in devices if d not in processors[:-1]]
    lines = ["| work | on | faster than | of the limit | commit |", "|---|---|---|---|---|"]
    missing = []
    for row in ROWS:
        found = {device["name"]: _lines(row, device) for device in devices}
        lines += [line for per_device in found.values() for line in per_device]
        if row.kernels and not any(found[d["name"]] for d in devices if d["device"] == "cuda"):
            missing.append(row.work.replace(", {size}", ""))
    notes = [_machine(d) for d in devices]
    if older:
        notes.append(f"`bench/results` also has {'; '.join(d['name'] for d in older)}.")
    if missing:
        notes.append(f"Not yet measured on a GPU: {', '.join(missing)}.")
    return "\n".join([*lines, "", *notes])


def replaced(readme: str, new: str) -> str:
    begin, end = readme.find(BEGIN), readme.find(END)
    if begin < 0 or end < begin:
        raise SystemExit(f"{README.name} must hold {BEGIN!r} and {END!r}, in this order")
    return f"{readme[: begin + len(BEGIN)]}\n{new}\n{readme[end:]}"


def show(run: dict[str, Any]) -> str:
    """Every comparison of a run: a line for each candidate of gcfast's, with its ratios to the others."""
    lines = [f"{'op, size, dtype':<65}{'candidate':<19}{'median':>12}{'of limit':>9}  faster than"]
    for result in run["results"]:
        first = result["candidates"][0]["name"]
        title = ", ".join(t for t in (result["op"], result["size"], result["dtype"]) if t)
        for c in result["candidates"][1:]:
            if c["name"] not in PEERS:
                others = [name for name in (first, *PEERS) if name in c["ratios"]]
                ratios = ", ".join(f"{name} {_interval(c['ratios'][name])}" for name in others)
                share = "-" if c["of_limit"] is None else f"{c['of_limit']:.0%}"
                lines.append(f"{title:<64} {c['name']:<19}{c['median'] * 1e3:>9.3f} ms{share:>9}  {ratios}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.table", description="README's table of speed, made from bench/results."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit code 1 and a diff if README is out of date")
    what.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="take recorded runs into results")
    what.add_argument("--show", type=Path, metavar="FILE", help="print the comparisons of one run")
    args = parser.parse_args(argv)
    if args.show:
        print(show(_record.read(args.show)))
        return 0
    for path in merge(args.merge or []):
        print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    before = README.read_text(encoding="utf-8")
    after = replaced(before, table(load()))
    if args.check:
        diff = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "README.md", "what bench/results say", lineterm=""
        )
        print("\n".join(diff) or "README's table is what bench/results say")
        return int(before != after)
    if before != after:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
