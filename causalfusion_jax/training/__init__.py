"""Jobs: the training objective, step, optimizer, checkpoints, metrics and loop."""
