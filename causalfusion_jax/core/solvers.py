"""Noise-axis solvers as tables: one row for each evaluation of the network.

DDPM, DDIM, DPM-Solver++(2M), Euler and Heun all advance by a fixed linear combination
of the current x, the x where the step began, the predicted x_0, the previous predicted
x_0 and fresh noise:

    x <- c_x x + c_begin begin + c_x_0 x_0 + c_previous previous + c_noise noise

so a solver *is* its coefficients, computed here once in float64, and the sampler has a
single loop for all of them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.core.diffusion import DiffusionConfig, alpha_bar_table

SOLVERS = ("ddpm", "ddim", "dpmpp_2m", "euler", "heun")
SPACINGS = ("auto", "respaced", "leading", "trailing", "linspace")
VARIANCES = ("large", "small")


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """How the noise axis is integrated.

    Attributes:
      solver: `ddpm` (ancestral), `ddim`, `dpmpp_2m` (DPM-Solver++ 2M, midpoint), or for
        schedule flow `euler` and `heun`.
      solver_steps: noise levels visited in each AR step; Heun evaluates the network
        2 solver_steps - 1 times.
      spacing: which timesteps of a discrete schedule are visited. `respaced`: n rounded points of
        0..T-1, both ends included (DDPM as released with CausalFusion); `leading`: 0,
        T/n, 2T/n, ...; `trailing`: T/n, 2T/n, ..., T, less 1; `linspace`: n+1 rounded
        points of 0..T-1 without 0 (DPM-Solver++ as released with ACDiT). `auto`: linspace
        for dpmpp_2m, else respaced. A flow always takes n equal steps from T to 0.
      variance: noise of ddpm: `large` (beta) or `small` (posterior).
      eta: noise of ddim: 0 is deterministic, 1 as noisy as ddpm with small variance.
    """

    solver: str = "ddpm"
    solver_steps: int = 50
    spacing: str = "auto"
    variance: str = "large"
    eta: float = 0.0

    def __post_init__(self):
        require_one_of("solver", self.solver, SOLVERS)
        require_one_of("spacing", self.spacing, SPACINGS)
        require_one_of("variance", self.variance, VARIANCES)
        require_number("solver_steps", self.solver_steps, 1)
        require_number("eta", self.eta, 0.0, 1.0)
        require(self.eta == 0.0 or self.solver == "ddim", "eta", self.eta, f"must be 0 for solver {self.solver}")
        allowed = f"has no meaning for solver {self.solver}; leave it large"
        require(self.variance == "large" or self.solver == "ddpm", "variance", self.variance, allowed)

    @property
    def is_stochastic(self) -> bool:
        """Whether the solver adds noise between noise levels."""
        return self.solver == "ddpm" or self.eta > 0.0


class SolverTable(NamedTuple):
    """Coefficients, one row for each evaluation of the network; arrays [rows].

    Attributes:
      t: timestep given to the network; alpha, sigma: the schedule there.
      c_x, c_begin, c_x_0, c_previous, c_noise: coefficients of the module's update.
      begins: whether a step begins at the x of this row.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    c_x: np.ndarray
    c_begin: np.ndarray
    c_x_0: np.ndarray
    c_previous: np.ndarray
    c_noise: np.ndarray
    begins: np.ndarray


def timesteps(config: SolverConfig, diffusion: DiffusionConfig) -> np.ndarray:
    """Noise levels from the noisiest down, [steps]; int64, or float64 for the flow.

    Raises:
      InputError: more steps than timesteps, or a spacing that the schedule does not have.
    """
    T, n = diffusion.num_timesteps, config.solver_steps
    if diffusion.is_continuous:
        require(config.spacing == "auto", "spacing", config.spacing, "schedule flow has equal steps; leave it auto")
        return T * (1.0 - np.arange(n) / n)
    require_number("solver_steps", n, 1, T)
    spacing = config.spacing
    if spacing == "auto":
        spacing = "linspace" if config.solver == "dpmpp_2m" else "respaced"
    if spacing == "linspace":
        require_number("solver_steps", n, 1, T - 1)
        ascending = np.round(np.linspace(0, T - 1, n + 1))[1:]
    elif spacing == "leading":
        ascending = np.arange(n) * (T // n)
    elif spacing == "trailing":
        ascending = np.round(T - np.arange(n) * (T / n))[::-1] - 1
    else:
        # With one step the respaced process keeps the noisiest level alone.
        ascending = np.round(np.linspace(0, T - 1, n)) if n > 1 else np.array([T - 1])
    return ascending[::-1].astype(np.int64)


def solver_table(config: SolverConfig, diffusion: DiffusionConfig) -> SolverTable:
    """The solver's coefficients on this schedule, float32 (t in the schedule's type).

    Raises:
      InputError: the solver does not fit the schedule.
    """
    t = timesteps(config, diffusion)
    if diffusion.is_continuous:
        sigma = t / diffusion.num_timesteps
        alpha = 1.0 - sigma
    else:
        bar = alpha_bar_table(diffusion)[t]
        alpha, sigma = np.sqrt(bar), np.sqrt(1.0 - bar)
    if config.solver in ("euler", "heun") and not diffusion.is_continuous:
        raise InputError(
            "solver",
            config.solver,
            f"integrates the flow, not schedule {diffusion.schedule}; use ddpm, ddim or dpmpp_2m",
        )
    # The noise level that each step leads to: the next one, and from the last one clean data.
    to_alpha, to_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    coefficients = {
        "ddpm": lambda: _ancestral(alpha, sigma, to_alpha, to_sigma, config.variance),
        "ddim": lambda: _ddim(alpha, sigma, to_alpha, to_sigma, config.eta),
        "dpmpp_2m": lambda: _dpmpp_2m(alpha, sigma, to_alpha, to_sigma),
        # On the flow the Euler step of dx/dt = eps - x_0 is the DDIM step.
        "euler": lambda: _ddim(alpha, sigma, to_alpha, to_sigma, 0.0),
    }
    if config.solver == "heun":
        return _heun_table(t, alpha, sigma, to_sigma)
    return _table(t, alpha, sigma, **coefficients[config.solver]())


def _table(t, alpha, sigma, **coefficients) -> SolverTable:
    """A SolverTable; coefficients not given are 0, and every row begins a step."""
    named = {"begins": np.ones(len(t), bool), "alpha": alpha, "sigma": sigma, **coefficients}
    columns = {name: np.asarray(named.get(name, np.zeros(len(t)))) for name in SolverTable._fields if name != "t"}
    columns = {name: a if a.dtype == bool else a.astype(np.float32) for name, a in columns.items()}
    return SolverTable(t=t.astype(np.float32 if t.dtype.kind == "f" else np.int32), **columns)


def _ancestral(alpha, sigma, to_alpha, to_sigma, variance):
    """q(x_s | x_t, x_0) of the Gaussian process (Ho et al. 2020), for any schedule."""
    ratio = alpha / to_alpha
    step_variance = sigma**2 - ratio**2 * to_sigma**2
    small = step_variance * to_sigma**2 / sigma**2
    noise = np.sqrt(np.where(to_sigma > 0, step_variance if variance == "large" else small, 0.0))
    return dict(c_x=ratio * to_sigma**2 / sigma**2, c_x_0=to_alpha * step_variance / sigma**2, c_noise=noise)


def _ddim(alpha, sigma, to_alpha, to_sigma, eta):
    """Song et al. 2021: part `eta` of the ancestral noise, the rest along eps."""
    noise = eta * _ancestral(alpha, sigma, to_alpha, to_sigma, "small")["c_noise"]
    along_eps = np.sqrt(np.maximum(to_sigma**2 - noise**2, 0.0))
    return dict(c_x=along_eps / sigma, c_x_0=to_alpha - along_eps * alpha / sigma, c_noise=noise)


def _dpmpp_2m(alpha, sigma, to_alpha, to_sigma):
    """Lu et al. 2022, order 2 multistep, midpoint; first and last step of order 1."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)
        to_log_snr = np.log(to_alpha) - np.log(to_sigma)
    h = to_log_snr - log_snr
    gain = -to_alpha * np.expm1(-h)
    extrapolation = np.zeros(len(alpha))
    if len(alpha) > 2:
        # h(i) / (2 h(i-1)): the extrapolation along the change of x_0 between two rows.
        extrapolation[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return dict(c_x=to_sigma / sigma, c_x_0=gain * (1.0 + extrapolation), c_previous=-gain * extrapolation)


def _heun_table(t, alpha, sigma, to_sigma) -> SolverTable:
    """Euler to the next level, then the trapezoid of both slopes; the last step is Euler."""
    d = to_sigma - sigma
    euler = _table(t, alpha, sigma, c_x=to_sigma / sigma, c_x_0=1.0 - to_sigma / sigma)
    half, half_to = d[:-1] / (2 * sigma[:-1]), d[:-1] / (2 * to_sigma[:-1])
    corrector = _table(
        t[1:],
        alpha[1:],
        sigma[1:],
        c_begin=1.0 + half,
        c_previous=-half,
        c_x=half_to,
        c_x_0=-half_to,
        begins=np.zeros(len(t) - 1, bool),
    )

    def interleave(a, b):
        out = np.empty(len(a) + len(b), a.dtype)
        out[0::2], out[1::2] = a, b
        return out

    return SolverTable(*map(interleave, euler, corrector))
