"""Flags of the commands that sample: which weights, and how they are sampled.

`flags.adopt_module_key_flags(sampling_flags)` shows these flags in a command's --help.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from causalfusion_jax.cli import config_flags, weights_flags
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.requests import require_same
from causalfusion_jax.config.sampling import SamplerConfig

WEIGHTS = weights_flags.define()
VAE = flags.DEFINE_string("vae", None, "Folder of a converted autoencoder, for a model of latents.")
SEED = flags.DEFINE_integer("seed", 0, "Seed; image i depends only on it, on i and on its condition.")
BATCH = flags.DEFINE_integer("batch_size", 250, "Images sampled at a time.")
SAMPLER = config_flags.define(SamplerConfig, unset="as in config.sampling")


def sampler(default: SamplerConfig) -> SamplerConfig:
    """The run's sampler settings, updated by the flags. Raises InputError."""
    return default.updated(SAMPLER.given())


def ar_steps_given() -> bool:
    """Whether the command line says how many AR steps there are."""
    return not {"ar_steps", "step_sizes"}.isdisjoint(SAMPLER.given())


def trained():
    """The model that --workdir or --checkpoint names, a `trained.Trained`. Raises InputError."""
    return WEIGHTS.choice().open()


def check_seed_and_batch() -> None:
    """Raises InputError for a --seed or --batch_size that is not allowed."""
    require(BATCH.value >= 1, "--batch_size", BATCH.value, "must be >= 1")
    require(0 <= SEED.value < 2**32, "--seed", SEED.value, "must be >= 0 and < 2**32")


def is_done(out: pathlib.Path, request: dict[str, Any], written: Sequence[str]) -> bool:
    """Whether OUT already holds the files `written` of this request. Raises InputError for other content."""
    if files.is_new(out):
        return False
    problem = "exists with other content: results of another request"
    require_same("--out", out, files.read_json(out / "request.json"), request, problem)
    return all((out / name).is_file() for name in written)
