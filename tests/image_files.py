"""Small data sets written in the original formats, and where the real ones are."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest


def real_data(name: str) -> Path:
    """The folder of the real files, from GCFAST_DATA or beside the repository; skips without ``name``."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GCFAST_DATA", beside))
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in {folder}; set GCFAST_DATA to the folder that has it")
    return folder


def random_images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist_raw(
    root: Path, suffix: str = "", train: int = 30, test: int = 20, place: str = "MNIST/raw"
) -> dict[str, np.ndarray]:
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        arrays[part] = random_images(n, 28, 28, seed=n)
        arrays[f"{part}-labels"] = (np.arange(n) * 7 % 10).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", arrays[part])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", arrays[f"{part}-labels"])
    return arrays


def write_kmnist_npz(root: Path, train: int = 30, test: int = 20) -> dict[str, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in (("train", train), ("test", test)):
        arrays[f"{part}-imgs"] = random_images(n, 28, 28, seed=n)
        arrays[f"{part}-labels"] = (np.arange(n) * 7 % 10).astype(np.uint8)
    for name, array in arrays.items():
        np.savez_compressed(root / f"kmnist-{name}.npz", array)
    return arrays


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2 wrote its str."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_python2_str(self, value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_python2_str


def pickled(content: object, protocol: int | str) -> bytes:
    """By a protocol of Python 3, or "python2": protocol 2 of Python 2, which CIFAR's own files have."""
    if isinstance(protocol, int):
        return pickle.dumps(content, protocol=protocol)
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")  # where numpy 1 had it


def write_cifar_batches(root: Path, n: int = 4, protocol: int | str = "python2") -> list[np.ndarray]:
    """As torchvision unpacks it."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    arrays = []
    for index, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        data = random_images(n, 3072, seed=index)
        arrays.append(data)
        batch = {
            "batch_label": name,
            "labels": [(index + i) % 10 for i in range(n)],
            "data": data,
            "filenames": [],
        }
        (folder / name).write_bytes(pickled(batch, protocol))
    return arrays


def cifar100_files(train: int = 8, test: int = 4) -> dict[str, dict[str, object]]:
    """What the pickles of ``cifar-100-python`` hold."""
    files: dict[str, dict[str, object]] = {}
    for part, n in (("train", train), ("test", test)):
        fine = [(13 * i + n) % 100 for i in range(n)]
        files[part] = {
            "data": random_images(n, 3072, seed=n),
            "fine_labels": fine,
            "coarse_labels": [label // 5 for label in fine],
            "filenames": [f"picture_s_{i:06d}.png" for i in range(n)],
            "batch_label": f"{part}ing batch 1 of 1",
        }
    files["meta"] = {
        "fine_label_names": [f"fine_{label}" for label in range(100)],
        "coarse_label_names": [f"coarse_{label}" for label in range(20)],
    }
    return files


def write_cifar100(root: Path, files: dict[str, dict[str, object]], protocol: int | str = "python2") -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(pickled(content, protocol))


def write_svhn(
    root: Path, compressed: bool = True, train: int = 12, test: int = 6
) -> dict[str, dict[str, np.ndarray]]:
    savemat = pytest.importorskip("scipy.io").savemat
    root.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, n in (("train", train), ("test", test)):
        labels = (np.arange(n) * 3 % 10 + 1).astype(np.uint8)[:, None]
        files[part] = {"X": random_images(32, 32, 3, n, seed=n), "y": labels}
        savemat(root / f"{part}_32x32.mat", files[part], do_compression=compressed)
    return files


def write_semeion_text(path: Path, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(3).integers(0, 2, (n, 256))
    labels = np.arange(n) % 10
    rows = [
        " ".join([*(f"{value:.4f}" for value in row), *(str(int(label == k)) for k in range(10))])
        for row, label in zip(pixels, labels)
    ]
    path.write_text("\n".join(rows) + "\n")
    return pixels, labels


def png(array: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def folder_images(train: int = 6, test: int = 2, size: int = 6, channels: int = 3) -> dict[str, bytes]:
    """Names and contents of an ImageFolder tree of three classes."""
    files = {}
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog", "emu")):
            for index in range(count):
                shape = (size, size, 3) if channels == 3 else (size, size)
                picture = random_images(1, *shape, seed=1000 * label + index + 500 * (part == "test"))[0]
                files[f"{part}/{name}/{index:03d}.png"] = png(picture)
    return files


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path
