"""The paper's claims on real data.

python -m experiments.paper --suite cpu --out DIR   every cell that DIR lacks
python -m experiments.paper --page                  docs/paper.md, docs/guide.md and figures

A finished cell is one JSON file: a killed run goes on where it stopped, and the pages are made from the
committed ones. Data are looked for in GCFAST_DATA or, from a checkout, ../shared/data; cells of data that are
not there are passed over, and run once they are.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

CELLS = Path(__file__).with_name("cells")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.paper", description=__doc__, formatter_class=raw)
    parser.add_argument("--suite", choices=("cpu", "gpu"))
    parser.add_argument("--out", type=Path, help="default: the committed cells, experiments/paper/cells")
    parser.add_argument(
        "--only", default="*", metavar="GLOBS", help="cells of these names: 'table1-*,times-*'"
    )
    parser.add_argument(
        "--workers", type=int, help="cells at a time, one thread each; default: cores, 1 on a GPU"
    )
    parser.add_argument("--minutes", type=float, help="stop by then, within a cell too, and go on next time")
    parser.add_argument("--list", action="store_true", help="name the cells and which are done")
    parser.add_argument("--page", action="store_true", help="write the pages")
    parser.add_argument("--check", action="store_true", help="exit code 1 if they are not what was measured")
    known = parser.parse_args()
    if known.page or known.check:
        from paper import pages

        return pages.check() if known.check else pages.write()
    if known.suite is None:
        parser.error("--suite cpu or --suite gpu, or --page")
    from paper import running, suite

    globs = known.only.split(",")
    cells = [c for c in getattr(suite, known.suite)() if any(fnmatch.fnmatch(c.name, g) for g in globs)]
    if not cells:
        parser.error(f"--only: no cell of the {known.suite} suite is named {known.only!r}")
    out = known.out or CELLS
    if known.list:
        for cell in cells:
            print("done" if running.result(out, cell).exists() else "    ", cell.name)
        return 0
    device = "cuda" if known.suite == "gpu" else "cpu"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--suite gpu: no CUDA device here")
    return running.run(cells, out, device=device, workers=known.workers, minutes=known.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
