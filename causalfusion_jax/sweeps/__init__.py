"""Sweeps: runs of one config with different settings, and a table of their scores."""

from causalfusion_jax.sweeps.sweep import Sweep, chain, grid, product, together

__all__ = ["Sweep", "chain", "grid", "product", "together"]
