"""Files made to crash, hang or fill the machine: each is refused by name, in little time and memory.

All are tried by one child with limited memory, so that what is not refused ends the child, not the tests.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
import torch
from image_files import (
    cifar100_files,
    folder_images,
    png,
    write_cifar100,
    write_cifar_batches,
    write_kmnist_npz,
    write_mnist_raw,
    write_svhn,
    write_tree,
    write_zip,
)

TRIES = """
import json, resource, sys, time
from pathlib import Path
from gcfast.cli.data import image_tree
from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.training.checkpoint import RunCheckpoint
from gcfast.storage import StateFile

image_tree._SECONDS = 0

def state(path):
    with StateFile(path, "certify", "0123") as file, file.load() as loaded:
        for name in loaded.names:
            loaded.tensors(name)

def peak():
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

read = {"checkpoint": lambda path: RunCheckpoint.load(Path(path)).build(), "state": state}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for kind, root in json.load(sys.stdin):
    start, before = time.perf_counter(), peak()
    try:
        read.get(kind, lambda root: load_dataset(kind, root))(root)
        answer = ["read", ""]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([*answer, time.perf_counter() - start, (peak() - before) / 1024]), flush=True)
"""


def bomb(size: int, wbits: int = -15) -> bytes:
    """A deflated stream of ``size`` zeros, made without compressing them all; its checksum is another's."""
    stream = zlib.compressobj(9, zlib.DEFLATED, wbits)
    stream.compress(bytes(1 << 20))
    start = stream.flush(zlib.Z_FULL_FLUSH)
    stream.compress(bytes(1 << 20))
    return start + stream.flush(zlib.Z_FULL_FLUSH) * (size // (1 << 20) - 1) + stream.flush()


def zipped(path: Path, name: str, size: int, content: bytes, claimed: int | None = None) -> None:
    """A zip file of one deflated member that says of itself what is asked for."""
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        archive.writestr(info, content)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.file_size = size if claimed is None else claimed
    raw = bytearray(path.read_bytes())  # the header in front of the member, which still says "stored"
    struct.pack_into("<H", raw, raw.rindex(b"PK\3\4") + 8, zipfile.ZIP_DEFLATED)
    path.write_bytes(raw)


DTYPE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
DEEP = b"\x85" * 200_000  # a tuple in a tuple in a tuple ...
PICKLES = {
    "bytes that numpy takes for pointers": b"\x80\x02}U\x04data"
    + ARRAY
    + b"(K\x01(K\x01K\x02t"
    + DTYPE.replace(b"\x02u1", b"\x02O8")
    + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x01tb\x89U\x10AAAAAAAABBBBBBBBtbs.",
    "a state of the dtype that is no tuple": b"\x80\x02}U\x04data" + DTYPE + b"](K\x01K\x02ebs.",
    "a memo index of 2^28": b"\x80\x02Nr" + struct.pack("<I", 1 << 28) + b".",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "bytes of 2^31": b"\x80\x02T" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "a bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a frame of 2^40": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.",
    "an integer of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "a key of tuples in tuples": b"\x80\x02})" + DEEP + b"Ns.",
    "arguments of tuples in tuples": b"\x80\x02}U\x04data"
    + ARRAY[:-1]
    + b"0"
    + b"cnumpy\ndtype\n)"
    + DEEP
    + b"Rs.",
    "a dtype of 2^31 bytes": b"\x80\x02}U\x04datacnumpy\ndtype\n(X\x0b\x00\x00\x00V2147483647tRs.",
    "a shape of 2^50 rows": b"\x80\x02}U\x04data"
    + ARRAY
    + b"(K\x01(\x8a\x08"
    + struct.pack("<q", 1 << 50)
    + b"M\x00\x0ct"
    + DTYPE
    + b"\x89U\x00tbs.",
    "a shape of -1 rows": b"\x80\x02}U\x04data"
    + ARRAY
    + b"(K\x01(J\xff\xff\xff\xffM\x00\x0ct"
    + DTYPE
    + b"\x89U\x00tbs.",
    "twenty million lists": b"\x80\x02" + b"]" * 15_000_000 + b".",
    "marks without end": b"\x80\x02" + b"(" * 3_000_000 + b".",
    "a list that holds itself": b"\x80\x02}U\x04data]q\x00h\x00as.",
    "a label of 2^2000": b"\x80\x02}(U\x04data"
    + ARRAY
    + b"(K\x01(K\x01M\x00\x0ct"
    + DTYPE
    + b"\x89T\x00\x0c\x00\x00"
    + bytes(3072)
    + b"tbU\x06labels]\x8a\xff"
    + b"\x7f" * 255
    + b"au.",
    "nothing on the stack": b"\x80\x02R.",
    "an object of a class": b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ft\x81.",
    "an extension": b"\x80\x02\x82\x01.",
}


def cifar(content: bytes) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        write_cifar_batches(root)
        victim = root / "cifar-10-batches-py" / "data_batch_2"
        victim.write_bytes(content)
        return "cifar10", root, victim

    return make


def names_of_classes(root: Path) -> tuple[str, Path, Path]:
    write_cifar100(root, cifar100_files())
    victim = root / "cifar-100-python" / "meta"
    victim.write_bytes(PICKLES["a memo index of 2^28"])
    return "cifar100", root, victim


def idx(
    header: bytes, body: Callable[[], bytes], suffix: str = ".gz"
) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        write_mnist_raw(root, suffix)
        victim = root / "MNIST" / "raw" / f"train-images-idx3-ubyte{suffix}"
        packed = gzip.compress(header)[:10] + zlib_raw(header) + body() if suffix else header + body()
        victim.write_bytes(packed)
        return "mnist", root, victim

    return make


def zlib_raw(content: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(content) + stream.flush(zlib.Z_FULL_FLUSH)


def npz(make_member: Callable[[Path], None]) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        write_kmnist_npz(root)
        victim = root / "kmnist-train-imgs.npz"
        victim.unlink()
        make_member(victim)
        return "kmnist", root, victim

    return make


def npy(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz_that_grows(path: Path) -> None:
    head = npy((2 << 20, 28, 28))
    zipped(path, "arr_0.npy", len(head) + (2 << 20) * 784, zlib_raw(head) + bomb((2 << 20) * 784))


def npz_that_lies(path: Path) -> None:
    head = npy((10, 28, 28))
    zipped(path, "arr_0.npy", 0, zlib_raw(head) + bomb(2 << 30), claimed=len(head) + 7840)


def npz_of_bzip2(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("arr_0.npy", npy((10, 28, 28)) + bytes(7840))


def npz_of_promises(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", npy((1 << 40, 28, 28)))


def npz_of_brackets(path: Path) -> None:
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"-" * 9000 + b"1}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text)


def mat(claimed: int, size: int) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        write_svhn(root)
        victim = root / "train_32x32.mat"
        stream = zlib.compressobj(9)
        tag = stream.compress(struct.pack("<II", 14, claimed)) + stream.flush(zlib.Z_FULL_FLUSH)
        content = tag + bomb(size)
        victim.write_bytes(victim.read_bytes()[:128] + struct.pack("<II", 15, len(content)) + content)
        return "svhn", root, victim

    return make


def semeion(root: Path) -> tuple[str, Path, Path]:
    victim = root / "semeion.data.gz"
    victim.write_bytes(gzip.compress(b"0")[:10] + bomb(2 << 30))
    return "semeion", victim, victim


def semeion_of_one_line(root: Path) -> tuple[str, Path, Path]:
    victim = root / "semeion.data"
    victim.write_bytes(b"1 " * (20 << 20))
    return "semeion", victim, victim


def picture(content: Callable[[], bytes], name: str = "1.png") -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        one = content()
        files = {f"{part}/{group}/{name}": one for part in ("train", "test") for group in "ab"}
        return "folder", write_tree(root / "tree", files), Path(name)

    return make


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def large_png(width: int, height: int, bits: int = 8, colour: int = 2, rows: int | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    size = (width * {0: 1, 2: 3}[colour] * bits // 8 + 1) * (height if rows is None else rows)
    body = b"\x78\x9c" + bomb(max(size, 1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff_that_hangs() -> bytes:
    """A million pixels, in four hundred thousand tiles that lie on one another."""
    tiles, side = 400_000, 1000
    data = bytes(side * side)
    offsets = struct.pack("<H", 8) * tiles
    tags = [
        (256, 3, 1, side),
        (257, 3, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]
    tags += [(322, 3, 1, side), (323, 3, 1, side - 1), (324, 3, tiles, 8 + len(data)), (325, 3, 1, 1)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(offsets)) + data + offsets + directory


def tiff_of_large_tags() -> bytes:
    """Four thousand tags, each of them the whole file."""
    data = bytes(1 << 20)
    tags = [(256, 3, 1, 6), (257, 3, 1, 6), *((number, 7, len(data), 8) for number in range(1000, 5000))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def tree_of_large_pictures(root: Path) -> tuple[str, Path, Path]:
    """Each of them could be meant."""
    one = png(np.zeros((4000, 4000), dtype=np.uint8))
    files = {
        f"{part}/{group}/{index}.png": one
        for part in ("train", "test")
        for group in "ab"
        for index in range(9)
    }
    return "folder", write_tree(root / "tree", files), Path("tree")


def zip_member(root: Path) -> tuple[str, Path, Path]:
    path = write_zip(root / "tree.zip", folder_images())
    zipped(path, "train/dog/large.png", 2 << 30, bomb(2 << 30))
    return "folder", path, path


def zip_member_that_lies(root: Path) -> tuple[str, Path, Path]:
    path = write_zip(root / "tree.zip", folder_images())
    zipped(path, "train/dog/large.png", 0, bomb(2 << 30), claimed=100)
    return "folder", path, Path("train/dog/large.png")


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def content() -> dict[str, Any]:
    """A checkpoint of the smallest model that there is."""
    shapes = {"linear1": (1, 4), "wide": (3, 1), "head": (2, 3)}
    state = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.ones(shape[0]) for name, shape in shapes.items()}
    model = {"kind": "mlp", "shape": [1, 2, 2], "classes": 2, "hidden": [1], "wide": 3, "activation": "tanh"}
    data = {"name": "folder", "limit": None, "test_limit": None, "seed": 0, "image_size": None}
    data |= {"mean": [0.5], "std": [0.5], "fingerprint": "0"}
    parts = {"model": model, "data": data, "state_dict": state, "heads": {}}
    plain = {"loss": "cross_entropy", "stage": "switch", "step": 1}
    return {"format": "gcfast-checkpoint", "version": 1, **plain, **parts}


def checkpoint(
    change: Callable[[dict[str, Any]], object], rewrite: Callable[[Path], None] | None = None
) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        path = root / "checkpoint.pt"
        values = content()
        change(values)
        torch.save(values, path)
        if rewrite is not None:
            rewrite(path)
        return "checkpoint", path, Path("CHECKPOINT")

    return make


def members(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in held.items():
            archive.writestr(name, change(name, raw))


def short_storages(path: Path) -> None:
    members(path, lambda name, raw: raw[:4] if "/data/" in name else raw)


def long_storages(path: Path) -> None:
    """The first tensor's storage says that it has 2^30 numbers."""

    def change(name: str, raw: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return raw
        place = raw.index(b"K", raw.index(b"cpu") + 3)
        return raw[:place] + b"J" + struct.pack("<i", 1 << 30) + raw[place + 2 :]

    members(path, change)


def growing_storage(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/data/0")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in held.items():
            archive.writestr(name, raw)
    zipped(path, f"{folder}/data/0", 2 << 30, bomb(2 << 30))


def not_a_zip(path: Path) -> None:
    """The format of torch before 1.6."""
    torch.save(content(), path, _use_new_zipfile_serialization=False)


def state(**changes: Any) -> Callable[[Path], tuple[str, Path, Path]]:
    def make(root: Path) -> tuple[str, Path, Path]:
        from gcfast.storage.file_format import header_bytes

        entry = {
            "name": "x",
            "dtype": "float64",
            "shape": [8],
            "order": [0],
            "offset": 0,
            "bytes": 64,
            "digest": "",
        }
        header = {
            "kind": "certify",
            "fingerprint": "0123",
            "gcfast": "0",
            "values": {},
            "tensors": [entry | changes],
        }
        path = root / "state.ck"
        path.write_bytes(header_bytes(header) + bytes(64))
        return "state", path, path

    return make


def nested_state(root: Path) -> tuple[str, Path, Path]:
    import hashlib

    text = b"[" * 4_000_000
    head = struct.pack("<16sIQ", b"gcfast\x00state\r\n\x1a\n", 1, len(text)) + text
    path = root / "state.ck"
    path.write_bytes(head + hashlib.blake2b(head, digest_size=32).digest())
    return "state", path, path


IDX = b"\0\0\x08\x03"
CASES: dict[str, Callable[[Path], tuple[str, Path, Path]]] = {
    **{f"pickle: {name}": cifar(raw) for name, raw in PICKLES.items()},
    "pickle of names": names_of_classes,
    "idx.gz that grows": idx(IDX + struct.pack(">III", 2 << 20, 28, 28), lambda: bomb((2 << 20) * 784)),
    "idx.gz longer than it says": idx(IDX + struct.pack(">III", 30, 28, 28), lambda: bomb(2 << 30)),
    "idx of 2^32 images": idx(IDX + struct.pack(">III", 2**32 - 1, 28, 28), lambda: bytes(9), ""),
    "idx of 200 axes": idx(b"\0\0\x08\xc8" + struct.pack(">I", 1) * 200, lambda: b"1", ""),
    "npz that grows": npz(npz_that_grows),
    "npz longer than it says": npz(npz_that_lies),
    "npz of bzip2": npz(npz_of_bzip2),
    "npz of 2^40 images": npz(npz_of_promises),
    "npz with a nested header": npz(npz_of_brackets),
    "mat that grows": mat(2 << 30, 2 << 30),
    "mat longer than it says": mat(64, 2 << 30),
    "semeion in gzip": semeion,
    "semeion of one line": semeion_of_one_line,
    "png of 169 million pixels": picture(lambda: large_png(13000, 13000)),
    "png of 900 million pixels": picture(lambda: large_png(30000, 30000, 1, 0, rows=9)),
    "png of 80 million pixels": picture(lambda: large_png(9000, 9000)),
    "pgm of 2^60 pixels": picture(lambda: b"P5 1073741824 1073741824 255\n" + bytes(99)),
    "tiff that hangs": picture(tiff_that_hangs, "1.tif"),
    "tiff of large tags": picture(tiff_of_large_tags, "1.tif"),
    "postscript": picture(
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\n{} loop\n"
    ),
    "many large pictures": tree_of_large_pictures,
    "zip member that grows": zip_member,
    "zip member longer than it says": zip_member_that_lies,
    "checkpoint that makes a bytearray": checkpoint(lambda c: c.update(x=Call(bytearray, 1 << 34))),
    "checkpoint that calls": checkpoint(lambda c: c.update(x=Call(print, "called"))),
    "checkpoint with short storages": checkpoint(lambda c: None, short_storages),
    "checkpoint with a forged length": checkpoint(lambda c: None, long_storages),
    "checkpoint that grows": checkpoint(lambda c: None, growing_storage),
    "checkpoint of old torch": checkpoint(lambda c: None, not_a_zip),
    "checkpoint of a giant": checkpoint(lambda c: c["model"].update(hidden=[1 << 20, 1 << 20])),
    "checkpoint of 2^80 units": checkpoint(lambda c: c["model"].update(wide=1 << 80)),
    "checkpoint of a million layers": checkpoint(lambda c: c["model"].update(hidden=[1] * 300_000)),
    "checkpoint of one number a giant": checkpoint(
        lambda c: (
            c["model"].update(wide=1 << 24),
            c["state_dict"].update({"head.weight": torch.ones(1, 1).expand(2, 1 << 24)}),
        )
    ),
    "checkpoint of other numbers": checkpoint(
        lambda c: c["state_dict"].update({"head.bias": torch.ones(2).long()})
    ),
    "checkpoint without deviation": checkpoint(lambda c: c["data"].update(std=[0.0])),
    "checkpoint of infinite classes": checkpoint(lambda c: c["model"].update(classes=float("inf"))),
    "checkpoint of data that are a tensor": checkpoint(lambda c: c.update(data=torch.ones(2))),
    "checkpoint of a version that is a tensor": checkpoint(lambda c: c.update(version=torch.ones(2))),
    "checkpoint without tensors": checkpoint(lambda c: c.update(state_dict={"head.bias": 1})),
    "state of 2^50 numbers": state(shape=[1 << 50]),
    "state of fewer bytes than numbers": state(shape=[9]),
    "state of negative bytes": state(bytes=-64),
    "state with an axis too many": state(order=[0, 1]),
    "state of text": state(shape="8"),
    "state of quarters of a byte": state(shape=[64], dtype="quint2x4"),
    "state of no rows of 2^100 numbers": state(shape=[0, 1 << 100], order=[0, 1], bytes=0),
    "state in a nested header": nested_state,
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    pytest.importorskip("PIL")
    pytest.importorskip("scipy")
    root = tmp_path_factory.mktemp("hostile")
    tasks, victims = [], {}
    for number, (name, make) in enumerate(CASES.items()):
        folder = root / str(number)
        folder.mkdir()
        kind, place, victims[name] = make(folder)
        tasks.append((kind, str(place)))
    (root / "tasks").write_text(json.dumps(tasks))
    with open(root / "tasks") as stream:
        done = children.run([sys.executable, "-c", TRIES], stdin=stream, timeout=100)
    lines = done.stdout.splitlines()
    found = {name: json.loads(line) for name, line in zip(CASES, lines)}
    ended = f"the process ended by {done.returncode} {done.stderr[-300:]}"
    return {name: (found.get(name, [ended, "", 0, 0]), victims[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused_by_name(answers: dict[str, Any], name: str) -> None:
    (kind, message, seconds, mebibytes), victim = answers[name]
    assert kind in ("UserError", "CheckpointError"), (kind, message)
    assert victim.name in message and len(message) < 1000
    assert seconds < 8 and mebibytes < 400


def test_the_arrays_of_a_mat_file_grow_together(tmp_path: Path) -> None:
    """Each of two that nobody asks for would be allowed alone."""
    from gcfast.cli.data.formats import read_svhn
    from gcfast.errors import UserError

    write_svhn(tmp_path)
    size, elements = 40 << 20, b""
    for name in (b"first...", b"second.."):
        head = struct.pack("<12I8s", 14, size, 6, 8, 9, 0, 5, 8, 1, 1, 1, 8, name)
        body = zlib.compress(head.ljust(size + 8, b"\0"))
        elements += struct.pack("<II", 15, len(body)) + body
    victim = tmp_path / "train_32x32.mat"
    victim.write_bytes(victim.read_bytes()[:128] + elements)
    with pytest.raises(UserError, match=rf"{victim}: its .* bytes promise to become {2 * size:,}"):
        read_svhn(victim)
