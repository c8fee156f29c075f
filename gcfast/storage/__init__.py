"""Memory budgets, files that are whole or absent, digests, and checkpoints of long computations."""
