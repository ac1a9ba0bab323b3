"""Which tiles of queries and keys the attention rule lets a kernel skip.

Queries and keys are cut into tiles. Roles and AR steps say which pairs of tiles hold no
visible pair of tokens, which need the rule for every pair, and which need no rule since
all is visible. Roles and steps may be traced and differ between samples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from causalfusion_jax.core.factorization import CONDITION_STEP, EMPTY_STEP, Role, attends, tile_may_attend

HIDDEN_LOGIT = -1e30
LEAST_MAXIMUM = -1e29
"""Where the running maximum of a softmax starts: far above hidden logits, whose exp is then 0."""

SKIP, MIXED, FULL = range(3)
"""What a tile needs: nothing, the rule for each pair, or no rule since all pairs are visible."""


class Layout(NamedTuple):
    """Roles and AR steps of queries, int32 [batch, queries], and keys, int32 [batch, keys]."""

    q_role: jax.Array
    q_step: jax.Array
    k_role: jax.Array
    k_step: jax.Array

    def padded(self, q_tile: int, k_tile: int) -> "Layout":
        """Whole tiles, with queries that see nothing and keys that nobody sees for padding."""
        q_role = pad(self.q_role, q_tile, -1, Role.PAD)
        is_pad = q_role == Role.PAD
        # By the rule padding sees padding. A query before all steps sees nothing at all.
        return Layout(
            jnp.where(is_pad, Role.CLEAN, q_role),
            jnp.where(is_pad, CONDITION_STEP - 1, pad(self.q_step, q_tile, -1)),
            pad(self.k_role, k_tile, -1, Role.PAD),
            pad(self.k_step, k_tile, -1, EMPTY_STEP),
        )


class TilePlan(NamedTuple):
    """For each tile, the tiles of the other side to visit.

    Attributes:
      index: int32 [batch, tiles, others], those to visit in ascending order. The last one
        is repeated to fill the row: a tile that was just fetched is not fetched again.
      kind: int32 [batch, tiles, others], SKIP, MIXED or FULL.
    """

    index: jax.Array
    kind: jax.Array


def pad(x, multiple: int, axis: int, value=0):
    """Pads an axis at its end to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def tiles_all_visible(layout: Layout, q_tile: int, k_tile: int):
    """Tiles in which everyone surely sees everyone; bool [batch, q_tiles, k_tiles].

    For two roles the rule is a relation of two steps, `<`, `<=` or `=`: where it holds for
    the least and greatest steps of both tiles, it holds for all between.
    """

    def corners(role, step, tile):
        role, step = (a.reshape(*a.shape[:-1], -1, tile) for a in (role, step))
        roles, steps = ([jnp.min(a, axis=-1), jnp.max(a, axis=-1)] for a in (role, step))
        pairs = [(r, s) for r in roles for s in steps]
        return (jnp.stack(a, axis=-1).reshape(*role.shape[:-2], -1) for a in zip(*pairs, strict=True))

    q = corners(layout.q_role, layout.q_step, q_tile)
    k = corners(layout.k_role, layout.k_step, k_tile)
    visible = attends(*q, *k)
    *batch, q_corners, k_corners = visible.shape
    return visible.reshape(*batch, q_corners // 4, 4, k_corners // 4, 4).all(axis=(-3, -1))


def tile_plans(layout: Layout, q_tile: int, k_tile: int) -> tuple[TilePlan, TilePlan]:
    """The key tiles to visit for each query tile of a padded layout, and the reverse."""
    may, full = tile_may_attend(*layout, q_tile, k_tile), tiles_all_visible(layout, q_tile, k_tile)
    kind = jnp.where(may, jnp.where(full, FULL, MIXED), SKIP).astype(jnp.int32)
    return _plan_of_rows(kind), _plan_of_rows(kind.swapaxes(1, 2))


def _plan_of_rows(kind) -> TilePlan:
    """Gathers what there is to visit at the front of each row of int32 [batch, tiles, others]."""
    # Stable: tiles to visit stay in ascending order.
    order = jnp.argsort(kind == SKIP, axis=-1, stable=True).astype(jnp.int32)
    last = jnp.maximum((kind != SKIP).sum(axis=-1, keepdims=True) - 1, 0)
    index = jnp.take_along_axis(order, jnp.minimum(jnp.arange(kind.shape[-1]), last), axis=-1)
    return TilePlan(index, jnp.take_along_axis(kind, order, axis=-1))
