"""Time and memory of certify and solve_head against n on MNIST, and the page made from them.

python -m experiments.scaling --sizes 500,1000,2000,4000,8000,20000    measure what is not there yet
python -m experiments.scaling --page                                   docs/scaling.md, of what was measured

MNIST is looked for in GCFAST_DATA or, from a checkout, ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import os

from scaling import measure, page


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", default="500,1000,2000,4000,8000,20000")
    parser.add_argument("--with-base", default="20000", help="sizes at which the base optimizer runs as well")
    parser.add_argument("--in-memory", default="20000", help="sizes solved once more within 1 GB")
    parser.add_argument("--page", action="store_true", help="write the page")
    parser.add_argument("--check", action="store_true", help="exit code 1 if it is not what was measured")
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--theorem", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.cell:
        print(json.dumps(measure.cell(known.cell, known.base, known.memory)))
    elif known.theorem:
        print(json.dumps(measure.theorem()))
    elif known.page:
        page.PAGE.parent.mkdir(exist_ok=True)
        page.PAGE.write_text(page.text(measure.RESULTS))
    elif known.check:
        if page.text(measure.RESULTS) != page.PAGE.read_text():
            said = f"{page.PAGE} is not what {measure.RESULTS} say"
            raise SystemExit(f"{said}: python -m experiments.scaling --page")
    else:
        os.environ.setdefault("GCFAST_DATA", str(measure.ROOT.parent / "shared" / "data"))

        def numbers(text: str) -> list[int]:
            return [int(part) for part in text.split(",") if part]

        measure.measure(numbers(known.sizes), set(numbers(known.with_base)), set(numbers(known.in_memory)))


if __name__ == "__main__":
    main()
