"""Pickles of plain values, read without Python's unpickler: nothing is imported, called or restored."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

_MOST = 1 << 19  # instructions; CIFAR-100's training batch has 200,000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    [
        "INT",
        "LONG",
        "LONG1",
        "BININT",
        "BININT1",
        "BININT2",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
    ]
)
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Named(str):
    """The module and the name, with a blank between, of something that a pickle asks for."""


class Made:
    """An object that a pickle makes by a call and then gives a state: both are kept, neither is acted on."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None


def read_pickle(
    raw: bytes,
    make: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What a pickle of None, booleans, numbers, strings, lists, tuples and dicts with strings as keys holds.

    ``make`` says for each name that the pickle may ask for what a call of it gives; it must check its
    arguments, which may be anything. None stands for a name that is not called. ``persistent`` gives the
    object of a persistent id. Memory and time are proportional to the pickle, whatever it says.

    Raises ValueError for whatever else it asks for, and nearly anything for a damaged one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def after_mark() -> list[Any]:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        name = opcode.name
        if count >= _MOST:
            raise ValueError(f"it has more than {_MOST:,} instructions")
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("TUPLE", "LIST"):
            stack.append((tuple if name == "TUPLE" else list)(after_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = after_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else after_mark()
            if name == "DICT":
                stack.append({})
            # Other keys are not hashed: doing so to a tuple in a tuple in a tuple ... can end the process.
            pairs = zip((_expect(key, str) for key in items[::2]), items[1::2], strict=True)
            _expect(stack[-1], dict).update(pairs)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            asked = argument or f"{_expect(stack.pop(-2), str)} {_expect(stack.pop(), str)}"
            if asked not in make:
                raise ValueError(
                    f"it asks for {asked.replace(' ', '.')[:100]}, which such a file does not need"
                )
            stack.append(Named(asked))
        elif name == "REDUCE":
            arguments = _expect(stack.pop(), tuple)
            function = make[_expect(stack.pop(), Named)]
            if function is None:
                raise ValueError("it calls what is not there to be called")
            stack.append(function(*arguments))
        elif name == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not dict:  # what torch notes beside a state_dict
                _expect(stack[-1], Made).state = state
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}, which plain values do not need")
    raise ValueError("it has no end")


def _expect(thing: Any, kind: type) -> Any:
    if type(thing) is not kind:
        raise ValueError(f"a {kind.__name__} was expected in it, got a {type(thing).__name__}")
    return thing
