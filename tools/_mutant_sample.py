"""Faults drawn from the sources: constants, signs and comparisons of what the guarantees rest on.

They come from Python's syntax tree and from the tokens of C++, not from a list that someone chose. Each has
one other form, drawn with it: a number is doubled, halved, or moved by one; a sign or a comparison becomes
its neighbour. A recorded map says which tests run the function that a fault is in.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Mutant = dict[str, Any]
Calls = dict[str, tuple[float, list[str]]]  # of a test: its seconds, and the functions it runs as file:line
GROUPS = {  # where the sample is drawn from, and each one's share
    "proofs": (("gcfast/proofs",), 0.3),
    "losses": (("gcfast/losses",), 0.25),
    "gaps": (("gcfast/solve/solution", "gcfast/solve/bound", "gcfast/certificate"), 0.25),
    "core": (("csrc/core",), 0.2),
}
# every constant of these is tried: the bounds of roundings and of gaps
BOUNDING = re.compile(r"bound|gap|gamma|round|excess|error|rank_lower|sigma|conjugate|infimum")
BOUNDS = ("gcfast/proofs/rounding", "gcfast/losses/rounding", "gcfast/solve/bound", "csrc/core/rank_bounds")
CALLERS = {"activations": "activations.py", "panel": "wide.py"}  # of the headers in csrc/core, in gcfast/ops
OTHER = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
COMPARED = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
CPP = re.compile(
    r"(?P<skip>//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])+'|^[ \t]*#(?:\\\n|[^\n])*|"
    r"\b(?:template|static_assert)\b[^\n]*|\b[A-Za-z_]\w*)"
    r"|(?P<number>\b0x[0-9a-fA-F.]+(?:p[+-]?\d+)?|\b\d+\.?\d*(?:e[+-]?\d+)?)(?=[fuUlL]*\b|[^\w.])"
    r"|(?<= )(?P<operator>[<>=!]=|[-+*/<>])(?= )",
    re.DOTALL | re.MULTILINE,
)


def _numbers(text: str) -> list[str]:
    """Other values of a number, as they would be written."""
    if re.fullmatch(r"\d+", text):
        k = int(text)
        return [str(k + 1), str(k - 1) if k else "2"] if k < 3 else [str(k + 1), str(k - 1), str(2 * k)]
    if text.startswith("0x"):
        return [f"2 * {text}", f"{text} / 2"]
    return [repr(v) for v in (2 * float(text), 0.5 * float(text)) if v != float(text)] or ["1.0"]


def _python(text: str) -> Iterator[tuple[int, str, int, str]]:
    """Place, text, line of the function and its name of every token that can be changed."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(node: Any, end: bool = False) -> int:
        line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[line - 1] + column

    def between(left: int, right: int, token: str) -> int:
        return text.encode().index(token.encode(), left, right)

    def visit(node: ast.AST, line: int, name: str) -> Iterator[tuple[int, str, int, str]]:
        if isinstance(node, (ast.JoinedStr, ast.Raise)):
            return
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and not isinstance(node, ast.Lambda):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            name = f"{name}.{node.name}"
            inner: list[ast.AST] = [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]
        elif isinstance(node, ast.AnnAssign):
            inner = [node.value] if node.value else []
        elif isinstance(node, ast.Subscript):
            inner = [node.value, *([] if isinstance(node.slice, ast.Constant) else [node.slice])]
        else:
            inner = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            found = text.encode()[at(node) : at(node, True)].decode()
            if re.fullmatch(r"[\d.]+(?:e[+-]?\d+)?", found):
                yield at(node), found, line, name
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            token = OPERATORS[type(node.op)]
            yield between(at(node.left, True), at(node.right), token), token, line, name
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield at(node), "-", line, name
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            token = COMPARED[type(node.ops[0])]
            yield between(at(node.left, True), at(node.comparators[0]), token), token, line, name
        for child in inner:
            yield from visit(child, line, name)

    for place, token, line, name in visit(ast.parse(text), 0, ""):
        yield len(text.encode()[:place].decode()), token, line, name


def _cpp(text: str) -> Iterator[tuple[int, str, int, str]]:
    for match in CPP.finditer(text):
        if match["skip"] is None:
            yield match.start(), match[0], 0, ""


def candidates(sources: dict[str, str], seed: int) -> list[Mutant]:
    """One fault for each place, in the order of the sources; the same ones for the same seed."""
    found: list[Mutant] = []
    for name, text in sources.items():
        group = next((g for g, (starts, _) in GROUPS.items() if name.startswith(starts)), None)
        if group is None:
            continue
        for start, old, line, function in _python(text) if name.endswith(".py") else _cpp(text):
            number = old[0].isdigit()
            rng = random.Random(f"{seed} {name} {start} {old}")
            unary = old == "-" and text[start + 1] != " "
            new = rng.choice(_numbers(old)) if number else "+" if unary else OTHER[old]
            first, last = text.rfind("\n", 0, start) + 1, text.find("\n", start)
            row = text.count("\n", 0, start) + 1
            found.append(
                {
                    "id": f"{name}:{row}:{start - first + 1} {old} -> {new}",
                    "room": name.split("/")[1] if name.startswith("gcfast/") else "ops",
                    "why": text[first:last].strip(),
                    "find": text[first:last],
                    "replace": text[first:start] + new + text[start + len(old) : last],
                    "group": group,
                    "file": name,
                    "first": first,
                    "function": line,
                    "bound": number and (name.startswith(BOUNDS) or bool(BOUNDING.search(function))),
                }
            )
    return found


def sample(found: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of them, each group its share, spread over its files; and all constants of the bounds."""
    rng = random.Random(seed)
    chosen: list[Mutant] = []
    for group, (_, share) in GROUPS.items():
        files: dict[str, list[Mutant]] = {}
        for mutant in found:
            if mutant["group"] == group:
                files.setdefault(mutant["file"], []).append(mutant)
        for mutants in files.values():
            rng.shuffle(mutants)
        rounds = itertools.chain.from_iterable(itertools.zip_longest(*files.values()))
        chosen += itertools.islice(filter(None, rounds), round(share * count))
    ids = {m["id"] for m in chosen}
    return chosen + [m for m in found if m["bound"] and m["id"] not in ids]


def placed(mutant: Mutant, sources: dict[str, str]) -> Mutant:
    """With as many lines before its own as tell its place."""
    text, first, find = sources[mutant["file"]], mutant["first"], mutant["find"]
    while first and sum(other.count(find) for other in sources.values()) > 1:
        first = text.rfind("\n", 0, first - 1) + 1
        find = text[first : mutant["first"]] + mutant["find"]
    return {**mutant, "find": find, "replace": find[: -len(mutant["find"])] + mutant["replace"]}


def tests_of(mutant: Mutant, calls: Calls, seconds: float) -> list[str]:
    """The tests that ran the mutant's function, then its file: quick ones first, for so many seconds."""
    name, line = mutant["file"], mutant["function"]
    if name.startswith("csrc/"):  # no Python function: those that call what it is for
        name = "gcfast/ops/" + next((v for k, v in CALLERS.items() if k in name), "rank.py")
    exactly = {t for t, (_, where) in calls.items() if line and f"{name}:{line}" in where}
    nearly = [t for t, (_, where) in calls.items() if any(w.startswith(f"{name}:") for w in where)]
    chosen: list[str] = []
    for test in sorted(nearly, key=lambda t: (t not in exactly, calls[t][0])):
        seconds -= calls[test][0]
        if seconds < 0 and chosen:
            break
        chosen.append(test)
    return chosen


def programs_of(mutant: Mutant, root: Path) -> list[str]:
    """The C++ tests of a header, which need no build of the modules."""
    header = Path(mutant["file"])
    programs = {
        p.stem
        for p in (root / "tests" / "core").glob("*.cpp")
        if p.stem == header.stem or f'/{header.name}"' in p.read_text()
    }
    return [f"tests/ops/test_core.py::test_core[native-{p}]" for p in sorted(programs) or ["inertia"]]
