"""The two-phase optimizer around any torch.optim.Optimizer."""
