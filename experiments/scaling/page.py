"""docs/scaling.md, made from the cells that measure.py ran."""

# ruff: noqa: E501  (the page's own lines)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper.statistics import power_law

import gcfast

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
FIT_FROM = 2000  # samples: below, what is counted is not what takes the time

TEXT = """# How time and memory grow with the number of samples

Made by `python -m experiments.scaling` and `python -m experiments.scaling --page`, of MNIST's first n samples with m = 1.1 n
softplus features of d = {d} inputs (MLP 784-256-{d}-m-10, SGD with momentum, {epochs} epochs, perturbed and
frozen after {tau:.0%} of them), {threads} threads of {machine}, commit {commit}. `certify(sharp=False, route="direct")` proves rank n of
the very features that phase two trains on; `solve_head` goes to a gap of 1e-6. Memory is what the process grew by.

| n | certify | route | σ_min ≥ | memory | solve | form of K | products | memory | test error |
|---|---|---|---|---|---|---|---|---|---|
{rows}

{fits}

{inside}

{base}

## The model behind it

With one product of an n × m matrix and its transpose (lower half) counted as n² m operations:

- *certify*: the Gram n² m; whitening, where the shift does not do, 2 n² m a pass (X H1 with X triangular, and its Gram)
  and n³ for factor, inverse and composition; a doubled product 2 n² m more. Features are made again for each sweep
  where they are not stored: 2 n m d. Memory: three lower triangles, 12 n² bytes, and six panels n × 1,024.
- *solve*: the samples that matter, |S| of n: their Gram |S|² m once, passes over all features 4 n m C (and 2 n m d where
  they are recomputed) a point of the path; or K whole, n² m once and n² C a product. Memory: 8 to 12 |S|², or 4 n² to
  8 n², or some dozens of n × C.

`print(gcfast.plan(model, data))` counts this for your sizes before any work. For sizes that nobody here has run:

{plans}

**These are counts, not measurements**: "h100" rates are nominal figures of the card, halved. n = 50,000 fits one
card: the certificate's triangles are {certify_50k}. For n = 1.28 million with m = 1.41 million no n × n matrix is
within reach of eight cards ({triangle_1m} for one triangle): the direct route is out, the theorem's is what
certifies (`certify(WideFeatures(z, layer), route="theorem")`, {theorem}), and phase two is solved matrix-free.

## What is sharded, and how

Row blocks of Z, of the features made from them, of targets, logits and dual variables (n × C) live on one device each
(`torch.distributed`, one process a device). A product K r = Φ (Φᵀ r) + 1 (1ᵀ r) is two local products around one
all-reduce of Φᵀ r, (m + 1) × C numbers; inner products of (n, C) quantities are all-reduces of single numbers. The
Gram needs Z everywhere (one all-gather; features are made again), its tiles live column by column in turn; a Cholesky
factor sends every finished column of tiles round once. What a device sends, in rings:

{sharded}

`tests/solve/test_plan.py` runs these algorithms on a simulated ring that counts every message: sent bytes are the planned
ones, and the results those of one device.
"""


def _fit(points: list[tuple[int, float]]) -> tuple[float, float] | None:
    """(exponent, seconds at n = 10,000) of the least-squares line through the logarithms."""
    points = [(n, t) for n, t in points if n >= FIT_FROM]
    if len(points) < 3:
        return None
    exponent, factor = power_law(points)
    return exponent, factor * 1e4**exponent


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def text(results: Path) -> str:
    """The page. Raises FileNotFoundError where nothing was measured."""
    known: dict[str, Any] = json.loads(results.read_text())
    cells = [known["cells"][k] for k in sorted((k for k in known["cells"] if k.isdigit()), key=int)]
    rows = []
    for c in cells:
        cert, s = c["certify"], c["solve"]
        route = cert["reason"].split(": ", 2)[1]
        rows.append(
            f"| {c['n']:,} | {cert['seconds']:.3g} s | {cert['status']}: {route} | {cert['sigma_min_lower']:.1e} "
            f"| {_size(cert['bytes'])} | {s['seconds']:.3g} s | {s['form']} | {s['products']} "
            f"| {_size(s['bytes'])} | {s['test_error']:.2f} % |"
        )
    lines = []
    for what in ("certify", "solve"):
        for value, unit in (("seconds", "time"), ("bytes", "memory")):
            found = _fit([(c["n"], c[what][value]) for c in cells])
            if found:
                at = f"{found[1]:.3g} s" if value == "seconds" else _size(found[1])
                lines.append(f"- {unit} of {what}: n^{found[0]:.2f}, {at} at n = 10,000")
    fits = f"Fitted from n = {FIT_FROM:,} on, by least squares in the logarithms:\n\n" + "\n".join(lines)
    inside = ""
    for key, c in known["cells"].items():
        if "max_bytes" in c.get("solve", {}) and not key.isdigit():
            s = c["solve"]
            inside = (
                f"Within `max_bytes` = {s['max_bytes'] / 1e9:g} GB, n = {c['n']:,}: {s['form']}, gap "
                f"{s['gap']:.1e} in {s['seconds']:.3g} s and {s['products']} products, test error "
                f"{s['test_error']:.2f} %; the process grew by {_size(s['bytes'])}"
                + (
                    ", more than allowed: bytes were undercounted then."
                    if s["bytes"] > s["max_bytes"]
                    else "."
                )
            )
    base = "\n".join(
        f"n = {c['n']:,}: SGD for all {known['epochs']} epochs ends at loss {c['base']['loss']:.3g} and test error "
        f"{c['base']['test_error']:.2f} % after {c['base']['seconds']:.3g} s; A(SGD) with `nearest`, frozen at "
        f"{known['tau']:.0%}, at {c['solve']['loss']:.1e} and {c['solve']['test_error']:.2f} % after "
        f"{c['phase_one_seconds'] + c['solve']['seconds']:.3g} s."
        for c in cells
        if "base" in c
    )
    card = gcfast.plan(n=50_000, m=55_000, d=512, c=10, rates="h100", max_bytes=78 * 10**9)
    large = gcfast.plan(
        n=1_281_167, m=1_409_284, d=512, c=1000, rates="h100", max_bytes=78 * 10**9, devices=8
    )
    plans = "\n\n".join(f"```text\n{p}\n```" for p in (str(card), str(large).split("  over ")[0].rstrip()))
    assert large.sharded is not None
    return TEXT.format(
        d=cells[0]["d"],
        epochs=known["epochs"],
        tau=known["tau"],
        threads=cells[0]["threads"],
        machine=known["machine"],
        commit=known["commit"],
        rows="\n".join(rows),
        fits=fits,
        inside=inside,
        base=base,
        plans=plans,
        certify_50k=_size(card["certify"].bytes),
        triangle_1m=f"{8 * 1_281_167**2 / 2 / 1e12:.1f} TB",
        theorem=_theorem(known["cells"]["theorem"]),
        sharded=f"```text\n{large.sharded}\n```",
    )


def _theorem(cell: dict[str, Any]) -> str:
    return (
        f"measured here: n = {cell['n']:,}, d = {cell['d']}, all distinct in {cell['seconds']:.2g} s; with "
        f"{cell['planted']:,} planted pairs of equal rows, {cell['conflicts']:,} of them with conflicting labels, every "
        f"one is named and no other in {cell['seconds_with_pairs']:.2g} s; {_size(cell['bytes'])} held, inputs and layer included"
    )
