"""Prepared once before training or sampling: released checkpoints converted, data sets encoded."""
