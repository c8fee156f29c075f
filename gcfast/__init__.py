"""gcfast: a provable global minimum for the PyTorch training you already do."""
