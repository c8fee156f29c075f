"""A cache of what enters the head, so that phase two trains without running the frozen body.

Kawaguchi and Sun, *A Recipe for Global Convergence Guarantee in Deep Neural Networks*, AAAI 2021: in phase
two all weights below the head are frozen, so what enters the head is one fixed matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.features.cached_head import CachedHead, output_shape
from gcfast.features.checks import check_features
from gcfast.features.collection import head_by_forward, output_of
from gcfast.features.frozen_body import BodySnapshot
from gcfast.features.loader import device_of, to_device
from gcfast.features.row_buffer import RowBuffer
from gcfast.features.second_look import SecondLook, by_rows, taken
from gcfast.features.second_reading import Reading
from gcfast.model import (
    FeatureTap,
    Head,
    WideLayerFound,
    check_wrappers,
    hidden_parameters,
    keeping_random_state,
    unwrap,
    wide_activation,
    without_gradients,
)
from gcfast.nn import WideLayer

STORES = ("auto", "below", "features")
_FEW = 16
_COMPARED = 64


class FeatureCache(Dataset[tuple[Tensor, Tensor]]):
    """What enters the head for every training sample, and the rest of the model, to train the head on.

    In phase two of `gcfast.TwoPhase` the hidden weights, normalisation statistics and dropout are frozen, so
    the body gives the same at every step. It is run once here, in evaluation mode, as phase two sees it;
    after that only `head` is run. Its parameters are the model's own: the optimizer, its momentum, its
    schedulers and its step count go on unchanged, and the model is trained when the loop ends.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 3))
    >>> opt = gcfast.TwoPhase(torch.optim.SGD(model.parameters(), lr=0.1), model, switch_step=None)
    >>> opt.switch()  # or the step that switches
    >>> cache = gcfast.FeatureCache(model, (torch.randn(8, 4), torch.randint(3, (8,))))
    >>> for z, y in cache.batches(4):  # or DataLoader(cache, batch_size=4, shuffle=True)
    ...     opt.zero_grad(); nn.functional.cross_entropy(cache.head(z), y).backward(); opt.step()

    Args:
        model: in phase two, plain or wrapped: nothing below its head requires gradients.
        data: the training set: (inputs, targets), a `Dataset`, a `DataLoader`, or batches (inputs, targets);
            what is no tensor is read a second time without the model, and compared.
        head: the last affine layer, a module or its name, where the model does not tell.
        store: what to hold of each sample. "features": the m numbers that enter the head, any float type.
            "below": the d numbers that enter the `gcfast.WideLayer` below it; `head` is then that layer and
            the head, and makes features by the batch. "auto": "below" where d < m, else "features".
            "features" is the faster one, several times so for m much above d, where m numbers a sample fit.
        device: where to hold the rows; the model's device by default.
        max_bytes: refuse beforehand to hold more than this; by default more than the device has free.
        fixed: the data are the same at every reading, by your word: they are read once, and not compared.

    Attributes:
        features: (n, d) or (n, m), what `head` takes, in the type the model computes it in.
        targets: (n, ...), as given.
        head: a module from such rows, (batch, d) or (batch, m), to outputs of the shape the model gives for a
            batch; (batch, C) where the model gives no tensor. Hooks of the model and of its body do not run.
        stored: "below" or "features".
        compared: with "below", the columns (drawn with seed 0) of the features of every sample that were
            compared with what the model gives the head; the other columns were compared for the first few
            samples alone. None where the features themselves are stored.
        nbytes, device, dtype: of what is held.

    As a dataset it has n pairs (row, target). `cache[i]` also takes a slice, a list or a tensor of indices;
    `DataLoader(cache, sampler=BatchSampler(RandomSampler(cache), 64, False), batch_size=None)` makes use of
    that, as does `batches`, the fastest, without a DataLoader.

    Raises:
        ValueError: something below the head requires gradients; the data change, drop or repeat samples, are
            empty or have no targets; a feature is not finite, or not of one sample alone; "below" is asked
            for without a WideLayer.
        HeadError: the model has no head. MemoryError: see `max_bytes`.
        RuntimeError: from `head`, `batches` and `check`, once a weight or buffer below the head has changed.
    """

    features: Tensor
    targets: Tensor
    head: nn.Module
    stored: str
    compared: Tensor | None

    @ordinary()
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        head: Head | nn.Module | str | None = None,
        store: str = "auto",
        device: torch.device | str | None = None,
        max_bytes: int | None = None,
        fixed: bool = False,
    ) -> None:
        errors.is_choice("store", store, STORES)
        errors.is_flag("fixed", fixed)
        place = None if device is None else errors.as_device("device", device)
        if place is not None and place.type == "meta":
            raise ValueError("device: expected one that holds numbers; got meta")
        root = unwrap(model)
        check_wrappers(model)
        with keeping_random_state(root):  # a DataLoader draws a seed for every pass
            self._fill(root, data, head, store, place, max_bytes, fixed)

    def _fill(
        self,
        model: nn.Module,
        data: Any,
        head: Any,
        store: str,
        device: Any,
        max_bytes: int | None,
        fixed: bool,
    ) -> None:
        place, reading = device_of(model), Reading(data, fixed)
        rows: RowBuffer | None = None
        for inputs, targets in reading:
            if targets is None:
                raise ValueError("data: expected (inputs, targets); there are no targets")
            inputs = to_device(inputs, place)
            if rows is None:
                x = _few(inputs, targets)
                found = head_by_forward(model, x, head)
                _check_frozen(model, found)
                wide = _wide_below(model, found, x, store)
                self.stored = "features" if wide is None else "below"
                self.compared = None if wide is None else _some_columns(wide.m).to(place)
                self._snapshot = BodySnapshot(model, found)
                with FeatureTap(model, found) as tap:
                    h, out = tap(x)
                looks = SecondLook(model, found if wide is None else wide.module)
                rows = RowBuffer(reading.source.n, device or place, max_bytes, _way_out(found, wide, store))
            if wide is None:
                with FeatureTap(model, found) as tap:
                    z, given = tap(inputs)
                output_of(found, z, given, rows.used)
            else:
                z = _entering(model, found, wide, inputs, self.compared, rows.used)
            if len(targets) != len(z):
                raise ValueError(f"data: a batch of {len(z)} inputs came with {len(targets)} targets")
            looks.keep(inputs, z)
            rows.add(z, targets)
        if rows is None:
            raise ValueError("data: the training set is empty")
        self.features, self.targets = rows.taken()
        check_features(self.features, "features")
        looks.finish()
        reading.again()
        layer = None if wide is None else wide.module
        assert layer is None or isinstance(layer, WideLayer)
        self.head = CachedHead(found, layer, output_shape(out, len(h), found), self._snapshot)
        self._check_first(self.features[: len(h)].to(place), out, found)

    @without_gradients()
    def _check_first(self, rows: Tensor, out: Any, head: Head) -> None:
        """The first batch through the rest must be what the model gave: a hook may do what no class says."""
        if not isinstance(out, Tensor) or out.numel() != len(rows) * head.out_features:
            return
        got, want = self.head(rows).double().reshape(-1), out.double().reshape(-1)
        close = 64 * torch.finfo(rows.dtype).eps * float(want.abs().amax() + 1e-30)
        if bool(((got - want).abs() > max(close, 1e-4 * float(want.abs().amax()))).any()):
            raise ValueError(
                f"model: run from {'its wide layer' if self.stored == 'below' else 'its head'} on it gives "
                "other outputs than as a whole; a hook or a wrapper changes them on the way"
            )

    # -- a dataset

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.features[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader fetches: one gather, split into the pairs it collates."""
        rows, targets = self[torch.as_tensor(indices, device=self.device)]
        return list(zip(rows.unbind(), targets.unbind(), strict=True))

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in batches (rows, targets), on the head's device; the last may be smaller.

        Shuffled by one `torch.randperm` from `generator` (torch's global one by default), drawn here.

        Raises:
            ValueError: batch_size < 1. RuntimeError: the cache is stale.
        """
        batch_size = errors.is_count("batch_size", batch_size)
        errors.is_generator("generator", generator)
        errors.is_flag("shuffle", shuffle)
        errors.is_flag("drop_last", drop_last)
        self._snapshot.check()
        n = len(self)
        order = None
        if shuffle:
            where = "cpu" if generator is None else generator.device
            order = torch.randperm(n, generator=generator, device=where).to(self.device)
        stop = n - n % batch_size if drop_last else n
        return self._iterate(order, batch_size, stop)

    def _iterate(self, order: Tensor | None, size: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for low in range(0, stop, size):
            rows = slice(low, low + size)
            z, y = self[rows if order is None else order[rows]]
            place = next(self.head.parameters()).device
            yield z.to(place), y.to(place)

    # -- what it is

    def check(self, model: nn.Module | None = None) -> None:
        """Raise RuntimeError if anything below the head is not, bit by bit, what the cache was made with.

        `head` and `batches` ask for this by version counters at every call, which overlooks writes through
        `Tensor.data`; this reads every bit. `model`: another one to compare with, say a reloaded one.
        """
        self._snapshot.check(model, full=True)

    @property
    def nbytes(self) -> int:
        """Bytes of features and targets."""
        return self.features.nbytes + self.targets.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Where features and targets are held."""
        return self.features.device

    def __repr__(self) -> str:
        kind = "inputs of the wide layer" if self.stored == "below" else "inputs of the head"
        n, k = self.features.shape
        return f"FeatureCache({n} {kind}, {k} wide, {self.dtype}, {self.device}, {self.nbytes:,} bytes)"


def _few(inputs: Any, targets: Tensor) -> Any:
    """The first samples of a batch, enough to look at a model with; all of it where samples are not rows."""
    if not by_rows(inputs, len(targets)):
        return inputs
    return taken(inputs, range(min(_FEW, len(targets))))


def _check_frozen(model: nn.Module, head: Head) -> None:
    trained = [name for name, p in hidden_parameters(model, head).items() if p.requires_grad]
    if trained:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        raise ValueError(
            f"model: {trained[0]!r}{more} below the head {head.name!r} still requires gradients, so what "
            "enters the head will change and must not be cached. Begin phase two first (TwoPhase.switch()), "
            "or call requires_grad_(False) on all but the head"
        )


def _wide_below(model: nn.Module, head: Head, x: Any, store: str) -> WideLayerFound | None:
    """The plain WideLayer whose output enters the head, if its inputs are what is to be stored."""
    found = None if store == "features" else wide_activation(model, head, x)
    if found is None or not found.recomputable:
        if store == "below":
            why = "" if found is None or found.altered is None else f"; of {found.name!r}: {found.altered}"
            raise ValueError(
                f"store: expected a plain gcfast.WideLayer directly below the head for 'below'; got none{why}"
            )
        return None
    return None if store == "auto" and found.d >= found.m else found


def _some_columns(m: int) -> Tensor:
    """Units at which the model's features are compared with what the cached head makes of the rows."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(
        m, (min(m, _COMPARED),), generator=generator, dtype=torch.int64, device="cpu"
    ).unique()


def _entering(
    model: nn.Module, head: Head, wide: WideLayerFound, inputs: Any, columns: Tensor | None, first: int
) -> Tensor:
    """What enters the wide layer; ValueError where what enters the head is not what the layer makes of it.

    And HeadError where the model's output is not what the head makes of that.

    All features of a sample would take as long as the wide layer itself: these columns tell whether the model
    does for every sample what it did for the few that were traced.
    """
    assert columns is not None
    with wide.narrowed(head, columns), FeatureTap(model, head, wide.module) as tap:
        h, z, given = tap(inputs)
        output_of(head, h, given, first)
    differs = wide.difference(z, h, first, columns)
    if differs is not None:
        raise ValueError(f"model: {differs}, so that its inputs must not be cached; use store='features'")
    return z


def _way_out(head: Head, wide: WideLayerFound | None, store: str) -> str:
    general = "device='cpu' to hold it in the host's memory, or a larger max_bytes"
    if wide is not None:
        return general
    if store == "features":
        return f"store='below' if a gcfast.WideLayer precedes the head, {general}"
    return f"gcfast.widen before training, whose wide layer's inputs are cached instead, {general}"
