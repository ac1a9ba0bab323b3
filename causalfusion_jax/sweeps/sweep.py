"""Sweeps: many runs of one config, and their scores as a table.

A sweep's overrides are plain dicts of config paths, one a run, combined by

    grid({"factorization.gamma": [1.0, 0.9], "train.seed": [0, 1]})    every combination: 4 runs
    together({"model.hidden": [96, 192], "model.heads": [3, 6]})       first with first, ...: 2 runs
    product(a, b)                                                      every a with every b
    chain(a, b)                                                        those of a, then those of b

`configs/sweeps/*.py` hold `get_sweep(arg)`; launch/sweep.py runs them.
"""

import ast
import collections
import csv
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require, require_number, require_one_of
from causalfusion_jax.common.line_plot import line_plot
from causalfusion_jax.common.requests import require_same
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.workdir import load_config, measured_settings
from causalfusion_jax.data import scores as data_scores

Overrides = Mapping[str, Any]
"""Values of settings by their path in the config: {"factorization.gamma": 0.9}."""


# --- The algebra ------------------------------------------------------------------


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
    """Every run of each sweep with every run of the others; the last sweep varies fastest."""
    return _distinct(_union(parts) for parts in itertools.product(*map(tuple, sweeps)))


def _check_axes(axes: Mapping[str, Sequence[Any]]) -> None:
    """Raises InputError unless every path has a list of values."""
    require(bool(axes), "axes", axes, "must name at least one path")
    for path, values in axes.items():
        require(
            isinstance(values, (list, tuple, range)) and len(values) > 0,
            path,
            values,
            "must be a list of values to sweep over",
        )


def _union(parts: Sequence[Overrides]) -> Overrides:
    """All overrides of `parts` in one dict. Raises InputError where two set one path."""
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
        require(key not in seen, "sweep", overrides, "this run is there twice")
        seen.add(key)
    return runs


# --- The sweep and its runs -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is run, and what is measured of every run.

    Attributes:
      config: the config all runs start from, NAME.py or NAME.py:ARG.
      overrides: what each run changes.
      fixed: what all of them change.
      ar_steps: numbers of AR steps that every run is sampled at; or, where they differ, a
        tuple of them for each of `overrides`.
      num_samples: images sampled at each.
      metric: score by which the runs are sorted; "": the first that can be measured of their
        samples (`data.scores.measurable`).
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
        require(
            len(self.ar_steps_by_run) == len(self.overrides),
            "ar_steps",
            self.ar_steps,
            f"must be numbers, or a tuple of them for each of the {len(self.overrides)} runs",
        )
        for ar_steps in self.ar_steps_by_run:
            require(
                bool(ar_steps) and len(set(ar_steps)) == len(ar_steps),
                "ar_steps",
                self.ar_steps,
                "must be one or more different numbers",
            )
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
        """The paths that runs differ in, in the order they first appear."""
        return tuple(dict.fromkeys(path for overrides in self.overrides for path in overrides))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: says what it overrides; a file name, and the same whatever else the sweep holds.
      config: all its settings.
      flags: of `causalfusion_jax.train`, that make the sweep's config this run's.
      ar_steps: numbers of AR steps that it is sampled at.
    """

    name: str
    config: ExperimentConfig
    flags: tuple[str, ...]
    ar_steps: tuple[int, ...]


def load(flag: str, location: str, function: str, root: pathlib.Path) -> Any:
    """What a function of a Python file returns.

    Args:
      flag: where the location was given, for errors.
      location: PATH or PATH:ARG.
      function: its name; called with ARG, where there is one.
      root: folder that a relative PATH starts from.

    Raises:
      InputError: no such file or function, or one it raised itself.
    """
    file, _, arg = location.partition(":")
    path = root / file
    require(path.suffix == ".py" and path.is_file(), flag, location, "no such file; give PATH.py or PATH.py:ARG")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    require(callable(make), flag, location, f"has no {function}(arg)")
    try:
        return make(arg) if arg else make()
    except InputError as error:
        raise InputError(flag, location, str(error)) from None


def expand(sweep: Sweep, base: Mapping[str, Any]) -> tuple[Run, ...]:
    """Every run of a sweep, all of them checked.

    Args:
      sweep: the sweep.
      base: settings of `sweep.config`, nested.

    Raises:
      InputError: a path that is no setting, a value of the wrong type or not allowed, a
        swept path that is fixed too, two runs of the same settings, or AR steps that a run
        cannot be sampled at.
    """
    fixed = sweep.fixed
    for path in sweep.paths:
        require(path not in fixed, path, fixed.get(path), "the sweep sets it run by run; it cannot be fixed")
    runs: dict[ExperimentConfig, Run] = {}
    for overrides, numbers in zip(sweep.overrides, sweep.ar_steps_by_run, strict=True):
        config = merge(base, {**fixed, **overrides})
        name = _name(config, sorted(overrides))
        require(config not in runs, "sweep", name, f"has the same settings as {getattr(runs.get(config), 'name', '')}")
        for ar_steps in numbers:
            sampler = dataclasses.replace(config.sampling, ar_steps=ar_steps, step_sizes=())
            try:
                config.check_sampler(sampler)
            except InputError as error:
                raise error.under(f"{name}: sampling") from None
        runs[config] = Run(name, config, tuple(_flag(config, path) for path in (*fixed, *overrides)), numbers)
    return tuple(runs.values())


def with_metric(sweep: Sweep, runs: Iterable[Run]) -> Sweep:
    """The sweep with the metric that its runs are sorted by. Raises InputError where one of them does not have it."""
    for run in runs:
        known = tuple(data_scores.measurable(run.config.data))
        sweep = dataclasses.replace(sweep, metric=sweep.metric or known[0])
        require(
            sweep.metric in known,
            "metric",
            sweep.metric,
            f"cannot be measured of samples of {run.name}; must be one of {', '.join(known)}",
        )
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
    # A comma separates only where a path follows: values of tuples hold commas too.
    for part in filter(None, re.split(r",(?=\w+\.\w+=)", text)):
        path, equals, value = part.partition("=")
        section, _, name = path.partition(".")
        require(bool(equals) and bool(name), flag, part, "must be SECTION.NAME=VALUE")
        require(path not in parsed, flag, part, f"{path} is given twice")
        parsed[path] = _parse(flag, part, value, defaults.get(section, {}).get(name, ""))
    return parsed


def _parse(flag: str, part: str, text: str, default: Any) -> Any:
    """`text` as the type of `default`."""
    if isinstance(default, str):
        return text
    kinds = {bool: "True or False", int: "an integer", float: "a number", tuple: "a tuple: (1,2)"}
    try:
        value = float(text) if isinstance(default, float) else ast.literal_eval(text.strip().capitalize())
    except (ValueError, SyntaxError):
        value = None
    require(type(value) is type(default), flag, part, f"the value must be {kinds[type(default)]}")
    return value


def _value(config: ExperimentConfig, path: str) -> Any:
    """The setting at a path."""
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def _flag(config: ExperimentConfig, path: str) -> str:
    """The command line option that sets it."""
    return f"--config.{path}={_value(config, path)}"


def _label(path: str) -> str:
    """The path's last part, where no other section that a sweep's commands read has a setting of that name."""
    sections = experiment.to_dict(ExperimentConfig())
    read = (names for section, names in sections.items() if section not in ("probe", "finetune"))
    counts = collections.Counter(name for names in read for name in names)
    name = path.rpartition(".")[2]
    return name if counts[name] == 1 else path


def _text(value: Any) -> str:
    """A value in a name or table."""
    if isinstance(value, tuple):
        value = "-".join(map(str, value))
    return str(value) or "none"


def _name(config: ExperimentConfig, paths: Sequence[str]) -> str:
    """Name of the run that sets `paths`, which depends on them and their values alone."""
    name = ",".join(f"{_label(path)}={_text(_value(config, path))}" for path in paths) or "base"
    safe = re.sub(r"[^\w.,=+-]", "-", name)
    if safe == name and len(name) <= 100:
        return name
    # What was replaced or cut off must still tell runs apart.
    return f"{safe[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# --- The results ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
      run: the run.
      state: finished, failed, ...
      scores: by number of AR steps, then by name.
    """

    run: Run
    state: str
    scores: Mapping[int, Mapping[str, float]]

    def score(self, metric: str, ar_steps: int) -> float | None:
        """A score, or None where it was not (yet) measured."""
        return self.scores.get(ar_steps, {}).get(metric)

    def mean(self, metric: str) -> float | None:
        """A score averaged over the numbers of AR steps."""
        scores = [scores[metric] for scores in self.scores.values() if metric in scores]
        return math.fsum(scores) / len(scores) if scores else None


def samples_folder(workdir: pathlib.Path, run: Run, ar_steps: int, sweep: Sweep) -> pathlib.Path:
    """Where a run is sampled: another number of images is another folder."""
    return workdir / run.name / f"samples_ar{ar_steps}_n{sweep.num_samples}"


def check_run(run: Run, folder: pathlib.Path) -> None:
    """Raises InputError where `folder` was trained by other settings than those of `run`."""
    if not (folder / "config.json").is_file():
        return
    stored, wanted = measured_settings(load_config(str(folder))), measured_settings(run.config)
    require_same("--workdir", folder, stored, wanted, "was trained by other settings", "use another workdir")


def gather(sweep: Sweep, runs: Iterable[Run], workdir: pathlib.Path, states: Mapping[str, str]) -> list[Result]:
    """The scores of all runs, as far as they are there, the best first.

    Args:
      sweep: the sweep.
      runs: its runs.
      workdir: folder of all runs.
      states: by name, of runs without all their scores; default: unfinished.

    Raises:
      InputError: the folder of a run holds one by other settings.
    """
    results = []
    for run in runs:
        folder, scores = workdir / run.name, {}
        check_run(run, folder)
        for ar_steps in run.ar_steps:
            read = files.read_json(samples_folder(workdir, run, ar_steps, sweep) / "evaluation.json") or {}
            kept = {name: float(value) for name, value in read.items() if name in data_scores.metrics()}
            if kept:
                scores[ar_steps] = kept
        require(
            not scores or (folder / "config.json").is_file(),
            "--workdir",
            str(folder),
            "has scores and no config.json, which says of what",
        )
        state = "finished" if len(scores) == len(run.ar_steps) else states.get(run.name, "unfinished")
        results.append(Result(run, state, scores))
    return sort(sweep, results)


def metrics(sweep: Sweep, results: Iterable[Result]) -> tuple[str, ...]:
    """The scores that were measured, the sweep's metric first."""
    names = {name for result in results for scores in result.scores.values() for name in scores}
    return tuple(sorted(names, key=lambda name: (name != sweep.metric, name)))


def sort(sweep: Sweep, results: Iterable[Result]) -> list[Result]:
    """The best by the sweep's metric, averaged over AR steps, first; unmeasured ones last."""
    sign = -1.0 if data_scores.higher_is_better(sweep.metric) else 1.0

    def rank(result):
        mean = result.mean(sweep.metric)
        return (mean is None or math.isnan(mean), sign * (mean or 0.0), result.run.name)

    return sorted(results, key=rank)


def table(sweep: Sweep, results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: the settings swept over, every score at every number of AR steps, the state."""
    columns = [(metric, ar_steps) for metric in metrics(sweep, results) for ar_steps in sweep.all_ar_steps]
    header = [_label(path) for path in sweep.paths] + [f"{metric} S={s}" for metric, s in columns] + ["state"]
    rows = [
        [_text(_value(result.run.config, path)) for path in sweep.paths]
        + [result.score(*column) for column in columns]
        + [result.state]
        for result in results
    ]
    return header, rows


def markdown(sweep: Sweep, results: Sequence[Result]) -> str:
    """The table in Markdown, the best of every score in bold."""
    header, rows = table(sweep, results)
    best = {}
    for i, name in enumerate(header):
        scores = [row[i] for row in rows if isinstance(row[i], float) and not math.isnan(row[i])]
        if scores:
            best[i] = max(scores) if data_scores.higher_is_better(name.partition(" ")[0]) else min(scores)

    def cell(i, value):
        if not isinstance(value, float):
            return "" if value is None else value
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
        return f"**{text}**" if value == best.get(i) else text

    lines = [header, ["---"] * len(header), *([cell(i, value) for i, value in enumerate(row)] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(sweep: Sweep, results: Sequence[Result]) -> str:
    """The table as CSV, each run's name in front."""
    header, rows = table(sweep, results)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *header])
    writer.writerows([result.run.name, *row] for result, row in zip(results, rows, strict=True))
    return file.getvalue()


def plot(sweep: Sweep, results: Sequence[Result]) -> Image.Image:
    """A panel for each score, over the number of AR steps, a line for each run; keyed below, best first."""
    lines = {result.run.name: result.scores for result in results if result.scores}
    return line_plot(lines, metrics(sweep, results), sorted(sweep.all_ar_steps), "AR steps S")
