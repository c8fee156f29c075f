"""Arguments of the two-phase optimizer: their checks, and the Gaussian perturbation of the hidden weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gcfast import errors
from gcfast.model import Head, unwrap


def resolve_switch_step(value: Any) -> float:
    """The number of steps of phase one: an int, or infinity."""
    if value is None:
        return math.inf
    if not errors.as_real(value) > 0:
        raise ValueError(
            "switch_step: expected a number of steps > 0 (or None to switch by hand), "
            f"got {errors.came(value)} ({type(value).__name__})"
        )
    if math.isinf(errors.as_real(value)):
        return math.inf
    # 0.28 * 100 = 28.000000000000004 means 28
    return max(1, math.ceil(value * (1 - 1e-12))) if not isinstance(value, int) else value


def resolve_perturbation(value: Any) -> float:
    """The standard deviation of the Gaussian step."""
    if not 0 <= errors.as_real(value) < math.inf:
        raise ValueError(
            f"perturbation: expected a finite number ≥ 0, got {errors.came(value)} ({type(value).__name__})"
        )
    return float(value)


def resolve_generator(generator: Any, seed: Any) -> torch.Generator:
    """The generator of the Gaussian step."""
    if generator is not None:
        if seed is not None:
            raise ValueError("seed: expected None beside generator, got both")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            what = getattr(generator, "device", type(generator).__name__)
            raise ValueError(f"generator: expected a torch.Generator on the CPU, got {what}")
        return generator
    if seed is None:
        # a stream of its own, which must not be that of the weights' initial values
        seed = (torch.initial_seed() * 6364136223846793005 + 1442695040888963407) % 2**63
    else:
        errors.is_count("seed", seed, -(2**63))
    return torch.Generator("cpu").manual_seed(int(seed))


def check_group(model: nn.Module, group: dict[str, Any], index: int) -> None:
    """Raise unless every parameter of the group, number ``index`` of ``param_groups``, is the model's.

    As for torch, parameters may come alone, from an iterator, which becomes a list here, or with names.
    """
    params = group.get("params")
    if params is None:
        raise ValueError(f"param_groups[{index}]: expected a dict with an entry 'params'; got {list(group)}")
    if not isinstance(params, list):
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
    known = {id(p) for p in unwrap(model).parameters()}
    for j, named in enumerate(params):
        p = named[1] if isinstance(named, tuple) else named
        if id(p) not in known:
            shape = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(
                f"param_groups[{index}]['params'][{j}], of shape {shape}, is not a parameter of the model"
            )


def check_head_in_groups(groups: Iterable[dict[str, Any]], head: Head) -> None:
    """Raise unless phase two could train the head: it is in the groups and requires gradients."""
    known = {id(p) for group in groups for p in group["params"]}
    for key, p in (("weight", head.weight), ("bias", head.bias)):
        if p is not None and id(p) not in known:
            raise ValueError(
                f"base: the {key} of the head {head} is in none of its param_groups, "
                "so phase two could not train it"
            )
        if p is not None and not p.requires_grad:
            raise ValueError(
                f"model: the {key} of the head {head} does not require gradients, "
                "so phase two could not train it"
            )


@torch.no_grad()
def perturb(parameters: Mapping[str, Tensor], scale: float, generator: torch.Generator) -> set[str]:
    """Add scale · N(0, I): drawn on the CPU in float32 or wider, added there, rounded once.

    The names of those that were moved: a whole number has no density to be drawn from, and a step below the
    spacing of a weight's numbers is lost when the sum is rounded.
    """
    moved = set()
    for name, p in parameters.items():
        if not (p.is_floating_point() or p.is_complex()):
            continue
        value = torch.view_as_real(p) if p.is_complex() else p
        wide = torch.promote_types(value.dtype, torch.float32)
        noise = torch.randn(value.shape, dtype=wide, generator=generator, device="cpu")
        if scale > 0:
            if not bool((value.abs() * torch.finfo(value.dtype).eps > scale).any()):
                moved.add(name)
            value.copy_(value.to(wide) + noise.to(value.device) * scale)
    return moved
