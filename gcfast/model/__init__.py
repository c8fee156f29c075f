"""What a model is made of: its head, its wide layer, which operators are analytic; freezing and widening."""

from gcfast.model.analytic_body import analyticity
from gcfast.model.analytic_ops import activation_verdict
from gcfast.model.draws import Draw, draw_of, forget_draws, note_draws
from gcfast.model.free_weights import alteration, check_wrappers
from gcfast.model.freeze import Freezer, digest, fingerprint, hidden_parameters, plain_name, retrace_compiled
from gcfast.model.head import AmbiguousHeadError, Head, HeadError, find_head
from gcfast.model.tap import FeatureTap
from gcfast.model.tracing import (
    call_arguments,
    copy_tensors,
    keeping_random_state,
    output_tensors,
    unwrap,
    without_gradients,
)
from gcfast.model.watch import Watch
from gcfast.model.wide_layer import WideLayerFound, wide_activation
from gcfast.model.widening import widen

__all__ = [
    "AmbiguousHeadError",
    "Draw",
    "FeatureTap",
    "Freezer",
    "Head",
    "HeadError",
    "Watch",
    "WideLayerFound",
    "activation_verdict",
    "alteration",
    "analyticity",
    "call_arguments",
    "check_wrappers",
    "copy_tensors",
    "digest",
    "draw_of",
    "find_head",
    "fingerprint",
    "forget_draws",
    "hidden_parameters",
    "keeping_random_state",
    "note_draws",
    "output_tensors",
    "plain_name",
    "retrace_compiled",
    "unwrap",
    "wide_activation",
    "widen",
    "without_gradients",
]
