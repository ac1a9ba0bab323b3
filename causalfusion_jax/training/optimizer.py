"""AdamW with warm-up, as the papers train."""

import jax.numpy as jnp
import optax

from causalfusion_jax.config.training import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step. The first step already moves: its rate is peak / warmup."""
    peak, warmup = config.learning_rate, config.warmup_steps

    def schedule(step):
        done = (step - warmup) / max(total_steps - warmup, 1)
        if config.schedule == "constant":
            after = 1.0
        elif config.schedule == "cosine":
            fall = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
            after = config.final_ratio + (1.0 - config.final_ratio) * fall
        else:
            start = total_steps * (1.0 - config.decay_fraction)
            r = jnp.clip((step - start) / (total_steps - start), 0.0, 1.0)
            after = 0.5 ** (6.0 * r)
        return peak * jnp.where(step < warmup, (step + 1) / max(warmup, 1), after)

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW. Weight decay spares vectors (norms, biases), as the field does."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def is_matrix(params):
        # Layers are stacked: a vector parameter of a block has two dimensions.
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
    """The step of the learning rate's schedule, int32 []: steps taken without those that were skipped."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
