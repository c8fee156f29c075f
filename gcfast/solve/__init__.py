"""Phase two, solved: the head of least loss nearest to where training left it, with a duality gap."""

from gcfast.solve.gram_forms import Rates
from gcfast.solve.head_solver import solve_head
from gcfast.solve.plan_report import Plan
from gcfast.solve.planning import plan
from gcfast.solve.solution import HeadSolution, Progress

__all__ = [
    "HeadSolution",
    "Plan",
    "Progress",
    "Rates",
    "plan",
    "solve_head",
]
