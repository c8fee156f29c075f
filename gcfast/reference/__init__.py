"""Every op in plain PyTorch: the specification of the kernels, and a backend of its own.

Any floating dtype, any device. Half and bfloat16 inputs are computed in float32 and rounded once. This room
imports neither Triton nor the compiled modules.
"""

from gcfast.reference.activations import ACTIVATIONS, activation
from gcfast.reference.jacobian import gradient_gram, jacobian_gram
from gcfast.reference.products import abs_products, add_product, gram_error_bound, gram_product
from gcfast.reference.rank import batched_rank
from gcfast.reference.softmax import softmax_curvature, softmax_residual
from gcfast.reference.wide import (
    wide_backward,
    wide_features,
    wide_forward,
    wide_gram_product,
    wide_head_grad,
)

__all__ = [
    "ACTIVATIONS",
    "abs_products",
    "activation",
    "add_product",
    "batched_rank",
    "gradient_gram",
    "gram_error_bound",
    "gram_product",
    "jacobian_gram",
    "softmax_curvature",
    "softmax_residual",
    "wide_backward",
    "wide_features",
    "wide_forward",
    "wide_gram_product",
    "wide_head_grad",
]
