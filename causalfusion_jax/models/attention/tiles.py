"""Which tiles of queries and keys a kernel can skip by the attention rule.

Queries and keys are cut into tiles. From roles and AR steps follows which pairs of tiles are
fully masked, which need the rule for every pair of tokens, and which need no mask. Roles and
steps may be traced and may differ between samples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from causalfusion_jax.core.factorization import CONDITION_STEP, EMPTY_STEP, Role, attends, tile_may_attend

MASKED_LOGIT = -1e30
LEAST_MAXIMUM = -1e29
"""First value of the running maximum of a softmax: far above masked logits, whose exp is then 0."""

SKIP, MIXED, FULL = range(3)
"""Kinds of tiles: fully masked; masked in part, where the rule decides for each pair; without a mask."""


class AttentionLayout(NamedTuple):
    """Roles and AR steps of queries, int32 [batch, queries], and keys, int32 [batch, keys]."""

    q_role: jax.Array
    q_step: jax.Array
    k_role: jax.Array
    k_step: jax.Array

    def as_arrays(self) -> "AttentionLayout":
        """The same as int32 arrays on the device."""
        return AttentionLayout(*(jnp.asarray(x, jnp.int32) for x in self))

    def padded(self, q_tile: int, k_tile: int) -> "AttentionLayout":
        """Pads to whole tiles, with queries that attend to no key and keys that no query attends to."""
        q_role = pad(self.q_role, q_tile, -1, Role.PAD)
        is_pad = q_role == Role.PAD
        # By the rule padding attends to padding. A query before all steps attends to nothing.
        return AttentionLayout(
            jnp.where(is_pad, Role.CLEAN, q_role),
            jnp.where(is_pad, CONDITION_STEP - 1, pad(self.q_step, q_tile, -1)),
            pad(self.k_role, k_tile, -1, Role.PAD),
            pad(self.k_step, k_tile, -1, EMPTY_STEP),
        )


class TilePlan(NamedTuple):
    """For each tile, the tiles of the other side to visit.

    Attributes:
      index: int32 [batch, tiles, others], the tiles to visit in ascending order. The last one
        is repeated to fill the row, because a tile that was just fetched is not fetched again.
      kind: int32 [batch, tiles, others], SKIP, MIXED or FULL.
    """

    index: jax.Array
    kind: jax.Array


def pad(x, multiple: int, axis: int, value=0):
    """Pads an axis at its end to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def unmasked_tiles(layout: AttentionLayout, q_tile: int, k_tile: int):
    """Tiles in which every query surely attends to every key; bool [batch, q_tiles, k_tiles].

    For two roles the rule is a relation of two steps, `<`, `<=` or `=`: where it holds for
    the least and greatest steps of both tiles, it holds for all steps in between.
    """

    def corners(role, step, tile):
        role, step = (a.reshape(*a.shape[:-1], -1, tile) for a in (role, step))
        roles, steps = ([jnp.min(a, axis=-1), jnp.max(a, axis=-1)] for a in (role, step))
        pairs = [(r, s) for r in roles for s in steps]
        return (jnp.stack(a, axis=-1).reshape(*role.shape[:-2], -1) for a in zip(*pairs, strict=True))

    q = corners(layout.q_role, layout.q_step, q_tile)
    k = corners(layout.k_role, layout.k_step, k_tile)
    mask = attends(*q, *k)
    *batch, q_corners, k_corners = mask.shape
    return mask.reshape(*batch, q_corners // 4, 4, k_corners // 4, 4).all(axis=(-3, -1))


def tile_plans(layout: AttentionLayout, q_tile: int, k_tile: int) -> tuple[TilePlan, TilePlan]:
    """The key tiles to visit for each query tile of a padded layout, and the reverse."""
    may, full = tile_may_attend(*layout, q_tile, k_tile), unmasked_tiles(layout, q_tile, k_tile)
    kind = jnp.where(may, jnp.where(full, FULL, MIXED), SKIP).astype(jnp.int32)
    return _plan_of_rows(kind), _plan_of_rows(kind.swapaxes(1, 2))


def _plan_of_rows(kind) -> TilePlan:
    """Moves the tiles to visit to the front of each row of `kind`, int32 [batch, tiles, others]."""
    # Stable: tiles to visit stay in ascending order.
    order = jnp.argsort(kind == SKIP, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.maximum((kind != SKIP).sum(axis=-1, keepdims=True) - 1, 0)
    index = jnp.take_along_axis(order, jnp.minimum(jnp.arange(kind.shape[-1]), last), axis=-1)
    return TilePlan(index, jnp.take_along_axis(kind, order, axis=-1))
