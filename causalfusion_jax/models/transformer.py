"""The trunk: one causal diffusion transformer for training and cached sampling.

Condition, clean and noisy tokens are one sequence; clean and noisy tokens share one input
projection. Pre-norm blocks, qk-norm, tanh-GELU, zero-initialized head. What the papers do
differently are switches:

- CausalFusion as released (arXiv 2412.12095): `in_context` conditioning (the class is
  tokens, the timestep is added to the noisy tokens), LayerNorm, a table of positions.
- ACDiT as released (arXiv 2412.07720): `adaln`-zero on the noisy tokens only, so that clean
  keys and values depend on neither class nor timestep; RMSNorm, rotary positions.

Training passes roles and steps of the whole sequence. Sampling passes a KVCache and
the new tokens. Both run `Transformer.trunk`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.common.sharding import constrain, platform
from causalfusion_jax.core.factorization import training_layout
from causalfusion_jax.models.attention.mask import attention_mask
from causalfusion_jax.models.block import Block, Context, linear, modulation_layer, on_noisy, with_axes
from causalfusion_jax.models.config import REMATS, TransformerConfig
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.layers import Norm
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.positions import rope_table, sincos_table, timestep_features
from causalfusion_jax.models.text import TextTokens

FLASH_FROM = 1024
FLASH_FROM_IN_TPU_TRAINING = 512
"""Keys from which `auto` computes attention in tiles (launch/bench/RESULTS.md)."""
TIMESTEP_FEATURES = 256


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

    def embed_condition(self, labels: jax.Array) -> jax.Array:
        """Class labels int [batch] (num_classes: no class) to tokens [batch, C, hidden]."""
        c = self.config
        if not c.num_condition_tokens:
            return jnp.zeros((labels.shape[0], 0, c.hidden), c.dtype)
        learned = self.label_table(labels).reshape(labels.shape[0], -1, c.hidden)
        tokens = jnp.tile(learned, (1, c.condition_repeats, 1))
        return tokens + self.condition_positions[...].astype(tokens.dtype)

    def embed_tokens(self, tokens: jax.Array, ids: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """Image tokens to the width of the trunk.

        Args:
          tokens: [batch, n, token_dim].
          ids: int [batch, n], which grid token each is.
          t: noise levels [batch, groups], each for as many consecutive tokens; None: clean.

        Returns:
          [batch, n, hidden].
        """
        c = self.config
        h = self.token_in(tokens)
        if c.positions != "rope":
            table = self.positions[...] if c.positions == "learned" else jnp.asarray(sincos_table(c.grid, c.hidden))
            h = h + table.astype(c.dtype)[ids]
        if t is None or c.conditioning == "adaln":
            return h
        levels = self._embed_timestep(t)
        return (h.reshape(h.shape[0], t.shape[1], -1, c.hidden) + levels[:, :, None]).reshape(h.shape)

    def noise_condition(self, labels: jax.Array, t: jax.Array) -> jax.Array | None:
        """What modulates the noisy tokens; None for in_context conditioning.

        Args:
          labels: int [batch].
          t: noise levels [batch, groups].

        Returns:
          [batch, groups, hidden], past its SiLU, which all layers share.
        """
        if self.config.conditioning != "adaln":
            return None
        return jax.nn.silu(self._embed_timestep(t) + self.label_table(labels)[:, None])

    def _embed_timestep(self, t):
        """Timesteps [...] to [..., hidden]."""
        features = timestep_features(t, TIMESTEP_FEATURES).astype(self.config.dtype)
        return self.timestep_out(jax.nn.silu(self.timestep_in(features)))

    def trunk(
        self,
        h,
        role,
        step,
        ids,
        cache: KVCache | None = None,
        condition=None,
        num_clean: int = 0,
        document=None,
        branch_scale=None,
        of_layer: Callable[[jax.Array], Any] | None = None,
    ):
        """Runs all layers on new tokens, which see the cache and each other by the rule.

        Args:
          h: [batch, n, hidden].
          role, step: int32 [batch, n].
          ids: int32 [batch, n], which grid token each is; -1 for condition tokens.
          cache: earlier tokens, or None; `batch` may be several copies of the cache's,
            which then share it.
          condition: from `noise_condition`, or None.
          num_clean: the first so many tokens are not noisy; the condition passes them by.
          document: int [batch, n], where they are several sequences packed into one.
          branch_scale: float32 [layers, 2, batch], what attention and MLP of every layer add is
            multiplied by (`layers.drop_path_scale`); None: they are added as they are.
          of_layer: what of a layer's h [batch, n, hidden] is returned, stacked over the layers,
            in place of the keys and values.

        Returns:
          h, and the new tokens' keys and values, [layers, batch, n, heads, head_dim].
        """
        cached_step = None if cache is None else jnp.tile(cache.step, (h.shape[0] // cache.step.shape[0], 1))
        keys = h.shape[1] + (0 if cache is None else cached_step.shape[1])
        long = FLASH_FROM_IN_TPU_TRAINING if cache is None and platform() == "tpu" else FLASH_FROM
        flash = self.config.attention == "flash" or (self.config.attention == "auto" and keys >= long)
        mask = attention_mask(role, step, cached_step, flash, document)
        cached_kv = () if cache is None else (cache.k, cache.v)
        context = Context(mask, self._rope(ids), condition)
        graph, params = nnx.split(self.blocks)
        h = constrain(h, ("batch", "sequence", None))

        def layer(h, scanned):
            layer_params, layer_kv, *scale = scanned
            h, kv = nnx.merge(graph, layer_params)(h, context, layer_kv or None, num_clean, *scale)
            return h, kv if of_layer is None else of_layer(h)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMATS[self.config.remat], prevent_cse=False)
        scanned = (params, cached_kv) if branch_scale is None else (params, cached_kv, branch_scale)
        return jax.lax.scan(layer, h, scanned, unroll=self.config.scan_unroll)

    def _rope(self, ids):
        """Cosines and sines of the tokens' positions, or None; condition tokens stay unturned."""
        c = self.config
        if c.positions != "rope":
            return None
        cos, sin = (jnp.asarray(table)[ids] for table in rope_table(c.grid, c.head_dim, c.rope_grid))
        on_grid = (ids >= 0)[..., None]
        return jnp.where(on_grid, cos, 1.0), jnp.where(on_grid, sin, 0.0)

    def head(self, h: jax.Array, condition: jax.Array | None = None) -> jax.Array:
        """Noisy tokens [batch, n, hidden] to predictions, float32 [batch, n, token_dim]."""
        h = self.final_norm(h)
        if condition is not None:
            shift, scale = jnp.split(self.final_modulation(condition), 2, axis=-1)
            h = on_noisy(h, 0, 1.0 + scale, shift)
        return self.token_out(h).astype(jnp.float32)

    def __call__(self, labels, clean, noisy, t, order, step) -> jax.Array:
        """Training forward pass over `[condition | clean | noisy]`.

        Args:
          labels: int [batch]; num_classes stands for no class.
          clean: x_0 of the first K places, [batch, K, token_dim]; K = L, or less where
            nobody looks at the rest (`factorization.num_visible_clean`).
          noisy: x_t of every place, [batch, L, token_dim].
          t: noise levels [batch, groups], each for as many consecutive places.
          order, step: int32 [batch, L], as in `factorization.Plan`.

        Returns:
          Predictions for every place, float32 [batch, L, token_dim].
        """
        role, step = training_layout(self.config.num_condition_tokens, step, clean.shape[1])
        return self.sequence(labels, None, clean, noisy, t, order[:, : clean.shape[1]], order, role, step)[0]

    def sequence(self, labels, text, clean, noisy, t, clean_ids, noisy_ids, role, step):
        """Forward pass over `[condition | text | clean | noisy]` of any layout (`layouts`).

        Args:
          labels, t: as for `__call__`.
          text: int [batch, T], token ids, negative in empty slots; None: no text.
          clean, noisy: image tokens, [batch, K, token_dim] and [batch, N, token_dim].
          clean_ids, noisy_ids: int [batch, K] and [batch, N], which grid token each is.
          role, step: int32 [batch, C + T + K + N].

        Returns:
          Predictions for the noisy tokens, float32 [batch, N, token_dim], and the hidden states
          of the text, [batch, T, hidden], for `text_logits`.
        """
        num_text = 0 if text is None else text.shape[1]
        begin = self.config.num_condition_tokens
        condition = self.noise_condition(labels, t)
        parts = [self.embed_condition(labels)] + ([self.text.embed(text, jnp.arange(num_text))] if num_text else [])
        parts += [self.embed_tokens(clean, clean_ids), self.embed_tokens(noisy, noisy_ids, t)]
        off_grid = jnp.full((noisy.shape[0], begin + num_text), -1, noisy_ids.dtype)
        h, _ = self.trunk(
            jnp.concatenate(parts, axis=1),
            role,
            step,
            jnp.concatenate([off_grid, clean_ids, noisy_ids], axis=1),
            condition=condition,
            num_clean=begin + num_text + clean.shape[1],
        )
        return self.head(h[:, -noisy.shape[1] :], condition), h[:, begin : begin + num_text]

    def text_logits(self, h: jax.Array) -> jax.Array:
        """Text tokens [batch, n, hidden] to logits of the token after each, float32 [batch, n, text_vocab]."""
        return self.text.logits(self.final_norm(h))


@functools.cache
def abstract_model(config: TransformerConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """The model without its numbers.

    Returns:
      graph: to `nnx.merge(graph, params)` into a Transformer.
      shapes: parameters as jax.ShapeDtypeStruct.
      axes: logical axes of every parameter, a tuple of names or None.
    """
    graph, state = nnx.split(jax.eval_shape(lambda: _build(config, jax.random.key(0))))
    is_variable = lambda v: isinstance(v, nnx.Variable)
    axes = jax.tree.map(lambda v: tuple(v.get_metadata("out_sharding")), state, is_leaf=is_variable)
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def _build(config, key):
    # Shardings come from the logical axes, by the rules of sharding.py, not from here.
    with nnx.use_eager_sharding(False):
        return Transformer(config, nnx.Rngs(params=key))


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return nnx.to_pure_dict(nnx.state(_build(config, key)))


def count_params(config: TransformerConfig) -> int:
    """Number of learned values."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(abstract_model(config)[1]))
