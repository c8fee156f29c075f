"""Products with the layers' Jacobians, never stored: the empirical neural tangent kernel, and trainability."""
