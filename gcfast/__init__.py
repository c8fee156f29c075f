"""gcfast: a provable global minimum for the PyTorch training you already do.

Implements Kawaguchi and Sun, *A Recipe for Global Convergence Guarantee in Deep Neural Networks* (AAAI 2021):
a two-phase wrapper around any optimizer, a certificate that it reaches the global minimum, and a convex solve
that finishes phase two.
"""

from gcfast._version import __version__
from gcfast.certificate.certificate import Assumption, Certificate, Offender
from gcfast.certificate.certification import certify
from gcfast.features.cache import FeatureCache
from gcfast.features.wide import WideFeatures
from gcfast.jacobian.layer_jacobians import LayerJacobians
from gcfast.jacobian.plan import JacobianPlan
from gcfast.jacobian.trainability_report import LayerTrainability, Trainability
from gcfast.jacobian.trainability_run import trainability
from gcfast.losses import ConvexLoss
from gcfast.model.head import HeadError, find_head
from gcfast.model.widening import widen
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
from gcfast.optim.two_phase import TwoPhase
from gcfast.proofs.rank_estimate import RankEstimate, matrix_rank
from gcfast.proofs.wide_layer_gram import WideGram, wide_gram
from gcfast.solve.gram_forms import Rates
from gcfast.solve.head_solver import solve_head
from gcfast.solve.plan_report import Plan
from gcfast.solve.planning import plan
from gcfast.solve.solution import HeadSolution, Progress

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
