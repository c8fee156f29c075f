"""Proofs that trust nothing but matrix products and their rounding-error bounds."""
