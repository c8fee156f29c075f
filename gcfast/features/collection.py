"""Collect features, targets and duplicates in one pass over model and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gcfast.features.checks import check_features
from gcfast.features.duplicates import RowKeys
from gcfast.features.loader import batches_of, device_of, loader_of, sample_count, tensors, to_device
from gcfast.features.matrix import Features, StoredFeatures
from gcfast.features.wide import WideFeatures
from gcfast.model import FeatureTap, Head, HeadError, WideLayerFound, find_head, wide_activation
from gcfast.nn import WideLayer
from gcfast.storage import allowed_bytes


@dataclass
class TrainingSet:
    """What certify and solve_head know of a model's training set.

    ``features`` (n, m) enter the head: stored, or recomputed from what enters a :class:`gcfast.WideLayer`
    where storing them would take too much; ``below`` (n, d) enter the wide layer (None where there is none);
    ``outputs`` (n, C) are the model's, which gave each sample's in ``output_shape``; ``duplicate_groups``
    lists groups of samples whose inputs are equal, number for number.
    """

    features: Features
    targets: Tensor | None
    outputs: Tensor
    output_shape: torch.Size
    head: Head
    wide: WideLayerFound | None
    below: Tensor | None
    duplicate_groups: list[list[int]]
    first_batch: Any


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
    device = device_of(model)
    loader = loader_of(data)
    first: Any = None
    features: list[Tensor] = []
    below: list[Tensor] = []
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    keys = RowKeys()
    wide: WideLayerFound | None = None
    recomputed = False
    for x, y in batches_of(loader):
        x = to_device(x, device)
        if first is None:
            first = (x, y)
            head = head_by_forward(model, x, head)
            wide = wide_activation(model, head, x)
            recomputed = (
                wide is not None
                and wide.recomputable
                and streams(sample_count(loader), head.module.weight, max_bytes)
            )
            looked_below = wide is not None and (recomputed or (inspect and wide.caveat is None))
            tap = FeatureTap(model, head, wide.module) if wide and looked_below else FeatureTap(model, head)
        with tap:
            h, *z, out = tap(x)
        if wide is not None and z:
            differs = wide.difference(z[0], h, sum(map(len, below)))
            if differs is not None and recomputed:
                raise ValueError(
                    f"model: {differs}, so that features cannot be made anew; allow more max_bytes, which "
                    "stores them, or apply the layer alone before the head"
                )
            if differs is not None:
                wide = replace(wide, caveat=differs)
            below += z
        outputs.append(out.detach().reshape(-1, head.out_features))
        differs = head.difference(h, outputs[-1], sum(map(len, outputs)) - len(h))
        if differs is not None:
            raise HeadError(
                f"model: {differs}; a hook or a wrapper changes it, or the head depends on the batch"
            )
        if not recomputed:
            features.append(h)
        if inspect:
            keys.add([t.detach().cpu() for t in tensors(x)])
        if y is not None:
            if len(y) != len(h):
                raise ValueError(f"data: a batch of {len(h)} inputs came with {len(y)} targets")
            targets.append(y.to(device))
    if first is None:
        raise ValueError("data: the training set is empty")
    h = torch.cat(below if recomputed else features)
    del features
    check_features(h, "what enters the wide layer" if recomputed else "features")
    again, y = next(iter(batches_of(loader)))
    tapped = wide.module if wide is not None and recomputed else head
    same_again(model, tapped, first, (to_device(again, device), y), h)
    found: Features
    if wide is not None and recomputed:
        assert isinstance(wide.module, WideLayer)
        found, below = WideFeatures(h, wide.module), [h]
    else:
        found = StoredFeatures(h)
    return TrainingSet(
        features=found,
        targets=torch.cat(targets) if targets else None,
        outputs=torch.cat(outputs),
        output_shape=out.shape[1:],
        head=head,
        wide=wide if inspect else None,
        below=torch.cat(below) if below else None,
        duplicate_groups=keys.confirm(tensors(x) for x, _ in batches_of(loader)) if inspect else [],
        first_batch=first[0],
    )


def streams(n: int | None, head_weight: Tensor, max_bytes: int | None) -> bool:
    """Whether features of n samples (None: of nobody knows how many) are recomputed rather than stored."""
    most = allowed_bytes(max_bytes, head_weight.device)
    size = head_weight.shape[1] * head_weight.element_size()
    return n is None or (most is not None and n * size > most // 4)


def head_by_forward(model: nn.Module, x: Any, head: Any) -> Head:
    try:
        return find_head(model, x, head)
    except RuntimeError as error:
        given = {t.dtype for t in tensors(x) if t.is_floating_point()}
        expected = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if given and expected and not given & expected:
            names = " and ".join(", ".join(sorted(map(str, dtypes))) for dtypes in (given, expected))
            raise ValueError(f"data: inputs and model differ in dtype: {names} ({error})") from error
        raise


def same_again(model: nn.Module, head: Any, first: Any, again: Any, features: Tensor) -> None:
    (x, y), (x2, y2) = first, again
    same = len(tensors(x)) == len(tensors(x2)) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(tensors(x), tensors(x2), strict=True)
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
