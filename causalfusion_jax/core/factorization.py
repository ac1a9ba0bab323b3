"""The sequence axis: token orders, autoregressive (AR) steps, and the attention mask that follows.

A token has two small integers, a *role* and an *AR step*, and one rule (`attends`)
gives the attention mask from them. CausalFusion's generalized causal mask, ACDiT's
skip-causal mask, plain diffusion, token-by-token autoregression, a causal language
model and Transfusion are instances of that rule; they differ only in how `order`,
`step` and `weight` are filled in (CausalFusion section 3, ACDiT section 3.2).

`L` is the number of image tokens. A *position* counts tokens in the order of
generation, 0..L-1; `order[position]` is the token of the grid generated there.
"""

import dataclasses
import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of

CONDITION_STEP = -1
"""AR step of every condition token: before all others."""

EMPTY_STEP = np.iinfo(np.int32).max
"""AR step of an empty slot: after all others, so that no token attends to it."""

ORDERS = ("raster", "block_raster", "dilated", "random", "square_blocks")
STEPS = ("decay", "uniform", "fixed", "block")
STEPS_SHARED_BY = ("image", "batch")
WEIGHTS = ("linear", "cosine", "none")


class Role(enum.IntEnum):
    """How a token takes part in attention."""

    CONDITION = 0
    CLEAN = 1
    NOISY = 2
    PAD = 3


@dataclasses.dataclass(frozen=True)
class FactorizationConfig:
    """How images are factorized over the sequence axis.

    Attributes:
      order: token order: raster, block_raster, dilated, random, square_blocks.
      order_block: side of a block (block_raster), stride (dilated), or tokens in a
        block (square_blocks); 0 for raster and random, which have no blocks.
      steps: how the L positions are split into AR steps. `decay`: P(S=i) ∝ gamma^(i-1),
        then S-1 cut points uniformly among the L-1 (CausalFusion section 3.3);
        `uniform`: `decay` with gamma = 1; `fixed`: `num_steps` equal steps;
        `block`: steps of `block_size` tokens (ACDiT).
      steps_shared_by: AR steps are drawn for each `image`, or once for the whole `batch` (as
        released with CausalFusion), so that unattended clean tokens can be left out
        (`train.length_buckets`).
      gamma: decay of the number of AR steps, for `decay`.
      num_steps: number of AR steps, for `fixed`.
      block_size: tokens in an AR step, for `block`.
      weight: AR loss weight, falling `linear`ly or by half a `cosine` from
        `weight_max` to `weight_min` with the position at which the step begins.
    """

    order: str = "random"
    order_block: int = 0
    steps: str = "decay"
    steps_shared_by: str = "image"
    gamma: float = 0.9
    num_steps: int = 1
    block_size: int = 1
    weight: str = "linear"
    weight_max: float = 2.0
    weight_min: float = 1.0

    def __post_init__(self):
        require_one_of("order", self.order, ORDERS)
        require_one_of("steps", self.steps, STEPS)
        require_one_of("steps_shared_by", self.steps_shared_by, STEPS_SHARED_BY)
        require_one_of("weight", self.weight, WEIGHTS)
        require_number("gamma", self.gamma, 0.0, 1.0, open_low=True)
        require_number("num_steps", self.num_steps, 1)
        require_number("block_size", self.block_size, 1)
        require_number("weight_min", self.weight_min, 0.0)
        require_number("weight_max", self.weight_max, self.weight_min)
        if self.order in ("raster", "random"):
            require(
                self.order_block == 0, "order_block", self.order_block, f"must be 0: order {self.order} has no blocks"
            )
        else:
            require_number("order_block", self.order_block, 1)

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """Raises InputError where this factorization does not fit a token grid."""
        tokens = math.prod(grid)
        if self.order != "random":
            token_order(self, grid)
        if self.steps == "fixed":
            require_number("num_steps", self.num_steps, 1, tokens)
        if self.steps == "block":
            allowed = f"must divide the {tokens} tokens of an image"
            require(tokens % self.block_size == 0, "block_size", self.block_size, allowed)


class Plan(NamedTuple):
    """A factorization of an image over the sequence axis; arrays [..., L], one entry a position.

    Attributes:
      order: int32, the grid token at each position.
      step: int32, the AR step of each position, non-decreasing from 0.
      weight: float32, the AR loss weight of each position.
    """

    order: jax.Array
    step: jax.Array
    weight: jax.Array


# --- The rule ---------------------------------------------------------------------


def attends(q_role, q_step, k_role, k_step, q_document=None, k_document=None) -> jax.Array:
    """The attention mask: whether each query attends to each key.

    Only noisy queries of the same AR step attend to a noisy key. Queries of all later
    steps attend to any other key, and so do queries of its own step, except the noisy
    ones (which must not attend to their own clean values). Padding attends and is
    attended to by padding alone, so that no row of the mask is empty.

    Args:
      q_role, q_step: int [..., q].
      k_role, k_step: int [..., k].
      q_document, k_document: int [..., q] and [..., k], of several sequences packed into one:
        tokens of different documents do not attend to each other. Default: one document.

    Returns:
      bool [..., q, k].
    """
    q_role, q_step = jnp.asarray(q_role)[..., :, None], jnp.asarray(q_step)[..., :, None]
    k_role, k_step = jnp.asarray(k_role)[..., None, :], jnp.asarray(k_step)[..., None, :]
    same_step = q_step == k_step
    sees_noisy = (q_role == Role.NOISY) & same_step
    sees_other = (k_step < q_step) | (same_step & (q_role != Role.NOISY))
    visible = jnp.where(k_role == Role.NOISY, sees_noisy, sees_other)
    q_pad, k_pad = q_role == Role.PAD, k_role == Role.PAD
    visible = jnp.where(q_pad | k_pad, q_pad & k_pad, visible)
    if q_document is None:
        return visible
    return visible & (jnp.asarray(q_document)[..., :, None] == jnp.asarray(k_document)[..., None, :])


def tile_may_attend(q_role, q_step, k_role, k_step, q_tile: int, k_tile: int) -> jax.Array:
    """An upper bound of `attends` per tile, from the least and greatest step in each tile.

    Where it is False, the mask is False in the whole tile, and a kernel may skip it.
    The bound is tight for tiles of one role (as in training layouts with aligned
    parts), and conservative for mixed ones.

    Args:
      q_role, q_step: int [..., q], q a multiple of `q_tile`.
      k_role, k_step: int [..., k], k a multiple of `k_tile`.

    Returns:
      bool [..., q / q_tile, k / k_tile].
    """

    def bounds(role, step, tile, kept):
        """Least and greatest step among the `kept` tokens of each tile."""
        role, step = (jnp.reshape(a, (*a.shape[:-1], -1, tile)) for a in (role, step))
        keep = kept(role)
        least = jnp.min(jnp.where(keep, step, EMPTY_STEP), axis=-1)
        greatest = jnp.max(jnp.where(keep, step, CONDITION_STEP - 1), axis=-1)
        return least, greatest, jnp.any(keep, axis=-1)

    def pairs(q, k, relation):
        (q_min, q_max, q_any), (k_min, k_max, k_any) = q, k
        q_min, q_max, q_any = q_min[..., :, None], q_max[..., :, None], q_any[..., :, None]
        k_min, k_max, k_any = k_min[..., None, :], k_max[..., None, :], k_any[..., None, :]
        return relation(q_min, q_max, k_min, k_max) & q_any & k_any

    def is_noisy(role):
        return role == Role.NOISY

    def is_other(role):
        return (role == Role.CONDITION) | (role == Role.CLEAN)

    def is_pad(role):
        return role == Role.PAD

    q_role, q_step, k_role, k_step = map(jnp.asarray, (q_role, q_step, k_role, k_step))
    q = {kept: bounds(q_role, q_step, q_tile, kept) for kept in (is_noisy, is_other, is_pad)}
    k = {kept: bounds(k_role, k_step, k_tile, kept) for kept in (is_noisy, is_other, is_pad)}
    noisy_noisy = pairs(
        q[is_noisy], k[is_noisy], lambda q_min, q_max, k_min, k_max: (q_min <= k_max) & (k_min <= q_max)
    )
    noisy_other = pairs(q[is_noisy], k[is_other], lambda q_min, q_max, k_min, k_max: k_min < q_max)
    other_other = pairs(q[is_other], k[is_other], lambda q_min, q_max, k_min, k_max: k_min <= q_max)
    pad_pad = pairs(q[is_pad], k[is_pad], lambda *_: jnp.array(True))
    return noisy_noisy | noisy_other | other_other | pad_pad


def training_layout(num_condition: int, step, num_clean: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of the training sequence `[condition | clean | noisy]`.

    Args:
      num_condition: number of condition tokens C.
      step: int32 [..., L], the AR step of each position.
      num_clean: K, the first K positions have a clean token; default: L.

    Returns:
      role, step: int32 [..., C + K + L].
    """
    step = jnp.asarray(step, jnp.int32)
    num_clean = step.shape[-1] if num_clean is None else num_clean
    condition = jnp.full((*step.shape[:-1], num_condition), CONDITION_STEP, jnp.int32)
    steps = jnp.concatenate([condition, step[..., :num_clean], step], axis=-1)
    counts = {Role.CONDITION: num_condition, Role.CLEAN: num_clean, Role.NOISY: step.shape[-1]}
    roles = np.repeat([int(r) for r in counts], list(counts.values())).astype(np.int32)
    return jnp.broadcast_to(roles, steps.shape), steps


# --- Token orders -----------------------------------------------------------------


def block_raster_order(grid: tuple[int, int], block: int) -> np.ndarray:
    """Blocks of `block` x `block` tokens in raster order, raster within a block.

    Returns int32 [L]. Raises InputError where the block does not tile the grid.
    """
    height, width = grid
    if height % block or width % block:
        raise InputError("order_block", block, f"must divide both sides of the {height}x{width} token grid")
    ids = np.arange(height * width, dtype=np.int32)
    return ids.reshape(height // block, block, width // block, block).swapaxes(1, 2).reshape(-1)


def dilated_order(grid: tuple[int, int], stride: int) -> np.ndarray:
    """Every `stride`-th token of every `stride`-th row first, then the next phase.

    Returns int32 [L]. Raises InputError where the stride exceeds the grid.
    """
    height, width = grid
    if stride > min(grid):
        raise InputError("order_block", stride, f"stride must be <= {min(grid)}, the {height}x{width} grid's side")
    ids = np.arange(height * width, dtype=np.int32).reshape(grid)
    phases = [ids[i::stride, j::stride].reshape(-1) for i in range(stride) for j in range(stride)]
    return np.concatenate(phases)


def token_order(config: FactorizationConfig, grid: tuple[int, ...], key: jax.Array | None = None):
    """The order in which the tokens of a grid are generated.

    Blocks and strides lie within a frame; the frames of a video follow one another.

    Args:
      config: names the order.
      grid: token rows and columns, after frames for a video.
      key: PRNG key, needed by `random` only.

    Returns:
      int32 [L]: the grid token (raster index) at each position.

    Raises:
      InputError: the order's blocks do not fit the grid.
    """
    num_tokens = math.prod(grid)
    if config.order == "random":
        return jax.random.permutation(key, num_tokens).astype(jnp.int32)
    if config.order == "raster":
        return np.arange(num_tokens, dtype=np.int32)
    if len(grid) == 3:
        frame = token_order(config, grid[1:])
        return (np.arange(grid[0], dtype=np.int32)[:, None] * len(frame) + frame).reshape(-1)
    if config.order == "block_raster":
        return block_raster_order(grid, config.order_block)
    if config.order == "dilated":
        return dilated_order(grid, config.order_block)
    side = math.isqrt(config.order_block)
    if side * side != config.order_block:
        raise InputError("order_block", config.order_block, "square_blocks needs a square number of tokens")
    return block_raster_order(grid, side)


# --- AR steps ---------------------------------------------------------------------


def equal_steps(num_tokens: int, num_steps: int) -> np.ndarray:
    """`num_steps` AR steps whose sizes differ by at most one; int32 [L]."""
    return (np.arange(num_tokens) * num_steps // num_tokens).astype(np.int32)


def step_sizes_to_step(sizes) -> np.ndarray:
    """AR step of each position from the sizes of the steps; int32 [sum(sizes)]."""
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


def num_steps_probabilities(num_tokens: int, gamma: float) -> np.ndarray:
    """P(S = i) ∝ gamma^(i-1) for i = 1..L; float64 [L]."""
    p = np.power(float(gamma), np.arange(num_tokens))
    return p / p.sum()


def static_steps(config: FactorizationConfig, num_tokens: int) -> np.ndarray | None:
    """AR step of each position if all images share it, int32 [L]; None if it is drawn."""
    if config.steps == "fixed":
        return equal_steps(num_tokens, config.num_steps)
    if config.steps == "block":
        return (np.arange(num_tokens) // config.block_size).astype(np.int32)
    return None


def num_visible_clean(config: FactorizationConfig, num_tokens: int) -> int:
    """Number of positions, the first ones, that need a clean token in training.

    Clean tokens of the last AR step are unattended. Where the steps are drawn, the last
    one may be a single token, and all L are kept.
    """
    step = static_steps(config, num_tokens)
    return num_tokens if step is None else int(np.sum(step < step[-1]))


def places_per_t(config: FactorizationConfig, num_tokens: int) -> int:
    """Consecutive positions that share a noise level, where one is drawn for each AR step.

    The size of the steps if all are equal, so that what depends on the noise level is
    computed once a step; else 1.
    """
    step = static_steps(config, num_tokens)
    if step is None or num_tokens % (step[-1] + 1):
        return 1
    return num_tokens // int(step[-1] + 1)


def ar_steps(config: FactorizationConfig, num_tokens: int, key: jax.Array):
    """Splits L positions into AR steps.

    Args:
      config: names the sampler.
      num_tokens: L.
      key: PRNG key, used by `decay` and `uniform`.

    Returns:
      int32 [L], non-decreasing from 0.
    """
    static = static_steps(config, num_tokens)
    if static is not None:
        return static
    gamma = config.gamma if config.steps == "decay" else 1.0
    # Logarithms of the unnormalized probabilities: gamma^L may underflow.
    logits = np.arange(num_tokens) * math.log(gamma)
    count_key, cut_key = jax.random.split(key)
    num_cuts = jax.random.categorical(count_key, jnp.asarray(logits, jnp.float32))
    # The first `num_cuts` of a random ranking of the L-1 gaps are cut.
    is_cut = jax.random.permutation(cut_key, num_tokens - 1) < num_cuts
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_cut, dtype=jnp.int32)])


# --- AR loss weights --------------------------------------------------------------


def step_start(step) -> jax.Array:
    """The position at which the AR step of each position begins; int32 [..., L]."""
    step = jnp.asarray(step)
    first = jnp.concatenate([jnp.ones_like(step[..., :1], bool), step[..., 1:] != step[..., :-1]], axis=-1)
    positions = jnp.where(first, jnp.arange(step.shape[-1], dtype=jnp.int32), 0)
    return jax.lax.cummax(positions, axis=positions.ndim - 1)


def ar_weights(config: FactorizationConfig, step) -> jax.Array:
    """AR loss weights: later steps have more context and smaller weights.

    w = min + (max - min) * f(start / L), with f(u) = 1 - u (linear) or
    (1 + cos(pi u)) / 2 (cosine); constant within a step (CausalFusion section 3.3).

    Args:
      config: names the weight and its range.
      step: int [..., L].

    Returns:
      float32 [..., L].
    """
    if config.weight == "none":
        return jnp.ones(jnp.shape(step), jnp.float32)
    u = step_start(step) / jnp.shape(step)[-1]
    fall = 1.0 - u if config.weight == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * u))
    return (config.weight_min + (config.weight_max - config.weight_min) * fall).astype(jnp.float32)


def draw_plan(
    config: FactorizationConfig, grid: tuple[int, ...], key: jax.Array, batch_key: jax.Array | None = None
) -> Plan:
    """Draws one image's factorization; arrays [L]. Use with `jax.vmap` over keys.

    Args:
      config: what to draw.
      grid: token rows and columns, after frames for a video.
      key: PRNG key of the image.
      batch_key: PRNG key of the batch, for AR steps that the batch shares; default: `key`'s.
    """
    order_key, step_key = jax.random.split(key)
    order = jnp.asarray(token_order(config, grid, order_key))
    if config.steps_shared_by == "batch" and batch_key is not None:
        step_key = batch_key
    step = jnp.asarray(ar_steps(config, math.prod(grid), step_key))
    return Plan(order, step, ar_weights(config, step))


def num_visible_clean_of_batch(config: FactorizationConfig, num_tokens: int, batch_key: jax.Array) -> jax.Array:
    """`num_visible_clean` of a batch that shares drawn AR steps; int32 []."""
    step = ar_steps(config, num_tokens, batch_key)
    return jnp.sum(step < step[-1])
