"""The sequence that the trunk runs on: embedded tokens with their roles, AR steps and grid positions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

OFF_GRID = -1
"""Grid position of class and text tokens."""


class ImageTokens(NamedTuple):
    """Tokens of images, before they are embedded.

    Attributes:
      values: [batch, n, token_dim].
      ids: int [batch, n], grid token of each.
      t: noise levels [batch, groups], each of n / groups consecutive tokens; None: clean.
    """

    values: jax.Array
    ids: jax.Array
    t: jax.Array | None = None


class Tokens(NamedTuple):
    """Embedded tokens.

    Attributes:
      h: [batch, n, hidden].
      role, step: int32 [batch, n], as in `factorization.attends`.
      ids: int32 [batch, n], grid token of each; OFF_GRID for class and text tokens.
    """

    h: jax.Array
    role: jax.Array
    step: jax.Array
    ids: jax.Array


def make_tokens(h: jax.Array, role, step, ids=OFF_GRID) -> Tokens:
    """Tokens of h [batch, n, hidden]; role, step and ids are broadcast to [batch, n]."""
    role, step, ids = (jnp.broadcast_to(jnp.asarray(a, jnp.int32), h.shape[:2]) for a in (role, step, ids))
    return Tokens(h, role, step, ids)


def join(segments: Sequence[Tokens]) -> Tokens:
    """Segments of a sequence, one after the other."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *segments)


def repeat_batch(tree, copies: int):
    """Arrays [batch, ...] of a tree as [copies * batch, ...], whole batches one after the other."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (copies, *[1] * (leaf.ndim - 1))), tree)
