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


def write_mnist_raw(root: Path, suffix: str = "", train: int = 30, test: int = 20) -> dict[str, np.ndarray]:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        arrays[part] = random_images(n, 28, 28, seed=n)
        arrays[f"{part}-labels"] = (np.arange(n) * 7 % 10).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", arrays[part])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", arrays[f"{part}-labels"])
    return arrays


def write_cifar_batches(root: Path, n: int = 4, protocol: int = 2) -> list[np.ndarray]:
    """As torchvision unpacks it; protocol 2 is that of the original files."""
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
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return arrays


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
