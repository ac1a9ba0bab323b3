"""Settings of the sampler."""

import dataclasses

import numpy as np

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.core import factorization
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig
from causalfusion_jax.core.solvers import SolverConfig, solver_table
from causalfusion_jax.models.config import TransformerConfig

CFG_SCHEDULES = ("constant", "linear", "ar_linear")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are generated.

    Attributes:
      ar_steps: number S of AR steps, 1..L, of (nearly) equal sizes.
      step_sizes: tokens in each AR step instead; must sum to the tokens generated.
      order: token order, any of `factorization.ORDERS`; empty: as in training.
      order_block: block or stride of that order, as in FactorizationConfig.
      solver, solver_steps, spacing, variance, eta: as in SolverConfig.
      cfg_scale: guidance w in eps = eps_u + w (eps_c - eps_u); 1 is none.
      cfg_schedule: `constant`; `linear`: from 1 at t = T up to cfg_scale at t = 0;
        `ar_linear`: from 1 up to cfg_scale with the part of the image generated.
      cfg_interval: guidance only where low <= t < high.
      temperature: scales the noise that a stochastic solver adds.
      clip_x_0: bound on the predicted |x_0|, for data in pixels; 0 is none.
    """

    ar_steps: int = 1
    step_sizes: tuple[int, ...] = ()
    order: str = ""
    order_block: int = 0
    solver: str = "ddpm"
    solver_steps: int = 50
    spacing: str = "auto"
    variance: str = "large"
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: tuple[float, float] = (0.0, float("inf"))
    temperature: float = 1.0
    clip_x_0: float = 0.0

    def __post_init__(self):
        require_number("ar_steps", self.ar_steps, 1)
        for size in self.step_sizes:
            require(size >= 1, "step_sizes", self.step_sizes, "every AR step needs at least one token")
        if self.order:
            require_one_of("order", self.order, factorization.ORDERS)
        else:
            require(self.order_block == 0, "order_block", self.order_block, "needs order to be set")
        require_number("cfg_scale", self.cfg_scale, 0.0)
        require_one_of("cfg_schedule", self.cfg_schedule, CFG_SCHEDULES)
        low, high = self.cfg_interval
        require(0 <= low <= high, "cfg_interval", self.cfg_interval, "must be low,high with 0 <= low <= high")
        require_number("temperature", self.temperature, 0.0)
        require_number("clip_x_0", self.clip_x_0, 0.0)
        require(
            self.temperature == 1.0 or self.solver_config.is_stochastic,
            "temperature",
            self.temperature,
            f"must be 1: solver {self.solver} with eta={self.eta} adds no noise to scale",
        )

    @property
    def solver_config(self) -> SolverConfig:
        """The noise axis' part."""
        return SolverConfig(self.solver, self.solver_steps, self.spacing, self.variance, self.eta)

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens in each AR step when `num_tokens` are generated. Raises InputError."""
        if self.step_sizes:
            require(
                sum(self.step_sizes) == num_tokens,
                "step_sizes",
                self.step_sizes,
                f"must sum to the {num_tokens} tokens generated",
            )
            return tuple(self.step_sizes)
        require(
            self.ar_steps <= num_tokens,
            "ar_steps",
            self.ar_steps,
            f"must be >= 1 and <= {num_tokens}, the tokens generated",
        )
        return tuple(np.bincount(factorization.equal_steps(num_tokens, self.ar_steps)).tolist())

    def check(self, model: TransformerConfig, diffusion: DiffusionConfig) -> None:
        """Raises InputError where this sampler does not fit the model."""
        self.sizes(model.num_tokens)
        solver_table(self.solver_config, diffusion)
        if self.order:
            FactorizationConfig(order=self.order, order_block=self.order_block).check_grid(model.grid)

    def order_config(self, trained: FactorizationConfig) -> FactorizationConfig:
        """The token order to sample in; `trained` where none is named."""
        if not self.order:
            return trained
        return FactorizationConfig(order=self.order, order_block=self.order_block)
