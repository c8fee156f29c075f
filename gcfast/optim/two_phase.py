"""Two-phase training around any torch.optim.Optimizer: all weights, then the last layer alone.

A(base) of Kawaguchi and Sun, *A Recipe for Global Convergence Guarantee in Deep Neural Networks*, AAAI 2021.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gcfast import errors
from gcfast.ambient import ordinary
from gcfast.model import (
    AmbiguousHeadError,
    Draw,
    Freezer,
    Head,
    HeadError,
    Watch,
    find_head,
    forget_draws,
    hidden_parameters,
    note_draws,
    retrace_compiled,
)
from gcfast.optim.arguments import (
    check_group,
    check_head_in_groups,
    perturb,
    resolve_generator,
    resolve_perturbation,
    resolve_switch_step,
)
from gcfast.optim.head_only import forget_curvature, forget_flattening, head_only
from gcfast.optim.saved_state import load_base, loaded_draws, pickled, saved_state, through_hooks, unpickled


class TwoPhase(Optimizer):
    """Train all weights with `base` for `switch_step` steps, then the head alone.

    Phase one is `base`, unchanged. The last thing step number `switch_step` does is to switch: a Gaussian
    vector, `perturbation` · N(0, I), is added to every hidden weight that is being trained, hidden weights
    stop requiring gradients (and lose those they have), and from the next forward pass on normalisation
    statistics and dropout below the head are frozen, whatever `model.train()` says. In phase two `base`
    trains the head alone, with the momentum it has; with a convex loss this problem is convex, and if the
    features have rank n (see `gcfast.certify`) its minimum is the global minimum of the training loss.
    `gcfast.FeatureCache` makes its steps cheap: what enters the head does not change any more.

    It is used as `base` would be: learning-rate schedulers, `GradScaler`, gradient clipping, closures, hooks
    and checkpoints all take a `TwoPhase`. `param_groups`, `state` and `defaults` are those of `base`.

    Args:
        base: any `torch.optim.Optimizer` over parameters of `model`. From now on step this object instead.
        model: the model, plain or wrapped by `torch.compile`, `DataParallel`, `DistributedDataParallel`.
        switch_step: number of steps of phase one, ≥ 1. A fraction is rounded up, so that `0.6 * total_steps`
            will do. `None` or `math.inf`: only `switch()` switches. Skipped steps of a `GradScaler` do not
            count.
        head: the last affine layer, an `nn.Linear` or its qualified name. By default it is found: from the
            structure, or as the last `nn.Linear` applied in the first forward pass with gradients. This pass
            also checks, by one additional pass in evaluation mode, that the output is affine in the head.
        perturbation: standard deviation of the Gaussian vector, ≥ 0. It is drawn in float32 (float64 for
            float64 weights) on the CPU, parameter by parameter in the order of `model.named_parameters()`, so
            that a seed means the same on every device; the sum is rounded once to the weights' own type.
        generator: the `torch.Generator`, on the CPU, to draw from. Default: an own one, seeded by `seed`, or
            else by torch's initial seed; the global generator is never drawn from.
        seed: seed for the own generator; not together with `generator`.

    Raises:
        HeadError: no head, several candidates, or an output not affine in it; in the constructor if that can
            be told there, else in the first forward pass, or in the first step if no forward pass was seen.
        ValueError, TypeError: an argument is out of range; a parameter of `base` is not one of `model`.

    Hidden parameters that are in `model` but not in `base` are perturbed if they require gradients, and
    frozen. The tensors `state` holds for hidden parameters stay where they are. A head without bias is
    trained as it is. Copying a model in phase two (`copy.deepcopy(model)`) gives one whose hidden weights
    require no gradients but which is otherwise free; copying a `TwoPhase` copies its model and freezes the
    copy.

    Under `torch.compile` the first forward pass is observed if the compiled model itself is given here. If
    the plain model is given and then compiled, nothing is observed: the structure or `head` must tell.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 3))
    >>> opt = TwoPhase(torch.optim.SGD(model.parameters(), lr=0.1), model, switch_step=2, seed=0)
    >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
    >>> for _ in range(3):
    ...     opt.zero_grad(); nn.functional.cross_entropy(model(x), y).backward(); opt.step()
    >>> opt.phase, opt.step_count, model[0].weight.requires_grad, model[2].weight.requires_grad
    (2, 3, False, True)
    """

    switch_step: float
    _head: Head | None
    _head_error: HeadError | None  # why the head is not known
    _watch: Watch | None
    _freezer: Freezer | None  # there is one in phase two

    @ordinary()
    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        switch_step: float | None,
        head: nn.Module | str | None = None,
        perturbation: float = 1e-3,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        errors.is_a("base", base, Optimizer, "a torch.optim.Optimizer")
        if isinstance(base, TwoPhase):
            raise TypeError("base: expected the optimizer to be wrapped; got a TwoPhase")
        errors.is_module("model", model)
        self.base, self.model = base, model
        self.switch_step = resolve_switch_step(switch_step)
        self.perturbation = resolve_perturbation(perturbation)
        self.generator = resolve_generator(generator, seed)
        self.step_count = 0
        self._prepare()
        for i, group in enumerate(base.param_groups):
            check_group(model, group, i)
        try:
            self._head = find_head(model, head=head)
            check_head_in_groups(base.param_groups, self._head)
        except AmbiguousHeadError as error:
            self._head_error = error
        self._watch = Watch(model, None if self._head is None else self._head.module, self._on_head_found)

    def _prepare(self) -> None:
        """Set what is neither an argument nor saved."""
        for call in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                setattr(self, f"_optimizer_{call}_{when}_hooks", OrderedDict())
        self._patch_step_function()  # names zero_grad in profiles; `step` is marked as hooked already
        self._head = self._head_error = self._freezer = self._watch = None
        self._proved_frozen = False

    # -- what is shared with base

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The very list of `base`."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property  # type: ignore[override]
    def state(self) -> Any:
        """The very state of `base`."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        """The defaults of `base`."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    # -- what is known

    @property
    def phase(self) -> int:
        """1 while all weights are trained, 2 while the head alone is."""
        return 1 if self._freezer is None else 2

    @property
    def head(self) -> Head:
        """The head; `HeadError` while it is not known."""
        if self._head is None:
            raise self._head_error or HeadError("the head is not known yet")
        return self._head

    @property
    def hidden(self) -> dict[str, nn.Parameter]:
        """By name, the hidden parameters that phase one trains and phase two holds fixed."""
        everything = hidden_parameters(self.model, self.head)
        if self._freezer is not None:
            return {name: everything[name] for name in self._freezer.trainable}
        return {name: p for name, p in everything.items() if p.requires_grad}

    def _on_head_found(self, answer: Head | HeadError) -> None:
        """Take what the first forward pass has shown: the head, or why there is none."""
        if isinstance(answer, HeadError):
            self._head_error = answer
            return
        try:
            check_head_in_groups(self.param_groups, answer)
        except ValueError as error:
            self._head_error = HeadError(str(error))
            raise
        self._head, self._head_error = answer, None

    # -- stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of `base`, on all parameters in phase one, on the head in phase two; its result."""
        errors.is_function("closure", closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for hook in self._optimizer_step_pre_hooks.values():
            changed = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(
                        f"a step pre-hook must return None or (new_args, new_kwargs), got {changed!r}"
                    )
                args, kwargs = changed
        if self.phase == 2:
            with head_only(self.base, self.model, self.head, verify=not self._proved_frozen):
                result = self.base.step(*args[1:], **kwargs)
            self._proved_frozen = True
        else:
            result = self.base.step(*args[1:], **kwargs)
        why = self._head_error  # the first step is the last moment at which not to know the head
        if isinstance(why, AmbiguousHeadError):
            raise HeadError(
                f"no forward pass of the model with gradients was seen before the step, and {why}"
            )
        if why is not None:
            raise why
        self.step_count += 1
        for post in self._optimizer_step_post_hooks.values():
            post(self, args, kwargs)
        if self.phase == 1 and self.step_count >= self.switch_step:
            self.switch()
        return result

    # Optimizer would wrap `step` to run hooks; those of all optimizers are run by base.step, our own above
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """`base.zero_grad`."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """`base.add_param_group`, for parameters of the model; hidden ones are frozen in phase two."""
        errors.is_a("param_group", param_group, dict, "a dict with an entry 'params'")
        check_group(self.model, param_group, len(self.param_groups))
        self.base.add_param_group(param_group)
        if self._freezer is not None:
            new = [n for n, p in hidden_parameters(self.model, self.head).items() if p.requires_grad]
            self._freeze(list(dict.fromkeys([*self._freezer.trainable, *new])))

    # -- the two phases

    @ordinary()
    @torch.no_grad()
    def switch(self) -> None:
        """Begin phase two now, if it has not begun. Call it between steps, not before a backward pass."""
        if self._freezer is not None:
            return
        check_head_in_groups(self.param_groups, self.head)
        hidden, seed = self.hidden, self.generator.initial_seed()
        scale = resolve_perturbation(self.perturbation)  # which may have been set since
        moved = perturb(hidden, scale, self.generator)
        forget_curvature(self.base)
        self._freeze(list(hidden))
        everything = hidden_parameters(self.model, self.head)
        drawn = {n: Draw(scale if n in moved else 0.0, seed, self.step_count) for n in everything}
        note_draws(everything, drawn)

    def _freeze(self, trainable: list[str] | None) -> None:
        """Hold all hidden weights fixed, of which these were trained; None: give them back."""
        if self._freezer is not None:
            self._freezer.release()
        self._freezer = None if trainable is None else Freezer(self.model, self.head, trainable)
        if trainable is None:
            forget_draws(hidden_parameters(self.model, self.head))
        self._proved_frozen = False
        retrace_compiled()

    def unfreeze(self) -> None:
        """Give the model back: gradients required as before, hooks removed, training mode as the user has it.

        What was trained stays. The phase is 1 again, and `switch_step` infinite, so that nothing switches
        unasked.
        """
        if self._watch is not None:
            self._watch.remove()
        self.switch_step = math.inf
        if self._freezer is not None:
            self._freeze(None)
            forget_curvature(self.base)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of `base`, with an entry "two_phase" of tensors and plain values beside it.

        In phase two that entry holds a fingerprint of all that is frozen, and loading asks for the same.
        """
        for pre in self._optimizer_state_dict_pre_hooks.values():
            pre(self)
        state = saved_state(
            self.base,
            self.model,
            self._head,
            self._freezer,
            step_count=self.step_count,
            switch_step=self.switch_step,
            perturbation=self.perturbation,
            generator=self.generator,
        )
        return through_hooks(self._optimizer_state_dict_post_hooks, self, state)

    @ordinary()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state: phase, count, generator, `switch_step` and `perturbation`.

        What the state says replaces what the constructor was given. Load the model's own state first: a
        state of phase two is refused by a model whose frozen weights or buffers differ in one bit.
        Everything is checked before anything is changed.
        """
        errors.is_a("state_dict", state_dict, dict, "what TwoPhase.state_dict gave")
        state = through_hooks(self._optimizer_load_state_dict_pre_hooks, self, state_dict.copy())
        head = load_base(state, self.base, self.model, self._head, self.generator)
        own = state["two_phase"]
        if head is not None:
            self._head, self._head_error = head, None
        self.step_count, self.switch_step = own["step_count"], own["switch_step"]
        self.perturbation = own["perturbation"]
        if own["phase"] == 2:
            self._freeze(own["trainable"])
            note_draws(hidden_parameters(self.model, self.head), loaded_draws(own))
        elif self._freezer is not None:
            self._freeze(None)
        forget_flattening(self.base)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        return pickled(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._prepare()
        vars(self).update(unpickled(state))
        if state["watching"]:
            self._watch = Watch(self.model, state["head"], self._on_head_found)
        if state["trainable"] is not None:
            self._freeze(state["trainable"])
            note_draws(hidden_parameters(self.model, self.head), loaded_draws(state))

    def __repr__(self) -> str:
        steps = self.switch_step
        of = f"switch after step {steps}" if steps < math.inf else "switch by hand"
        head = "to be found" if self._head is None else str(self._head)
        base = "\n".join("  " + line for line in repr(self.base).splitlines())
        return (
            f"TwoPhase (\n  phase {self.phase}, {self.step_count} steps done, {of}\n  head: {head}\n"
            f"  perturbation: {self.perturbation:g}\n{base}\n)"
        )
