"""Weights under the released CausalFusion's names, as this package's parameters."""

import numpy as np

from causalfusion_jax.models.transformer import TransformerConfig


def causalfusion_params(weights: dict[str, np.ndarray], config: TransformerConfig) -> dict:
    """Nested parameters from the released names and layouts (also of gradients)."""
    c = config

    def linear(name):
        layer = {"kernel": weights[f"{name}.weight"].T}
        return layer | ({"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def block(i):
        name = f"blocks.{i}"
        qkv = linear(f"{name}.attn.qkv")["kernel"]
        return {
            "attention_norm": norm(f"{name}.norm1"),
            "qkv": {"kernel": qkv.reshape(c.hidden, 3, c.heads, c.head_dim)},
            "q_norm": norm(f"{name}.attn.q_norm"),
            "k_norm": norm(f"{name}.attn.k_norm"),
            "attention_out": linear(f"{name}.attn.proj"),
            "mlp_norm": norm(f"{name}.norm2"),
            "mlp_in": linear(f"{name}.mlp.fc1"),
            "mlp_out": linear(f"{name}.mlp.fc2"),
        }

    def stack(trees):
        if isinstance(trees[0], dict):
            return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
        return np.stack(trees)

    return {
        "label_table": {"embedding": weights["y_embedder.embedding_table.weight"]},
        "condition_positions": weights["cond_pos_embed"][0],
        "positions": weights["pos_embed"][0],
        "token_in": linear("x_proj"),
        "timestep_in": linear("t_embedder.mlp.0"),
        "timestep_out": linear("t_embedder.mlp.2"),
        "blocks": stack([block(i) for i in range(c.layers)]),
        "final_norm": norm("final_layer.0"),
        "token_out": linear("final_layer.1"),
    }
