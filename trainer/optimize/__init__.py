"""From log-probs to new weights: losses, the optimiser, one step of it, checkpoints that survive a crash."""
