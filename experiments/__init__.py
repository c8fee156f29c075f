"""Measured for the pages in docs/: run from the root of a checkout, python -m experiments.paper.

The experiments import one another, and the modules that benchmarks share, by their plain names.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = [ROOT / "experiments", ROOT / "bench"]
# The installed package comes before the source tree, which has no compiled modules.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, *_FOLDERS)]
sys.path += map(str, (ROOT, *_FOLDERS))
