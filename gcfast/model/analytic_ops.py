"""Which operators are real analytic functions of their arguments.

Names are those of the dispatcher (`aten.relu`), without the trailing underscore of the in-place form. An
operator that is analytic only on part of its domain (square root, logarithm, division) counts as analytic
where its argument is known to stay inside: `SignTracker` remembers which results are ≥ 0 or > 0, by rules
like exp > 0, x² ≥ 0, (≥ 0) + eps > 0, and which masks come from comparing real numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from gcfast.model.analytic_tables import (
    ACTIVATIONS,
    ALIASES,
    ANALYTIC,
    BATCH_NORMS,
    COMPARISONS,
    CONSTANTS,
    KINKS,
    NORMS,
    OPEN_DOMAIN,
    POSITIVE_DOMAIN,
    RANDOM,
    SIGN_KEPT,
    TIES,
)

Verdict = Literal["analytic", "not analytic", "ties", "unknown"]


def activation_verdict(name: str) -> tuple[Verdict, str]:
    """The verdict on an elementwise activation given by name, whatever its case."""
    key = name.lower().lstrip("_").rstrip("_").removeprefix("nn.")
    key = ALIASES.get(key, key)
    if key not in ACTIVATIONS:
        return "unknown", f"no rule for the activation {name!r}"
    analytic, why = ACTIVATIONS[key]
    return ("analytic", f"{key} is real analytic") if analytic else ("not analytic", f"{key} {why}")


def _storage(value: Tensor) -> int | None:
    """A key for the memory of a tensor, None where it has none of its own kind (sparse tensors)."""
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


class SignTracker:
    """What is known of the tensors of one forward pass: signs, and what was computed from weights.

    Dependence on weights goes by storage, so that writing through a view is not missed.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        self.signs = WeakTensorKeyDictionary()  # 1: ≥ 0, 2: > 0
        self.weighted = {_storage(w) for w in weights} | {None}

    def sign(self, value: Any) -> int:
        """2 for > 0, 1 for ≥ 0, 0 for not known."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return 2 if value > 0 else 1 if value == 0 else 0
        return int(self.signs.get(value, 0)) if isinstance(value, Tensor) else 0

    def depends(self, value: Tensor) -> bool:
        """Whether a tensor may have been computed from weights."""
        return _storage(value) in self.weighted

    def note(self, func: Any, out: Any, sign: int, depends: bool, constant: bool) -> None:
        """Remember what an operator gave."""
        fresh = not func._schema.is_mutable and all(r.alias_info is None for r in func._schema.returns)
        fresh = fresh or constant
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.signs[t] = sign
                if depends:
                    self.weighted.add(_storage(t))
                elif fresh and _storage(t) is not None:
                    self.weighted.discard(_storage(t))  # memory used again
                if func._schema.is_mutable and t._base is not None:
                    self.signs[t._base] = 0  # written through a view


def _new_sign(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], marks: SignTracker) -> int:
    """What is known of the sign of the result."""
    first = args[0] if args else None
    if name in ("exp", "exp2", "softplus", "sigmoid", "cosh", "_softmax", "softmax"):
        return 2
    if name in ("square", "var", "relu", "abs", "linalg_vector_norm", "norm"):
        return 1
    if name == "pow" and isinstance(args[1], (int, float)) and float(args[1]) % 2 == 0:
        return 1
    if name in ("rsqrt", "reciprocal"):
        return 2 if marks.sign(first) == 2 else 0
    if name in ("mul", "div") and len(args) > 1:
        if name == "mul" and args[0] is args[1]:
            return 1
        return min(marks.sign(args[0]), marks.sign(args[1]))
    if name == "add" and len(args) > 1 and kwargs.get("alpha", 1) > 0:
        low, high = sorted((marks.sign(args[0]), marks.sign(args[1])))
        return high if low > 0 else 0
    return marks.sign(first) if name in SIGN_KEPT else 0


def _base_name(func: Any) -> tuple[str, str]:
    namespace, _, name = func._schema.name.partition("::")
    return namespace, name if name.startswith("__") else name.rstrip("_")


def classify(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, marks: SignTracker
) -> tuple[Verdict, str]:
    """The verdict on one operator call, with the reason; what it tells of its result goes into `marks`."""
    namespace, name = _base_name(func)
    verdict = _verdict(namespace, name, args, kwargs, marks)
    sign = _new_sign(name, args, kwargs, marks)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    constant = name in CONSTANTS or name in ("lift", "lift_fresh")
    marks.note(func, out, sign, not constant and any(marks.depends(t) for t in tensors), constant)
    return verdict


def _verdict(
    namespace: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], marks: SignTracker
) -> tuple[Verdict, str]:
    leaves = tree_leaves((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    reals = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if namespace == "gcfast":
        return _own_op(name, args, kwargs)
    if namespace not in ("aten", "prims", "_c10d_functional"):
        return "unknown", f"no rule for operators of {namespace!r}"
    if name in RANDOM:
        return "unknown", "draws random numbers, so the features are not a function of the weights"
    if name in ("_local_scalar_dense", "item", "is_nonzero") and any(marks.depends(t) for t in reals):
        return "unknown", "reads a number out of a tensor, and what is made of it is not seen"
    if name in CONSTANTS:
        return "analytic", "a constant"
    if not any(marks.depends(t) for t in tensors):
        return "analytic", "acts on the data alone, not on anything computed from weights"
    if name in ("where", "masked_fill", "masked_scatter"):
        if any(marks.depends(t) for t in tensors if t.dtype == torch.bool):
            return "not analytic", "chooses by a mask computed from weights"
        return "analytic", "linear in what it chooses from; the mask does not depend on weights"
    if not reals:
        return "analytic", "acts on whole numbers or masks only"
    return _real_verdict(name, args, kwargs, marks)


def _own_op(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Verdict, str]:
    """gcfast's own operators: what their `activation` argument says."""
    for value in [kwargs.get("activation"), *(a for a in args if isinstance(a, str))]:
        if isinstance(value, str):
            return activation_verdict(value)
    return activation_verdict(name)


def _real_verdict(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], marks: SignTracker
) -> tuple[Verdict, str]:
    if name == "softplus":
        threshold = args[2] if len(args) > 2 else kwargs.get("threshold", 20)
        beta = args[1] if len(args) > 1 else kwargs.get("beta", 1)
        # Where both are the same to rounding the threshold does not matter, nor where no number is above it.
        least = 34 if args[0].dtype == torch.float64 else 20
        if threshold < 20 or (threshold < least and bool((args[0] * beta > threshold).any())):
            return "not analytic", (
                f"softplus is replaced by the identity above threshold {threshold}, where {args[0].dtype} "
                f"tells them apart; threshold={least} is high enough"
            )
    if name in ANALYTIC:
        return "analytic", "real analytic in all its arguments"
    key = ALIASES.get(name.lstrip("_"), name.lstrip("_"))
    if key in ACTIVATIONS:
        return activation_verdict(key)
    if name in KINKS:
        return "not analytic", f"{name} {KINKS[name]}"
    if name in TIES:
        return "ties", TIES[name]
    if name in COMPARISONS:
        return "not analytic", "compares real numbers"
    if name in NORMS:
        eps = args[NORMS[name]] if len(args) > NORMS[name] else kwargs.get("eps")
        if isinstance(eps, (int, float)) and eps <= 0:
            return "ties", "eps = 0: analytic only where the variance is not 0"
        return "analytic", "eps > 0 keeps the square root away from 0"
    if name in BATCH_NORMS:
        # the flag `training`, sixth in the older operators; *_no_training and *_no_update carry none
        flag = False if name.endswith(("no_training", "no_update")) else _training_flag(name, args)
        if flag:
            return (
                "unknown",
                "normalises by the statistics of the batch, so features depend on the batch they come in",
            )
        return "analytic", "statistics are fixed"
    if name in POSITIVE_DOMAIN:
        if marks.sign(args[0]) == 2:
            return "analytic", "its argument is positive"
        return "ties", "analytic only where its argument is positive"
    if name == "div":
        if kwargs.get("rounding_mode") is not None:
            return "not analytic", "rounds"
        if not isinstance(args[1], Tensor) or marks.sign(args[1]) == 2:
            return "analytic", "the denominator is not 0"
        return "ties", "analytic only where the denominator is not 0"
    if name == "pow":
        exponent = args[1] if len(args) > 1 else None
        if isinstance(exponent, (int, float)) and float(exponent).is_integer() and exponent >= 0:
            return "analytic", "a polynomial"
        if marks.sign(args[0]) == 2:
            return "analytic", "its argument is positive"
        return "ties", "analytic only where its argument is positive"
    if name in OPEN_DOMAIN:
        if name == "log1p" and marks.sign(args[0]) >= 1:
            return "analytic", "its argument is at least 0"
        return "ties", "analytic only inside its domain (away from 0, or from the ends of the interval)"
    return "unknown", f"no rule for {name!r}"


def _training_flag(name: str, args: tuple[Any, ...]) -> bool:
    if len(args) > 5 and isinstance(args[5], bool):
        return args[5]
    # no running statistics among the arguments: _native_batch_norm_legit.no_stats
    return any(isinstance(a, bool) and a for a in args) or name.endswith("with_update")
