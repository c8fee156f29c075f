"""Proofs that trust nothing but matrix products and their rounding-error bounds."""

from gcfast.ops import exact_products
from gcfast.proofs.dependency import near_dependency, prove_rank_of_basis
from gcfast.proofs.eigenvalue_counts import count_above
from gcfast.proofs.full_rank import prove_full_rank
from gcfast.proofs.logits import ROOT, SMALLEST, bounded_logits
from gcfast.proofs.rank_estimate import RankEstimate, matrix_rank
from gcfast.proofs.rank_proof import proof_bytes, proof_flops
from gcfast.proofs.rounding import gamma, mirror_, round_up
from gcfast.proofs.shift import prove_least_eigenvalue
from gcfast.proofs.tiles import Tiles, add_gram_, cholesky, solve_triangular
from gcfast.proofs.wide_layer_gram import WideGram, wide_gram

__all__ = [
    "ROOT",
    "SMALLEST",
    "RankEstimate",
    "Tiles",
    "WideGram",
    "add_gram_",
    "bounded_logits",
    "cholesky",
    "count_above",
    "exact_products",
    "gamma",
    "matrix_rank",
    "mirror_",
    "near_dependency",
    "proof_bytes",
    "proof_flops",
    "prove_full_rank",
    "prove_least_eigenvalue",
    "prove_rank_of_basis",
    "round_up",
    "solve_triangular",
    "wide_gram",
]
