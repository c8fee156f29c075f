"""Collect features, targets and duplicates in one pass over model and data, and look at both again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gcfast.features.checks import check_features
from gcfast.features.loader import device_of, tensors, to_device
from gcfast.features.matrix import Features, StoredFeatures
from gcfast.features.second_look import SecondLook
from gcfast.features.second_reading import Reading
from gcfast.features.wide import WideFeatures
from gcfast.model import (
    FeatureTap,
    Head,
    HeadError,
    WideLayerFound,
    alteration,
    check_wrappers,
    copy_tensors,
    find_head,
    output_tensors,
    wide_activation,
)
from gcfast.nn import WideLayer
from gcfast.storage import allowed_bytes

_FINE = 2.0**-20  # of a dtype whose values tell one formula from another


@dataclass
class TrainingSet:
    """What certify and solve_head know of a model's training set.

    ``features`` (n, m) enter the head: stored, or recomputed from what enters a :class:`gcfast.WideLayer`
    where storing them would take too much; ``below`` (n, d) enter the wide layer (None where there is none);
    ``outputs`` (n, C) are the model's, which gave each sample's in ``output_shape``; ``duplicate_groups``
    lists groups of samples whose inputs are equal, number for number, as far as they are ``told_apart``: each
    of their tensors has one row a sample; ``fixed`` has status and words of the assumption that the data are,
    None for tensors.
    """

    features: Features
    targets: Tensor | None
    outputs: Tensor
    output_shape: torch.Size
    head: Head
    wide: WideLayerFound | None
    below: Tensor | None
    duplicate_groups: list[list[int]]
    told_apart: bool
    first_batch: Any
    looks: SecondLook
    fixed: tuple[Literal["holds", "not checked"], str] | None


def collect(
    model: nn.Module,
    data: Any,
    head: Any = None,
    *,
    inspect: bool = True,
    max_bytes: int | None = None,
    fixed: bool = False,
    told: Callable[[str, float], None] | None = None,
) -> TrainingSet:
    """Run the model over the data once, in evaluation mode, and look at a few rows a second time.

    Data that are no tensors are read a second time without the model and compared, unless the user says that
    they are ``fixed``; ``told`` hears of it.

    The features of a :class:`gcfast.WideLayer` are stored where they take no more than a quarter of
    ``max_bytes`` (default: of what is free), and recomputed from what enters it otherwise.

    Raises ValueError where the data change between the readings, drop or repeat samples, or are empty, where
    the features are not finite or not those of one sample alone; HeadError where the model has no head.
    """
    check_wrappers(model)
    device = device_of(model)
    reading = Reading(data, fixed, copies=inspect)
    first: Any = None
    features: list[Tensor] = []
    below: list[Tensor] = []
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    wide: WideLayerFound | None = None
    recomputed = False
    for x, y in reading:
        x = to_device(x, device)
        if first is None:
            first = x if reading.held else copy_tensors(x)
            head = head_by_forward(model, x, head)
            wide = wide_activation(model, head, x)
            recomputed = (
                wide is not None
                and wide.recomputable
                and streams(reading.source.n, head.module.weight, max_bytes)
            )
            looked_below = wide is not None and (recomputed or (inspect and wide.caveat is None))
            tap = FeatureTap(model, head, wide.module) if wide and looked_below else FeatureTap(model, head)
            looks = SecondLook(model, wide.module if wide and recomputed else head)
        with tap:
            h, *z, given = tap(x)
        out = output_of(head, h, given, sum(map(len, outputs)))
        looks.keep(x, z[0] if recomputed else h)
        if wide is not None and z:
            differs = wide.difference(z[0], h, sum(map(len, below)))
            if recomputed and h.dtype != wide.module.weight.dtype:
                differs = f"what enters the head is {h.dtype}, which the weights of {wide.name!r} are not"
            if differs is not None and recomputed:
                raise ValueError(
                    f"model: {differs}, so that features cannot be made anew; allow more max_bytes, which "
                    "stores them, or apply the layer alone before the head"
                )
            if differs is not None:
                wide = replace(wide, caveat=differs)
            below += z
        outputs.append(out.detach().reshape(-1, head.out_features))
        strange = alteration(head.module) if torch.finfo(outputs[-1].dtype).eps > _FINE else None
        if strange is not None:
            raise HeadError(
                f"model: of the head {head}, {strange}: outputs of {outputs[-1].dtype} are too coarse to "
                "tell whether it does; use a plain nn.Linear, or compute in float32"
            )
        if not recomputed:
            features.append(h)
        if y is not None:
            if len(y) != len(h):
                raise ValueError(f"data: a batch of {len(h)} inputs came with {len(y)} targets")
            targets.append(y.to(device, copy=not reading.held))
    if first is None:
        raise ValueError("data: the training set is empty")
    h = torch.cat(below if recomputed else features)
    del features
    check_features(h, "what enters the wide layer" if recomputed else "features")
    looks.finish()
    groups = reading.again(told)
    told_apart = reading.copies and reading.n == len(h)
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
        duplicate_groups=groups if told_apart else [],
        told_apart=told_apart,
        first_batch=first,
        looks=looks,
        fixed=reading.statement(),
    )


def output_of(head: Head, h: Tensor, given: Any, first: int) -> Tensor:
    """The tensor in what the model gave; HeadError where that is not W h + b of h (k, m).

    ``first`` is the number of the first of the k samples.
    """
    found = output_tensors(given)  # whatever holds it
    if len(found) != 1 or found[0].numel() != len(h) * head.out_features:
        shapes = ", ".join(str(tuple(t.shape)) for t in found)
        raise HeadError(
            f"model: gives {len(found)} tensors ({shapes}) for samples {first} to {first + len(h) - 1}, "
            f"where it gave one, the output of its head {head}, for the first ones"
        )
    differs = head.difference(h, found[0].reshape(len(h), head.out_features), first)
    if differs is not None:
        raise HeadError(f"model: {differs}; a hook, a wrapper or a class of its own changes it")
    return found[0]


def copies_among(data: Any, fixed: bool, groups: list[list[int]], n: int) -> list[list[int]]:
    """Of groups among n samples the parts whose inputs are equal too; none where nothing can tell."""
    reading = Reading(data, fixed, copies=True)
    if reading.source.once:
        return []
    for _ in reading:
        pass
    equal = reading.again()
    if not reading.copies or reading.n != n:
        return []
    owner = {i: k for k, group in enumerate(equal) for i in group}
    parts: dict[tuple[int, int], list[int]] = {}
    for k, group in enumerate(groups):
        for i in group:
            if i in owner:
                parts.setdefault((k, owner[i]), []).append(i)
    return [part for part in parts.values() if len(part) > 1]


def check_new_head(found: TrainingSet) -> None:
    """HeadError or ValueError where a few samples do not follow the model's head, which is another one now.

    A model may keep outputs or a copy of the head from before, make features of it, or change it in a pass.
    """
    head, inputs = found.head, found.looks.samples()
    with FeatureTap(found.looks.model, head) as tap:
        h, given = tap(inputs)
    try:
        output_of(head, h, given, 0)
    except HeadError as error:
        raise HeadError(
            f"{error} now that another head is written to it: the model keeps outputs or weights of before, "
            "or writes to its head in every pass. It has its old head again"
        ) from None
    found.looks.finish(again=True)


def streams(n: int | None, head_weight: Tensor, max_bytes: int | None) -> bool:
    """Whether features of n samples (None: of nobody knows how many) are recomputed rather than stored."""
    most = allowed_bytes(max_bytes, head_weight.device)
    size = head_weight.shape[1] * head_weight.element_size()
    return n is None or (most is not None and n * size > most // 4)


def head_by_forward(model: nn.Module, x: Any, head: Any) -> Head:
    """The head, by one pass; what torch says of the inputs names ``data``."""
    try:
        return find_head(model, x, head)
    except ValueError as error:
        if error.__cause__ is None:  # not what torch says of the inputs, but what find_head does of the model
            raise
        empty = [name for name, p in model.named_parameters() if p.device.type == "meta"]
        if empty:
            raise ValueError(f"model: {empty[0]!r} is on the meta device: it has no values yet") from error
        given = {t.dtype for t in tensors(x) if t.is_floating_point()}
        expected = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if given and expected and not given & expected:
            names = " and ".join(", ".join(sorted(map(str, dtypes))) for dtypes in (given, expected))
            raise ValueError(f"data: inputs and model differ in dtype: {names} ({error})") from error
        raise ValueError(f"data: {error}") from error.__cause__
