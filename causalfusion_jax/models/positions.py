"""Sinusoidal embeddings of token positions and of timesteps."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """Sines then cosines of `positions` [n] at dim/2 frequencies 10000^(-2i/dim); [n, dim]."""
    frequencies = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2))
    angles = positions[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def coordinates(grid: tuple[int, ...]) -> np.ndarray:
    """Coordinates of every token of a grid in raster order; int [axes, L]."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij")).reshape(len(grid), -1)


def sincos_table(grid: tuple[int, ...], dim: int) -> np.ndarray:
    """Position table of a grid: one part for each axis, the last axis (columns) first.

    Args:
      grid: token rows and columns, after frames for a video.
      dim: embedding size, even.

    Returns:
      float32 [L, dim], raster order.
    """
    part = dim // len(grid) // 2 * 2
    dims = [part] * (len(grid) - 1) + [dim - part * (len(grid) - 1)]
    axes = coordinates(grid)[::-1].astype(np.float64)
    parts = [sincos_1d(axis, axis_dim) for axis, axis_dim in zip(axes, dims, strict=True)]
    return np.concatenate(parts, axis=1).astype(np.float32)


ROPE_SPLITS = {2: (1, 1), 3: (2, 3, 3)}
"""Shares of the head dim for the axes of an image and of a video (ACDiT)."""


def rope_dims(num_axes: int, head_dim: int) -> tuple[int, ...]:
    """Values of the head dim that rotate by the position on each axis of a grid."""
    shares = ROPE_SPLITS[num_axes]
    return tuple(head_dim * share // sum(shares) for share in shares)


def rope_base(length: int) -> int:
    """Base of the frequencies of an axis of `length` tokens (as released with ACDiT)."""
    return (int(8 * length / np.pi) // 100 + 1) * 100


def rope_table(grid: tuple[int, ...], head_dim: int, base_grid: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Rotary embedding over all axes of a grid, as released with ACDiT.

    Axis a has `rope_dims[a]` values, its d/2 frequencies twice. The k-th is
    base^-e with e = k-th of linspace(0, 1, d/2).

    Args:
      grid: token rows and columns, after frames for a video.
      head_dim: a multiple of 4, of 16 for a video.
      base_grid: the grid whose sides set the frequencies; default: `grid`.

    Returns:
      Cosines and sines, float32 [L, head_dim] each, raster order.
    """
    angles = []
    for axis, length, dim in zip(coordinates(grid), base_grid or grid, rope_dims(len(grid), head_dim), strict=True):
        frequencies = float(rope_base(length)) ** -np.linspace(0.0, 1.0, dim // 2)
        angles += 2 * [axis[:, None] * frequencies]
    angles = np.concatenate(angles, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates queries or keys by their positions.

    Value i is paired with value i + head_dim / 2 of the whole head dim, not of an axis.

    Args:
      x: [batch, n, heads, head_dim].
      rope: cosines and sines of the tokens, float32 [batch, n, head_dim].

    Returns:
      [batch, n, heads, head_dim], of x's type.
    """
    cos, sin = (a[:, :, None] for a in rope)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (x * cos + jnp.concatenate([-high, low], axis=-1) * sin).astype(x.dtype)


def timestep_features(t: jax.Array, dim: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Cosines then sines of timesteps `t` [...] in 0..T; float32 [..., dim]."""
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
