"""Text tokens before and after the trunk: embedding table, positions, and the next-token head."""

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.models.block import linear, with_axes

TEXT_HEADS = ("tied", "separate")


class TextTokens(nnx.Module):
    """Embeds text tokens, and predicts the next one from their hidden states.

    Args:
      config: TransformerConfig with `text_vocab`, `text_tokens` and `text_head`.
    """

    def __init__(self, config, rngs: nnx.Rngs):
        c, self.config = config, config
        normal = nnx.initializers.normal(0.02)
        self.table = nnx.Embed(
            c.text_vocab, c.hidden, dtype=c.dtype, embedding_init=with_axes(normal, "vocab", "embed"), rngs=rngs
        )
        self.positions = nnx.Param(normal(rngs.params(), (c.text_tokens, c.hidden)), out_sharding=("tokens", "embed"))
        self.head = (
            linear(
                c.hidden, c.text_vocab, ("embed", "vocab"), c, rngs, use_bias=False, kernel_init=nnx.initializers.zeros
            )
            if c.text_head == "separate"
            else None
        )

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Token ids int [batch, n] and their positions in the text int [batch, n] or [n], to [batch, n, hidden].

        The negative id of an empty slot is embedded as token 0; its role PAD masks it.
        """
        positions = jnp.clip(positions, 0, self.config.text_tokens - 1)
        return self.table(jnp.maximum(tokens, 0)) + self.positions[...].astype(self.config.dtype)[positions]

    def logits(self, h: jax.Array) -> jax.Array:
        """Normalized hidden states [batch, n, hidden] to logits of the next token, float32 [batch, n, vocab]."""
        out = self.table.attend(h) if self.head is None else self.head(h)
        return out.astype(jnp.float32)
