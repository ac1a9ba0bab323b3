"""The trunk: one causal diffusion transformer for training and cached sampling.

Condition, clean and noisy tokens are one sequence; clean and noisy tokens share one input
projection. Pre-norm blocks, qk-norm, tanh-GELU, zero-initialized head. Settings switch between
the papers' variants:

- CausalFusion as released (arXiv 2412.12095): `in_context` conditioning (the class is
  tokens, the timestep is added to the noisy tokens), LayerNorm, a table of positions.
- ACDiT as released (arXiv 2412.07720): `adaln`-zero on the noisy tokens only, so that clean
  keys and values depend on neither class nor timestep; RMSNorm, rotary positions.

Training runs the trunk on a whole sequence of `Tokens`, sampling on the new tokens and a
KVCache. `Transformer.condition_tokens` and `image_tokens` embed the segments for both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.common.sharding import constrain, platform
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.core.factorization import CONDITION_STEP, Role, training_layout
from causalfusion_jax.core.layouts import NO_TOKEN
from causalfusion_jax.models.attention.mask import attention_mask
from causalfusion_jax.models.block import Block, Context, linear, modulation_layer, on_noisy, with_axes
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.layers import NORMS, Norm
from causalfusion_jax.models.params import DTYPES, Params
from causalfusion_jax.models.positions import ROPE_SPLITS, rope_table, sincos_table, timestep_features
from causalfusion_jax.models.sequence import ImageTokens, Tokens, join, make_tokens
from causalfusion_jax.models.text import TEXT_HEADS, TextTokens

CONDITIONINGS = ("in_context", "adaln")
POSITIONS = ("learned", "sincos", "rope")
ATTENTIONS = ("auto", "dense", "flash")
FLASH_FROM = 1024
FLASH_FROM_IN_TPU_TRAINING = 512
"""Least number of keys for which `auto` computes attention in tiles (launch/bench/RESULTS.md)."""
REMATS = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
TIMESTEP_FEATURES = 256


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static shape of the trunk.

    Attributes:
      hidden, heads, layers: width, attention heads, depth.
      grid: token rows and columns of an image, after frames for a video.
      token_dim: values in an image token, patch_size^2 * channels.
      num_classes: number of classes; one more row of the label table stands for no class.
      conditioning: how class and timestep reach the noisy tokens: `in_context` or `adaln`.
      num_condition_tokens: number C of condition tokens for a class; 0 for adaln.
      condition_repeats: number of times that the C / condition_repeats tokens learned for a class
        are repeated; every repeat has position embeddings of its own.
      mlp_ratio: width of the MLP in units of `hidden`.
      norm: `layer`, `rms`, or `plain` (LayerNorm without scale and bias).
      positions: `learned` (initialized with sines and cosines), fixed `sincos`, or `rope`,
        which rotates queries and keys by the position on every axis.
      rope_grid: the grid that rope's frequencies were trained for, if `grid` is larger;
        empty: `grid`.
      qk_norm: normalize queries and keys per head.
      qkv_bias, token_bias: biases of the query-key-value and the token projection.
      attention: `dense`, `flash` (in tiles, without an array of [tokens, tokens]), or
        `auto`: flash for at least FLASH_FROM keys, or FLASH_FROM_IN_TPU_TRAINING keys
        without a cache on a TPU.
      dtype: compute type; parameters are float32.
      remat: what the backward pass recomputes: `none`, all but the matrix products
        (`dots`), or all of a block (`full`).
      scan_unroll: layers unrolled in one iteration of the scan over layers.
      text_vocab: size of the text vocabulary; 0: no text.
      text_tokens: number of text slots, the length of the longest text.
      text_head: `tied` to the embedding table of text tokens, or `separate`.
    """

    hidden: int
    heads: int
    layers: int
    grid: tuple[int, int]
    token_dim: int
    num_classes: int
    conditioning: str = "in_context"
    num_condition_tokens: int = 4
    condition_repeats: int = 1
    mlp_ratio: float = 4.0
    norm: str = "layer"
    positions: str = "learned"
    rope_grid: tuple[int, ...] = ()
    qk_norm: bool = True
    qkv_bias: bool = False
    token_bias: bool = True
    attention: str = "auto"
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    text_vocab: int = 0
    text_tokens: int = 0
    text_head: str = "tied"

    def __post_init__(self):
        for name in ("hidden", "heads", "layers", "num_classes"):
            require_number(name, getattr(self, name), 1)
        require_one_of("conditioning", self.conditioning, CONDITIONINGS)
        if self.conditioning == "in_context":
            require_number("num_condition_tokens", self.num_condition_tokens, 1)
        else:
            require(
                self.num_condition_tokens == 0,
                "num_condition_tokens",
                self.num_condition_tokens,
                "must be 0 for conditioning adaln, which has no condition tokens",
            )
        require_number("condition_repeats", self.condition_repeats, 1)
        require(
            max(self.num_condition_tokens, 1) % self.condition_repeats == 0,
            "condition_repeats",
            self.condition_repeats,
            f"must divide num_condition_tokens={self.num_condition_tokens}",
        )
        require(self.hidden % self.heads == 0, "heads", self.heads, f"must divide hidden={self.hidden}")
        require_one_of("norm", self.norm, NORMS)
        require_one_of("positions", self.positions, POSITIONS)
        if self.positions == "rope":
            unit = 2 * sum(ROPE_SPLITS[len(self.grid)])
            require(
                self.head_dim % unit == 0,
                "heads",
                self.heads,
                f"hidden / heads={self.head_dim} must be a multiple of {unit} for rope on {len(self.grid)} axes",
            )
        else:
            require(self.hidden % 4 == 0, "hidden", self.hidden, "must be a multiple of 4 (2D sines and cosines)")
        require_number("mlp_ratio", self.mlp_ratio, 0.0, open_low=True)
        require_number("scan_unroll", self.scan_unroll, 1, self.layers)
        require_one_of("attention", self.attention, ATTENTIONS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("remat", self.remat, REMATS)
        require_one_of("text_head", self.text_head, TEXT_HEADS)
        require_number("text_vocab", self.text_vocab, 0)
        require_number("text_tokens", self.text_tokens, 2 if self.text_vocab else 0)

    @property
    def num_tokens(self) -> int:
        """Image tokens L."""
        return math.prod(self.grid)

    @property
    def label_width(self) -> int:
        """Number of parameters of a class in the label table."""
        return max(self.num_condition_tokens, 1) // self.condition_repeats * self.hidden

    @property
    def head_dim(self) -> int:
        """Values in a head."""
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP."""
        return int(self.hidden * self.mlp_ratio)

    def on_grid(self, grid: tuple[int, ...]) -> "TransformerConfig":
        """The network on another token grid, with its positions extrapolated.

        Raises:
          InputError: positions are learned, one vector for each token of the trained grid.
        """
        if grid == self.grid:
            return self
        require(
            self.positions != "learned",
            "grid",
            grid,
            f"must be {self.grid}: positions are learned for that grid alone (sincos and rope continue)",
        )
        return dataclasses.replace(self, grid=grid, rope_grid=self.rope_grid or self.grid)

    @property
    def clean_depends_on_class(self) -> bool:
        """Whether clean keys and values depend on the class, so that guidance needs two copies."""
        return self.conditioning == "in_context"


class Transformer(nnx.Module):
    """The causal diffusion transformer."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        normal = nnx.initializers.normal(0.02)
        self.label_table = nnx.Embed(
            c.num_classes + 1,
            c.label_width,
            dtype=c.dtype,
            embedding_init=with_axes(normal, "classes", "embed"),
            rngs=rngs,
        )
        if c.num_condition_tokens:
            self.condition_positions = nnx.Param(
                normal(rngs.params(), (c.num_condition_tokens, c.hidden)), out_sharding=("tokens", "embed")
            )
        if c.positions == "learned":
            self.positions = nnx.Param(jnp.asarray(sincos_table(c.grid, c.hidden)), out_sharding=("tokens", "embed"))
        self.token_in = linear(c.token_dim, c.hidden, ("token_dim", "embed"), c, rngs, use_bias=c.token_bias)
        self.timestep_in = linear(TIMESTEP_FEATURES, c.hidden, ("timestep", "embed"), c, rngs)
        self.timestep_out = linear(c.hidden, c.hidden, (None, "embed"), c, rngs)

        @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs):
            return Block(c, layer_rngs)

        self.blocks = stack(rngs.split(c.layers))
        self.final_norm = Norm(c.norm, c.hidden, "embed")
        self.final_modulation = modulation_layer(2, c, rngs)
        self.token_out = linear(
            c.hidden, c.token_dim, ("embed", "token_dim"), c, rngs, kernel_init=nnx.initializers.zeros
        )
        self.text = TextTokens(c, rngs) if c.text_vocab else None

    def condition_tokens(self, condition: Condition) -> list[Tokens]:
        """The condition as segments of the sequence `[class | text]`, without those that the model has not.

        Class tokens precede all AR steps; text slot i is AR step i, empty slots are PAD.
        """
        segments = []
        if self.config.num_condition_tokens:
            segments.append(make_tokens(self._embed_class(condition.labels), Role.CONDITION, CONDITION_STEP))
        if condition.num_steps:
            positions = jnp.arange(condition.num_steps)
            segments.append(self.text_tokens(condition.text, positions, positions))
        return segments

    def text_tokens(self, text: jax.Array, positions: jax.Array, step) -> Tokens:
        """Text tokens as a segment of the sequence; PAD in empty slots.

        Args:
          text: token ids int [batch, n], NO_TOKEN in empty slots.
          positions, step: positions in the text and AR steps, int [batch, n] or [n].
        """
        role = jnp.where(text == NO_TOKEN, Role.PAD, Role.CLEAN)
        return make_tokens(self.text.embed(text, positions), role, step)

    def image_tokens(self, image: ImageTokens, role, step=0) -> Tokens:
        """Image tokens as a segment of the sequence; role and step are broadcast to int32 [batch, n]."""
        return make_tokens(self._embed_image(image), role, step, image.ids)

    def embed_noise(self, condition: Condition, t: jax.Array) -> jax.Array | None:
        """The embedding of class and noise level that modulates noisy tokens; None for in_context conditioning.

        Args:
          condition: of the images.
          t: noise levels [batch, groups].

        Returns:
          [batch, groups, hidden], after its SiLU, which all layers share.
        """
        if self.config.conditioning != "adaln":
            return None
        return jax.nn.silu(self._embed_timestep(t) + self.label_table(condition.labels)[:, None])

    def _embed_class(self, labels: jax.Array) -> jax.Array:
        """Class labels int [batch] (num_classes: no class) to tokens [batch, C, hidden]."""
        c = self.config
        learned = self.label_table(labels).reshape(labels.shape[0], -1, c.hidden)
        tokens = jnp.tile(learned, (1, c.condition_repeats, 1))
        return tokens + self.condition_positions[...].astype(tokens.dtype)

    def _embed_image(self, image: ImageTokens) -> jax.Array:
        """Image tokens to [batch, n, hidden]."""
        c, t = self.config, image.t
        h = self.token_in(image.values)
        if c.positions != "rope":
            table = self.positions[...] if c.positions == "learned" else jnp.asarray(sincos_table(c.grid, c.hidden))
            h = h + table.astype(c.dtype)[image.ids]
        if t is None or c.conditioning == "adaln":
            return h
        levels = self._embed_timestep(t)
        return (h.reshape(h.shape[0], t.shape[1], -1, c.hidden) + levels[:, :, None]).reshape(h.shape)

    def _embed_timestep(self, t):
        """Timesteps [...] to [..., hidden]."""
        features = timestep_features(t, TIMESTEP_FEATURES).astype(self.config.dtype)
        return self.timestep_out(jax.nn.silu(self.timestep_in(features)))

    def trunk(
        self,
        tokens: Tokens,
        cache: KVCache | None = None,
        noise_embedding=None,
        num_clean: int = 0,
        *,
        document=None,
        branch_scale=None,
        layer_output: Callable[[jax.Array], Any] | None = None,
    ):
        """Runs all layers on new tokens, which attend to the cache and to each other by `attends`.

        Args:
          tokens: the new tokens.
          cache: earlier tokens, or None. `batch` may be several copies of the cache's batch, which
            then share it.
          noise_embedding: from `embed_noise`, or None.
          num_clean: the first `num_clean` tokens are not noisy, and not modulated by it.
          document: int [batch, n], where the tokens are several sequences packed into one.
          branch_scale: float32 [layers, 2, batch], scale of what attention and MLP of each layer add
            to the residual stream (`layers.drop_path_scale`); None: 1.
          layer_output: function of each layer's h [batch, n, hidden], whose results, stacked over
            the layers, are returned instead of the keys and values.

        Returns:
          h, and the new tokens' keys and values, [layers, batch, n, heads, head_dim].
        """
        h, role, step, ids = tokens
        cached_step = None if cache is None else jnp.tile(cache.step, (h.shape[0] // cache.step.shape[0], 1))
        keys = h.shape[1] + (0 if cache is None else cached_step.shape[1])
        long = FLASH_FROM_IN_TPU_TRAINING if cache is None and platform() == "tpu" else FLASH_FROM
        flash = self.config.attention == "flash" or (self.config.attention == "auto" and keys >= long)
        mask = attention_mask(role, step, cached_step, flash, document)
        cached_kv = () if cache is None else (cache.k, cache.v)
        context = Context(mask, self._rope(ids), noise_embedding)
        graph, params = nnx.split(self.blocks)
        h = constrain(h, ("batch", "sequence", None))

        def layer(h, scanned):
            layer_params, layer_kv, *scale = scanned
            h, kv = nnx.merge(graph, layer_params)(h, context, layer_kv or None, num_clean, *scale)
            return h, kv if layer_output is None else layer_output(h)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMATS[self.config.remat], prevent_cse=False)
        scanned = (params, cached_kv) if branch_scale is None else (params, cached_kv, branch_scale)
        return jax.lax.scan(layer, h, scanned, unroll=self.config.scan_unroll)

    def _rope(self, ids):
        """Cosines and sines of the tokens' positions, or None; tokens off the grid are not rotated."""
        c = self.config
        if c.positions != "rope":
            return None
        cos, sin = (jnp.asarray(table)[ids] for table in rope_table(c.grid, c.head_dim, c.rope_grid))
        on_grid = (ids >= 0)[..., None]
        return jnp.where(on_grid, cos, 1.0), jnp.where(on_grid, sin, 0.0)

    def head(self, h: jax.Array, noise_embedding: jax.Array | None = None) -> jax.Array:
        """Noisy tokens [batch, n, hidden] to predictions, float32 [batch, n, token_dim]."""
        h = self.final_norm(h)
        if noise_embedding is not None:
            shift, scale = jnp.split(self.final_modulation(noise_embedding), 2, axis=-1)
            h = on_noisy(h, 0, 1.0 + scale, shift)
        return self.token_out(h).astype(jnp.float32)

    def __call__(self, condition: Condition, clean, noisy, t, order, step) -> jax.Array:
        """Training forward pass over `[condition | clean | noisy]`.

        Args:
          condition: without text.
          clean: x_0 of the first K positions, [batch, K, token_dim]; K = L, or less where the rest
            would be unattended (`factorization.num_visible_clean`).
          noisy: x_t of all positions, [batch, L, token_dim].
          t: noise levels [batch, groups], each of L / groups consecutive positions.
          order, step: int32 [batch, L], as in `factorization.Plan`.

        Returns:
          Predictions for all positions, float32 [batch, L, token_dim].
        """
        num_clean = clean.shape[1]
        role, step = training_layout(self.config.num_condition_tokens, step, num_clean)
        clean, noisy = ImageTokens(clean, order[:, :num_clean]), ImageTokens(noisy, order, t)
        return self.sequence(condition, clean, noisy, role, step)[0]

    def sequence(self, condition: Condition, clean: ImageTokens, noisy: ImageTokens, role, step):
        """Forward pass over `[condition | text | clean | noisy]`, laid out for any task (core/layouts.py).

        Args:
          condition: classes, and texts [batch, T], whether they are given or learned.
          clean, noisy: K and N image tokens; either may be none.
          role, step: int32 [batch, C + T + K + N].

        Returns:
          Predictions for the noisy tokens, float32 [batch, N, token_dim], and the hidden states
          of the text, [batch, T, hidden], for `text_logits`.
        """
        begin, num_noisy = self.config.num_condition_tokens, noisy.values.shape[1]
        noise_embedding = self.embed_noise(condition, noisy.t)
        images = [self.image_tokens(clean, Role.CLEAN), self.image_tokens(noisy, Role.NOISY)]
        tokens = join([*self.condition_tokens(condition), *images])._replace(role=role, step=step)
        h, _ = self.trunk(tokens, noise_embedding=noise_embedding, num_clean=tokens.h.shape[1] - num_noisy)
        return self.head(h[:, -num_noisy:], noise_embedding), h[:, begin : begin + condition.num_steps]

    def text_logits(self, h: jax.Array) -> jax.Array:
        """Text tokens [batch, n, hidden] to logits of the token after each, float32 [batch, n, text_vocab]."""
        return self.text.logits(self.final_norm(h))


@functools.cache
def abstract_model(config: TransformerConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """The model without values of its parameters.

    Returns:
      graph: `nnx.merge(graph, params)` is a Transformer.
      shapes: parameters as jax.ShapeDtypeStruct.
      axes: logical axes of every parameter, a tuple of names or None.
    """
    graph, state = nnx.split(jax.eval_shape(lambda: _build(config, jax.random.key(0))))
    is_variable = lambda v: isinstance(v, nnx.Variable)
    axes = jax.tree.map(lambda v: tuple(v.get_metadata("out_sharding")), state, is_leaf=is_variable)
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def _build(config, key):
    # Arrays are sharded later, by the rules of sharding.py for the logical axes.
    with nnx.use_eager_sharding(False):
        return Transformer(config, nnx.Rngs(params=key))


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return nnx.to_pure_dict(nnx.state(_build(config, key)))


def count_params(config: TransformerConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(abstract_model(config)[1]))
