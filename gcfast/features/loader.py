"""Batches from tensors, a Dataset or a DataLoader, always in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

BATCH = 512


def batches_of(loader: Any) -> Iterator[tuple[Any, Tensor | None]]:
    for batch in loader:
        yield _pair(batch)


def _pair(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], torch.as_tensor(batch[1])
    raise TypeError(
        f"data: expected batches (inputs, targets); got {type(batch).__name__} of length {len(batch)}"
    )


def loader_of(data: Any) -> Any:
    """A re-iterable of batches in a fixed order, or an error that says what is wrong with ``data``."""
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler):
            raise ValueError(
                "data: this DataLoader shuffles; give one with shuffle=False (every pass must see the "
                "samples in one order)"
            )
        if data.drop_last and data.batch_size:
            try:
                n = len(data.dataset)  # type: ignore[arg-type]
            except TypeError:
                n = 0
            if n % data.batch_size:
                raise ValueError(
                    f"data: this DataLoader drops the last {n % data.batch_size} of {n} samples; give one "
                    "with drop_last=False"
                )
        return data
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, (tuple, list)) and data and all(isinstance(t, Tensor) for t in data):
        if len(data) > 2:
            raise TypeError(f"data: expected (inputs, targets); got {len(data)} tensors")
        if any(len(t) != len(data[0]) for t in data):
            raise ValueError(
                f"data: inputs and targets differ in length: {', '.join(str(len(t)) for t in data)}"
            )
        if len(data[0]) == 0:
            raise ValueError("data: the training set is empty")
        if len(data) == 1:
            return list(data[0].split(BATCH))
        return list(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True))
    if isinstance(data, TensorDataset):
        return loader_of(data.tensors)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=BATCH, shuffle=False)
    raise TypeError(f"data: expected (inputs, targets), a Dataset or a DataLoader; got {type(data).__name__}")


def to_device(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return type(x)(to_device(t, device) for t in x)
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    return x


def tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for part in x for t in tensors(part)] if isinstance(x, (tuple, list)) else []


def sample_count(loader: Any) -> int | None:
    """The samples a loader will give, None where it does not say."""
    try:
        if isinstance(loader, DataLoader):
            return len(loader.dataset)  # type: ignore[arg-type]
        return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in loader)
    except TypeError:
        return None


def device_of(model: nn.Module) -> torch.device:
    places = {p.device: name for name, p in model.named_parameters()}
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(f"model: expected all parameters on one device; got {where}")
    return next(iter(places), torch.device("cpu"))


def count(loader: Any) -> int | None:
    """How many samples a pass gives, where that can be known."""
    if isinstance(loader, list):
        return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in loader)
    plain = isinstance(loader, DataLoader) and loader.batch_size is not None
    if not plain or isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
