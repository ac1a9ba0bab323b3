"""Sinusoidal embeddings of token positions and of timesteps."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """Sines then cosines of `positions` [n] at dim/2 frequencies 10000^(-2i/dim); [n, dim]."""
    frequencies = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))
    angles = positions[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Position table of a [height, width] grid, the column index in the first half.

    Args:
      grid: token rows and columns.
      dim: embedding size, a multiple of 4.

    Returns:
      float32 [height * width, dim], raster order.
    """
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = [sincos_1d(axis.reshape(-1).astype(np.float64), dim // 2) for axis in (columns, rows)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Cosines then sines of timesteps `t` [...] in 0..T; float32 [..., dim]."""
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
