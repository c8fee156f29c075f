"""Real data sets as tensors, read from files that the user already has."""
