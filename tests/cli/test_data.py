from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import (
    cifar100_files,
    folder_images,
    png,
    random_images,
    real_data,
    write_cifar100,
    write_cifar_batches,
    write_idx,
    write_kmnist_npz,
    write_mnist_raw,
    write_semeion_text,
    write_svhn,
    write_tree,
    write_zip,
)

from gcfast.cli import main
from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.data.formats import Images, read_svhn
from gcfast.cli.data.image_tree import ImageTree
from gcfast.cli.data.split import DataSplit, Raw, standardise
from gcfast.errors import UserError


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
@pytest.mark.parametrize(
    ("name", "place"), [("mnist", "MNIST/raw"), ("kmnist", "KMNIST/raw"), ("kmnist", "raw"), ("kmnist", ".")]
)
def test_mnist_and_kmnist_as_torchvision_stores_them(
    tmp_path: Path, suffix: str, name: str, place: str
) -> None:
    arrays = write_mnist_raw(tmp_path, suffix, place=place)
    data = load_dataset(name, tmp_path)
    check_shape(data, 30, 20)
    train = arrays["train"][:, None]
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=1e-6)
    np.testing.assert_allclose(data.x_test.numpy(), standardised(arrays["t10k"][:, None], train), atol=1e-6)
    np.testing.assert_array_equal(data.y_train.numpy(), arrays["train-labels"])
    np.testing.assert_array_equal(data.y_test.numpy(), arrays["t10k-labels"])
    assert data.class_names[:3] == (("0", "1", "2") if name == "mnist" else ("o", "ki", "su"))


def test_mnist_is_not_taken_for_kmnist(tmp_path: Path) -> None:
    write_mnist_raw(tmp_path)
    with pytest.raises(UserError, match="none of these is there"):
        load_dataset("kmnist", tmp_path)


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


def test_kmnist_npz(tmp_path: Path) -> None:
    arrays = write_kmnist_npz(tmp_path)
    data = load_dataset("kmnist", tmp_path)
    check_shape(data, 30, 20)
    train, test = arrays["train-imgs"][:, None], arrays["test-imgs"][:, None]
    np.testing.assert_allclose(data.x_test.numpy(), standardised(test, train), atol=1e-6)
    np.testing.assert_array_equal(data.y_train.numpy(), arrays["train-labels"])
    np.testing.assert_array_equal(data.y_test.numpy(), arrays["test-labels"])
    assert data.class_names == ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


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


@pytest.mark.parametrize("protocol", ["python2", 2, 4])
def test_cifar_batches(tmp_path: Path, protocol: int | str) -> None:
    arrays = write_cifar_batches(tmp_path, protocol=protocol)
    data = load_dataset("cifar10", tmp_path)
    check_shape(data, 20, 4)
    train = np.concatenate(arrays[:5]).reshape(-1, 3, 32, 32)
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=2e-6)
    assert data.y_train[:5].tolist() == [0, 1, 2, 3, 1] and data.y_test.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("protocol", ["python2", 2, 4])
def test_cifar100(tmp_path: Path, protocol: int | str) -> None:
    files = cifar100_files()
    write_cifar100(tmp_path, files, protocol)
    data = load_dataset("cifar100", tmp_path)
    check_shape(data, 8, 4)
    train, test = (files[part]["data"].reshape(-1, 3, 32, 32) for part in ("train", "test"))
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=2e-6)
    np.testing.assert_allclose(data.x_test.numpy(), standardised(test, train), atol=2e-6)
    assert data.y_train.tolist() == files["train"]["fine_labels"] == [8, 21, 34, 47, 60, 73, 86, 99]
    assert data.y_test.tolist() == files["test"]["fine_labels"]
    assert list(data.class_names) == files["meta"]["fine_label_names"]
    inside = load_dataset("cifar100", tmp_path / "cifar-100-python")
    assert inside.fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar100", "cifar-100-python/train"),
        ("cifar100", "cifar-100-python/meta"),
    ],
)
def test_cifar_pickle_that_would_run_code_is_refused(tmp_path: Path, name: str, victim: str) -> None:
    write_cifar_batches(tmp_path)
    write_cifar100(tmp_path, cifar100_files())
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(witness),)

    (tmp_path / victim).write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=rf"{victim}.*mkdir"):
        load_dataset(name, tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn(tmp_path: Path, compressed: bool) -> None:
    files = write_svhn(tmp_path, compressed)
    data = load_dataset("svhn", tmp_path)
    check_shape(data, 12, 6)
    train, test = (files[part]["X"].transpose(3, 2, 0, 1) for part in ("train", "test"))
    np.testing.assert_allclose(data.x_train.numpy(), standardised(train, train), atol=2e-6)
    np.testing.assert_allclose(data.x_test.numpy(), standardised(test, train), atol=2e-6)
    assert files["train"]["y"][:5].ravel().tolist() == [1, 4, 7, 10, 3]
    assert data.y_train[:5].tolist() == [1, 4, 7, 0, 3] and data.class_names == tuple("0123456789")


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


@pytest.mark.parametrize("value", range(0, 256, 15))
def test_a_constant_channel_is_centred_and_not_scaled(value: int) -> None:
    images = random_images(12, 3, 4, 7)
    images[:, 1] = value
    unseen = random_images(5, 3, 4, 7)
    labels = np.arange(12) % 2
    raw = Raw(Images(images, labels), Images(unseen, labels[:5]), ("a", "b"), 255.0, "here")
    data = standardise("folder", raw, None, None, None)
    assert data.std[1] == 1.0 and data.mean[1] == value / 255
    assert bool((data.x_train[:, 1] == 0).all())
    np.testing.assert_allclose(data.x_test[:, 1].numpy(), (unseen[:, 1] / 255.0 - value / 255), atol=1e-6)


def test_a_channel_of_which_one_pixel_differs_is_scaled() -> None:
    images = np.full((500, 1, 40, 40), 77, dtype=np.uint8)
    images[3, 0, 5, 6] = 78
    labels = np.arange(500) % 2
    raw = Raw(Images(images, labels), Images(images[:9], labels[:9]), ("a", "b"), 255.0, "here")
    data = standardise("folder", raw, None, None, None)
    assert data.std[0] == pytest.approx((images / 255).std(), rel=1e-6) and data.x_train.max() > 100


def test_class_names_that_cannot_be_printed_are_refused() -> None:
    images = Images(random_images(4, 1, 2, 2), np.arange(4) % 2)
    for name in ("\x1b[2Jcat", "cat\udcff", "cat\n"):
        raw = Raw(images, images, ("dog", name), 255.0, "here")
        with pytest.raises(
            UserError, match=r"here: expected class names that can be printed, got '(cat|.x1b)"
        ):
            standardise("folder", raw, None, None, None)


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
        ("kmnist", "kmnist-train-imgs.npz.*KMNIST/raw/train-images-idx3-ubyte.*datasets.KMNIST"),
        ("semeion", "semeion.npz.*semeion.data"),
        ("cifar10", "data_batch_1.*cifar10_jpeg_24k.zip"),
        ("cifar100", "cifar-100-python/train.*datasets.CIFAR100"),
        ("svhn", "train_32x32.mat.*test_32x32.mat.*datasets.SVHN"),
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
def test_cut_gzip_npz_zip_pickle_and_mat(tmp_path: Path, keep: int) -> None:
    pytest.importorskip("PIL")
    write_mnist_raw(tmp_path / "gz", ".gz")
    write_cifar_batches(tmp_path / "cifar")
    np.savez_compressed(tmp_path / "semeion.npz", images=random_images(20, 16, 16), labels=np.arange(20) % 10)
    write_zip(tmp_path / "images.zip", folder_images())
    write_mnist_raw(tmp_path / "kmnist-gz", ".gz", place="KMNIST/raw")
    write_kmnist_npz(tmp_path / "kmnist")
    write_cifar100(tmp_path / "test", cifar100_files())
    write_cifar100(tmp_path / "meta", cifar100_files())
    write_svhn(tmp_path / "svhn")
    write_svhn(tmp_path / "plain-svhn", compressed=False)
    cases = (
        ("mnist", tmp_path / "gz", tmp_path / "gz" / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"),
        ("cifar10", tmp_path / "cifar", tmp_path / "cifar" / "cifar-10-batches-py" / "test_batch"),
        ("semeion", tmp_path, tmp_path / "semeion.npz"),
        ("folder", tmp_path / "images.zip", tmp_path / "images.zip"),
        (
            "kmnist",
            tmp_path / "kmnist-gz",
            tmp_path / "kmnist-gz" / "KMNIST" / "raw" / "train-images-idx3-ubyte.gz",
        ),
        ("kmnist", tmp_path / "kmnist", tmp_path / "kmnist" / "kmnist-test-imgs.npz"),
        ("cifar100", tmp_path / "test", tmp_path / "test" / "cifar-100-python" / "test"),
        ("cifar100", tmp_path / "meta", tmp_path / "meta" / "cifar-100-python" / "meta"),
        ("svhn", tmp_path / "svhn", tmp_path / "svhn" / "train_32x32.mat"),
        ("svhn", tmp_path / "plain-svhn", tmp_path / "plain-svhn" / "test_32x32.mat"),
    )
    for name, root, victim in cases:
        load_dataset(name, root)
        victim.write_bytes(victim.read_bytes()[:keep])
        with pytest.raises(UserError, match=victim.name):
            load_dataset(name, root)


def test_damaged_kmnist_npz(tmp_path: Path) -> None:
    write_kmnist_npz(tmp_path)
    images, labels = (tmp_path / f"kmnist-test-{kind}.npz" for kind in ("imgs", "labels"))
    for path, array, message in (
        (images, random_images(20, 28, 27), r"expected uint8 images of 28x28, got uint8 of \(28, 27\)"),
        (images, random_images(19, 28, 28), "19 images but 20 labels"),
        (labels, np.full(20, 10), "labels run from 10 to 10, expected 0 to 9"),
        (labels, np.zeros((20, 10), dtype=np.uint8), "expected a list of integer labels"),
    ):
        whole = path.read_bytes()
        np.savez(path, array)
        with pytest.raises(UserError, match=message):
            load_dataset("kmnist", tmp_path)
        path.write_bytes(whole)
    whole = labels.read_bytes()
    for place, value in ((8, 1), (10, 99)):  # in the zip's directory: encrypted, an unknown compression
        damaged = bytearray(whole)
        damaged[whole.index(b"PK\1\2") + place] = value
        labels.write_bytes(damaged)
        with pytest.raises(UserError, match=r"kmnist-test-labels.npz: not a readable .npz file"):
            load_dataset("kmnist", tmp_path)
    np.savez(images, images=random_images(20, 28, 28))
    with pytest.raises(UserError, match=r"kmnist-test-imgs.npz: no array named arr_0; it holds images"):
        load_dataset("kmnist", tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match=r"lacks kmnist-test-labels.npz"):
        load_dataset("kmnist", tmp_path)


def test_damaged_cifar100(tmp_path: Path) -> None:
    for file, key, value, message in (
        ("train", "data", random_images(8, 3071), "train: expected an array 'data' of uint8 rows of 3072"),
        ("train", "fine_labels", [0] * 7, "train: 8 images but 7 labels"),
        ("test", "fine_labels", [0, 1, 2, 100], "test: labels run from 0 to 100, expected 0 to 99"),
        ("test", "fine_labels", None, "test: expected a list 'fine_labels' of integers"),
        ("meta", "fine_label_names", ["apple"] * 99, "meta: expected 100 class names, found 99"),
        ("meta", "fine_label_names", [1] * 100, "meta: expected a list 'fine_label_names' of names"),
    ):
        files = cifar100_files()
        files[file][key] = value
        write_cifar100(tmp_path, files)
        with pytest.raises(UserError, match=message):
            load_dataset("cifar100", tmp_path)
    write_cifar100(tmp_path, cifar100_files())
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match="train: expected a pickled dictionary, found list"):
        load_dataset("cifar100", tmp_path)
    (tmp_path / "cifar-100-python" / "meta").unlink()
    with pytest.raises(UserError, match="lacks meta"):
        load_dataset("cifar100", tmp_path)


def test_damaged_svhn(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    images, labels = random_images(32, 32, 3, 5), np.full((5, 1), 10, dtype=np.uint8)
    for arrays, message in (
        ({"X": images}, "no array named y; it holds X"),
        ({"X": images[1:], "y": labels}, "expected 'X' of 32x32x3xn, got 31x32x3x5"),
        ({"X": images[..., 0], "y": labels}, "expected 'X' of 32x32x3xn, got 32x32x3$"),
        ({"X": images / 255, "y": labels}, "'X' is not an array of uint8 values"),
        ({"X": images, "y": labels.T}, "expected 'y' of nx1, got 1x5"),
        ({"X": images, "y": labels[1:]}, "5 images but 4 labels"),
        ({"X": images, "y": labels - 10}, "labels run from 0 to 0, expected 1 to 10"),
        ({"X": images, "y": labels + 1}, "labels run from 11 to 11, expected 1 to 10"),
        ({"X": images[..., :0], "y": labels[:0]}, "no images"),
    ):
        savemat(path, arrays, do_compression=True)
        with pytest.raises(UserError, match=rf"test_32x32.mat: .*{message}"):
            load_dataset("svhn", tmp_path)
    path.write_bytes(b"<!doctype html>" * 20)
    with pytest.raises(UserError, match=r"test_32x32.mat: not a little-endian MATLAB 5 file"):
        load_dataset("svhn", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"lacks test_32x32.mat"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_byte_around_the_pixels_of_svhn_is_seen_or_harmless(tmp_path: Path, compressed: bool) -> None:
    arrays = write_svhn(tmp_path, compressed, train=1, test=4)["test"]
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    # What has no checksum in an uncompressed file: the pixels, and the last four bytes, which are the labels.
    headers = [*range(124, 192), *range(len(whole) - 56, len(whole) - 4)]
    places = range(124, len(whole), 499) if compressed else headers
    expected = arrays["X"].transpose(3, 2, 0, 1)
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        try:
            images, labels = read_svhn(path)
        except UserError as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert np.array_equal(images, expected) and labels.tolist() == [1, 4, 7, 0]
    assert refused > len(places) / 2


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


def saved(picture: Any, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pictures_of_every_mode_of_eight_bits_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    coloured = image.fromarray(random_images(1, 6, 6, 4)[0], "RGBA")
    palette = coloured.convert("RGB").quantize(20)
    pictures = {
        "1.png": saved(coloured.convert("1")),
        "L.png": saved(coloured.convert("L")),
        "LA.png": saved(coloured.convert("LA")),
        "P.png": saved(palette),
        "transparent P.png": saved(palette, transparency=bytes(range(0, 200, 10))),
        "transparent P.gif": saved(palette, "GIF", transparency=3),
        "RGB.tif": saved(coloured.convert("RGB"), "TIFF"),
        "RGB of LZW.tif": saved(coloured.convert("RGB"), "TIFF", compression="tiff_lzw"),
        "RGBA.webp": saved(coloured, "WEBP"),
        "CMYK.jfif": saved(coloured.convert("CMYK"), "JPEG"),
        "YCbCr.jpg": saved(coloured.convert("RGB"), "JPEG"),
        "RGB.bmp": saved(coloured.convert("RGB"), "BMP"),
        "RGB.ppm": saved(coloured.convert("RGB"), "PPM"),
    }
    for mode, channels in (("L", 1), ("RGB", 3)):
        held = {name: content for name, content in pictures.items() if (name[0] in "1L") == (mode == "L")}
        places = [f"{part}/{group}/" for part in ("train", "test") for group in "ab"]
        files = {place + name: content for place in places for name, content in held.items()}
        tree = ImageTree(write_tree(tmp_path / mode, files))
        chosen = tree.pick("train", None, 0)
        images, labels = tree.decode(chosen)
        assert images.shape == (2 * len(held), channels, 6, 6)
        assert labels.tolist() == [label for _, label in chosen]
        for found, (name, _) in zip(images, chosen, strict=True):
            expected = np.asarray(image.open(io.BytesIO(files[name])).convert(mode)).reshape(6, 6, channels)
            assert np.array_equal(found.transpose(1, 2, 0), expected), name


def png_of_16_bits(colour: int, channels: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        start, end = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
        return start + kind + content + end

    rows = b"".join(b"\0" + random_images(1, 12 * channels, seed=row).tobytes() for row in range(6))
    header = struct.pack(">IIBBBBB", 6, 6, 16, colour, 0, 0, 0)
    ends = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(ends)


def test_pictures_of_more_than_eight_bits_are_refused_by_name(tmp_path: Path) -> None:
    """Pillow clips some of them to white, and of others leaves out the lower half without a word."""
    image = pytest.importorskip("PIL.Image")
    numbers = np.random.default_rng(0).integers(256, 65536, (6, 6))
    pictures = {
        "I16.png": saved(image.fromarray(numbers.astype(np.uint16))),
        "I16.tif": saved(image.fromarray(numbers.astype(np.uint16)), "TIFF"),
        "I.tif": saved(image.fromarray(numbers.astype(np.int32)), "TIFF"),
        "F.tif": saved(image.fromarray(numbers.astype(np.float32)), "TIFF"),
        "grey.png": png_of_16_bits(0, 1),
        "RGB.png": png_of_16_bits(2, 3),
        "LA.png": png_of_16_bits(4, 2),
        "RGBA.png": png_of_16_bits(6, 4),
        "RGB.ppm": b"P6 6 6 65535\n" + random_images(1, 216).tobytes(),
        "grey.pgm": b"P2 6 6 1023\n" + b"1000 " * 36,
    }
    for name, content in pictures.items():
        files = {**folder_images(), f"train/dog/{name}": content}
        message = rf"train/dog/{name} is not .*expected 8 bits a channel.*got (16|32) bits"
        with pytest.raises(UserError, match=message):
            load_dataset("folder", write_tree(tmp_path / name, files))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("train/fox/", r"got none in train/fox: fill or remove it"),
        ("test/emu/.gitkeep", None),
        ("train/fox/.gitkeep", r"got none in train/fox"),
        ("train/fox/notes.txt", r"got none in train/fox"),
        ("train/fox/1.heic", r"got train/fox/1.heic: move"),
        ("train/cat/1.HEIC", r"got train/cat/1.HEIC: move"),
        ("train/fox/deep/1.png", r"got train/fox/deep/"),
        ("train/cat/deep/1.png", r"got train/cat/deep/"),
        ("train/1.png", r"got train/1.png"),
        ("train/fox.zip", r"got train/fox.zip"),
        ("train/labels.csv", None),
        ("train/cat/Thumbs.db", None),
        ("train/.cache/1.png", None),
        ("val/cat/1.png", None),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_class_of_pictures_is_named_or_changes_nothing(
    tmp_path: Path, added: str, message: str | None, packed: bool
) -> None:
    """A class that went missing would shift the labels of those behind it."""
    files = {f"{part}/{group}/1.png": b"" for part in ("train", "test") for group in ("cat", "emu", "gnu")}
    if packed:
        root = write_zip(tmp_path / "tree.zip", {**files, added: b""}, "around/")
    else:
        root = write_tree(tmp_path, files if added.endswith("/") else {**files, added: b""})
        (root / added).parent.mkdir(parents=True, exist_ok=True)
        (root / added if added.endswith("/") else root).mkdir(exist_ok=True)
    if message is None:
        tree = ImageTree(root)
        tree.close()
        assert tree.classes == ["cat", "emu", "gnu"]
        assert [label for _, label in tree.pick("train", None, 0)] == [0, 1, 2]
    else:
        with pytest.raises(UserError, match=message.replace("train", "(around/)?train", 1)):
            ImageTree(root)


def test_links_that_lead_nowhere_pipes_and_devices_are_named(tmp_path: Path) -> None:
    files = {f"{part}/{group}/1.png": b"" for part in ("train", "test") for group in ("cat", "emu")}
    for name, target, message in (
        ("fox", "nowhere", "none in train/fox"),
        ("cat/up", "..", "got train/cat/up/"),
        ("up", ".", "got train/up/"),
        ("cat/itself.png", "itself.png", "got train/cat/itself.png/"),
        ("cat/gone.png", "nowhere", "got train/cat/gone.png/"),
        ("cat/device.png", "/dev/zero", "got train/cat/device.png/"),
        ("cat/pipe.png", None, "got train/cat/pipe.png/"),
    ):
        place = write_tree(tmp_path / f"tree of {name}".replace("/", " "), files) / "train" / name
        if target is None:
            os.mkfifo(place)
        else:
            place.symlink_to(target)
        with pytest.raises(UserError, match=message):
            ImageTree(tmp_path / f"tree of {name}".replace("/", " "))
    os.mkfifo(tmp_path / "pipe")
    for kind in ("folder", "semeion", "mnist", "cifar10"):
        with pytest.raises(UserError, match=r"expected a regular file|none of these is there"):
            load_dataset(kind, tmp_path / "pipe")


def test_zip_files_of_two_trees_or_two_members_of_one_name(tmp_path: Path) -> None:
    files = {f"{part}/{group}/1.png": b"" for part in ("train", "test") for group in ("cat", "emu")}
    both = {f"{top}/{name}": content for top in ("old", "new") for name, content in files.items()}
    with pytest.raises(UserError, match=r"expected one folder with train/ and test/, got new, old"):
        ImageTree(write_zip(tmp_path / "two.zip", both))
    path = write_zip(tmp_path / "twice.zip", files)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("train/cat/1.png", b"another")
    with pytest.raises(UserError, match="two of its members have one name"):
        ImageTree(path)


def test_forty_equal_images_end_in_a_clear_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    one = png(random_images(1, 8, 8)[0])
    counts = {"train": 20, "test": 5}
    files = {f"{part}/{c}/{i}.png": one for part, count in counts.items() for c in "ab" for i in range(count)}
    root, out = write_tree(tmp_path / "tree", files), tmp_path / "out"
    where = ["--data-root", str(root), "--out", str(out)]
    code = main(["train", "folder", *where, "--epochs", "3", "--no-compare"])
    told = capsys.readouterr()
    assert code == 0 and "groups of equal samples" in told.out and (out / "report.html").is_file(), told.err


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
