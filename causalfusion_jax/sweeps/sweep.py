"""Sweeps: the runs of one config with different settings.

The overrides of a sweep are plain dicts from config path to value, one for each run, combined by

    grid({"factorization.gamma": [1.0, 0.9], "train.seed": [0, 1]})    every combination: 4 runs
    together({"model.hidden": [96, 192], "model.heads": [3, 6]})       first with first, ...: 2 runs
    product(a, b)                                                      every run of a with every run of b
    chain(a, b)                                                        the runs of a, then the runs of b

`configs/sweeps/*.py` hold `get_sweep(arg)`; launch/sweep.py runs them, and `sweeps.results` collects the scores.
"""

import ast
import collections
import dataclasses
import hashlib
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data import scores as data_scores

Overrides = Mapping[str, Any]
"""Values of settings by their path in the config: {"factorization.gamma": 0.9}."""


# --- Combining overrides ----------------------------------------------------------


def grid(axes: Mapping[str, Sequence[Any]]) -> tuple[Overrides, ...]:
    """Every combination of the values of each path; the last path varies fastest."""
    _check_axes(axes)
    return _distinct(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def together(axes: Mapping[str, Sequence[Any]]) -> tuple[Overrides, ...]:
    """The first value of every path, then the second of every path, and so on."""
    _check_axes(axes)
    lengths = {path: len(values) for path, values in axes.items()}
    require(len(set(lengths.values())) == 1, "together", lengths, "every path must have as many values")
    return _distinct(dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True))


def chain(*sweeps: Iterable[Overrides]) -> tuple[Overrides, ...]:
    """The runs of each sweep, one sweep after the other."""
    return _distinct(itertools.chain(*sweeps))


def product(*sweeps: Iterable[Overrides]) -> tuple[Overrides, ...]:
    """Every run of each sweep with every run of the others; the last sweep varies fastest.

    Raises:
      InputError: two sweeps set the same path.
    """
    return _distinct(_union(parts) for parts in itertools.product(*map(tuple, sweeps)))


def _check_axes(axes: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError unless every path has a list of values."""
    require(bool(axes), "axes", axes, "must name at least one path")
    for path, values in axes.items():
        is_list = isinstance(values, (list, tuple, range)) and len(values) > 0
        require(is_list, path, values, "must be a list of values to sweep over")


def _union(parts: Sequence[Overrides]) -> Overrides:
    """All overrides of `parts` in one dict. Raises InputError where two set the same path."""
    union: dict[str, Any] = {}
    for part in parts:
        for path in part:
            require(path not in union, path, part[path], f"set twice in a product; {union.get(path)!r} too")
        union |= part
    return union


def _distinct(sweep: Iterable[Overrides]) -> tuple[Overrides, ...]:
    """The sweep as a tuple. Raises InputError where two runs are the same."""
    runs = tuple(dict(overrides) for overrides in sweep)
    seen = set()
    for overrides in runs:
        key = tuple(sorted((path, repr(value)) for path, value in overrides.items()))
        require(key not in seen, "sweep", overrides, "the sweep has this run twice")
        seen.add(key)
    return runs


# --- The sweep and its runs -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is run, and what is measured of every run.

    Attributes:
      config: the config all runs start from, NAME.py or NAME.py:ARG.
      overrides: the settings that each run changes.
      fixed: the settings that all runs change.
      ar_steps: numbers of AR steps that every run is sampled at; or, where they differ, a
        tuple of them for each of `overrides`.
      num_samples: images sampled for each number of AR steps.
      metric: score by which the runs are sorted; "": the first that can be measured of their
        samples (`data.scores.measurable`).

    Raises:
      InputError: an unknown metric, no run, equal runs, or AR steps that do not fit the runs.
    """

    config: str
    overrides: tuple[Overrides, ...]
    fixed: Overrides = dataclasses.field(default_factory=dict)
    ar_steps: tuple[int, ...] | tuple[tuple[int, ...], ...] = (1,)
    num_samples: int = 1000
    metric: str = ""

    def __post_init__(self):
        if self.metric:
            require_one_of("metric", self.metric, data_scores.metrics())
        object.__setattr__(self, "overrides", _distinct(self.overrides))
        require(bool(self.overrides), "overrides", self.overrides, "must hold at least one run")
        num_runs = len(self.overrides)
        allowed = f"must be numbers, or a tuple of them for each of the {num_runs} runs"
        require(len(self.ar_steps_by_run) == num_runs, "ar_steps", self.ar_steps, allowed)
        for ar_steps in self.ar_steps_by_run:
            different = bool(ar_steps) and len(set(ar_steps)) == len(ar_steps)
            require(different, "ar_steps", self.ar_steps, "must be one or more different numbers")
        require_number("num_samples", self.num_samples, 2)

    @property
    def ar_steps_by_run(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of AR steps that each run is sampled at."""
        shared = all(isinstance(ar_steps, int) for ar_steps in self.ar_steps)
        return (self.ar_steps,) * len(self.overrides) if shared else self.ar_steps

    @property
    def all_ar_steps(self) -> tuple[int, ...]:
        """Numbers of AR steps that any run is sampled at."""
        numbers = dict.fromkeys(itertools.chain(*self.ar_steps_by_run))
        return tuple(numbers) if numbers.keys() == set(self.ar_steps) else tuple(sorted(numbers))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths in which runs differ, in the order they first appear."""
        return tuple(dict.fromkeys(path for overrides in self.overrides for path in overrides))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: names its overrides; a file name, and the same whatever else the sweep holds.
      config: all its settings.
      flags: of `causalfusion_jax.train`, that turn the sweep's config into this run's.
      ar_steps: numbers of AR steps that it is sampled at.
    """

    name: str
    config: ExperimentConfig
    flags: tuple[str, ...]
    ar_steps: tuple[int, ...]

    def samples_folder(self, workdir: pathlib.Path, ar_steps: int, num_samples: int) -> pathlib.Path:
        """Where it is sampled, below the folder of all runs: another number of images is another folder."""
        return workdir / self.name / f"samples_ar{ar_steps}_n{num_samples}"


def load(flag: str, location: str, function: str, root: pathlib.Path) -> Any:
    """Calls a function of a Python file.

    Args:
      flag: where the location was given, for errors.
      location: PATH or PATH:ARG.
      function: its name; called with ARG if there is one.
      root: folder that a relative PATH starts from.

    Raises:
      InputError: no such file or function, or the function raised one.
    """
    file, _, arg = location.partition(":")
    path = root / file
    require(path.suffix == ".py" and path.is_file(), flag, location, "no such file; give PATH.py or PATH.py:ARG")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get = getattr(module, function, None)
    require(callable(get), flag, location, f"has no {function}(arg)")
    try:
        return get(arg) if arg else get()
    except InputError as error:
        raise InputError(flag, location, str(error)) from None


def expand(sweep: Sweep, base: Mapping[str, Any]) -> tuple[Run, ...]:
    """Every run of a sweep, all of them checked.

    Args:
      sweep: the sweep.
      base: settings of `sweep.config`, nested.

    Raises:
      InputError: an unknown path, a value of the wrong type or not allowed, a path that is
        both swept and fixed, two runs with the same settings, or AR steps that a run cannot be
        sampled at.
    """
    fixed = sweep.fixed
    for path in sweep.paths:
        require(path not in fixed, path, fixed.get(path), "the sweep sets it run by run; it cannot be fixed")
    runs: dict[ExperimentConfig, Run] = {}
    for overrides, ar_steps in zip(sweep.overrides, sweep.ar_steps_by_run, strict=True):
        config = merge(base, {**fixed, **overrides})
        name = _name(config, sorted(overrides))
        same = runs[config].name if config in runs else ""
        require(config not in runs, "sweep", name, f"has the same settings as {same}")
        for number in ar_steps:
            try:
                config.check_sampler(dataclasses.replace(config.sampling, ar_steps=number, step_sizes=()))
            except InputError as error:
                raise error.under(f"{name}: sampling") from None
        flags = tuple(f"--config.{path}={setting(config, path)}" for path in (*fixed, *overrides))
        runs[config] = Run(name, config, flags, ar_steps)
    return tuple(runs.values())


def with_metric(sweep: Sweep, runs: Iterable[Run]) -> Sweep:
    """The sweep with the metric that its runs are sorted by. Raises InputError where it cannot be measured of a run."""
    for run in runs:
        known = tuple(data_scores.measurable(run.config.data))
        sweep = dataclasses.replace(sweep, metric=sweep.metric or known[0])
        allowed = f"cannot be measured of samples of {run.name}; must be one of {', '.join(known)}"
        require(sweep.metric in known, "metric", sweep.metric, allowed)
    return sweep


def merge(base: Mapping[str, Any], overrides: Overrides) -> ExperimentConfig:
    """Settings of one run. Raises InputError where `overrides` do not fit."""
    values = {section: dict(settings) for section, settings in base.items()}
    for path, value in overrides.items():
        section, _, name = path.partition(".")
        require(bool(name), path, value, "must be SECTION.NAME of the config")
        values.setdefault(section, {})[name] = value
    return experiment.from_dict(values)


def parse_overrides(flag: str, text: str) -> dict[str, Any]:
    """Reads SECTION.NAME=VALUE,SECTION.NAME=VALUE. Raises InputError where it cannot be read."""
    defaults = experiment.to_dict(ExperimentConfig())
    parsed: dict[str, Any] = {}
    # Only a comma before a path separates: values of tuples hold commas too.
    for part in filter(None, re.split(r",(?=\w+\.\w+=)", text)):
        path, equals, value = part.partition("=")
        section, _, name = path.partition(".")
        require(bool(equals) and bool(name), flag, part, "must be SECTION.NAME=VALUE")
        require(path not in parsed, flag, part, f"{path} is given twice")
        parsed[path] = _parse_value(flag, part, value, defaults.get(section, {}).get(name, ""))
    return parsed


def _parse_value(flag: str, part: str, text: str, default: Any) -> Any:
    """Reads `text` as a value of the type of `default`."""
    if isinstance(default, str):
        return text
    kinds = {bool: "True or False", int: "an integer", float: "a number", tuple: "a tuple: (1,2)"}
    try:
        value = float(text) if isinstance(default, float) else ast.literal_eval(text.strip().capitalize())
    except (ValueError, SyntaxError):
        value = None
    require(type(value) is type(default), flag, part, f"the value must be {kinds[type(default)]}")
    return value


# --- Names ------------------------------------------------------------------------


def setting(config: ExperimentConfig, path: str) -> Any:
    """The value at a path."""
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def label(path: str) -> str:
    """The last part of a path, or all of it where another section has a setting of that name."""
    sections = experiment.to_dict(ExperimentConfig())
    # The commands of a sweep do not read the settings of probes.
    names = (name for section in sections if section not in ("probe", "finetune") for name in sections[section])
    name = path.rpartition(".")[2]
    return name if collections.Counter(names)[name] == 1 else path


def value_text(value: Any) -> str:
    """A value as it appears in names and tables."""
    if isinstance(value, tuple):
        value = "-".join(map(str, value))
    return str(value) or "none"


def _name(config: ExperimentConfig, paths: Sequence[str]) -> str:
    """Name of the run that sets `paths`, which depends on them and their values alone."""
    name = ",".join(f"{label(path)}={value_text(setting(config, path))}" for path in paths) or "base"
    safe = re.sub(r"[^\w.,=+-]", "-", name)
    if safe == name and len(name) <= 100:
        return name
    # Runs that differ in what was replaced or cut off need different names.
    return f"{safe[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
