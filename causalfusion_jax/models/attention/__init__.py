"""Attention under the mask of the generalized causal rule: dense, in tiles, as a TPU kernel."""
