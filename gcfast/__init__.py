"""gcfast: a provable global minimum for the PyTorch training you already do.

Implements Kawaguchi and Sun, *A Recipe for Global Convergence Guarantee in Deep Neural Networks* (AAAI 2021):
a two-phase wrapper around any optimizer, a certificate that it reaches the global minimum, and a convex solve
that finishes phase two.
"""

from gcfast._version import __version__
from gcfast.certificate import Assumption, Certificate, Offender, certify
from gcfast.features import FeatureCache, WideFeatures
from gcfast.jacobian import JacobianPlan, LayerJacobians, LayerTrainability, Trainability, trainability
from gcfast.losses import ConvexLoss
from gcfast.model import HeadError, find_head, widen
from gcfast.nn import WideHead, WideLayer
from gcfast.ops import (
    backend,
    backends,
    softmax_curvature,
    softmax_residual,
    wide_forward,
    wide_gram_product,
    wide_head_grad,
)
from gcfast.optim import TwoPhase
from gcfast.proofs import RankEstimate, WideGram, matrix_rank, wide_gram
from gcfast.solve import HeadSolution, Plan, Progress, Rates, plan, solve_head

__all__ = [
    "Assumption",
    "Certificate",
    "ConvexLoss",
    "FeatureCache",
    "HeadError",
    "HeadSolution",
    "JacobianPlan",
    "LayerJacobians",
    "LayerTrainability",
    "Offender",
    "Plan",
    "Progress",
    "RankEstimate",
    "Rates",
    "Trainability",
    "TwoPhase",
    "WideFeatures",
    "WideGram",
    "WideHead",
    "WideLayer",
    "__version__",
    "backend",
    "backends",
    "certify",
    "find_head",
    "matrix_rank",
    "plan",
    "softmax_curvature",
    "softmax_residual",
    "solve_head",
    "trainability",
    "wide_forward",
    "wide_gram",
    "wide_gram_product",
    "wide_head_grad",
    "widen",
]
