from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.report.page import render, write_report
from gcfast.cli.report.verdicts import verdict
from gcfast.cli.training.checkpoint import DataSpec
from gcfast.cli.training.models import ModelSpec
from gcfast.cli.training.record import Record
from gcfast.cli.training.train import CurvePoint, Schedule, Settings


def a_record(root: Path, **certificate: Any) -> Record:
    """A record as a run leaves it, with smooth curves in the place of training."""
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8),
        np.arange(60) % 10,
    )
    np.savez(
        root / "mnist.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    data = load_dataset("mnist", root)
    settings = Settings(batch_size=10, epochs=10)
    schedule = Schedule(60, 10, 10, settings.tau, 0)
    record = Record(
        data,
        DataSpec("mnist", None, None, 0, None, data.mean, data.std, data.fingerprint()),
        ModelSpec("mlp", data.shape, 10, (20, 10), 66),
        settings,
        schedule,
        "gcfast train mnist --data-root 'a <b> & c'",
        status="complete",
    )
    for name, floor in (("base", 1e-3), ("two_phase", 3e-3)):
        record.curves[name] = [CurvePoint(6 * k, k, 2.0 * math.exp(-k) + floor, 10.0 - k) for k in range(11)]
    record.switch = record.curves["two_phase"][6]
    record.nearest = CurvePoint(36, 6.0, 7e-7, 2.5)
    record.path = [(10.0**-k, 10.0 ** -(k + 1)) for k in range(6)]
    record.solver = {"iterations": 17, "duality_gap": 1e-9}
    record.spectrum = np.geomspace(300, 2e-3, 60).tolist()
    record.seconds = {"phase_one": 1.0, "phase_two": 0.5, "base": 1.6, "certify": 0.1, "solve": 0.2}
    record.certificate = {
        "status": "holds",
        "route": "direct",
        "rank_lower": 60,
        "sigma_min_lower": 1e-3,
        "offenders": [],
        "infimum": 0.0,
        "reason": "rank(H1) = n is proved",
        "assumptions": [{"name": "full rank", "status": "holds", "reason": "margin 0.98 > 0 & <proved>"}],
        "text": "holds, directly",
        **certificate,
    }
    return record


class _Page(HTMLParser):
    """Collects what a browser would fetch, the text, and whether tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.svgs = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href", "data", "action") and value and not value.startswith("#"):
                self.fetched.append(value)
            if name == "href" and value and value.startswith("#"):
                self.references.append(value[1:])
            if name == "id" and value:
                self.ids.append(value)
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_page_is_self_contained_and_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", a_record(tmp_path).values())
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == [] and page.fetched == []
    assert "://" not in text and "@import" not in text
    assert page.svgs == 6  # three pictures, each for wide and for narrow screens
    assert len(page.ids) == len(set(page.ids)) and set(page.references) <= set(page.ids)


def test_page_shows_the_figures_of_the_run(tmp_path: Path) -> None:
    record = a_record(tmp_path)
    text = " ".join(_Page(render(record.values())).text.split())
    for expected in (
        "Global minimum reached",
        "L* = 0",
        "7.0e-07",  # the final loss and the gap
        "≥ 1.0e-03",  # the bound on the smallest singular value
        "0.00 %",  # test error of the last point of a curve
        "2.50 %",
        "margin 0.98 > 0 & <proved>",
        "gcfast train mnist --data-root 'a <b> & c'",
        "17 Newton steps",
    ):
        assert expected in text, expected


def test_verdict_never_says_more_than_the_certificate(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], float | None, str, str], ...] = (
        ({}, 7e-7, "good", "Global minimum reached"),
        ({}, 5e-6, "partial", "still 5.0e-06 above"),
        ({}, None, "partial", "was not solved"),
        ({"status": "unknown", "route": None}, 5e-6, "partial", "Not decided"),
        ({"status": "unknown", "route": None}, 7e-7, "partial", "though the condition is not proved"),
        ({"status": "fails"}, 5e-6, "bad", "condition fails"),
        ({"status": "fails"}, None, "bad", "condition fails"),
        ({"status": "fails"}, 7e-7, "partial", "though the condition fails"),
    )
    for certificate, final, level, headline in cases:
        record = a_record(tmp_path, **certificate)
        record.nearest = None if final is None else CurvePoint(36, 6.0, final, 2.5)
        judged = verdict(record.values())
        assert judged.level == level and headline in judged.headline
        if level != "good":
            assert "Global minimum reached" not in render(record.values())


def test_an_interrupted_run_still_gives_a_page(tmp_path: Path) -> None:
    record = a_record(tmp_path)
    record.certificate, record.nearest, record.switch, record.path, record.spectrum = (
        None,
        None,
        None,
        [],
        None,
    )
    record.curves = {"two_phase": record.curves["two_phase"][:3], "base": []}
    record.status, record.notes = "interrupted", ["Interrupted during phase one; what was finished is here."]
    page = _Page(render(record.values()))
    assert page.svgs == 2 and "Interrupted during phase one" in page.text and "Not decided" in page.text


def test_offenders_are_listed(tmp_path: Path) -> None:
    offender = {"kind": "equal inputs", "samples": [3, 17], "targets": [1, 4], "conflicting": True}
    record = a_record(
        tmp_path, status="fails", offenders=[offender] * 12, reason="12 groups of equal samples"
    )
    text = _Page(render(record.values())).text
    assert "equal inputs: samples 3, 17, conflicting targets 1, 4" in text
    assert "and 2 more" in text and "12 groups of equal samples." in text


def test_gap_is_final_minus_infimum(tmp_path: Path) -> None:
    values = a_record(tmp_path, infimum=2e-7).values()
    assert values["loss"]["gap"] == pytest.approx(5e-7)
    assert values["loss"]["switch"] == pytest.approx(2.0 * math.exp(-6) + 3e-3)
