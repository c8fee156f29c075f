"""The wide layer: act(z weight^T + bias) with m units, initialised so that its features are well spread."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gcfast import errors, ops
from gcfast.ops import arguments


class WideLayer(nn.Module):
    """act(z weight^T + bias): (..., d) to (..., m).

    Args:
        d: width of the input.
        m: number of units; the guarantee needs about as many as there are training samples.
        activation: softplus, sigmoid, tanh, gelu, gelu_tanh, silu or relu. Every one but relu is real
            analytic, which the theorem route of ``certify`` asks for.
        beta: softplus's sharpness. The default 1.0 is the ordinary softplus, so that step sizes that suit the
            rest of the model suit this layer; a larger beta puts sharper kinks between the samples, which
            raises sigma_min of the features where m is well above n, and lowers it near m = n
            (docs/paper.md).
        device, dtype: of the parameters.

    Attributes: ``weight`` (m, d), ``bias`` (m,), ``activation``, ``beta``.

    Initialisation: weight ~ N(0, 1/d), so that an input with entries of size one gives pre-activations of
    size one at any d and m, and random directions differ between units; bias ~ U(-sqrt 3, sqrt 3), of
    variance one, spreads the kinks over the range of the data, so that no two units are alike even for d = 1.
    Neither depends on m: the head's own initialisation divides by it. No unit of a smooth activation is dead
    or saturated. softplus keeps this up to beta = 4: its slope 1 / (1 + exp(-beta x)) exceeds 1e-3 wherever
    x > -sqrt 3. A sharper one, and relu, have units whose kink lies beyond all samples (relu, 200 to 256
    standard normal samples: 12 % for d = 1, about 1 % for d = 8, none for d = 64). These kinks serve data
    wider than the standard normal: with biases drawn within each unit's own range, in proportion to the norm
    of its weights, no unit is dead, but twelve points in [-4, 4] no longer have features of full rank (relu,
    d = 1, m = 400).

    The features are an output like any other and are stored for the backward pass;
    :class:`WideHead` does without.
    """

    def __init__(
        self,
        d: int,
        m: int,
        *,
        activation: str = "softplus",
        beta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d, m = errors.is_count("d", d), errors.is_count("m", m)
        arguments.is_activation(activation, beta)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating dtype; got {errors.came(dtype)}")
        if device is not None:
            device = errors.as_device("device", device)
        self.d = d
        self.m = m
        self.activation = activation
        self.beta = float(beta)
        try:
            self.weight = nn.Parameter(torch.empty(m, d, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(m, device=device, dtype=dtype))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MemoryError(
                f"m, the width: {m:,} units of d = {d:,} weights do not fit ({reason})"
            ) from error
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw weight and bias anew, from `generator` if given."""
        errors.is_generator("generator", generator)
        self.weight.normal_(0.0, 1.0 / math.sqrt(self.d), generator=generator)
        self.bias.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)

    def forward(self, z: Tensor) -> Tensor:
        pre = nn.functional.linear(z, self.weight)
        # Under autocast the product is half precision and so is the sum with the bias.
        return ops.activation(pre, self.bias.to(pre.dtype), activation=self.activation, beta=self.beta)

    def extra_repr(self) -> str:
        return f"{self.d}, {self.m}, activation={self.activation!r}, beta={self.beta:g}"


def through_head(wide: nn.Module, head: nn.Module, z: Tensor, fused: bool = True) -> Tensor:
    """head(wide(z)), without the features in between if nobody asks for them and both are what they seem."""
    known = type(wide) is WideLayer and type(head) is nn.Linear
    if fused and known and not (wide._forward_hooks or _watched(wide) or _watched(head)):
        assert isinstance(wide, WideLayer) and isinstance(head, nn.Linear)
        weights = (wide.weight, wide.bias, head.weight, head.bias)
        if not any(is_traceable_wrapper_subclass(t) for t in (z, *weights)):
            fused_out = ops.wide_forward(z, *weights, activation=wide.activation, beta=wide.beta)
            for hook in list(head._forward_hooks.values()):
                hook(head, (), fused_out)
            return fused_out
    out: Tensor = head(wide(z))
    return out


def _watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, its own or everyone's, or a patch."""
    hooks = (
        # TwoPhase looks at the first pass: the pass it belongs to must not round differently for it
        not all(isinstance(hook, OutputHook) for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None  # Module.compile: called as the user had it compiled
    )
    return bool(hooks) or nn.modules.module._has_any_global_hook()


class WideHead(nn.Sequential):
    """A wide layer and the linear head upon it: (..., d) to (..., C); the features (..., m) are never stored.

    Args:
        wide: a :class:`WideLayer`, (..., d) to (..., m).
        head: ``nn.Linear(m, C)``, with or without a bias.

    Attributes: ``wide``, ``head`` (and ``[0]``, ``[1]``); ``fused``, True. The state dict is that of a
    ``Sequential`` of these names.

    Forward and backward pass make the features tile by tile (:func:`gcfast.wide_forward`), the backward pass
    anew: it costs one product more and saves some 3 batch m numbers of memory. Under autocast operands are
    cast as ``nn.Linear`` casts them. With a hook on either module, another class in the place of one (an
    adapter, a parametrization), weights that are tensor subclasses (quantised, sharded), or
    ``fused = False``, the two modules are called one after the other: whoever looks for the features finds
    them, and second derivatives work (they do not where fused, which says so). So it is in ``TwoPhase``'s
    second phase, whose hooks freeze the wide layer: the features are stored there, for the head's gradient.

    Raises:
        TypeError, ValueError: `wide` is no WideLayer, or `head` does not take its m features.
    """

    wide: WideLayer
    head: nn.Linear

    def __init__(self, wide: WideLayer, head: nn.Linear) -> None:
        if not isinstance(wide, WideLayer):
            raise TypeError(f"wide must be a gcfast.WideLayer; got {type(wide).__name__}")
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear; got {type(head).__name__}")
        if head.in_features != wide.m:
            raise ValueError(f"head must take the {wide.m} features of wide; it takes {head.in_features}")
        super().__init__(OrderedDict[str, nn.Module](wide=wide, head=head))
        self.fused = True

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # Sequential would make a WideHead of the part
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[arg-type]
        return super().__getitem__(index)

    def forward(self, z: Tensor) -> Tensor:
        if len(self) != 2:  # somebody appended to it
            out: Tensor = super().forward(z)
            return out
        return through_head(self.wide, self.head, z, self.fused)


class OutputHook:
    """A forward hook that reads a module's output alone, so that whoever fuses the module can serve it.

    Nothing is called while code is compiled.
    """

    def __init__(self, look: Callable[[Any], None]) -> None:
        self.look = look

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.look(output)
