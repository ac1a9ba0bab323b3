"""The papers' ablations: the sweep of each, the papers' figures, and the claims they make.

`run.py` trains and scores them, `render.py` compares our scores with the papers'. Several tables joined
are one sweep, in which the runs that they have in common appear once:

    python launch/sweep.py --sweep=launch/tables/tables.py:digits,gamma,order,seeds=3 --workdir=DIR

CausalFusion's figures are FID-10k on ImageNet at 256x256 of its L model, 240 epochs (arXiv
2412.12095); ACDiT's perplexities on OpenWebText (arXiv 2412.07720).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.sweeps import sweep as sweeps
from causalfusion_jax.sweeps.sweep import Sweep

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DATA = ("digits", "imagenet")
SHORT = {"configs/digits.py": "configs/digits.py:short", "configs/digits.py:acdit": "configs/digits.py:acdit,short"}
"""Shorter trainings that replace the config of a sweep, as the tables have many runs."""

FIXED = {"logging.sample_every": 0}
"""Settings of all runs of all tables."""

SEEDS = 3

SECONDS = {"start": 3.0, "train": 16.0, "sample": 2.0}
"""Time of starting a process, of 300 training steps of 36 tokens and of 1000 samples of digits, on 2 cores of an
Intel Xeon at 2.50 GHz with two runs at a time."""


class Cell(NamedTuple):
    """A cell of a table: its row, and the number of AR steps in sampling."""

    row: str
    ar_steps: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison that a paper makes.

    Attributes:
      text: the claim, in words.
      better, worse: the cells compared; a lower score is better.
      immaterial: the paper says that it makes no difference.
      figures: the paper's figures of both, where they are not in the table.
    """

    text: str
    better: Cell
    worse: Cell
    immaterial: bool = False
    figures: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """One ablation.

    Attributes:
      name: also of its sweep, `configs/sweeps/NAME.py`.
      title: what is varied.
      row: gives the row of a run from its settings.
      figures: the paper's scores, by row and AR steps in sampling.
      claims: the paper's comparisons of them.
      note: printed below the table.
    """

    name: str
    title: str
    row: Callable[[ExperimentConfig], str]
    figures: Mapping[str, Mapping[int, float]]
    claims: tuple[Claim, ...]
    note: str = ""


def at(ar_steps: Sequence[int], *values: float) -> dict[int, float]:
    """Figures by AR steps."""
    return dict(zip(ar_steps, values, strict=True))


def beats(better: str, worse: str, ar_steps: Sequence[int]) -> tuple[Claim, ...]:
    """Claims that one row is better than another at each of `ar_steps`."""
    return tuple(Claim(f"{better} beats {worse} at S_eval = {s}", Cell(better, s), Cell(worse, s)) for s in ar_steps)


# --- The rows ---------------------------------------------------------------------


def baseline_row(config: ExperimentConfig) -> str:
    """The step from the DiT to the in-context baseline."""
    if config.model.conditioning == "adaln":
        return "DiT (adaLN)"
    if config.train.batch_size == 256:
        return "without adaLN"
    warmup, norm = config.optimizer.warmup_steps > 0, config.model.qk_norm
    return {
        (False, False): "timestep added to the tokens",
        (False, True): "qk-norm",
        (True, False): "warm-up",
        (True, True): "all",
    }[warmup, norm]


def fixed_steps_row(config: ExperimentConfig) -> str:
    """The number of AR steps in training."""
    if config.factorization.steps != "fixed":
        return "random"
    steps = config.factorization.num_steps
    return "S = L" if steps == config.transformer.num_tokens else f"S = {steps}"


def gamma_row(config: ExperimentConfig) -> str:
    """The decay of the number of AR steps."""
    return f"γ = {config.factorization.gamma:g}"


def order_row(config: ExperimentConfig) -> str:
    """The token order; blocks by the number that tile the grid, so that grids of any size compare."""
    order = config.factorization.order
    if order != "block_raster":
        return order
    blocks = config.transformer.grid[0] // config.factorization.order_block
    return f"block-raster, {blocks}x{blocks} blocks"


def ar_weight_row(config: ExperimentConfig) -> str:
    """The weights of the first and the last AR step."""
    factorization = config.factorization
    return "1 → 1" if factorization.weight == "none" else f"{factorization.weight_max:g} → 1"


def condition_tokens_row(config: ExperimentConfig) -> str:
    """The number of condition tokens, or of learned ones and their repetitions."""
    tokens, repeats = config.model.num_condition_tokens, config.model.condition_repeats
    return str(tokens) if repeats == 1 else f"{tokens // repeats} repeated {repeats} times"


def t_sharing_row(config: ExperimentConfig) -> str:
    """What shares a timestep t, or the number of draws of it."""
    if config.diffusion.t_draws:
        return f"{config.diffusion.t_draws} draws"
    return {"image": "shared", "step": "independent"}[config.diffusion.t_shared_by]


def block_size_row(config: ExperimentConfig) -> str:
    """The block size as a fraction of the number L of tokens."""
    block, tokens = config.factorization.block_size, config.transformer.num_tokens
    return "B = L" if block == tokens else "B = 1" if block == 1 else f"B = L/{tokens // block}"


# --- The tables -------------------------------------------------------------------

_EVAL = (1, 2, 4, 8)
_SCALED = "L is 256 tokens in the paper and 16 on digits."

BASELINE = Table(
    "baseline",
    "From DiT to the in-context baseline (one AR step)",
    baseline_row,
    {
        "DiT (adaLN)": {1: 18.24},
        "without adaLN": {1: 26.71},
        "new recipe": {1: 21.94},
        "timestep added to the tokens": {1: 20.68},
        "qk-norm": {1: 18.66},
        "warm-up": {1: 17.11},
        "all": {1: 13.78},
    },
    (
        *beats("DiT (adaLN)", "timestep added to the tokens", (1,)),
        *beats("qk-norm", "timestep added to the tokens", (1,)),
        *beats("warm-up", "timestep added to the tokens", (1,)),
        *beats("all", "qk-norm", (1,)),
        *beats("all", "warm-up", (1,)),
        *beats("all", "DiT (adaLN)", (1,)),
    ),
    "Conditioning in context always adds the timestep to the tokens here, so `new recipe` alone cannot be trained, "
    "and `qk-norm` and `warm-up` are each that one on top of `timestep added to the tokens`. On digits there is one "
    "recipe (batch and learning rate), so `without adaLN`, with the DiT's, is not a row of its own; and adaLN, whose "
    "gates begin closed, has not learned the classes in so few steps, as its accuracy says.",
)

FIXED_STEPS = Table(
    "fixed_steps",
    "Fixed S in training against S in sampling",
    fixed_steps_row,
    {
        "S = 1": at(_EVAL, 13.78, 356.7, 404.7, 390.2),
        "S = 2": at(_EVAL, 16.69, 14.77, 47.49, 136.0),
        "S = 4": at(_EVAL, 24.14, 15.37, 18.13, 33.14),
        "S = 8": at(_EVAL, 54.08, 24.49, 22.66, 20.01),
        "S = L": at(_EVAL, 313, 322, 261, 192),
        "random": at(_EVAL, 21.31, 22.17, 23.54, 25.05),
    },
    (
        *(Claim(f"S = 1 collapses at S_eval = {s}", Cell("S = 1", 1), Cell("S = 1", s)) for s in _EVAL[1:]),
        *(Claim(f"S = {s} beats random at its own S_eval", Cell(f"S = {s}", s), Cell("random", s)) for s in _EVAL),
        *(Claim(f"random beats S = {s} at S_eval = 8", Cell("random", 8), Cell(f"S = {s}", 8)) for s in (1, 2, 4)),
        Claim("random beats S = 8 at S_eval = 1", Cell("random", 1), Cell("S = 8", 1)),
        *(Claim(f"random beats S = L at S_eval = {s}", Cell("random", s), Cell("S = L", s)) for s in (1, 8)),
    ),
    _SCALED,
)

GAMMA = Table(
    "gamma",
    "Decay γ of the number of AR steps in training",
    gamma_row,
    {
        "γ = 1": at(_EVAL, 21.31, 22.17, 23.54, 25.05),
        "γ = 0.95": at(_EVAL, 14.49, 17.78, 19.79, 23.93),
        "γ = 0.9": at(_EVAL, 12.89, 15.57, 18.83, 22.72),
        "γ = 0.85": at(_EVAL, 12.94, 15.54, 19.12, 23.46),
        "γ = 0.8": at(_EVAL, 12.78, 15.42, 19.38, 23.78),
    },
    (
        *beats("γ = 0.9", "γ = 1", _EVAL),
        *beats("γ = 0.9", "γ = 0.95", (1,)),
        *beats("γ = 0.9", "γ = 0.8", (4, 8)),
        Claim("γ = 0.9 is better at S_eval = 1 than at 8", Cell("γ = 0.9", 1), Cell("γ = 0.9", 8)),
    ),
    f"{_SCALED} Mean S in training at γ = 1, 0.95, 0.9, 0.85, 0.8 and L = 16: 8.5, 7.4, 6.4, 5.4, 4.5; at 256: 128, "
    "20, 10, 6.7, 5.",
)

ORDER = Table(
    "order",
    "Token order",
    order_row,
    {
        "raster": {1: 14.46},
        "block-raster, 2x2 blocks": {1: 14.76},
        "block-raster, 4x4 blocks": {1: 14.62},
        "dilated": {1: 15.54},
        "random": {1: 12.89},
    },
    (
        *beats("random", "raster", (1,)),
        *beats("random", "block-raster, 2x2 blocks", (1,)),
        *beats("random", "block-raster, 4x4 blocks", (1,)),
        *beats("random", "dilated", (1,)),
        *beats("raster", "dilated", (1,)),
    ),
    "The paper's blocks of 8x8 and 4x4 tokens tile its 16x16 grid 2x2 and 4x4 times; on the 4x4 grid of digits the "
    "latter are single tokens, which is raster. The stride of dilated is 2; the paper does not give it.",
)

AR_WEIGHT = Table(
    "ar_weight",
    "AR loss weight, from the first AR step to the last",
    ar_weight_row,
    {
        "1 → 1": at((1, 2, 4), 12.89, 15.57, 18.83),
        "1.5 → 1": at((1, 2, 4), 12.61, 15.49, 18.32),
        "2 → 1": at((1, 2, 4), 12.13, 15.15, 18.09),
        "2.5 → 1": at((1, 2, 4), 12.32, 15.22, 17.99),
        "3 → 1": at((1, 2, 4), 12.50, 15.28, 17.92),
    },
    (*beats("2 → 1", "1 → 1", (1, 2, 4)), *beats("1.5 → 1", "1 → 1", (1,)), *beats("2 → 1", "3 → 1", (1,))),
)

CONDITION_TOKENS = Table(
    "condition_tokens",
    "Condition tokens of a class",
    condition_tokens_row,
    {
        "4": {1: 12.13},
        "16": {1: 12.04},
        "64": {1: 11.84},
        "1 repeated 64 times": {1: 12.29},
        "4 repeated 16 times": {1: 11.75},
    },
    (
        *beats("16", "4", (1,)),
        *beats("64", "4", (1,)),
        *beats("64", "16", (1,)),
        *beats("64", "1 repeated 64 times", (1,)),
        *beats("4 repeated 16 times", "1 repeated 64 times", (1,)),
        *beats("4 repeated 16 times", "4", (1,)),
    ),
)

T_SHARING = Table(
    "t_sharing",
    "Draws of the timestep t in an image",
    t_sharing_row,
    {"shared": {1: 12.13}, "independent": {1: 12.27}, "4 draws": {1: 12.19}, "8 draws": {1: 12.23}},
    tuple(
        Claim(f"one t for an image or {other} is immaterial", Cell("shared", 1), Cell(row, 1), immaterial=True)
        for row, other in {
            "independent": "one for each AR step",
            "4 draws": "4 draws of it",
            "8 draws": "8 draws of it",
        }.items()
    ),
    "AR steps take the draws in turn; the paper does not say how they share them.",
)

_QUARTER = Cell("B = L/4", 4)

BLOCK_SIZE = Table(
    "block_size",
    "Block size of ACDiT",
    block_size_row,
    {},
    tuple(
        Claim(f"smaller blocks model better ({sizes})", better, worse, figures=figures)
        for sizes, better, worse, figures in (
            ("single tokens against a quarter of the image", Cell("B = 1", 16), _QUARTER, (21.59, 22.98)),
            ("a sixteenth against a quarter of the image", Cell("B = L/16", 16), _QUARTER, (21.59, 22.98)),
            ("a quarter of the image against full-sequence diffusion", _QUARTER, Cell("B = L", 1), (22.82, 22.98)),
        )
    ),
    "Each model is sampled in the blocks it was trained on. The paper gives no FID by block size; its figures in the "
    "statements are perplexities on text, of blocks of 8 (21.59), 128 (22.82) and 256 tokens (22.98).",
)

TABLES = {
    table.name: table
    for table in (GAMMA, ORDER, FIXED_STEPS, AR_WEIGHT, CONDITION_TOKENS, T_SHARING, BASELINE, BLOCK_SIZE)
}


# --- Their runs -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run of a table.

    Attributes:
      row: its row.
      seed: of training.
      overrides: the settings that differ from the config and FIXED; the same run has the same ones in all tables.
      ar_steps: numbers of AR steps that it is sampled at.
    """

    row: str
    seed: int
    overrides: Mapping[str, Any]
    ar_steps: tuple[int, ...]

    @property
    def key(self) -> tuple:
        """The same for the same run of different tables."""
        return tuple(sorted(self.overrides.items()))


def sweep_of(table: Table, on: str) -> Sweep:
    """The ablation, with one seed, on the config that tables use."""
    sweep = sweeps.load("--table", f"configs/sweeps/{table.name}.py:{on}", "get_sweep", ROOT)
    return dataclasses.replace(sweep, config=SHORT.get(sweep.config, sweep.config))


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting by its path."""
    values = experiment.to_dict(config)
    return {f"{section}.{name}": value for section in values for name, value in values[section].items()}


def base_of(location: str) -> dict[str, Any]:
    """The settings of a config, nested."""
    return sweeps.load("config", location, "get_config", ROOT).to_dict()


def entries(table: Table, on: str, seeds: int) -> list[Entry]:
    """All runs of a table."""
    sweep = sweep_of(table, on)
    base = base_of(sweep.config)
    plain, table_runs = _settings(sweeps.merge(base, FIXED)), []
    for overrides, ar_steps in zip(sweep.overrides, sweep.ar_steps_by_run, strict=True):
        config = sweeps.merge(base, {**FIXED, **sweep.fixed, **overrides})
        # Only the settings that differ from the config, so that the same run of two sweeps is equal.
        changed = {path: value for path, value in _settings(config).items() if value != plain[path]}
        for seed in range(seeds):
            table_runs.append(Entry(table.row(config), seed, {**changed, "train.seed": seed}, ar_steps))
    return table_runs


def joined(names: Sequence[str], on: str, seeds: int = SEEDS, num: int = 0) -> Sweep:
    """All runs of several tables of one config, each once, as a sweep.

    Args:
      names: of the tables.
      on: what is trained on.
      seeds: runs of every setting.
      num: images in a score; 0: as in the sweeps of the tables.

    Raises:
      InputError: tables of different configs, or none.
    """
    require(bool(names), "--table", names, "must name at least one table")
    table_sweeps = {name: sweep_of(TABLES[name], on) for name in names}
    configs = {sweep.config for sweep in table_sweeps.values()}
    require(len(configs) == 1, "--table", ",".join(names), f"are of different configs: {', '.join(sorted(configs))}")
    first, runs = table_sweeps[names[0]], {}
    for entry in (entry for name in names for entry in entries(TABLES[name], on, seeds)):
        runs.setdefault(entry.key, (entry.overrides, set()))[1].update(entry.ar_steps)
    return dataclasses.replace(
        first,
        overrides=tuple(overrides for overrides, _ in runs.values()),
        fixed=FIXED,
        ar_steps=tuple(tuple(sorted(ar_steps)) for _, ar_steps in runs.values()),
        num_samples=num or first.num_samples,
    )


def describe(names: Sequence[str], on: str, seeds: int = SEEDS, num: int = 0) -> str:
    """The number of runs and scores that tables of one config need and, on digits, about how long they take."""
    sweep = joined(names, on, seeds, num)
    scores = [ar_steps for numbers in sweep.ar_steps_by_run for ar_steps in numbers]
    text = f"{len(sweep.overrides)} runs, {len(scores)} scores"
    if on != "digits":
        return text
    tokens = [overrides.get("model.num_condition_tokens", 4) for overrides in sweep.overrides]
    steps = SECONDS["train"] * base_of(sweep.config)["train"]["steps"] / 300
    training = sum(SECONDS["start"] + steps * (32 + count) / 36 for count in tokens)
    total = training + sum(2 * SECONDS["start"] + SECONDS["sample"] * sweep.num_samples / 1000 for _ in scores)
    return f"{text}, about {max(1, round(total / 60))} minutes on two cores"


def groups(names: Sequence[str], on: str) -> dict[str, list[str]]:
    """Tables that share runs, by the folder of these runs."""
    folders: dict[str, list[str]] = {}
    for name in names:
        location = sweep_of(TABLES[name], on).config
        folders.setdefault(f"{on}_acdit" if "acdit" in location else on, []).append(name)
    return folders


def check_names(names: Sequence[str]) -> list[str]:
    """The tables named, all by default. Raises InputError for another name."""
    for name in names:
        require_one_of("--table", name, TABLES)
    return list(dict.fromkeys(names)) or list(TABLES)


def get_sweep(arg: str = "digits") -> Sweep:
    """Several tables as one sweep; `arg` is DATA,TABLE,...[,seeds=N][,num=N]."""
    words = [word.strip() for word in arg.split(",") if word.strip()]
    numbers = {"seeds": SEEDS, "num": 0}
    for word in [word for word in words if "=" in word]:
        name, _, value = word.partition("=")
        require_one_of("arg", name, numbers)
        if not value.isdecimal():
            raise InputError(f"arg {name}", value, "must be an integer")
        numbers[name] = int(value)
    require_number("seeds", numbers["seeds"], 1)
    words = [word for word in words if "=" not in word]
    require(bool(words) and words[0] in DATA, "arg", arg, f"must begin with {' or '.join(DATA)}")
    names = check_names(words[1:])
    if not words[1:]:
        names = groups(names, words[0])[words[0]]
    return joined(names, words[0], **numbers)
