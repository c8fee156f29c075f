"""The only door to the kernels: validated, dispatched, differentiable, compilable.

Each function checks its arguments, then calls an op registered with ``torch.library`` under the namespace
``gcfast`` (with fake kernel and gradient, so ``torch.compile(fullgraph=True)`` sees one node). The op runs on
the ``cpu`` backend (C++; float32 and float64, for the wide layer half precision too), on ``triton`` or
``cuda`` (CUDA tensors, on their device and its current stream), or on ``reference`` (plain PyTorch; anything
else). All kernels are deterministic.
``backends()`` says which are usable and why not, ``backend(...)`` and ``GCFAST_BACKEND`` force one, and
``last_backend(op)`` tells which one ran.
"""

from gcfast.ops.activations import activation
from gcfast.ops.arithmetic import exact_products
from gcfast.ops.dispatch import BackendError, BackendTable, backend, backends, last_backend
from gcfast.ops.error_bounds import abs_products, gram_error_bound
from gcfast.ops.jacobian import gradient_gram, jacobian_gram
from gcfast.ops.products import add_product, gram_product
from gcfast.ops.rank import RankBounds, batched_rank, kernel_ranks, rank_operator
from gcfast.ops.softmax import softmax_curvature, softmax_residual
from gcfast.ops.wide import wide_features, wide_forward
from gcfast.ops.wide_products import wide_gram_product, wide_head_grad, wide_panel

__all__ = [
    "BackendError",
    "BackendTable",
    "RankBounds",
    "abs_products",
    "activation",
    "add_product",
    "backend",
    "backends",
    "batched_rank",
    "exact_products",
    "gradient_gram",
    "gram_error_bound",
    "gram_product",
    "jacobian_gram",
    "kernel_ranks",
    "last_backend",
    "rank_operator",
    "softmax_curvature",
    "softmax_residual",
    "wide_features",
    "wide_forward",
    "wide_gram_product",
    "wide_head_grad",
    "wide_panel",
]
