"""Jacobians of the layers, never stored: the empirical neural tangent kernel, and trainability."""
