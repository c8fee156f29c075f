"""Checkpoints and pickles of the two-phase optimizer: its state_dict made, checked and loaded again.

A state is that of the base optimizer with an entry "two_phase" beside it. Everything in it is checked before
anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gcfast import errors
from gcfast.model import (
    Draw,
    Freezer,
    Head,
    draw_of,
    find_head,
    fingerprint,
    hidden_parameters,
    plain_name,
    unwrap,
)
from gcfast.optim.arguments import resolve_perturbation, resolve_switch_step

STATE_TYPES: dict[str, tuple[type, ...]] = {
    "phase": (int,),
    "step_count": (int,),
    "switch_step": (int, float),
    "perturbation": (int, float),
    "generator": (Tensor,),
    "head": (str, type(None)),
    "trainable": (list,),
    "fingerprint": (str,),
    "draws": (dict,),
}
_OWN_ERRORS = (ValueError, MemoryError, torch.OutOfMemoryError)
_PICKLED = ("base", "model", "switch_step", "perturbation", "step_count", "_head_error")


def saved_state(
    base: Optimizer,
    model: nn.Module,
    head: Head | None,
    freezer: Freezer | None,
    *,
    step_count: int,
    switch_step: float,
    perturbation: float,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The state of ``base``, with the entry "two_phase"; there is a ``freezer``, and a head, in phase two."""
    state = dict(base.state_dict())
    state["two_phase"] = {
        "format": 2,
        "base": type(base).__name__,
        "phase": 1 if freezer is None else 2,
        "step_count": step_count,
        "switch_step": switch_step,
        "perturbation": perturbation,
        "generator": generator.get_state(),
        "head": None if head is None else plain_name(head.name),
        "trainable": [],
        "fingerprint": "",
        "draws": {},
    }
    if freezer is not None:
        assert head is not None
        state["two_phase"]["trainable"] = list(freezer.trainable)
        state["two_phase"]["fingerprint"] = fingerprint(model, head)
        state["two_phase"]["draws"] = _draws(model, head)
    return state


def _draws(model: nn.Module, head: Head) -> dict[str, tuple[float, int, int]]:
    """(scale, seed, step) of every hidden weight that is as it was drawn, in plain values."""
    found = {name: draw_of(p) for name, p in hidden_parameters(model, head).items()}
    return {name: astuple(draw) for name, draw in found.items() if draw is not None}


def loaded_draws(state: Mapping[str, Any]) -> dict[str, Draw]:
    """What a state or a pickle of phase two says was drawn, by name."""
    return {name: Draw(*draw) for name, draw in state["draws"].items()}


def load_base(
    state: dict[str, Any], base: Optimizer, model: nn.Module, head: Head | None, generator: torch.Generator
) -> Head | None:
    """Check the whole state, then load what ``base`` and the generator have of it; the head it is of."""
    head = check_state(state, base, model, head)
    before = dict(vars(base))
    try:
        base.load_state_dict({key: value for key, value in state.items() if key != "two_phase"})
    except BaseException as error:
        vars(base).update(before)  # torch's optimizers find out when they hold a part of it
        if not isinstance(error, Exception) or isinstance(error, _OWN_ERRORS):
            raise
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the state is damaged: {type(base).__name__} cannot load it ({what:.300})"
        ) from error
    generator.set_state(state["two_phase"]["generator"].cpu())
    return head


def through_hooks(
    hooks: Mapping[int, Callable[..., Any]], owner: Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """The state after the hooks of ``owner``: each may change it in place or return another."""
    for hook in hooks.values():
        changed = hook(owner, state)
        if changed is not None:
            state = changed
    return state


def pickled(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a pickle or a copy keeps of a TwoPhase's attributes: plain values, no hooks on the model."""
    head, watch, freezer = attributes["_head"], attributes["_watch"], attributes["_freezer"]
    return {
        **{name: attributes[name] for name in _PICKLED},
        "generator": attributes["generator"].get_state(),
        "head": None if head is None else head.module,
        "watching": watch is not None and watch.active,
        "trainable": None if freezer is None else freezer.trainable,
        "draws": {} if freezer is None else _draws(attributes["model"], head),
    }


def unpickled(state: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes again, from what :func:`pickled` kept; hooks on the model are the caller's to make."""
    head = state["head"]
    generator = torch.Generator("cpu")
    generator.set_state(state["generator"])
    return {
        **{name: state[name] for name in _PICKLED},
        "generator": generator,
        "_head": None if head is None else find_head(state["model"], head=head),
    }


def check_state(state: dict[str, Any], base: Optimizer, model: nn.Module, head: Head | None) -> Head | None:
    """Raise unless `state` can be loaded; the head it names, where the optimizer did not know one."""
    own = state.get("two_phase")
    if not isinstance(own, dict):
        raise ValueError(
            "the state has no entry 'two_phase': it was saved from a plain optimizer, not from TwoPhase; "
            "load it into base (opt.base.load_state_dict) if that is meant"
        )
    form = own.get("format")
    if type(form) is not int or form != 2:
        raise ValueError(f"the state has format {errors.came(form)}; this version of gcfast reads format 2")
    for key, kinds in STATE_TYPES.items():
        if not isinstance(own.get(key), kinds) or isinstance(own.get(key), bool):
            raise ValueError(f"the state is damaged: two_phase[{key!r}] is {errors.came(own.get(key))}")
    if own["phase"] not in (1, 2) or own["step_count"] < 0:
        raise ValueError(f"the state is damaged: phase {own['phase']}, step_count {own['step_count']}")
    resolve_switch_step(own["switch_step"])
    resolve_perturbation(own["perturbation"])
    _check_generator(own["generator"])
    _check_groups(state, base, own)
    name = own["head"]
    here = None if head is None else plain_name(head.name)
    if name is not None and here is not None and name != here:
        raise ValueError(f"the state belongs to a model with head {name!r}, this one has {here!r}")
    if head is None and name is not None:
        head = find_head(model, head=_present_name(model, name))
    if own["phase"] == 2:
        if head is None:
            raise ValueError("the state is damaged: phase 2 without a head")
        _check_frozen(own, model, head)
    return head


def _check_generator(value: Tensor) -> None:
    try:
        torch.Generator("cpu").set_state(value.cpu())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the state is damaged: two_phase['generator'] is no such state ({error})") from None


def _check_groups(state: dict[str, Any], base: Optimizer, own: dict[str, Any]) -> None:
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        raise ValueError("the state is damaged: 'state' or 'param_groups' is missing")
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        raise ValueError("the state is damaged: 'param_groups' are not dicts with lists of 'params'")
    if own.get("base") != type(base).__name__:
        raise ValueError(f"the state was saved around {own.get('base')}, this base is {type(base).__name__}")
    saved = [len(g["params"]) for g in groups]
    here = [len(g["params"]) for g in base.param_groups]
    if saved != here:
        raise ValueError(f"the state has param_groups of {saved} parameters, base has {here}")


def _present_name(model: nn.Module, name: str) -> str:
    for present, _ in unwrap(model).named_modules():
        if plain_name(present) == name:
            return present
    return name


def _check_frozen(own: dict[str, Any], model: nn.Module, head: Head) -> None:
    hidden = hidden_parameters(model, head)
    damaged = [name for name, draw in own["draws"].items() if not _is_draw(draw)]
    if damaged:
        raise ValueError(f"the state is damaged: two_phase['draws'][{damaged[0]!r}] is no draw")
    strange = [n for n in [*own["trainable"], *own["draws"]] if not isinstance(n, str) or n not in hidden]
    if strange:
        raise ValueError(
            f"the state froze {errors.came(strange[0])}, which is no parameter below the head of this model"
        )
    if own["fingerprint"] != fingerprint(model, head):
        raise ValueError(
            "the state is of phase two, and the model's hidden weights or buffers are not those it froze: "
            "load the model's own state first (model.load_state_dict), then this one"
        )


def _is_draw(value: Any) -> bool:
    """Whether this is what a state holds of a draw: (scale, seed, step)."""
    if not (isinstance(value, (tuple, list)) and len(value) == 3):
        return False
    scale, seed, step = value
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (seed, step))
    return whole and step >= 0 and 0 <= errors.as_real(scale) < math.inf
