"""Read the data once for the model and a second time without it: samples that change, go or come are seen.

Each sample, inputs and targets, has a 64-bit digest. A guarantee is about one training set: where a second
reading has other digests, or another number of samples, the data are refused, naming the first that differs.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gcfast.features.duplicates import RowKeys, _keys, _parts
from gcfast.features.loader import Source, source_of, tensors

log = logging.getLogger("gcfast")

_MORE = 100  # beside twice the length, after which data are taken to have no end
_PLAIN = (str, bytes, bool, int, float, complex, type(None), np.generic)


class Reading:
    """One reading of the data, batch by batch, and a second one that is compared with it.

    Iterate over it once, for pairs (inputs, targets); then call :meth:`again`. ``copies``: groups of equal
    inputs are wanted; False as soon as a tensor among them has not its samples first, for then nothing tells
    what belongs to which sample. ``n``: samples read.

    Raises ValueError and TypeError naming ``data`` or ``fixed``.
    """

    def __init__(self, data: Any, fixed: bool = False, copies: bool = False) -> None:
        self.source: Source = source_of(data, fixed)
        self.copies = copies
        self.n = 0
        self.seconds = 0.0
        self._inputs, self._others = RowKeys(), RowKeys()

    @property
    def held(self) -> bool:
        """Whether batches stay as they are: other sources may use their memory again for the next one."""
        return self.source.kind == "tensors"

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        batches, twice = 0, self.source.kind == "read twice"
        first: Tensor | None = None
        said = self.source.n
        if twice and said is None:  # in batches, or in samples
            said = len(self.source.batches)  # type: ignore[arg-type]
        for x, y in self.source:
            rows = rows_of(x, y)
            if batches == 0:
                first = y
            _alike(first, y, batches)
            if twice or self.copies:
                parts, by_rows = _digestible(x, rows, self.copies)
                self.copies = self.copies and by_rows
                self._inputs.mixed |= not by_rows  # of some batches there are digests alone
                self._inputs.add(parts)
            if twice and y is not None:
                self._others.add([y])
            self.n, batches = self.n + rows, batches + 1
            come = batches if self.source.n is None else self.n
            if twice and said is not None and come > 2 * said + _MORE:
                raise ValueError(
                    f"data: a reading goes on after {batches} batches of {self.n} samples, where the "
                    f"length is {said}; give data that end where they say"
                )
            if rows:
                yield x, y
        self._count(batches)

    def _count(self, batches: int) -> None:
        """The first reading must have given all that the data say they have."""
        if self.source.kind != "read twice" or self.n == 0:
            return
        n = self.source.n
        if n is not None and self.n != n:
            did = "drops" if self.n < n else "repeats"
            raise ValueError(
                f"data: a reading gave {self.n} samples where the dataset has {n}: something on the way (a "
                f"collate_fn, workers that do not share an IterableDataset) {did} samples. Mend that, or say "
                "fixed=True, which takes what one reading gives for the training set"
            )
        if n is None:
            expected = len(self.source.batches)  # type: ignore[arg-type]
            if expected not in (batches, self.n):
                raise ValueError(
                    f"data: a reading ended after {batches} batches of {self.n} samples, where len(data) is "
                    f"{expected}; give data that end where they say, or fixed=True"
                )

    def again(self, told: Callable[[str, float], None] | None = None) -> list[list[int]]:
        """Read a second time, where that is needed, and compare; groups of equal inputs, if they are wanted.

        ``told`` hears ("second reading", fraction done).
        """
        if self.source.once and self.copies and self._inputs.candidates():
            i, j = self._inputs.candidates()[0][:2]
            raise ValueError(
                f"data: samples {i} and {j} seem equal, which a second reading must confirm, but this "
                f"{type(self.source.batches).__name__} can be read only once; give data to read twice"
            )
        if self.source.kind != "read twice":
            parts = (_digestible(x, rows_of(x, y), True)[0] for x, y in self.source)
            return self._inputs.confirm(parts) if self.copies else []
        began = time.perf_counter()
        compared = self._compared(told)
        groups = self._inputs.confirm(compared) if self.copies else []
        for _ in compared:  # what is left when the last candidate is confirmed
            pass
        self.seconds = time.perf_counter() - began
        log.info("data: read a second time, %d samples in %.2g s, without the model", self.n, self.seconds)
        return groups

    def _compared(self, told: Callable[[str, float], None] | None) -> Iterator[list[Tensor]]:
        start = 0
        for x, y in self.source:
            rows = rows_of(x, y)
            parts, _ = _digestible(x, rows, self.copies)
            _same("its inputs", self._inputs.first_other(start, parts), self.n)
            if (y is None) != (len(self._others) == 0):
                _same("its targets", start, self.n)
            if y is not None:
                _same("its target", self._others.first_other(start, [y]), self.n)
            start += rows
            if told is not None:
                told("second reading", start / self.n)
            yield parts
        if start < self.n:
            raise ValueError(
                f"data: the second reading ended after {start} samples, the first one after {self.n}; give "
                "the same samples at every reading"
            )

    def statement(self) -> tuple[Literal["holds", "not checked"], str] | None:
        """Status and words of the assumption that the data are fixed; None for tensors, which are."""
        if self.source.kind == "tensors":
            return None
        if self.source.kind == "fixed":
            return "not checked", (
                f"fixed=True: the user says that the {self.n} samples that one reading gave are the training "
                "set and do not change"
            )
        return "holds", (
            f"{self.n} samples were read twice, the second time without the model in {self.seconds:.2g} s: "
            "inputs and targets have the same 64-bit digests"
        )


def second_reading_seconds(source: Source, n: int) -> float:
    """What a second reading of n samples would take, judged by the first batches, read for half a second."""
    began, keys = time.perf_counter(), RowKeys()
    keys.mixed = True
    for x, y in source:
        keys.add(_digestible(x, rows_of(x, y), False)[0])
        if time.perf_counter() - began > 0.5:
            break
    return (time.perf_counter() - began) * n / max(1, len(keys))


def _same(what: str, index: int | None, n: int) -> None:
    if index is None:
        return
    if index >= n:
        raise ValueError(
            f"data: the second reading goes on after the {n} samples of the first one; give the same samples "
            "at every reading"
        )
    raise ValueError(
        f"data: sample {index} is another one in the second reading, in {what}: something shuffles or "
        "augments them on the way. Give the samples in a fixed order and without random transforms; the "
        "guarantee is about one fixed training set"
    )


def _alike(first: Tensor | None, y: Tensor | None, batch: int) -> None:
    """ValueError where targets of a batch are of another kind than those of the first one."""
    kinds = ["no targets" if t is None else f"targets {(*t.shape[1:],)} {t.dtype} each" for t in (first, y)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"data: expected targets of one kind in all batches; batch 0 has {kinds[0]}, batch {batch} "
            f"{kinds[1]}"
        )


def rows_of(x: Any, y: Tensor | None) -> int:
    """How many samples a batch has."""
    if y is not None:
        return len(y)
    found = next((t for t in tensors(x) if t.dim()), None)
    if found is None:
        raise ValueError("data: expected inputs with at least one tensor, samples first, or targets")
    return len(found)


def _digestible(x: Any, rows: int, copies: bool) -> tuple[list[Tensor], bool]:
    """Tensors with the samples first that say all of the inputs, and whether those given have them first."""
    found, by_rows = [], True
    for leaf in tree_leaves(x, is_leaf=lambda value: is_column(value, rows)):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc":
            leaf = torch.from_numpy(leaf)
        if isinstance(leaf, Tensor):
            leaf = leaf if leaf.layout == torch.strided else leaf.to_dense()
            if leaf.dim() == 0 or len(leaf) != rows:  # of the whole batch
                by_rows = False
                leaf = _keys(_parts([leaf[None]], "data")).expand(rows)
            found.append(leaf)
        elif is_column(leaf, rows):
            found.append(torch.stack([_digest(value) for value in leaf]))
        elif isinstance(leaf, _PLAIN):
            found.append(_digest(leaf).expand(rows, 2))
        else:
            raise TypeError(
                f"data: expected inputs of tensors, arrays, numbers and strings, which a second reading is "
                f"compared by; got a {type(leaf).__name__}. Give its tensors"
                + ("" if copies else ", or say fixed=True, which lists that as an assumption of yours")
            )
    return found, by_rows


def is_column(value: Any, rows: int) -> bool:
    """Whether this is a list with a plain value, such as a string, for each sample."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == rows > 0
        and all(isinstance(v, _PLAIN) for v in value)
    )


def _digest(value: Any) -> Tensor:
    """128 bits of a plain value, (2,) int64: values of one digest may be called equal."""
    text = f"{type(value).__name__} {value!r}".encode()
    return torch.from_numpy(np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.int64).copy())
