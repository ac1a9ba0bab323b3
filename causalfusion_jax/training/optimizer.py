"""AdamW with warm-up, as the papers train."""

import dataclasses

import jax.numpy as jnp
import optax

from causalfusion_jax.errors import require, require_number, require_one_of

SCHEDULES = ("constant", "cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: peak.
      schedule: after the warm-up `constant` (CausalFusion), `cosine` to
        `final_ratio`, or `wsd` (ACDiT): constant, then over the last
        `decay_fraction` of training a fall by 0.5^(6 r), r in 0..1.
      warmup_steps: linear warm-up from 0.
      decay_fraction: part of training in which wsd decays.
      final_ratio: last learning rate of cosine, as a part of the peak.
      b1, b2, eps, weight_decay: AdamW.
      clip_norm: bound on the global norm of the gradient; 0 is none.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_fraction: float = 0.15
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        require_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        require_one_of("schedule", self.schedule, SCHEDULES)
        require_number("warmup_steps", self.warmup_steps, 0)
        require_number("decay_fraction", self.decay_fraction, 0.0, 1.0, open_low=True)
        require_number("final_ratio", self.final_ratio, 0.0, 1.0)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, name, value, "must be >= 0 and < 1")
        require_number("eps", self.eps, 0.0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0.0)
        require_number("clip_norm", self.clip_norm, 0.0)


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
        b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=is_matrix,
    )
    return optax.chain(clip, adamw)


def updates_applied(opt_state: optax.OptState) -> jnp.ndarray:
    """The step of the learning rate's schedule, int32 []: steps taken without those that were skipped."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]
