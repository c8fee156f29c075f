"""Real data sets as tensors, read from files the user already has; nothing is ever downloaded.

=========  =====================================================================================
name       where it is looked for under ``root``
=========  =====================================================================================
digits     nowhere: scikit-learn ships it
mnist      ``mnist.npz``, or torchvision's ``MNIST/raw/*-ubyte`` (``.gz`` allowed)
kmnist     ``kmnist-*-imgs.npz`` and ``-labels.npz``, or torchvision's ``KMNIST/raw/*-ubyte``
semeion    ``semeion.npz``, or UCI's and torchvision's ``semeion.data``
cifar10    ``cifar-10-batches-py`` as torchvision stores it, or ``cifar10_jpeg_24k.zip``
cifar100   ``cifar-100-python`` as torchvision stores it; the labels are the fine ones
svhn       ``train_32x32.mat`` and ``test_32x32.mat``
folder     ``root`` itself, a folder or zip of ``train/<class>/*.png|jpg`` and ``test/<class>/…``
=========  =====================================================================================

``root`` may also be the file itself where one file has it all. Every input is standardised with one
mean and one standard deviation a channel, taken from the training samples in use. Duplicate samples
are kept: what they mean for the training loss is the certificate's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcfast.cli.data.formats import (
    Images,
    read_cifar_batch,
    read_cifar_names,
    read_idx,
    read_npz,
    read_semeion_text,
    read_svhn,
)
from gcfast.cli.data.image_tree import ImageTree
from gcfast.cli.data.split import DataSplit, Raw, standardise
from gcfast.errors import UserError, import_optional

DATASETS = ("digits", "mnist", "kmnist", "semeion", "cifar10", "cifar100", "svhn", "folder")
_TEST_SHARE = 0.3  # of data sets that come without a test set


def load_dataset(
    name: str,
    root: str | Path | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    *,
    image_size: int | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> DataSplit:
    """Read a data set by name.

    ``limit`` and ``test_limit`` keep the first samples: in the order the split drew them (digits,
    semeion), an equal share of each class of images in folders, otherwise in file order.
    ``seed`` decides the stratified split of data sets that have none (digits, semeion) and the choice
    among folder images. ``image_size`` resizes folder images to a square. ``statistics`` = (mean, std)
    a channel replaces those of the training samples.
    """
    if name not in DATASETS:
        raise UserError(f"DATA: expected one of {', '.join(DATASETS)}, got {name!r}")
    for argument, value in (("--limit", limit), ("--test-limit", test_limit), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{argument}: expected at least 1, got {value}")
    if seed < 0:
        raise UserError(f"--seed: expected 0 or more, got {seed}")
    if image_size is not None and name != "folder":
        raise UserError(f"--image-size: only images of DATA=folder are resized, not {name}")
    if name == "digits":
        raw = _digits(seed)
    else:
        folder = _existing_root(name, root)
        if name == "mnist":
            raw = _mnist(folder)
        elif name == "kmnist":
            raw = _kmnist(folder)
        elif name == "semeion":
            raw = _semeion(folder, seed)
        elif name == "cifar10":
            raw = _cifar10(folder, limit, test_limit, seed)
        elif name == "cifar100":
            raw = _cifar100(folder)
        elif name == "svhn":
            raw = _svhn(folder)
        else:
            raw = _folder(folder, limit, test_limit, seed, image_size)
    return standardise(name, raw, limit, test_limit, statistics)


def _existing_root(name: str, root: str | Path | None) -> Path:
    if root is None:
        raise UserError(f"--data-root: expected the place of {name}, got nothing. {_how_to_get(name)}")
    path = Path(root).expanduser()
    if not path.exists():
        raise UserError(f"--data-root: {path} does not exist. {_how_to_get(name)}")
    return path


def _how_to_get(name: str) -> str:
    return {
        "mnist": "It may hold mnist.npz, or MNIST/raw/train-images-idx3-ubyte and its like (or .gz);"
        " torchvision.datasets.MNIST(root, download=True) puts the latter there.",
        "kmnist": "It may hold kmnist-train-imgs.npz, kmnist-train-labels.npz and the same of test, or"
        " KMNIST/raw/train-images-idx3-ubyte and its like (or .gz); torchvision.datasets.KMNIST(root,"
        " download=True) puts the latter there.",
        "semeion": "It may hold semeion.npz or semeion.data; torchvision.datasets.SEMEION(root,"
        " download=True) puts the latter there.",
        "cifar10": "It may hold cifar-10-batches-py/ (data_batch_1 to 5, test_batch, batches.meta), which"
        " torchvision.datasets.CIFAR10(root, download=True) puts there, or cifar10_jpeg_24k.zip.",
        "cifar100": "It may hold cifar-100-python/ (train, test, meta), which"
        " torchvision.datasets.CIFAR100(root, download=True) puts there.",
        "svhn": "It may hold train_32x32.mat and test_32x32.mat, which"
        " [torchvision.datasets.SVHN(root, split, download=True) for split in ('train', 'test')] puts there.",
        "folder": "It must be a folder or a .zip of train/<class>/*.png|jpg and test/<class>/*.png|jpg.",
    }[name]


def _not_found(name: str, looked_for: Sequence[Path]) -> UserError:
    files = ", ".join(str(path) for path in looked_for)
    return UserError(f"--data-root: none of these is there: {files}. {_how_to_get(name)}")


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(str(digit) for digit in range(classes))


def _digits(seed: int) -> Raw:
    load_digits = import_optional("sklearn.datasets", "the digits data set").load_digits
    split = import_optional("sklearn.model_selection", "the digits data set").train_test_split
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    x_train, x_test, y_train, y_test = split(
        images, labels, test_size=_TEST_SHARE, stratify=labels, random_state=seed
    )
    source = "scikit-learn's load_digits"
    return Raw(Images(x_train, y_train), Images(x_test, y_test), _numbers(10), 16.0, source)


def _files(
    name: str, folders: Sequence[Path], stems: Sequence[str], suffixes: Sequence[str] = ("",)
) -> list[Path]:
    """The files, all of the first folder that has any, each with its first suffix there; empty if none has.

    All of one folder, so that images never meet the labels of another copy.
    """
    for folder in folders:
        choices = [[folder / f"{stem}{suffix}" for suffix in suffixes] for stem in stems]
        found = [next((path for path in paths if path.is_file()), None) for paths in choices]
        files = [path for path in found if path is not None]
        if len(files) == len(stems):
            return files
        if files:
            absent = [stem for stem, path in zip(stems, found, strict=True) if path is None]
            raise UserError(f"--data-root: {folder} lacks {', '.join(absent)}. {_how_to_get(name)}")
    return []


_GREY28: tuple[tuple[int, ...], ...] = ((28, 28), (), (28, 28), ())  # of images and labels, twice


def _mnist(root: Path) -> Raw:
    archive = root if root.is_file() else root / "mnist.npz"
    if archive.is_file():
        keys = ("train_images", "train_labels", "test_images", "test_labels")
        arrays = read_npz(archive, dict(zip(keys, _GREY28, strict=True)))
        return _grey28([arrays[key] for key in keys], _numbers(10), str(archive))
    files = _idx_files("mnist", root, archive)
    return _grey28(list(map(read_idx, files, _GREY28)), _numbers(10), str(files[0].parent))


def _kmnist(root: Path) -> Raw:
    stems = [f"kmnist-{part}-{kind}.npz" for part in ("train", "test") for kind in ("imgs", "labels")]
    files = _files("kmnist", [root], stems)
    if files:
        arrays = [read_npz(path, {"arr_0": size})["arr_0"] for path, size in zip(files, _GREY28, strict=True)]
    else:
        files = _idx_files("kmnist", root, root / stems[0])
        arrays = list(map(read_idx, files, _GREY28))
    return _grey28(arrays, _KMNIST_CLASSES, str(files[0].parent))


_KMNIST_CLASSES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def _idx_files(name: str, root: Path, other: Path) -> list[Path]:
    """MNIST's four files or their namesakes; ``other`` is what the caller looked for before."""
    folders = (root / name.upper() / "raw", root / "raw", root)
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = _files(name, folders, stems, ("", ".gz"))
    if not files:
        raise _not_found(name, [other, *(folder / stems[0] for folder in folders)])
    return files


def _grey28(arrays: Sequence[NDArray[Any]], class_names: tuple[str, ...], source: str) -> Raw:
    """Training images and labels, test images and labels, as MNIST and its namesakes have them."""
    train, test = (
        Images(images[:, None], labels.astype(np.int64)) for images, labels in (arrays[:2], arrays[2:])
    )
    return Raw(train, test, class_names, 255.0, source)


def _semeion(root: Path, seed: int) -> Raw:
    candidates = (root,) if root.is_file() else (root / "semeion.npz", root / "semeion.data")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise _not_found("semeion", candidates)
    if path.suffix == ".npz":
        arrays = read_npz(path, {"images": (16, 16), "labels": ()})
        whole = Images(arrays["images"][:, None], arrays["labels"].astype(np.int64))
    else:
        whole = read_semeion_text(path)
    whole.check(str(path), 10)
    train_part, test_part = (
        Images(whole.images[chosen], whole.labels[chosen]) for chosen in _stratified(whole.labels, seed)
    )
    return Raw(train_part, test_part, _numbers(10), 255.0, str(path))


def _stratified(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and test indices in drawn order, the same share of every class in each."""
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test[generator.permutation(members)[: round(_TEST_SHARE * len(members))]] = True
    order = generator.permutation(len(labels))
    return order[~test[order]], order[test[order]]


def _cifar10(root: Path, limit: int | None, test_limit: int | None, seed: int) -> Raw:
    jpegs = root if root.is_file() else root / "cifar10_jpeg_24k.zip"
    folders = (root / "cifar-10-batches-py", root)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = _files("cifar10", folders, names)
    if not files:
        if not jpegs.is_file():
            raise _not_found("cifar10", [*(place / names[0] for place in folders), jpegs])
        raw = _folder(jpegs, limit, test_limit, seed, None)
        if raw.train.images.shape[1:] != (3, 32, 32) or len(raw.class_names) != 10:
            raise UserError(
                f"{jpegs}: expected RGB images of 32x32 in 10 classes; for other images use DATA=folder"
            )
        return raw
    *batches, test = (read_cifar_batch(path, "labels").check(str(path), 10) for path in files)
    train = Images(
        np.concatenate([part.images for part in batches]), np.concatenate([part.labels for part in batches])
    )
    return Raw(train, test, _CIFAR10_CLASSES, 255.0, str(files[0].parent))


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar100(root: Path) -> Raw:
    folders = (root / "cifar-100-python", root)
    files = _files("cifar100", folders, ("train", "test", "meta"))
    if not files:
        raise _not_found("cifar100", [place / "train" for place in folders])
    *parts, meta = files
    names = read_cifar_names(meta, "fine_label_names")
    if len(names) != 100:
        raise UserError(f"{meta}: expected 100 class names, found {len(names)}")
    train, test = (read_cifar_batch(path, "fine_labels").check(str(path), 100) for path in parts)
    return Raw(train, test, names, 255.0, str(meta.parent))


def _svhn(root: Path) -> Raw:
    stems = ("train_32x32.mat", "test_32x32.mat")
    files = _files("svhn", [root], stems)
    if not files:
        raise _not_found("svhn", [root / stem for stem in stems])
    train, test = (read_svhn(path).check(str(path), 10) for path in files)
    return Raw(train, test, _numbers(10), 255.0, str(root))


def _folder(root: Path, limit: int | None, test_limit: int | None, seed: int, size: int | None) -> Raw:
    tree = ImageTree(root)
    try:
        train, test = tree.pick("train", limit, seed), tree.pick("test", test_limit, seed)
        # Together, so that both parts agree in size and in being grey or coloured.
        images, labels = tree.decode([*train, *test], size)
    finally:
        tree.close()
    cut = len(train)
    return Raw(
        Images(images[:cut], labels[:cut]),
        Images(images[cut:], labels[cut:]),
        tuple(tree.classes),
        255.0,
        str(root),
    )
