"""The trunk: one causal diffusion transformer for training and cached sampling.

CausalFusion as released (arXiv 2412.12095): condition, clean and noisy tokens in one
sequence, clean and noisy tokens sharing one input projection and one positional
embedding, the timestep added to the noisy tokens only, no adaLN. Pre-norm blocks,
qk-norm, tanh-GELU, zero-initialized head.

Training passes roles and steps of the whole sequence. Sampling passes a KVCache and
the new tokens. Both run `Transformer.trunk`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.errors import require, require_number, require_one_of
from causalfusion_jax.factorization import Role, attends, training_layout
from causalfusion_jax.models.attention import Keys, attend, visibility_bias
from causalfusion_jax.models.kv_cache import KVCache
from causalfusion_jax.models.layers import LayerNorm, gelu
from causalfusion_jax.models.positions import sincos_2d, timestep_features

POSITIONS = ("learned", "sincos")
DTYPES = ("float32", "bfloat16")
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
      grid: token rows and columns of an image.
      token_dim: values in an image token, patch_size^2 * channels.
      num_classes: classes; one more row of the label table stands for no class.
      num_condition_tokens: condition tokens C that a class becomes.
      mlp_ratio: width of the MLP in units of `hidden`.
      positions: `learned` (initialized with sines and cosines) or fixed `sincos`.
      qk_norm: normalize queries and keys per head.
      dtype: compute type; parameters are float32.
      remat: what the backward pass recomputes: `none`, all but the matrix products
        (`dots`), or all of a block (`full`).
      scan_unroll: layers unrolled in one iteration of the scan over layers.
    """

    hidden: int
    heads: int
    layers: int
    grid: tuple[int, int]
    token_dim: int
    num_classes: int
    num_condition_tokens: int = 4
    mlp_ratio: float = 4.0
    positions: str = "learned"
    qk_norm: bool = True
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        for name in ("hidden", "heads", "layers", "num_classes", "num_condition_tokens"):
            require_number(name, getattr(self, name), 1)
        require(
            self.hidden % self.heads == 0, "heads", self.heads,
            f"must divide hidden={self.hidden}",
        )
        require(self.hidden % 4 == 0, "hidden", self.hidden, "must be a multiple of 4 (2D sines and cosines)")
        require_number("mlp_ratio", self.mlp_ratio, 0.0, open_low=True)
        require_number("scan_unroll", self.scan_unroll, 1, self.layers)
        require_one_of("positions", self.positions, POSITIONS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("remat", self.remat, REMATS)

    @property
    def num_tokens(self) -> int:
        """Image tokens L."""
        return math.prod(self.grid)

    @property
    def head_dim(self) -> int:
        """Values in a head."""
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP."""
        return int(self.hidden * self.mlp_ratio)


def _init(initializer, *axes):
    """`initializer` with the logical axis of each dimension attached."""
    return nnx.with_partitioning(initializer, axes)


def _linear(in_features, out_features, axes, config, rngs, *, use_bias=True, kernel_init=None):
    """Xavier-uniform linear layer; `axes` are the logical axes of its kernel."""
    return nnx.Linear(
        in_features, out_features, use_bias=use_bias, dtype=config.dtype,
        kernel_init=_init(kernel_init or nnx.initializers.xavier_uniform(), *axes),
        bias_init=_init(nnx.initializers.zeros, axes[-1]),
        rngs=rngs,
    )


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        self.attention_norm = LayerNorm(c.hidden, "embed")
        self.qkv = nnx.LinearGeneral(
            c.hidden, (3, c.heads, c.head_dim), use_bias=False, dtype=c.dtype,
            kernel_init=_init(nnx.initializers.xavier_uniform(), "embed", None, "heads", "head_dim"),
            rngs=rngs,
        )
        self.q_norm = LayerNorm(c.head_dim, "head_dim") if c.qk_norm else None
        self.k_norm = LayerNorm(c.head_dim, "head_dim") if c.qk_norm else None
        self.attention_out = _linear(c.hidden, c.hidden, ("heads", "embed"), c, rngs)
        self.mlp_norm = LayerNorm(c.hidden, "embed")
        self.mlp_in = _linear(c.hidden, c.mlp_hidden, ("embed", "mlp"), c, rngs)
        self.mlp_out = _linear(c.mlp_hidden, c.hidden, ("mlp", "embed"), c, rngs)

    def __call__(self, h, bias, cached: tuple[jax.Array, jax.Array, jax.Array] | None):
        """Runs the block.

        Args:
          h: [batch, tokens, hidden].
          bias: visibility of the new tokens to each other, [batch, 1, tokens, tokens].
          cached: keys, values [batch, slots, heads, head_dim] of earlier tokens and
            their visibility [batch, 1, tokens, slots], or None.

        Returns:
          h, and the keys and values of the new tokens.
        """
        batch, tokens, hidden = h.shape
        # Matrix products run on [batch * tokens, ...]: XLA:CPU contracts the two
        # leading dimensions of a weight gradient far slower than one.
        with jax.named_scope("attention"):
            qkv = self.qkv(self.attention_norm(h.reshape(batch * tokens, hidden)))
            q, k, v = (x[:, 0] for x in jnp.split(qkv, 3, axis=1))
            if self.config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k, v = (x.reshape(batch, tokens, *x.shape[1:]) for x in (q, k, v))
            places = [Keys(k, v, bias)] if cached is None else [Keys(*cached), Keys(k, v, bias)]
            out = attend(q, places).reshape(batch * tokens, hidden)
            h = h + self.attention_out(out).reshape(h.shape)
        with jax.named_scope("mlp"):
            x = self.mlp_in(self.mlp_norm(h.reshape(batch * tokens, hidden)))
            h = h + self.mlp_out(gelu(x)).reshape(h.shape)
        return h, (k, v)


class Transformer(nnx.Module):
    """The causal diffusion transformer."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        normal = nnx.initializers.normal(0.02)
        self.label_table = nnx.Embed(
            c.num_classes + 1, c.num_condition_tokens * c.hidden, dtype=c.dtype,
            embedding_init=_init(normal, "classes", "embed"), rngs=rngs,
        )
        self.condition_positions = nnx.Param(
            normal(rngs.params(), (c.num_condition_tokens, c.hidden)), out_sharding=("tokens", "embed")
        )
        if c.positions == "learned":
            self.positions = nnx.Param(
                jnp.asarray(sincos_2d(c.grid, c.hidden)), out_sharding=("tokens", "embed")
            )
        self.token_in = _linear(c.token_dim, c.hidden, ("token_dim", "embed"), c, rngs)
        self.timestep_in = _linear(TIMESTEP_FEATURES, c.hidden, ("timestep", "embed"), c, rngs)
        self.timestep_out = _linear(c.hidden, c.hidden, (None, "embed"), c, rngs)

        @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs):
            return Block(c, layer_rngs)

        self.blocks = stack(rngs.split(c.layers))
        self.final_norm = LayerNorm(c.hidden, "embed")
        self.token_out = _linear(
            c.hidden, c.token_dim, ("embed", "token_dim"), c, rngs, kernel_init=nnx.initializers.zeros
        )

    def embed_condition(self, labels: jax.Array) -> jax.Array:
        """Class labels int [batch] (num_classes: no class) to [batch, C, hidden]."""
        c = self.config
        tokens = self.label_table(labels).reshape(-1, c.num_condition_tokens, c.hidden)
        return tokens + self.condition_positions[...].astype(tokens.dtype)

    def embed_tokens(self, tokens: jax.Array, ids: jax.Array, t: jax.Array | None = None) -> jax.Array:
        """Image tokens to the width of the trunk.

        Args:
          tokens: [batch, n, token_dim].
          ids: int [batch, n], which grid token each is.
          t: noise level of each token, [batch, n] or [batch, 1]; None: clean tokens.

        Returns:
          [batch, n, hidden].
        """
        c = self.config
        table = self.positions[...] if c.positions == "learned" else jnp.asarray(sincos_2d(c.grid, c.hidden))
        h = self.token_in(tokens) + table.astype(c.dtype)[ids]
        if t is None:
            return h
        features = timestep_features(t, TIMESTEP_FEATURES).astype(c.dtype)
        return h + self.timestep_out(jax.nn.silu(self.timestep_in(features)))

    def trunk(self, h, role, step, cache: KVCache | None = None):
        """Runs all layers on new tokens, which see the cache and each other by the rule.

        Args:
          h: [batch, n, hidden].
          role, step: int32 [batch, n].
          cache: earlier tokens, or None.

        Returns:
          h, and the new tokens' keys and values, [layers, batch, n, heads, head_dim].
        """
        bias = visibility_bias(attends(role, step, role, step))
        cached_kv, cached_bias = (), None
        if cache is not None:
            cached_role = jnp.full_like(cache.step, Role.CLEAN)
            cached_bias = visibility_bias(attends(role, step, cached_role, cache.step))
            cached_kv = (cache.k, cache.v)
        graph, params = nnx.split(self.blocks)

        def layer(h, scanned):
            layer_params, layer_kv = scanned
            cached = (*layer_kv, cached_bias) if layer_kv else None
            return nnx.merge(graph, layer_params)(h, bias, cached)

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMATS[self.config.remat], prevent_cse=False)
        return jax.lax.scan(layer, h, (params, cached_kv), unroll=self.config.scan_unroll)

    def head(self, h: jax.Array) -> jax.Array:
        """[batch, n, hidden] to predictions, float32 [batch, n, token_dim]."""
        return self.token_out(self.final_norm(h)).astype(jnp.float32)

    def __call__(self, labels, clean, noisy, t, order, step) -> jax.Array:
        """Training forward pass over `[condition | clean | noisy]`.

        Args:
          labels: int [batch]; num_classes stands for no class.
          clean, noisy: x_0 and x_t of every place, [batch, L, token_dim].
          t: noise levels, [batch, L] or [batch, 1].
          order, step: int32 [batch, L], as in `factorization.Plan`.

        Returns:
          Predictions for every place, float32 [batch, L, token_dim].
        """
        c = self.config
        parts = [self.embed_condition(labels), self.embed_tokens(clean, order), self.embed_tokens(noisy, order, t)]
        role, step = training_layout(c.num_condition_tokens, step)
        h, _ = self.trunk(jnp.concatenate(parts, axis=1), role, step)
        return self.head(h[:, -c.num_tokens:])


Params = dict[str, Any]
"""A nested dict of arrays: everything that is learned, and nothing else."""


@functools.cache
def abstract_model(config: TransformerConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """The model without its numbers.

    Returns:
      graph: to `nnx.merge(graph, params)` into a Transformer.
      shapes: parameters as jax.ShapeDtypeStruct.
      axes: logical axes of every parameter, a tuple of names or None.
    """
    graph, state = nnx.split(jax.eval_shape(lambda: _build(config, jax.random.key(0))))
    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
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


def forward_flops(config: TransformerConfig, new_tokens: int, seen_tokens: int | None = None) -> int:
    """Matrix-product FLOPs of `new_tokens` through the trunk and its token head.

    A multiply-add counts as two. Attention counts every one of `seen_tokens` keys
    (default: the new ones) for every query, as the dense path computes it.
    """
    c = config
    seen_tokens = new_tokens if seen_tokens is None else seen_tokens
    weights = 4 * c.hidden**2 + 2 * c.hidden * c.mlp_hidden
    attention = 2 * seen_tokens * c.hidden
    return 2 * new_tokens * (c.layers * (weights + attention) + 2 * c.hidden * c.token_dim)


def training_flops(config: TransformerConfig) -> int:
    """Model FLOPs of one image in a training step: forward, and twice that backward."""
    return 3 * forward_flops(config, config.num_condition_tokens + 2 * config.num_tokens)
