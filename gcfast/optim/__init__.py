"""The two-phase optimizer (TwoPhase) around any torch.optim.Optimizer."""
