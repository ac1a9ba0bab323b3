"""The noise axis: schedules, corruption, prediction targets, loss weights.

A schedule gives alpha(t) and sigma(t); corruption is x_t = alpha x_0 + sigma eps.
Every prediction target is a combination a x_0 + b eps, so that target and x_t are two
linear equations in x_0 and eps, and one pair of formulas converts between them all.

`t` is a timestep in 0..T-1 (int) for the discrete schedules, and a time in [0, T]
(float) for the rectified flow, in the units the network embeds. Only `sample_t` is
random.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common.errors import InputError, require_number, require_one_of

SCHEDULES = ("linear", "cosine", "flow")
TARGETS = ("eps", "x_0", "v", "velocity")
LOSS_WEIGHTS = ("none", "min_snr")
T_SHARED_BY = ("image", "step", "token")
T_DISTRIBUTIONS = ("uniform", "logit_normal")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How images are factorized over the noise level.

    Attributes:
      schedule: `linear` betas (DDPM), `cosine` (Nichol and Dhariwal 2021), or
        rectified `flow` (alpha = 1 - t/T, sigma = t/T).
      num_timesteps: T.
      beta_start, beta_end: ends of the linear betas at T = 1000; scaled by 1000/T.
      target: what the network predicts: `eps`, `x_0`, `v` = alpha eps - sigma x_0,
        or `velocity` = eps - x_0.
      loss_weight: `none` (plain mean squared error of the target), or `min_snr`
        (Hang et al. 2023): min(SNR, min_snr_gamma) on the error of x_0.
      t_shared_by: one t for the whole `image`, for each AR `step`, or for each `token`.
      t_draws: number of draws of t in an image, which AR steps take in turn; 0: one for each.
      t_distribution: `uniform`, or `logit_normal` (Esser et al. 2024), for flow.
    """

    schedule: str = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    target: str = "eps"
    loss_weight: str = "none"
    min_snr_gamma: float = 5.0
    t_shared_by: str = "image"
    t_draws: int = 0
    t_distribution: str = "uniform"

    def __post_init__(self):
        require_one_of("schedule", self.schedule, SCHEDULES)
        require_one_of("target", self.target, TARGETS)
        require_one_of("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        require_one_of("t_shared_by", self.t_shared_by, T_SHARED_BY)
        require_one_of("t_distribution", self.t_distribution, T_DISTRIBUTIONS)
        require_number("t_draws", self.t_draws, 0)
        if self.t_draws and self.t_shared_by != "step":
            raise InputError("t_draws", self.t_draws, f"t_shared_by step only, not {self.t_shared_by}; use 0")
        require_number("num_timesteps", self.num_timesteps, 2)
        require_number("beta_start", self.beta_start, 0.0, 1.0, open_low=True)
        require_number("beta_end", self.beta_end, self.beta_start, 1.0)
        require_number("min_snr_gamma", self.min_snr_gamma, 0.0, open_low=True)
        if self.schedule == "linear":
            require_number("num_timesteps", self.num_timesteps, int(1000 * self.beta_end) + 1)
        if self.schedule == "flow" and self.target == "eps":
            raise InputError(
                "target", "eps", "cannot recover x_0 at t=T of schedule flow, where alpha=0; use velocity, v or x_0"
            )
        if self.schedule != "flow" and self.t_distribution != "uniform":
            raise InputError("t_distribution", self.t_distribution, "schedule flow only; use uniform")

    @property
    def is_continuous(self) -> bool:
        """Whether t is a real number rather than a table index."""
        return self.schedule == "flow"


@functools.cache
def alpha_bar_table(config: DiffusionConfig) -> np.ndarray:
    """Products of (1 - beta) of a discrete schedule; float64 [T]."""
    T = config.num_timesteps
    if config.schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, T) * (1000 / T)
    elif config.schedule == "cosine":
        bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise InputError("schedule", config.schedule, "has no table of timesteps")
    return np.cumprod(1.0 - betas)


def alpha_sigma(config: DiffusionConfig, t) -> tuple[jax.Array, jax.Array]:
    """alpha(t) and sigma(t), float32, of the shape of `t`."""
    if config.is_continuous:
        u = jnp.asarray(t, jnp.float32) / config.num_timesteps
        return 1.0 - u, u
    bar = alpha_bar_table(config)
    alpha, sigma = (jnp.asarray(np.sqrt(a), jnp.float32) for a in (bar, 1.0 - bar))
    return alpha[t], sigma[t]


def add_noise(x_0, eps, alpha, sigma) -> jax.Array:
    """x_t = alpha x_0 + sigma eps; alpha and sigma [...], x_0 and eps [..., dim]."""
    return alpha[..., None] * x_0 + sigma[..., None] * eps


def _target_coefficients(target: str, alpha, sigma):
    """(a, b) of the target a x_0 + b eps."""
    return {"eps": (0.0, 1.0), "x_0": (1.0, 0.0), "v": (-sigma, alpha), "velocity": (-1.0, 1.0)}[target]


def make_target(target: str, x_0, eps, alpha, sigma) -> jax.Array:
    """The prediction target; x_0, eps [..., dim], alpha, sigma [...]."""
    a, b = _target_coefficients(target, alpha[..., None], sigma[..., None])
    return a * x_0 + b * eps


def to_x_0_and_eps(target: str, prediction, x_t, alpha, sigma) -> tuple[jax.Array, jax.Array]:
    """Solves target = a x_0 + b eps, x_t = alpha x_0 + sigma eps for (x_0, eps).

    Args:
      target: kind of prediction.
      prediction, x_t: [..., dim].
      alpha, sigma: [...], or scalars.

    Returns:
      x_0, eps: [..., dim].
    """
    alpha, sigma = jnp.asarray(alpha)[..., None], jnp.asarray(sigma)[..., None]
    a, b = _target_coefficients(target, alpha, sigma)
    determinant = alpha * b - sigma * a
    x_0 = (b * x_t - sigma * prediction) / determinant
    eps = (alpha * prediction - a * x_t) / determinant
    return x_0, eps


def loss_weight(config: DiffusionConfig, alpha, sigma) -> jax.Array:
    """Weight of the squared error of the target; float32, shape of `alpha`.

    min_snr weighs the error of x_0 by min(SNR, gamma), whatever is predicted: an error
    d of the target is an error sigma d / (alpha b - sigma a) of x_0.
    """
    if config.loss_weight == "none":
        return jnp.ones_like(alpha)
    if config.target == "x_0":
        # The formula below is 0/0 at sigma = 0; this one has an infinite SNR there, and the weight gamma.
        return jnp.minimum((alpha / sigma) ** 2, config.min_snr_gamma)
    a, b = _target_coefficients(config.target, alpha, sigma)
    determinant = alpha * b - sigma * a
    # min(SNR, gamma) sigma^2, without dividing by sigma.
    return jnp.minimum(alpha**2, config.min_snr_gamma * sigma**2) / determinant**2


def sample_t(config: DiffusionConfig, key: jax.Array, step) -> jax.Array:
    """Draws the noise levels of one image.

    Args:
      config: the distribution, and which tokens share a draw.
      key: PRNG key.
      step: int [L], the AR step of each position, or of each group of positions that
        shares one t (`factorization.places_per_t`).

    Returns:
      t at each of them, [L] ([1] where the image shares it): int32 in 0..T-1, or float32
      in (0, T) for the flow.
    """
    L, T = (1 if config.t_shared_by == "image" else step.shape[0]), config.num_timesteps
    if not config.is_continuous:
        draws = jax.random.randint(key, (L,), 0, T)
    elif config.t_distribution == "uniform":
        draws = T * jax.random.uniform(key, (L,))
    else:
        draws = T * jax.nn.sigmoid(jax.random.normal(key, (L,)))
    if config.t_shared_by == "step":
        return draws[step % config.t_draws if config.t_draws else step]
    return draws
