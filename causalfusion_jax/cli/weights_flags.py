"""The flags by which a command chooses trained weights: --workdir, --checkpoint, --weights and --step."""

import dataclasses
from typing import Any

from absl import flags

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import require

# Flags belong to the module that calls `define`.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class WeightsFlags:
    """The flags, and what they say.

    Attributes:
      workdir, checkpoint, weights, step: the flags; `workdir` is None in commands without it.
    """

    workdir: flags.FlagHolder | None
    checkpoint: flags.FlagHolder
    weights: flags.FlagHolder
    step: flags.FlagHolder

    def values(self) -> dict[str, Any]:
        """`weights` (`ema`, `params` or None) and `step` (an int, `best` or None). Raises InputError."""
        step = self.step.value
        require(step is None or step == "best" or step.isdigit(), "--step", step, "must be a step, or best")
        return {
            "weights": "params" if self.weights.value == "model" else self.weights.value,
            "step": int(step) if step is not None and step.isdigit() else step,
        }

    def choice(self):
        """The chosen weights, a `trained.WeightsChoice`. Raises InputError for flags that exclude each other."""
        from causalfusion_jax.sampling.trained import WeightsChoice

        with app.as_flags():
            return WeightsChoice(self.workdir.value, self.checkpoint.value, **self.values())


def define(
    workdir: str | None = "Folder of a training run.",
    checkpoint: str = "Folder of a converted checkpoint, instead of --workdir.",
) -> WeightsFlags:
    """Defines the flags.

    Args:
      workdir: help of --workdir; None: the command has no such flag.
      checkpoint: help of --checkpoint.
    """
    return WeightsFlags(
        None if workdir is None else flags.DEFINE_string("workdir", None, workdir),
        flags.DEFINE_string("checkpoint", None, checkpoint),
        flags.DEFINE_enum(
            "weights",
            None,
            ["ema", "params", "model"],
            "Of a run: averaged weights (ema), or those of the last step (params, also called model) [ema].",
        ),
        flags.DEFINE_string("step", None, "Of a run: step of the checkpoint, or `best` [the newest intact one]."),
    )
