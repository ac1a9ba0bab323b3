"""AdamW with the learning rate schedules of the papers."""

import jax.numpy as jnp
import optax

from causalfusion_jax.config.training import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step. That of the first step is not 0 but peak / warmup."""
    peak, warmup = config.learning_rate, config.warmup_steps

    def schedule(step):
        progress = (step - warmup) / max(total_steps - warmup, 1)
        if config.schedule == "constant":
            after = 1.0
        elif config.schedule == "cosine":
            fall = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
            after = config.final_ratio + (1.0 - config.final_ratio) * fall
        else:
            start = total_steps * (1.0 - config.decay_fraction)
            r = jnp.clip((step - start) / (total_steps - start), 0.0, 1.0)
            after = 0.5 ** (6.0 * r)
        return peak * jnp.where(step < warmup, (step + 1) / max(warmup, 1), after)

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW, without weight decay of vectors (norms, biases)."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def is_matrix(params):
        # By name, because layers are stacked: the vectors of blocks have two dimensions.
        return {
            name: is_matrix(value) if isinstance(value, dict) else name in ("kernel", "embedding")
            for name, value in params.items()
        }

    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    return optax.chain(clip, adamw)


def updates_applied(opt_state: optax.OptState) -> jnp.ndarray:
    """Step of the learning rate schedule, int32 []: the number of steps that were not skipped."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
