"""What the readers of files from strangers give for files that are as they should be; see also cli."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from gcfast.errors import UserError
from gcfast.storage import Archive, StateFile, check_growth, load_torch, read_pickle, read_whole, save_torch

PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**62, -(2**900), 0.1, float("inf"), True, False, None],
    "texts": ["", "ä\n\ud800", "x" * 70_000, b"", b"\xff" * 300],
    "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {"a": {"b": []}}],
    "long": list(range(2500)),
    "names": {str(i): i for i in range(2500)},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol_come_back(protocol: int) -> None:
    """Protocols 0 to 2 of Python 3 write bytes by a call."""
    make = {"_codecs encode": lambda text, encoding: text.encode(encoding), "__builtin__ bytes": bytes}
    found = read_pickle(pickle.dumps(PLAIN, protocol), make)
    assert found == PLAIN and [type(x) for x in found["numbers"]] == [type(x) for x in PLAIN["numbers"]]
    shared = ["x"]
    first, second = read_pickle(pickle.dumps([shared, shared], protocol), {})
    assert first is second


def test_checkpoints_come_back_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    content: dict[str, Any] = {
        **{str(dtype): base.to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool)},
        "transposed": base.T if base.dim() == 2 else base.mT,
        "part": base[:, 1:, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "twice": [base, base],
        "plain": PLAIN | {"texts": ["ä"]},
        "state": OrderedDict(torch.nn.Linear(2, 3).state_dict()),
    }
    path = save_torch(tmp_path / "x.pt", content)

    def compare(found: Any, expected: Any) -> None:
        if isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        elif isinstance(expected, dict):
            assert list(found) == list(expected)
            for key, value in expected.items():
                compare(found[key], value)
        elif isinstance(expected, list):
            assert len(found) == len(expected)
            for pair in zip(found, expected):
                compare(*pair)
        else:
            assert found == expected

    found = load_torch(path)
    compare(found, torch.load(path, weights_only=True))
    assert found["twice"][0] is found["twice"][1] and found["part"].is_contiguous()


def test_growth_is_refused_from_one_byte_on(tmp_path: Path) -> None:
    most = (1 << 26) + 100 * 1000
    check_growth("x", 1000, most)
    with pytest.raises(
        UserError, match=rf"x: its 1,000 bytes promise to become {most + 1:,}, expected at most {most:,}"
    ):
        check_growth("x", 1000, most + 1)


def test_files_with_holes_are_as_long_as_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as stream:
        stream.write(b"x")
        stream.truncate(1 << 29)
    if path.stat().st_blocks > 1000:
        pytest.skip("this file system stores holes")
    with pytest.raises(UserError, match=r"sparse: its .* bytes promise to become 536,870,912"):
        read_whole(path)
    with pytest.raises(UserError, match=r"sparse: 536,870,912 bytes, expected at most 1,024"):
        read_whole(path, 1024)


def test_members_give_no_more_than_they_say(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"1" * 100_000)
        archive.filelist[0].file_size = 10
    with Archive(path) as archive, pytest.raises(zipfile.BadZipFile, match="CRC"):
        archive.read("a")


def test_a_lock_that_is_a_link_is_refused_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "state.ck.lock").symlink_to("precious")
    with pytest.raises(OSError, match=r"its lock file .*state.ck.lock cannot be opened"):
        StateFile(tmp_path / "state.ck", "certify", "0123").load()
    assert (tmp_path / "precious").read_text() == "kept"
