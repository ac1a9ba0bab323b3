"""Solvers on a process whose exact solution is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from causalfusion_jax.core.diffusion import DiffusionConfig, alpha_sigma
from causalfusion_jax.core.solvers import SolverConfig, solver_table

LINEAR = DiffusionConfig()
FLOW = DiffusionConfig(schedule="flow", target="velocity")


def solve(table, x, variance):
    """Runs a deterministic solver where x_0 is normal with the given variance.

    The best prediction is then x_0 = alpha variance / (alpha^2 variance + sigma^2) x_t, and
    the exact flow keeps x / sqrt(alpha^2 variance + sigma^2).
    """
    begin, previous = x, 0.0
    for row in range(len(table.t)):
        alpha, sigma = np.float64(table.alpha[row]), np.float64(table.sigma[row])
        x_0 = alpha * variance / (alpha**2 * variance + sigma**2) * x
        begin = x if table.begins[row] else begin
        x = table.c_x[row] * x + table.c_begin[row] * begin + table.c_x_0[row] * x_0 + table.c_previous[row] * previous
        previous = x_0
    return x


def error(solver, diffusion, steps, variance=0.25):
    table = solver_table(SolverConfig(solver, steps), diffusion)
    alpha, sigma = np.float64(table.alpha[0]), np.float64(table.sigma[0])
    exact = np.sqrt(variance) / np.sqrt(alpha**2 * variance + sigma**2)
    return abs(solve(table, 1.0, variance) - exact)


@pytest.mark.parametrize(
    ("solver", "diffusion", "order"),
    [("euler", FLOW, 1), ("heun", FLOW, 2), ("ddim", LINEAR, 1), ("dpmpp_2m", LINEAR, 2)],
)
def test_order_of_convergence(solver, diffusion, order):
    coarse, fine = error(solver, diffusion, 40), error(solver, diffusion, 160)
    # A solver of order p gains 4^p; the first-order last step of a multistep costs some.
    assert coarse / fine > 0.6 * 4**order, (coarse, fine)
    assert fine < (0.01 if order == 1 else 0.001)


def test_ancestral_noise_keeps_the_variance():
    """DDPM on normal data: variance of x follows alpha^2 var + sigma^2 (small variance, full steps)."""
    variance = 1.0
    table = solver_table(SolverConfig("ddpm", 1000, variance="small"), LINEAR)
    second_moment = 1.0
    for row in range(1000):
        alpha, sigma = np.float64(table.alpha[row]), np.float64(table.sigma[row])
        gain = table.c_x[row] + table.c_x_0[row] * alpha * variance / (alpha**2 * variance + sigma**2)
        second_moment = gain**2 * second_moment + table.c_noise[row] ** 2
    assert abs(second_moment - 1.0) < 0.05


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_last_row_gives_the_predicted_x_0(solver):
    table = solver_table(SolverConfig(solver, 7), LINEAR)
    np.testing.assert_allclose([table.c_x[-1], table.c_x_0[-1], table.c_previous[-1], table.c_noise[-1]], [0, 1, 0, 0])


def test_ddim_with_full_eta_is_ddpm_with_small_variance():
    ddim = solver_table(SolverConfig("ddim", 20, eta=1.0), LINEAR)
    ddpm = solver_table(SolverConfig("ddpm", 20, variance="small"), LINEAR)
    for column in ("c_x", "c_x_0", "c_noise"):
        np.testing.assert_allclose(getattr(ddim, column), getattr(ddpm, column), atol=1e-6)


@pytest.mark.parametrize("spacing", ["respaced", "leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 10, 999])
def test_spacings_fall_within_the_schedule(spacing, steps):
    table = solver_table(SolverConfig("ddim", steps, spacing), LINEAR)
    assert len(table.t) == steps
    assert (np.diff(table.t) < 0).all() and table.t[-1] >= 0 and table.t[0] <= 999
    alpha, sigma = alpha_sigma(LINEAR, jnp.asarray(table.t))
    np.testing.assert_allclose(table.alpha, alpha, rtol=1e-6)
    np.testing.assert_allclose(table.sigma, sigma, rtol=1e-6)


def test_tables_are_finite():
    for solver in ("ddpm", "ddim", "dpmpp_2m", "euler", "heun"):
        assert all(np.isfinite(column).all() for column in solver_table(SolverConfig(solver, 9), FLOW))
