"""One pass over model and data: the features that enter the head, the targets, and who is a copy of whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from gcfast._distinct import RowKeys
from gcfast.model.head import Head, find_head
from gcfast.model.tap import FeatureTap
from gcfast.model.wide_activation import WideLayerFound, wide_activation
from gcfast.nn import WideLayer
from gcfast.sources import Features, StoredFeatures, WideFeatures, as_features
from gcfast.storage.memory import limit

BATCH = 512


@dataclass
class TrainingSet:
    """What certify and solve_head know of a model's training set.

    ``features`` (n, m) enter the head: stored, or recomputed from what enters a :class:`gcfast.WideLayer`
    where storing them would take too much; ``below`` (n, d) enter the wide layer (None where there is none);
    ``outputs`` (n, C) are the model's; ``copies`` lists groups of samples whose inputs are equal, number for
    number.
    """

    features: Features
    targets: Tensor | None
    outputs: Tensor
    head: Head
    wide: WideLayerFound | None
    below: Tensor | None
    copies: list[list[int]]
    first_batch: Any


def _batches(loader: Any) -> Iterator[tuple[Any, Tensor | None]]:
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


def _to_device(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return type(x)(_to_device(t, device) for t in x)
    if isinstance(x, dict):
        return {k: _to_device(v, device) for k, v in x.items()}
    return x


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for part in x for t in _tensors(part)] if isinstance(x, (tuple, list)) else []


def _all_finite(x: Tensor) -> bool:
    """One pass without copies of x: a sum may overflow where no entry does, then parts are looked at."""
    if bool(torch.isfinite(x.sum(-1)).all()):
        return True
    return all(bool(torch.isfinite(part).all()) for part in x.split(4096))


def check_features(features: Tensor, name: str = "features") -> None:
    """Raise what is wrong with an (n, m) matrix of features."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: expected a tensor (n, m); got {type(features).__name__}")
    if features.dim() != 2:
        raise ValueError(f"{name}: expected shape (n, m); got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"{name}: expected a real floating point dtype; got {features.dtype}")
    if features.shape[0] == 0:
        raise ValueError(f"{name}: the training set is empty (shape {tuple(features.shape)})")
    if _all_finite(features):
        return
    for start in range(0, len(features), 4096):
        bad = (~torch.isfinite(features[start : start + 4096])).nonzero()
        if len(bad):
            i, j = (bad[0] + torch.tensor([start, 0], device=bad.device)).tolist()
            raise ValueError(f"{name}: not finite: {float(features[i, j])} at sample {i}, unit {j}")


def checked(data: Any, name: str = "features") -> Features:
    """:class:`Features` of what a user gave, finite and not empty; TypeError and ValueError naming it."""
    if isinstance(data, Features):
        if isinstance(data, WideFeatures):
            check_features(data.z, "z")
            for part, value in (("weight", data.weight), ("bias", data.bias)):
                if not _all_finite(value):
                    raise ValueError(f"{part}: the wide layer's {part} is not finite")
        elif isinstance(data, StoredFeatures):
            check_features(data.matrix, name)
        return data
    found = as_features(data, name)
    assert isinstance(found, StoredFeatures)
    check_features(found.matrix, name)
    return found


def collect(
    model: nn.Module,
    data: Any,
    head: Any = None,
    *,
    inspect: bool = True,
    max_bytes: int | None = None,
) -> TrainingSet:
    """Run the model over the data once, in evaluation mode, and look at a few rows a second time.

    The features of a :class:`gcfast.WideLayer` are stored where they take no more than a quarter of
    ``max_bytes`` (default: of what is free), and recomputed from what enters it otherwise.

    Raises ValueError where the data change between passes (a shuffling or augmenting loader), are empty, or
    the features are not finite; HeadError where the model has no head.
    """
    device = _device_of(model)
    loader = loader_of(data)
    first: Any = None
    features: list[Tensor] = []
    below: list[Tensor] = []
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    keys = RowKeys()
    wide: WideLayerFound | None = None
    layer: nn.Module | None = None
    recomputed = False
    tapped: Any = None
    for x, y in _batches(loader):
        x = _to_device(x, device)
        if first is None:
            first = (x, y)
            head = _head_by_forward(model, x, head)
            wide = wide_activation(model, head, x)
            layer = wide.module if wide is not None and type(wide.module) is WideLayer else None
            recomputed = layer is not None and streams(sample_count(loader), head.module.weight, max_bytes)
            tapped = layer if recomputed else head
            tap = FeatureTap(model, tapped)
        with tap:
            h, out = tap(x)
        if inspect and wide is not None and not recomputed:
            with FeatureTap(model, wide.module) as below_tap:
                below.append(below_tap(x)[0])
        features.append(h)
        outputs.append(out.detach().reshape(-1, head.out_features))
        if inspect:
            keys.add([t.detach().cpu() for t in _tensors(x)])
        if y is not None:
            if len(y) != len(h):
                raise ValueError(f"data: a batch of {len(h)} inputs came with {len(y)} targets")
            targets.append(y.to(device))
    if first is None:
        raise ValueError("data: the training set is empty")
    h = torch.cat(features)
    del features
    check_features(h, "what enters the wide layer" if recomputed else "features")
    again, y = next(iter(_batches(loader)))
    _same_again(model, tapped, first, (_to_device(again, device), y), h)
    found: Features
    if recomputed:
        assert layer is not None
        found, below = WideFeatures(h, layer), [h]
    else:
        found = StoredFeatures(h)
    return TrainingSet(
        features=found,
        targets=torch.cat(targets) if targets else None,
        outputs=torch.cat(outputs),
        head=head,
        wide=wide if inspect else None,
        below=torch.cat(below) if below else None,
        copies=keys.confirm(_tensors(x) for x, _ in _batches(loader)) if inspect else [],
        first_batch=first[0],
    )


def sample_count(loader: Any) -> int | None:
    """The samples a loader will give, None where it does not say."""
    try:
        if isinstance(loader, DataLoader):
            return len(loader.dataset)  # type: ignore[arg-type]
        return sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in loader)
    except TypeError:
        return None


def streams(n: int | None, head_weight: Tensor, max_bytes: int | None) -> bool:
    """Whether features of n samples (None: of nobody knows how many) are recomputed rather than stored."""
    most = limit(max_bytes, head_weight.device)
    size = head_weight.shape[1] * head_weight.element_size()
    return n is None or (most is not None and n * size > most // 4)


def _device_of(model: nn.Module) -> torch.device:
    places = {p.device: name for name, p in model.named_parameters()}
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(f"model: expected all parameters on one device; got {where}")
    return next(iter(places), torch.device("cpu"))


def _head_by_forward(model: nn.Module, x: Any, head: Any) -> Head:
    try:
        return find_head(model, x, head)
    except RuntimeError as error:
        given = {t.dtype for t in _tensors(x) if t.is_floating_point()}
        expected = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if given and expected and not given & expected:
            names = " and ".join(", ".join(sorted(map(str, dtypes))) for dtypes in (given, expected))
            raise ValueError(f"data: inputs and model differ in dtype: {names} ({error})") from error
        raise


def _same_again(model: nn.Module, head: Any, first: Any, again: Any, features: Tensor) -> None:
    (x, y), (x2, y2) = first, again
    same = len(_tensors(x)) == len(_tensors(x2)) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(_tensors(x), _tensors(x2), strict=True)
    )
    if not same or (y is not None and not torch.equal(y, y2)):
        raise ValueError(
            "data: the first batch is another one in the second pass: the loader shuffles or augments. "
            "Give the samples in a fixed order and without random transforms; the guarantee is about one "
            "fixed training set"
        )
    with FeatureTap(model, head) as tap:
        h, _ = tap(x2)
    scale = float(h.abs().amax()) + 1e-30
    difference = float((h - features[: len(h)]).abs().amax()) / scale
    if difference > 1e-4:
        raise ValueError(
            "model: the same inputs gave other features in a second look "
            f"(relative difference {difference:.1e}): "
            "something random stays active in evaluation mode"
        )
