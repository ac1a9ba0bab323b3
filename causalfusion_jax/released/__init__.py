"""Parts: released checkpoints, read safely and renamed."""
