"""Every launch of a Triton kernel in the tests is one that tools/aot.py has compiled for the architectures.

``watch`` wraps the launchers' ``run`` for the whole session: a kernel, launch configuration, constants and
types of arguments that no entry of the module's ``specializations()`` states fail the test that asked for
them. What Triton specialises besides, the values of arguments (multiples of 16, an integer of 1), is not
asked of the list: tools/aot.py adds it to every entry.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

_passed: set[tuple[Any, ...]] = set()


def watch() -> None:
    """To be called before a module with kernels is imported; does nothing where Triton cannot be."""
    try:
        from gcfast.triton_kernels import _launch
    except ImportError:
        return
    run = _launch.run

    @functools.wraps(run)
    def watched(kernel: Any, grid: Any, launch: Any, device: Any, *args: Any, **constants: Any) -> None:
        check(kernel, launch, _launch.architecture(device), args, constants)
        run(kernel, grid, launch, device, *args, **constants)

    _launch.run = watched


def check(kernel: Any, launch: Any, arch: int, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Raise if no specialisation of the kernel's module is this launch."""
    parameters, defaults = _parameters(kernel.fn)
    asked = {**defaults, **dict(zip(parameters, args)), **launch.blocks, **constants}
    if set(asked) != set(parameters):
        raise AssertionError(
            f"{kernel.__name__}({', '.join(parameters)}) was launched with {', '.join(asked)}"
        )
    types = {name: _type(parameters[name], value) or repr(value) for name, value in asked.items()}
    key = (kernel.fn, arch, str(launch), *types.items())
    if key in _passed:
        return
    entries = [s for s in _listed(kernel.fn.__module__) if s.kernel.fn is kernel.fn]
    near = [s for s in entries if s.launch == launch and arch in s.architectures]
    if any(all(_fits(s, defaults, name, parameters[name], asked[name]) for name in parameters) for s in near):
        _passed.add(key)
        return
    wrong = min(
        ([n for n in parameters if not _fits(s, defaults, n, parameters[n], asked[n])] for s in near),
        key=len,
        default=["the launch configuration or the architecture"],
    )
    where = f"{kernel.fn.__module__}.specializations()"
    raise AssertionError(
        f"{kernel.__name__} was launched as no entry of {where} says: of its {len(entries)} entries the "
        f"nearest differs in {', '.join(wrong)}; asked for: sm_{arch}, {launch}, {types}"
    )


@functools.cache
def _listed(module: str) -> list[Any]:
    return list(sys.modules[module].specializations())


@functools.cache
def _parameters(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's parameters as Triton reads their annotations, and the defaults."""
    from triton.runtime.jit import KernelParam

    given = inspect.signature(function).parameters
    parameters = {name: KernelParam(i, p, False, False) for i, (name, p) in enumerate(given.items())}
    return parameters, {name: p.default for name, p in given.items() if p.default is not p.empty}


def _type(parameter: Any, value: Any) -> str:
    """The type that Triton compiles an argument for; "" for a constant."""
    from triton.runtime.jit import mangle_type

    if parameter.is_constexpr or value is None:
        return ""
    return parameter.annotation_type or mangle_type(value)


def _fits(s: Any, defaults: dict[str, Any], name: str, parameter: Any, value: Any) -> bool:
    """Whether the argument's type, or its value if it is a constant, is the entry's."""
    if name in s.signature:
        return _type(parameter, value) == s.signature[name]
    constants = {**defaults, **s.constants, **s.launch.blocks}
    if name not in constants or (hasattr(value, "data_ptr") and value is not constants[name]):
        return False
    return type(value) is type(constants[name]) and value == constants[name]
