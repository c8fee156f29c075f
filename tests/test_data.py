from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    folder_images,
    png,
    random_images,
    real_data,
    write_cifar_batches,
    write_idx,
    write_mnist_raw,
    write_semeion_text,
    write_tree,
    write_zip,
)

from gcfast.cli.data import DataSplit, load_dataset
from gcfast.cli.usage import UserError


def standardised(images: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The documented normalisation, straight from its definition, on (n, c, h, w) pixels."""
    pixels, reference = images / 255.0, train / 255.0
    mean, std = reference.mean(axis=(0, 2, 3), keepdims=True), reference.std(axis=(0, 2, 3), keepdims=True)
    return (pixels - mean) / std


def check_shape(data: DataSplit, n: int, n_test: int) -> None:
    assert data.x_train.shape == (n, *data.shape) and data.x_test.shape == (n_test, *data.shape)
    assert data.x_train.dtype == data.x_test.dtype == torch.float32
    assert data.y_train.dtype == data.y_test.dtype == torch.int64
    assert len(data.class_names) == data.classes
    axes = (0, 2, 3)
    torch.testing.assert_close(
        data.x_train.double().mean(axes), torch.zeros(data.shape[0]).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        data.x_train.double().std(axes, correction=0), torch.ones(data.shape[0]).double(), atol=1e-5, rtol=0
    )


def test_digits_is_the_documented_split() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    data = load_dataset("digits", seed=3)
    check_shape(data, 1257, 540)
    bunch = datasets.load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        bunch.images, bunch.target, test_size=0.3, stratify=bunch.target, random_state=3
    )
    np.testing.assert_array_equal(data.y_train.numpy(), y_train)
    np.testing.assert_array_equal(data.y_test.numpy(), y_test)
    expected = (x_test - x_train.mean()) / x_train.std()
    np.testing.assert_allclose(data.x_test[:, 0].numpy(), expected, atol=1e-6)
    other = load_dataset("digits", seed=4)
    assert other.fingerprint() != data.fingerprint() == load_dataset("digits", seed=3).fingerprint()


def test_limits_keep_the_first_samples() -> None:
    pytest.importorskip("sklearn")
    whole, part = load_dataset("digits"), load_dataset("digits", limit=50, test_limit=7)
    check_shape(part, 50, 7)
    assert torch.equal(part.y_train, whole.y_train[:50]) and torch.equal(part.y_test, whole.y_test[:7])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_as_torchvision_stores_it(tmp_path: Path, suffix: str) -> None:
    arrays = write_mnist_raw(tmp_path, suffix)
    data = load_dataset("mnist", tmp_path)
    check_shape(data, 30, 20)
    train = arrays["train"][:, None]
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=1e-6)
    np.testing.assert_allclose(data.x_test.numpy(), standardised(arrays["t10k"][:, None], train), atol=1e-6)
    np.testing.assert_array_equal(data.y_train.numpy(), arrays["train-labels"])


def test_mnist_npz_by_folder_or_by_name(tmp_path: Path) -> None:
    images, labels = random_images(12, 28, 28), np.arange(12, dtype=np.uint8) % 10
    np.savez(
        tmp_path / "mnist.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    check_shape(load_dataset("mnist", tmp_path), 12, 12)
    check_shape(load_dataset("mnist", tmp_path / "mnist.npz"), 12, 12)


def test_distinct_pixels_stay_distinct(tmp_path: Path) -> None:
    """Standardising must not merge samples: the certificate asks whether stored rows are distinct."""
    images = np.zeros((256, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = np.arange(256)
    labels = np.arange(256, dtype=np.uint8) % 10
    np.savez(
        tmp_path / "mnist.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )
    data = load_dataset("mnist", tmp_path)
    assert len(data.x_train.flatten(1).unique(dim=0)) == 256


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches(tmp_path: Path, protocol: int) -> None:
    arrays = write_cifar_batches(tmp_path, protocol=protocol)
    data = load_dataset("cifar10", tmp_path)
    check_shape(data, 20, 4)
    train = np.concatenate(arrays[:5]).reshape(-1, 3, 32, 32)
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=2e-6)
    assert data.y_train[:5].tolist() == [0, 1, 2, 3, 1] and data.y_test.tolist() == [5, 6, 7, 8]


def test_cifar_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_cifar_batches(tmp_path)
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(witness),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"data_batch_3.*mkdir"):
        load_dataset("cifar10", tmp_path)
    assert not witness.exists()


def test_semeion_text_and_split(tmp_path: Path) -> None:
    pixels, labels = write_semeion_text(tmp_path / "semeion.data")
    data = load_dataset("semeion", tmp_path, seed=5)
    check_shape(data, 30, 10)
    assert data.y_test.bincount(minlength=10).tolist() == [1] * 10
    rows = torch.cat([data.x_train, data.x_test]).flatten(1) > 0
    seen = {
        (tuple(row.tolist()), int(label)) for row, label in zip(rows, torch.cat([data.y_train, data.y_test]))
    }
    assert seen == {(tuple(bool(v) for v in row), int(label)) for row, label in zip(pixels, labels)}


@pytest.mark.parametrize("prefix", [None, "", "birds-v2/"])
def test_image_folder_and_zip(tmp_path: Path, prefix: str | None) -> None:
    pytest.importorskip("PIL")
    files = folder_images()
    root = (
        write_tree(tmp_path / "t", files) if prefix is None else write_zip(tmp_path / "t.zip", files, prefix)
    )
    data = load_dataset("folder", root)
    check_shape(data, 18, 6)
    assert data.class_names == ("cat", "dog", "emu") and data.shape == (3, 6, 6)
    part = load_dataset("folder", root, limit=7, test_limit=3)
    assert part.y_train.bincount().tolist() == [3, 2, 2] and part.y_test.bincount().tolist() == [1, 1, 1]
    if prefix is not None:
        plain = load_dataset("folder", write_tree(tmp_path / "plain", files))
        assert plain.fingerprint() == data.fingerprint()


def test_image_folder_grey_mixed_and_resized(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    files = folder_images(channels=1)
    assert load_dataset("folder", write_tree(tmp_path / "grey", files)).shape == (1, 6, 6)
    files["test/cat/000.png"] = png(random_images(1, 6, 6, 3)[0])
    assert load_dataset("folder", write_tree(tmp_path / "mixed", files)).shape == (3, 6, 6)
    files["train/cat/000.png"] = png(random_images(1, 9, 6)[0])
    sizes = write_tree(tmp_path / "sizes", files)
    with pytest.raises(UserError, match=r"differ in size.*--image-size"):
        load_dataset("folder", sizes)
    assert load_dataset("folder", sizes, image_size=5).shape == (3, 5, 5)


def test_given_statistics_replace_the_data_s_own(tmp_path: Path) -> None:
    arrays = write_mnist_raw(tmp_path)
    data = load_dataset("mnist", tmp_path, statistics=((0.5,), (0.25,)))
    np.testing.assert_allclose(data.x_train[:, 0].numpy(), (arrays["train"] / 255.0 - 0.5) / 0.25, atol=1e-6)


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"name": "fashion"}, "DATA: expected one of digits.*'fashion'"),
        ({"name": "mnist"}, r"--data-root: .*MNIST/raw/train-images-idx3-ubyte"),
        (
            {"name": "cifar10", "root": "/nonexistent/here"},
            "/nonexistent/here does not exist.*cifar-10-batches-py",
        ),
        ({"name": "digits", "limit": 0}, "--limit: expected at least 1, got 0"),
        ({"name": "digits", "image_size": 8}, "--image-size"),
    ):
        with pytest.raises(UserError, match=message):
            load_dataset(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "mnist.npz.*train-images-idx3-ubyte"),
        ("semeion", "semeion.npz.*semeion.data"),
        ("cifar10", "data_batch_1.*cifar10_jpeg_24k.zip"),
        ("folder", "no images found as train/<class>"),
    ],
)
def test_an_empty_root_names_the_files_looked_for(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_dataset(name, tmp_path)


def test_damaged_mnist_files(tmp_path: Path) -> None:
    write_mnist_raw(tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train-images.*promises 23520 bytes of data, it has 23519"):
        load_dataset("mnist", tmp_path)
    images.write_bytes(b"<!doctype html>")
    with pytest.raises(UserError, match="not an idx file"):
        load_dataset("mnist", tmp_path)
    images.write_bytes(whole)
    write_idx(labels, np.zeros(29, dtype=np.uint8))
    with pytest.raises(UserError, match="30 images but 29 labels"):
        load_dataset("mnist", tmp_path)
    write_idx(labels, np.full(30, 10, dtype=np.uint8))
    with pytest.raises(UserError, match="labels run from 10 to 10, expected 0 to 9"):
        load_dataset("mnist", tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match="lacks train-labels-idx1-ubyte"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, -20])
def test_cut_gzip_npz_zip_and_pickle(tmp_path: Path, keep: int) -> None:
    pytest.importorskip("PIL")
    write_mnist_raw(tmp_path / "gz", ".gz")
    write_cifar_batches(tmp_path / "cifar")
    np.savez_compressed(tmp_path / "semeion.npz", images=random_images(20, 16, 16), labels=np.arange(20) % 10)
    write_zip(tmp_path / "images.zip", folder_images())
    cases = (
        ("mnist", tmp_path / "gz", tmp_path / "gz" / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"),
        ("cifar10", tmp_path / "cifar", tmp_path / "cifar" / "cifar-10-batches-py" / "test_batch"),
        ("semeion", tmp_path, tmp_path / "semeion.npz"),
        ("folder", tmp_path / "images.zip", tmp_path / "images.zip"),
    )
    for name, root, victim in cases:
        load_dataset(name, root)
        victim.write_bytes(victim.read_bytes()[:keep])
        with pytest.raises(UserError, match=victim.name):
            load_dataset(name, root)


def test_damaged_image_names_the_image(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    files = folder_images()
    files["train/dog/003.png"] = files["train/dog/003.png"][:60]
    with pytest.raises(UserError, match=r"train/dog/003.png is not a readable image"):
        load_dataset("folder", write_tree(tmp_path, files))


def test_folder_with_a_class_only_in_test(tmp_path: Path) -> None:
    files = {"train/cat/1.png": b"", "train/dog/1.png": b"", "test/owl/1.png": b""}
    with pytest.raises(UserError, match="classes that train/ has not: owl"):
        load_dataset("folder", write_tree(tmp_path, files))


def test_semeion_text_damage(tmp_path: Path) -> None:
    path = tmp_path / "semeion.data"
    for text, message in (
        ("1 0 1\n", "expected 256 pixels and 10 class indicators a line, found 3"),
        ("1 x\n", "not a readable semeion.data"),
        (" ".join(["0"] * 266), "exactly one class indicator"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_dataset("semeion", tmp_path)


def test_real_mnist() -> None:
    data = load_dataset("mnist", real_data("mnist.npz"), limit=4000)
    check_shape(data, 4000, 10000)
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_real_semeion() -> None:
    data = load_dataset("semeion", real_data("semeion.npz"))
    check_shape(data, 1116, 477)


def test_real_cifar_jpegs() -> None:
    pytest.importorskip("PIL")
    data = load_dataset("cifar10", real_data("cifar10_jpeg_24k.zip"), limit=200, test_limit=100)
    check_shape(data, 200, 100)
    assert data.shape == (3, 32, 32) and data.y_train.bincount().tolist() == [20] * 10
