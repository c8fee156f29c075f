"""The picture of the rooms, docs/rooms.svg, drawn from the imports and from the floors in pyproject.toml.

python -m tools.rooms            write the picture
python -m tools.rooms --check    exit code 1 if the file is not what the imports say

Only the places of the rooms on their floors are chosen by hand. Needs import-linter, which brings grimp.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import grimp
from importlinter.api import read_configuration

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
DOORS = {"__main__", "__init__"}  # what a user comes in by: no rooms

# The column of each room. Right below the room that it comes from an arrow turns into the column of the room
# that it leads to, so no other room may stand there between the two: `arrow` refuses to draw through one.
PLACES = """
cli 3, integrations 4, sklearn 5, certificate 2, solve 3, jacobian 4, proofs 3, distributed 4, optim 0,
features 3, model 2, losses 1, nn 2, ops 1, storage 3.5, plots 5, triton_kernels 2,
verify 0, reference 1, _version 3.25, ambient 4.25, errors 5.25
"""
COLUMNS = {name: float(at) for name, at in (place.split() for place in PLACES.split(","))}
LEFT, TOP, STEP_X, STEP_Y, WIDTH, HEIGHT = 92, 78, 164, 100, 136, 52  # in pixels
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1d2733 }
.page { fill: #ffffff } .floor { fill: #f3f6f9 } .title { font-size: 19px; font-weight: 600 }
.note { font-size: 12px; fill: #5b6875 } .name { font-size: 14px; font-weight: 600; text-anchor: middle }
.size { font-size: 11px; fill: #5b6875; text-anchor: middle } .bar { fill: #2f7fd1 }
.room { fill: #ffffff; stroke: #2f7fd1 } .later { fill: none; stroke: #9aa7b4; stroke-dasharray: 4 4 }
.room, .arrow { stroke-width: 1.4 } .arrow { fill: none; stroke: #73808d } .head { fill: #73808d }
"""
DARK = """@media (prefers-color-scheme: dark) {
text { fill: #e4eaf0 } .page { fill: #0e141b } .floor { fill: #151d26 } .note, .size { fill: #93a1b0 }
.room { fill: #1a2531; stroke: #5aa2ec } .bar { fill: #5aa2ec } .arrow { stroke: #8494a4 }
.later { fill: none; stroke: #55626f } .head { fill: #8494a4 }
}
"""


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top to the ground, as the linter's contract names them."""
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    rows = [[name.strip(" ()") for name in layer.split("|")] for layer in layers]
    return [row for row in rows if not set(row) & DOORS]


def survey() -> tuple[dict[str, tuple[int, int]], set[tuple[str, str]]]:
    """The files and lines of each room that is built, and which room imports which."""
    with tempfile.TemporaryDirectory() as folder:  # the package as it is when installed
        package = Path(folder, "gcfast")
        skipped = shutil.ignore_patterns("triton_kernels", "__pycache__", "*.so")
        shutil.copytree(ROOT / "gcfast", package, ignore=skipped)
        shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=skipped)
        sys.path.insert(0, folder)
        graph = grimp.build_graph("gcfast", cache_dir=None)
        sizes = {}
        for place in package.iterdir():
            files = sorted(place.rglob("*.py")) if place.is_dir() else [place] * (place.suffix == ".py")
            if files and place.stem not in DOORS:
                sizes[place.stem] = (len(files), sum(len(f.read_text().splitlines()) for f in files))
    room = {module: module.split(".")[1] for module in graph.modules if "." in module}
    imports = ((a, b) for a in room for b in graph.find_modules_directly_imported_by(a) if b in room)
    return sizes, {(room[a], room[b]) for a, b in imports if room[a] != room[b] and room[a] not in DOORS}


def shortest(arrows: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that are not implied by others: there are no circles, so what is left is one set only."""

    @functools.cache
    def reach(room: str) -> frozenset[str]:
        return frozenset().union(*({b} | reach(b) for a, b in arrows if a == room))

    return sorted((a, b) for a, b in arrows if not any(b in reach(c) for x, c in arrows if x == a and c != b))


def draw(rows: list[list[str]], sizes: dict[str, tuple[int, int]], arrows: set[tuple[str, str]]) -> str:
    floor = {room: k for k, row in enumerate(rows) for room in row}
    if missing := sorted(floor.keys() - COLUMNS.keys()):
        sys.exit(f"tools/rooms.py: PLACES lacks {', '.join(missing)}")
    x = {room: LEFT + WIDTH / 2 + STEP_X * COLUMNS[room] for room in floor}
    y = {room: TOP + STEP_Y * k for room, k in floor.items()}  # of the upper edge
    kept = shortest(arrows)

    def arrow(a: str, b: str) -> str:
        for room in floor:
            if floor[a] < floor[room] < floor[b] and abs(x[room] - x[b]) < WIDTH / 2 + 8:
                sys.exit(f"tools/rooms.py: the arrow from {a} to {b} would go through {room}")
        # Arrows to the left begin left of the middle, the farthest outermost; likewise to the right.
        side = (x[b] > x[a]) - (x[b] < x[a])
        nearer = [t for s, t in kept if s == a and 0 < (x[t] - x[a]) * side < abs(x[b] - x[a])]
        begin, end = x[a] + side * 22 * (1 + len(nearer)), x[b]
        top, bottom = y[a] + HEIGHT, y[b] - 6
        turned, half = min(y[a] + STEP_Y, bottom), y[a] + (HEIGHT + STEP_Y) / 2
        path = f"M{begin:g} {top}C{begin:g} {half:g} {end:g} {half:g} {end:g} {turned:g}V{bottom:g}"
        return f'<path class="arrow" marker-end="url(#head)" d="{path}"/>'

    def box(room: str) -> str:
        left, up, (files, lines) = x[room] - WIDTH / 2, y[room], sizes.get(room, (0, 0))
        about = f"{round(lines, -2):,} lines" if lines >= 50 else "a few lines"  # not new after every change
        said = f"{files} file{'s' * (files != 1)}, {about}" if files else "reserved"
        bar = (WIDTH - 24) * round(lines, -2) / max(most for _, most in sizes.values())
        return (
            f'<rect class="room{" later" * (not files)}" x="{left:g}" y="{up}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="8"/><text class="name" x="{x[room]:g}" y="{up + 22}">{room}</text>'
            f'<text class="size" x="{x[room]:g}" y="{up + 38}">{said}</text>'
            f'<rect class="bar" x="{left + 12:g}" y="{up + 44}" width="{bar:.0f}" height="3"/>'
        )

    width, height = round(max(x.values()) + WIDTH / 2) + 24, max(y.values()) + HEIGHT + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="The rooms of gcfast and what they import">',
        f"<style>{STYLE}{DARK}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
        f'<rect class="page" width="{width}" height="{height}" rx="12"/>',
        '<text class="title" x="24" y="34">The rooms of gcfast</text>',
        '<text class="note" x="24" y="54">An arrow leads from a room to one that it imports, always on a '
        "lower floor. Arrows that others imply are left out.</text>",
    ]
    for k, up in enumerate(range(TOP - 8, height - HEIGHT, STEP_Y)):
        out += [f'<rect class="floor" x="12" y="{up}" width="{width - 24}" height="{HEIGHT + 16}" rx="8"/>']
        out += [f'<text class="note" x="24" y="{up + 38}">floor {len(rows) - k}</text>']
    out += [arrow(a, b) for a, b in kept] + [box(room) for row in rows for room in row]
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is another")
    picture = draw(floors(), *survey())
    if not parser.parse_args().check:
        PICTURE.write_text(picture)
    elif not PICTURE.is_file() or PICTURE.read_text() != picture:
        sys.exit("docs/rooms.svg is not what the imports say: run python -m tools.rooms")


if __name__ == "__main__":
    main()
