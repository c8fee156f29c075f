"""Training runs of the command line: models, loop, checkpoints, record."""
