"""Convex losses: value, residual, curvature, conjugate and infimum, sample by sample.

The training loss is L = (1/n) sum_i loss_i(f_i) with f = logits (n, C). Values agree with the functions of
``torch.nn.functional`` of the same name with ``reduction="mean"``: MSE, BCE and Huber average over the C
outputs too, so that loss_i carries a factor 1/C.
"""

from gcfast.losses.base import ConvexLoss
from gcfast.losses.bounds import LossBounds, bounds_at
from gcfast.losses.convexity import check_convex
from gcfast.losses.cross_entropy import CrossEntropy
from gcfast.losses.elementwise import MSE, BCEWithLogits, Huber
from gcfast.losses.resolve import check_matches_outputs, infimum_with_copies, resolve_loss
from gcfast.losses.rounding import UNIT, above, gap_above, mean_above, nan_is_inf

__all__ = [
    "MSE",
    "UNIT",
    "BCEWithLogits",
    "ConvexLoss",
    "CrossEntropy",
    "Huber",
    "LossBounds",
    "above",
    "bounds_at",
    "check_convex",
    "check_matches_outputs",
    "gap_above",
    "infimum_with_copies",
    "mean_above",
    "nan_is_inf",
    "resolve_loss",
]
