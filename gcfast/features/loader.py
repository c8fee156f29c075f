"""Batches from tensors, a Dataset, a DataLoader or an iterable, always the same samples in the same order."""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from gcfast import errors

log = logging.getLogger("gcfast")

BATCH = 512
_WAY_OUT = (
    "give a torch.utils.data.Subset of the samples that you train on, or say fixed=True, which takes what "
    "one reading gives for the training set and lists that as an assumption of yours"
)


@dataclass(frozen=True)
class Source:
    """Where batches come from, and what is known of them before one is read.

    ``kind``: "tensors", which are as they are; "read twice", whose second reading is to be compared with the
    first; "fixed", of which the user says that nothing changes. ``n``: how many samples a reading must give
    (of "fixed" ones: as far as is known), None where nothing says. ``once``: there is no second reading.
    """

    batches: Iterable[Any]
    n: int | None
    kind: Literal["tensors", "read twice", "fixed"]
    once: bool = False

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        batches = iter(self.batches)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except IndexError as error:  # a dataset's way to say that there is no such sample
                raise ValueError(
                    f"data: reading it ended in an IndexError ({error}): is a length or an index beyond its "
                    "samples?"
                ) from error
            yield _pair(batch)


def _pair(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch) in (1, 2):
        if len(batch) == 1:
            return batch[0], None
        try:
            # without a device torch would move a tensor to the default one
            y = batch[1] if isinstance(batch[1], Tensor) else torch.as_tensor(batch[1], device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            what = type(batch[1]).__name__
            raise TypeError(f"data: expected targets as a tensor or numbers; got {what} ({error})") from None
        if y.dim() == 0:
            raise ValueError(
                "data: expected batches (inputs, targets) with the samples first; got a target without a "
                "dimension. torch.utils.data.DataLoader(data, batch_size=...) makes batches of single samples"
            )
        return batch[0], y
    length = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
    raise TypeError(f"data: expected batches (inputs, targets); got {type(batch).__name__}{length}")


def source_of(data: Any, fixed: bool = False) -> Source:
    """Batches in a fixed order, or an error that says what is wrong with ``data``.

    Tensors and a TensorDataset are taken as they are. A DataLoader over a map-style dataset is read whole, in
    the dataset's order, or in the order of a sampler that this module does not know, asked once; a warning
    in the log says so. ``fixed``: what one reading gives is the training set, by the user's word.
    """
    errors.is_flag("fixed", fixed)
    if isinstance(data, DataLoader):
        return _of_loader(data, fixed)
    if isinstance(data, Tensor):
        data = (data,)
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        return _of_tensors(data, BATCH)
    if isinstance(data, Dataset):
        return _of_loader(DataLoader(data, batch_size=BATCH), fixed)
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping, tuple, np.ndarray)):
        raise TypeError(
            f"data: expected (inputs, targets), a Dataset or a DataLoader; got {type(data).__name__}"
        )
    once = isinstance(data, Iterator)
    if fixed:
        return Source(data, None, "fixed", once)
    if once or _length(data) is None:
        lack = "can be read only once" if once else "does not say how long it is"
        raise ValueError(
            f"data: expected data whose second reading can be compared with the first; this "
            f"{type(data).__name__} {lack}. Give a Dataset or a list of batches, or say fixed=True, which "
            "takes what one reading gives for the training set and lists that as an assumption of yours"
        )
    return Source(data, None, "read twice")


def _of_tensors(parts: Sequence[Tensor], size: int) -> Source:
    if len(parts) > 2:
        raise TypeError(f"data: expected (inputs, targets); got {len(parts)} tensors")
    for t in parts:
        errors.is_dense("data", t)
    if any(t.dim() == 0 for t in parts):
        raise ValueError("data: expected tensors with the samples first; got a scalar")
    if any(len(t) != len(parts[0]) for t in parts):
        raise ValueError(
            f"data: inputs and targets differ in length: {', '.join(str(len(t)) for t in parts)}"
        )
    if len(parts[0]) == 0:
        raise ValueError("data: the training set is empty")
    return Source(list(zip(*(t.split(size) for t in parts))), len(parts[0]), "tensors")


def _of_loader(loader: DataLoader[Any], fixed: bool) -> Source:
    same = copy.copy(loader)  # whatever class it is of, with its collate_fn, workers and generator
    own = vars(same)
    own.update(_iterator=None, in_order=True)
    total = _length(loader.dataset)
    if isinstance(loader.dataset, IterableDataset):
        if loader.drop_last:
            log.warning("data: this DataLoader drops its last samples; they are read as well")
            own["drop_last"] = False
        if total is None and not fixed:
            raise ValueError(
                f"data: the {type(loader.dataset).__name__} does not say how many samples it has, so nothing "
                "tells whether a reading gave all of them. Give it a __len__, or say fixed=True, which takes "
                "what one reading gives for the training set and lists that as an assumption of yours"
            )
        # of batches that the dataset makes itself, the length may be their number
        n = None if loader.batch_sampler is None else total
        return Source(same, n, "fixed" if fixed else "read twice")
    if total is None:
        raise ValueError(
            f"data: expected a dataset with a length; the {type(loader.dataset).__name__} has no __len__"
        )
    key = "sampler" if loader.batch_sampler is None else "batch_sampler"
    outer = own[key]
    inner = outer.sampler if type(outer) is BatchSampler else outer
    order, why = _known_order(inner, total)
    grouped = key == "batch_sampler" or type(outer) is BatchSampler
    if order is None:
        if fixed:
            return Source(same, total, "fixed")
        order = listed = _listed(outer, total)
        if grouped:
            order = [i for group in listed for i in group]
        if list(order) != list(range(total)):
            why = "has a sampler of its own, whose order is asked for once and kept"
        own[key] = listed
    elif type(outer) is BatchSampler:
        if outer.drop_last and len(order) % outer.batch_size:
            why += (" and " if why else "") + f"drops its last {len(order) % outer.batch_size}"
        own[key] = BatchSampler(order, outer.batch_size, False)
        plain = type(loader) is DataLoader and key == "batch_sampler" and order == range(total)
        if plain and type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate:
            _say(why, total)
            return _of_tensors(loader.dataset.tensors, outer.batch_size)
    else:
        own[key] = order
    _say(why, len(order))
    return Source(same, len(order) if grouped else None, "fixed" if fixed else "read twice")


def _say(why: str, n: int) -> None:
    if why:
        log.warning("data: this DataLoader %s; each of its %d samples is read once, in a fixed order", why, n)


def _known_order(sampler: Any, total: int) -> tuple[Sequence[int] | None, str]:
    """The samples that torch's own sampler is about, in the dataset's order, and what it does to them."""
    kind = type(sampler)
    if kind is SubsetRandomSampler:
        subset = [_plain(i) for i in sampler.indices]
        odd = [i for i in subset if not isinstance(i, int) or not 0 <= i < total]
        odd += [i for i, times in Counter(subset).items() if times > 1]
        if odd:
            raise ValueError(
                f"data: expected the SubsetRandomSampler of this DataLoader to hold different indices from 0 "
                f"to {total - 1}; got {odd[0]!r}, {subset.count(odd[0])} times"
            )
        return sorted(subset), "shuffles a subset of its dataset"
    known: dict[type, tuple[str, str]] = {
        SequentialSampler: ("data_source", ""),
        RandomSampler: ("data_source", "shuffles"),
        WeightedRandomSampler: ("weights", "draws samples by weights, which are not taken into account"),
        DistributedSampler: ("dataset", "gives a share of its dataset, which is read whole"),
    }
    about, why = known.get(kind, ("", ""))
    if not about or len(getattr(sampler, about)) != total:
        return None, ""
    if kind is RandomSampler and (sampler.replacement or sampler.num_samples != total):
        why = "draws samples again or leaves some out, which is not taken into account"
    return range(total), why


def _listed(outer: Iterable[Any], total: int) -> list[Any]:
    """All that a sampler or batch sampler gives: each sample of the dataset once, or refused."""
    if type(outer) is BatchSampler and outer.drop_last:
        outer = BatchSampler(outer.sampler, outer.batch_size, False)
    entries: list[Any] = []
    seen: set[Any] = set()
    for entry in outer:
        group = list(entry) if isinstance(entry, (Sequence, Tensor)) and not isinstance(entry, str) else None
        if isinstance(entry, Tensor) and entry.dim() == 0:
            group = None
        keys = [_plain(i) for i in (group if group is not None else [entry])]
        for i in keys:
            if i in seen:
                raise ValueError(f"data: the sampler of this DataLoader gives sample {i} twice; {_WAY_OUT}")
            seen.add(i)
        entries.append(keys if group is not None else keys[0])
    missing = next((i for i in range(total) if i not in seen), None)
    if len(seen) < total or (missing is not None and all(isinstance(i, int) for i in seen)):
        raise ValueError(
            f"data: the sampler of this DataLoader gives {len(seen)} of {total} samples and leaves out "
            f"sample {missing}; {_WAY_OUT}"
        )
    return entries


def _plain(index: Any) -> Any:
    try:
        return operator.index(index)
    except TypeError:
        return index


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"data: the length of this {type(data).__name__} is none: {error}") from error


def to_device(x: Any, device: torch.device) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)


def tensors(x: Any) -> list[Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, Tensor)]


def device_of(model: nn.Module) -> torch.device:
    places = {p.device: name for name, p in model.named_parameters()}
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(f"model: expected all parameters on one device; got {where}")
    return next(iter(places), torch.device("cpu"))
