"""What the commands that sample have in common: which weights, and how they are sampled.

Not a command itself. `flags.adopt_module_key_flags(sampling_flags)` shows these flags in a
command's --help.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run; or give --checkpoint.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a converted checkpoint.")
VAE = flags.DEFINE_string("vae", None, "Folder of a converted autoencoder, for a model of latents.")
SEED = flags.DEFINE_integer("seed", 0, "Seed; image i depends on it, i and its label alone.")
BATCH = flags.DEFINE_integer("batch_size", 250, "Images sampled at a time.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "params"], "Of a run: averaged weights [ema], or the last ones.")
_STEP = flags.DEFINE_string("step", None, "Of a run: checkpoint to use, a step or `best` [the newest intact one].")
_AR_STEPS = flags.DEFINE_integer("ar_steps", None, "AR steps of equal size: 1 is diffusion, L token by token.")
_STEP_SIZES = flags.DEFINE_string("step_sizes", None, "Tokens in each AR step instead: 1,3,12.")
_ORDER = flags.DEFINE_string("order", None, "raster, block_raster, dilated, random or square_blocks [as trained].")
_ORDER_BLOCK = flags.DEFINE_integer("order_block", None, "Block or stride of that order.")
_SOLVER = flags.DEFINE_string("solver", None, "ddpm, ddim, dpmpp_2m; for schedule flow also euler, heun.")
_SOLVER_STEPS = flags.DEFINE_integer("solver_steps", None, "Noise levels visited in each AR step.")
_SPACING = flags.DEFINE_string("spacing", None, "Timesteps visited: auto, respaced, leading, trailing, linspace.")
_VARIANCE = flags.DEFINE_string("variance", None, "Noise of ddpm: large or small.")
_ETA = flags.DEFINE_float("eta", None, "Noise of ddim, 0..1.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale; 1 is none.")
_CFG_SCHEDULE = flags.DEFINE_string("cfg_schedule", None, "constant, linear (in noise level) or ar_linear.")
_CFG_INTERVAL = flags.DEFINE_string("cfg_interval", None, "Timesteps with guidance: low,high.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Scale of the noise a stochastic solver adds.")
_CLIP_X_0 = flags.DEFINE_float("clip_x_0", None, "Bound on the predicted |x_0|, for data in pixels; 0 is none.")


def numbers(flag: str, text: str | None, kind: type) -> tuple | None:
    """A comma-separated flag as a tuple of `kind`, or None. Raises InputError."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{flag}", text, f"must be {kind.__name__} values separated by commas") from None


def sampler(default):
    """The run's sampler settings, a SamplerConfig, with those of the command line on top. Raises InputError."""
    given = {
        "ar_steps": _AR_STEPS.value,
        "step_sizes": numbers("step_sizes", _STEP_SIZES.value, int),
        "order": _ORDER.value,
        "order_block": _ORDER_BLOCK.value,
        "solver": _SOLVER.value,
        "solver_steps": _SOLVER_STEPS.value,
        "spacing": _SPACING.value,
        "variance": _VARIANCE.value,
        "eta": _ETA.value,
        "cfg_scale": _CFG_SCALE.value,
        "cfg_schedule": _CFG_SCHEDULE.value,
        "cfg_interval": numbers("cfg_interval", _CFG_INTERVAL.value, float),
        "temperature": _TEMPERATURE.value,
        "clip_x_0": _CLIP_X_0.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    require(
        not {"ar_steps", "step_sizes"} <= set(given),
        "--step_sizes",
        _STEP_SIZES.value,
        "says how many AR steps there are; leave out --ar_steps",
    )
    if "cfg_interval" in given:
        require(len(given["cfg_interval"]) == 2, "--cfg_interval", _CFG_INTERVAL.value, "must be low,high")
    if "ar_steps" in given:
        given["step_sizes"] = ()
    if "order" in given:
        given.setdefault("order_block", 0)
    if "solver" in given:
        # What the config says of another solver does not carry over.
        for name, neutral in {"spacing": "auto", "variance": "large", "eta": 0.0, "temperature": 1.0}.items():
            if given["solver"] != default.solver:
                given.setdefault(name, neutral)
    return dataclasses.replace(default, **given)


def is_done(out: pathlib.Path, request: dict, written: Sequence[str]) -> bool:
    """Whether OUT already holds this request and the files `written`. Raises InputError where it holds another."""
    if files.is_new(out):
        return False
    same = files.read_json(out / "request.json") == request
    require(same, "--out", str(out), "exists with other content; give a new or empty folder")
    return all((out / name).is_file() for name in written)


def _step() -> int | str | None:
    """The checkpoint that --step names."""
    if _STEP.value is None or _STEP.value == "best":
        return _STEP.value
    require(_STEP.value.isdigit(), "--step", _STEP.value, "must be a step, or best")
    return int(_STEP.value)


def trained():
    """The model that --workdir or --checkpoint names, a `trained.Trained`. Raises InputError."""
    from causalfusion_jax.sampling.trained import from_converted, from_run

    given = (_WORKDIR.value is None) + (_CHECKPOINT.value is None)
    require(given == 1, "--workdir", _WORKDIR.value, "give --workdir, or --checkpoint, and not both")
    if _WORKDIR.value is not None:
        return from_run(_WORKDIR.value, _WEIGHTS.value or "ema", _step())
    for name, flag in {"weights": _WEIGHTS, "step": _STEP}.items():
        require(flag.value is None, f"--{name}", flag.value, "a converted checkpoint has one; leave it out")
    return from_converted(_CHECKPOINT.value)


def check_seed_and_batch() -> None:
    """Raises InputError for a --seed or --batch_size that cannot be."""
    require(BATCH.value >= 1, "--batch_size", BATCH.value, "must be >= 1")
    require(0 <= SEED.value < 2**32, "--seed", SEED.value, "must be >= 0 and < 2**32")


def ar_steps_given() -> bool:
    """Whether the command line says how many AR steps there are."""
    return _AR_STEPS.value is not None or _STEP_SIZES.value is not None
