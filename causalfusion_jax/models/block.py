"""A block of the trunk, and the layers that blocks and trunk share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.common.sharding import constrain
from causalfusion_jax.models.attention.mask import AttentionMask
from causalfusion_jax.models.cpu import on_rows
from causalfusion_jax.models.layers import Norm, gelu
from causalfusion_jax.models.positions import rotate


def with_axes(initializer, *axes):
    """`initializer` with the logical axis of each dimension attached."""
    return nnx.with_partitioning(initializer, axes)


def linear(in_features, out_features, axes, config, rngs, *, use_bias=True, kernel_init=None):
    """Xavier-uniform linear layer; `axes` are the logical axes of its kernel."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=config.dtype,
        kernel_init=with_axes(kernel_init or nnx.initializers.xavier_uniform(), *axes),
        bias_init=with_axes(nnx.initializers.zeros, axes[-1]),
        rngs=rngs,
    )


def on_noisy(x, num_clean: int, scale, shift=None):
    """`x * scale + shift` on the noisy tokens.

    Args:
      x: [batch, tokens, dim].
      num_clean: the first `num_clean` tokens are not noisy, and returned unchanged.
      scale, shift: [batch, groups, dim], each for an equal number of consecutive noisy tokens.
    """
    clean, noisy = x[:, :num_clean], x[:, num_clean:]
    groups = noisy.reshape(*scale.shape[:2], -1, x.shape[-1]) * scale[:, :, None]
    groups = groups if shift is None else groups + shift[:, :, None]
    noisy = groups.reshape(noisy.shape)
    return jnp.concatenate([clean, noisy], axis=1) if num_clean else noisy


class Context(NamedTuple):
    """Inputs that all layers share.

    Attributes:
      mask: attention mask of the new tokens.
      rope: cosines and sines of their positions, [batch, tokens, head_dim], or None.
      noise_embedding: from `Transformer.embed_noise`, or None.
    """

    mask: AttentionMask
    rope: tuple[jax.Array, jax.Array] | None
    noise_embedding: jax.Array | None


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection; `config` is a TransformerConfig."""

    def __init__(self, config, rngs: nnx.Rngs):
        c, self.config = config, config
        self.attention_norm = Norm(c.norm, c.hidden, "embed")
        self.qkv = nnx.LinearGeneral(
            c.hidden,
            (3, c.heads, c.head_dim),
            use_bias=c.qkv_bias,
            dtype=c.dtype,
            kernel_init=with_axes(nnx.initializers.xavier_uniform(), "embed", None, "heads", "head_dim"),
            bias_init=with_axes(nnx.initializers.zeros, None, "heads", "head_dim"),
            rngs=rngs,
        )
        # Queries and keys need a learned scale, even where the other norms have none.
        qk_norm = "layer" if c.norm == "plain" else c.norm
        self.q_norm = Norm(qk_norm, c.head_dim, "head_dim") if c.qk_norm else None
        self.k_norm = Norm(qk_norm, c.head_dim, "head_dim") if c.qk_norm else None
        self.attention_out = linear(c.hidden, c.hidden, ("heads", "embed"), c, rngs)
        self.mlp_norm = Norm(c.norm, c.hidden, "embed")
        self.mlp_in = linear(c.hidden, c.mlp_hidden, ("embed", "mlp"), c, rngs)
        self.mlp_out = linear(c.mlp_hidden, c.hidden, ("mlp", "embed"), c, rngs)
        self.modulation = modulation_layer(6, c, rngs)

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [..., heads, head_dim] of normalized tokens [..., hidden]."""
        q, k, v = (jnp.squeeze(part, -3) for part in jnp.split(self.qkv(x), 3, axis=-3))
        return (self.q_norm(q), self.k_norm(k), v) if self.config.qk_norm else (q, k, v)

    def mlp(self, x: jax.Array) -> jax.Array:
        """The MLP on normalized tokens [..., hidden]."""
        return self.mlp_out(gelu(self.mlp_in(x)))

    def __call__(self, h, context: Context, cached, num_clean: int, branch_scale: jax.Array | None = None):
        """Runs the block.

        Args:
          h: [batch, tokens, hidden].
          context: attention mask, positions and noise embedding of the tokens.
          cached: keys, values [batch / copies, slots, heads, head_dim] of earlier tokens,
            or None.
          num_clean: the first `num_clean` tokens are not modulated.
          branch_scale: float32 [2, batch], scale of what attention and MLP add, or None.

        Returns:
          h, and the keys and values of the new tokens.
        """
        modulated = context.noise_embedding is not None
        if modulated:
            shifts, scales, gates = zip(*_triples(self.modulation(context.noise_embedding)), strict=True)

        def normed(norm, i):
            x = on_rows(norm, h)
            return on_noisy(x, num_clean, 1.0 + scales[i], shifts[i]) if modulated else x

        def gated(x, i):
            x = on_noisy(x, num_clean, gates[i]) if modulated else x
            return x if branch_scale is None else x * branch_scale[i][:, None, None].astype(x.dtype)

        with jax.named_scope("attention"):
            q, k, v = on_rows(self.queries_keys_values, normed(self.attention_norm, 0))
            q, k, v = (constrain(x, ("batch", "sequence", "heads", "head_dim")) for x in (q, k, v))
            if context.rope is not None:
                q, k = rotate(q, context.rope), rotate(k, context.rope)
            out = context.mask.attend(q, k, v, cached)
            h = h + gated(on_rows(self.attention_out, out.reshape(h.shape)), 0)
        with jax.named_scope("mlp"):
            h = h + gated(on_rows(self.mlp, normed(self.mlp_norm, 1)), 1)
        return constrain(h, ("batch", "sequence", None)), (k, v)


def modulation_layer(parts: int, config, rngs):
    """adaLN-zero: shifts, scales and gates from the noise embedding; None for in_context."""
    if config.conditioning != "adaln":
        return None
    return linear(
        config.hidden, parts * config.hidden, ("embed", "mlp"), config, rngs, kernel_init=nnx.initializers.zeros
    )


def _triples(modulation: jax.Array):
    """(shift, scale, gate) for the attention, then for the MLP."""
    parts = jnp.split(modulation, 6, axis=-1)
    return parts[:3], parts[3:]
