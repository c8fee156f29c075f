"""The two-phase optimizer (TwoPhase) around any torch.optim.Optimizer."""

from gcfast.optim.two_phase import TwoPhase

__all__ = [
    "TwoPhase",
]
