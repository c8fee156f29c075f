"""Has anything below the head changed? Cheap to ask at every step, exact where something moved."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

from gcfast.model import Head, digest, plain_name, unwrap
from gcfast.nn import WideLayer

_PLAIN = (int, float, str, tuple)
_Slot = tuple[str, dict[str, Any], str]  # a tensor's name, and where its module keeps it


class BodySnapshot:
    """Remembers all parameters and buffers of `model` below `head`, bit by bit, as 128-bit digests.

    The quick look is at addresses and version counters, and at the bits only where one of these moved. It
    cannot see a write through `Tensor.data`, which counts no version, nor a submodule that was exchanged; the
    full one sees both.
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        self.model, self.head = unwrap(model), head
        self._slots = list(_slots(self.model, head.module))
        self._digests = {name: digest(place[key]) for name, place, key in self._slots}
        self._kinds = _kinds(self.model, head.module)
        self._look()

    def check(self, model: nn.Module | None = None, full: bool = False) -> None:
        """RuntimeError if something has changed, quickly seen or in `full`."""
        change = self._full(model) if full else self._quick()
        if change is not None:
            raise RuntimeError(
                f"the cache is stale: {change} below the head since it was made, so the model gives other "
                "features now; make a new gcfast.FeatureCache"
            )

    def _look(self) -> None:
        self._values = [place[key] for _, place, key in self._slots]
        self._addresses = [t.data_ptr() for t in self._values]
        # an inference tensor counts no versions: where there is one the bits are read each time
        counted = not any(t.is_inference() for t in self._values)
        self._versions = [t._version for t in self._values] if counted else None

    def _quick(self) -> str | None:
        """What has changed, in words; None if nothing that counts versions has."""
        now = [place.get(key) for _, place, key in self._slots]
        if (
            self._versions is not None
            and all(map(operator.is_, now, self._values))
            and [t._version for t in self._values] == self._versions
            and [t.data_ptr() for t in self._values] == self._addresses
        ):
            return None
        # written to, moved or restored: a change only if the bits differ
        for (name, _, _), value in zip(self._slots, now, strict=True):
            if value is None or digest(value) != self._digests[name]:
                return f"{name!r} changed"
        self._look()
        return None

    def _full(self, model: nn.Module | None) -> str | None:
        """The same from every bit, of this model or of another one of the same names."""
        root = self.model if model is None else unwrap(model)
        head = dict(root.named_modules()).get(self.head.name)
        if head is None or (root is self.model and head is not self.head.module):
            return f"the head {self.head} is not there any more"
        now = {name: place[key] for name, place, key in _slots(root, head)}
        if now.keys() != self._digests.keys():
            odd = min(now.keys() ^ self._digests.keys())
            return f"{odd!r} {'is new' if odd in now else 'is gone'}"
        changed = [name for name in now if digest(now[name]) != self._digests[name]]
        kinds = _kinds(root, head)
        changed += [name for name in kinds.keys() | self._kinds if kinds.get(name) != self._kinds.get(name)]
        return f"{changed[0]!r} changed" if changed else None


def _kinds(model: nn.Module, head: nn.Module) -> dict[str, Any]:
    """What the modules below the head compute: their class, and the options of torch's and gcfast's own."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if module is not head and next(module.children(), None) is None:
            kind = type(module)
            known = isinstance(module, WideLayer) or kind.__module__.startswith("torch.nn.")
            options = [(k, v) for k, v in vars(module).items() if k != "training" and isinstance(v, _PLAIN)]
            found[plain_name(name)] = (kind, options if known else [])
    return found


def _slots(model: nn.Module, head: nn.Module) -> Iterator[_Slot]:
    inner = set(head.modules())
    for prefix, module in model.named_modules():
        if module not in inner:
            for place in (module._parameters, module._buffers):
                for key, value in place.items():
                    if value is not None:
                        yield plain_name(f"{prefix}.{key}" if prefix else key), place, key
