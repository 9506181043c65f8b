"""Training loop, checkpoints and weights."""
