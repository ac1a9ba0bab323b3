"""Model FLOPs, counted from shapes."""

from causalfusion_jax.models.config import TransformerConfig


def forward_flops(
    config: TransformerConfig, new_tokens: int, seen_tokens: int | None = None, noise_levels: int = 1
) -> int:
    """Matrix-product FLOPs of `new_tokens` through the trunk and its token head.

    A multiply-add counts as two. Attention counts all `seen_tokens` keys (default: the
    new tokens) for every query, as dense attention computes it; adaLN counts each of
    `noise_levels` once a layer.
    """
    c = config
    seen_tokens = new_tokens if seen_tokens is None else seen_tokens
    weights = 4 * c.hidden**2 + 2 * c.hidden * c.mlp_hidden
    attention = 2 * seen_tokens * c.hidden
    modulation = (6 * c.layers + 2) * c.hidden**2 * noise_levels if c.conditioning == "adaln" else 0
    return 2 * (new_tokens * (c.layers * (weights + attention) + 2 * c.hidden * c.token_dim) + modulation)


def text_head_flops(config: TransformerConfig, tokens: int) -> int:
    """Matrix-product FLOPs of the next-token head on `tokens` text tokens."""
    return 2 * tokens * config.hidden * config.text_vocab


def training_flops(config: TransformerConfig, num_clean: int | None = None, noise_levels: int = 1) -> int:
    """Model FLOPs of one image in a training step: forward, and twice that backward.

    Args:
      config: the network.
      num_clean: number of positions with a clean token; default: all.
      noise_levels: number of distinct t in an image.
    """
    num_clean = config.num_tokens if num_clean is None else num_clean
    tokens = config.num_condition_tokens + config.text_tokens + num_clean + config.num_tokens
    text_head = text_head_flops(config, config.text_tokens)
    return 3 * (forward_flops(config, tokens, noise_levels=noise_levels) + text_head)
