"""Jacobians of the layers, never stored: the empirical neural tangent kernel, and trainability."""

from gcfast.jacobian.layer_jacobians import LayerJacobians
from gcfast.jacobian.plan import JacobianPlan
from gcfast.jacobian.trainability_report import LayerTrainability, Trainability
from gcfast.jacobian.trainability_run import trainability

__all__ = [
    "JacobianPlan",
    "LayerJacobians",
    "LayerTrainability",
    "Trainability",
    "trainability",
]
