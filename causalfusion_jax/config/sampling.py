"""Settings of the samplers of images and of captions."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.core import factorization
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig
from causalfusion_jax.core.solvers import SolverConfig, solver_table

if TYPE_CHECKING:
    # Not imported: commands derive flags from these settings, and need no network for their --help.
    from causalfusion_jax.models.config import TransformerConfig

CFG_SCHEDULES = ("constant", "linear", "ar_linear")


OF_A_SOLVER = tuple(
    field.name for field in dataclasses.fields(SolverConfig) if field.name not in ("solver", "solver_steps")
) + ("temperature",)
"""Settings that belong to one solver: another solver starts from their defaults."""


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """The sequence axis of sampling: AR steps and token order.

    Attributes:
      ar_steps: number S of AR steps of (nearly) equal size, 1..L: 1 is diffusion, L token by token.
      step_sizes: tokens in each AR step, instead of `ar_steps`; must sum to the tokens generated.
      order: token order: raster, block_raster, dilated, random or square_blocks; empty: as in training.
      order_block: block or stride of that order, as in FactorizationConfig.
    """

    ar_steps: int = 1
    step_sizes: tuple[int, ...] = ()
    order: str = ""
    order_block: int = 0

    def __post_init__(self):
        require_number("ar_steps", self.ar_steps, 1)
        for size in self.step_sizes:
            require(size >= 1, "step_sizes", self.step_sizes, "every AR step needs at least one token")
        if self.order:
            require_one_of("order", self.order, factorization.ORDERS)
        else:
            require(self.order_block == 0, "order_block", self.order_block, "needs order to be set")

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens in each AR step when `num_tokens` are generated. Raises InputError."""
        if self.step_sizes:
            allowed = f"must sum to the {num_tokens} tokens generated"
            require(sum(self.step_sizes) == num_tokens, "step_sizes", self.step_sizes, allowed)
            return tuple(self.step_sizes)
        allowed = f"must be >= 1 and <= {num_tokens}, the tokens generated"
        require(self.ar_steps <= num_tokens, "ar_steps", self.ar_steps, allowed)
        return tuple(np.bincount(factorization.equal_steps(num_tokens, self.ar_steps)).tolist())

    def order_config(self, trained: FactorizationConfig) -> FactorizationConfig:
        """The token order to sample in: the sampler's own, or `trained` if it names none."""
        if not self.order:
            return trained
        return FactorizationConfig(order=self.order, order_block=self.order_block)


# The fields of the second base come first: runs store the settings of their evaluations in this order.
@dataclasses.dataclass(frozen=True)
class SamplerConfig(SolverConfig, SequenceConfig):
    """How images are generated: the sequence axis, the noise axis and guidance.

    Attributes:
      cfg_scale: classifier-free guidance w in eps = eps_u + w (eps_c - eps_u); 1 is none.
      cfg_schedule: `constant`; `linear`: from 1 at t = T up to cfg_scale at t = 0;
        `ar_linear`: from 1 up to cfg_scale with the part of the image generated.
      cfg_interval: timesteps low,high between which there is guidance: low <= t < high.
      temperature: scale of the noise that a stochastic solver adds.
      clip_x_0: bound on the predicted |x_0|, for data in pixels; 0 is none.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: tuple[float, float] = (0.0, float("inf"))
    temperature: float = 1.0
    clip_x_0: float = 0.0

    def __post_init__(self):
        SequenceConfig.__post_init__(self)
        require_number("cfg_scale", self.cfg_scale, 0.0)
        require_one_of("cfg_schedule", self.cfg_schedule, CFG_SCHEDULES)
        interval = self.cfg_interval
        allowed = "must be low,high with 0 <= low <= high"
        require(len(interval) == 2 and 0 <= interval[0] <= interval[1], "cfg_interval", interval, allowed)
        require_number("temperature", self.temperature, 0.0)
        require_number("clip_x_0", self.clip_x_0, 0.0)
        SolverConfig.__post_init__(self)
        allowed = f"must be 1: solver {self.solver} with eta={self.eta} adds no noise to scale"
        require(self.temperature == 1.0 or self.is_stochastic, "temperature", self.temperature, allowed)

    def updated(self, given: Mapping[str, Any]) -> "SamplerConfig":
        """The same settings with those `given` changed, and with defaults for settings that depend on them.

        Another solver resets the settings OF_A_SOLVER, an order its block, `ar_steps` the step sizes.

        Raises:
          InputError: a value that is not allowed, or both `ar_steps` and `step_sizes`.
        """
        allowed = "determines the number of AR steps; leave out ar_steps"
        require(not {"ar_steps", "step_sizes"} <= set(given), "step_sizes", given.get("step_sizes"), allowed)
        reset = set()
        if "ar_steps" in given:
            reset.add("step_sizes")
        if "order" in given:
            reset.add("order_block")
        if given.get("solver", self.solver) != self.solver:
            reset.update(OF_A_SOLVER)
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in reset}
        return dataclasses.replace(self, **(defaults | dict(given)))

    def check(self, model: "TransformerConfig", diffusion: DiffusionConfig) -> None:
        """Raises InputError if this sampler does not fit the model."""
        self.sizes(model.num_tokens)
        solver_table(self, diffusion)
        if self.order:
            FactorizationConfig(order=self.order, order_block=self.order_block).check_grid(model.grid)


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """How texts are generated.

    Attributes:
      num_beams: beams of beam search, the most probable of which is kept; 1: greedy.
      temperature: tokens are drawn with logits divided by it; 0: not drawn.
      top_k: only the k most probable tokens are drawn; 0: all.
      top_p: only the most probable tokens that together reach it are drawn; 1: all.
    """

    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        require_number("num_beams", self.num_beams, 1)
        require_number("temperature", self.temperature, 0.0)
        require_number("top_k", self.top_k, 0)
        require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        drawn = self.temperature > 0
        require(not drawn or self.num_beams == 1, "num_beams", self.num_beams, "must be 1 with a temperature")
        for name, neutral in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(self, name)
            require(drawn or value == neutral, name, value, "needs temperature > 0: nothing is drawn without")
