"""A training run as one HTML page and as a few lines of text."""
