from __future__ import annotations

import contextlib
import io
import os
import sys

import pytest

from gcfast.cli.progress import ProgressBar, format_seconds


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pseudo-terminal that gives its size as zero, as some containers do: the bar is drawn all the same."""
    pytest.importorskip("tqdm")
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with ProgressBar("phase one", 10) as progress:
            for done in range(1, 11):
                progress.update(done, f"loss {done}")
    raw = b""
    with contextlib.suppress(OSError):  # Linux ends a pseudo-terminal's output with an error
        while chunk := os.read(controller, 65536):
            raw += chunk
    os.close(controller)
    shown = raw.decode()
    assert "phase one" in shown and "100%" in shown and "loss 10" in shown


def test_lines_elsewhere() -> None:
    stream = io.StringIO()
    with ProgressBar("phase one", 10, stream=stream) as progress:
        for done in range(1, 11):
            progress.update(done, "loss 1")
    assert stream.getvalue().startswith("phase one") and "done in" in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_lines_tell_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("gcfast.cli.progress.time.perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()
    progress = ProgressBar("certificate", 4, stream=stream)
    progress.update(1, "whitening")
    assert " 25%  whitening  about 18.0 s left" in stream.getvalue()  # 6 s for a quarter


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("phase one", 2, quiet=True, stream=sys.stderr) as progress:
        progress.update(2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_no_tqdm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with ProgressBar("phase one", 2, stream=stream) as progress:
        progress.update(2)
    assert "pip install 'gcfast[cli]'" in stream.getvalue() and "done in" in stream.getvalue()


def test_seconds() -> None:
    assert [format_seconds(s) for s in (0.04, 59.9, 60, 3599, 7260)] == [
        "0.0 s", "59.9 s", "1 min 00 s", "59 min 59 s", "2 h 01 min",
    ]  # fmt: skip
