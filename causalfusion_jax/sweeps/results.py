"""Results of a sweep: the scores of its runs as a table in Markdown and CSV, and as a chart."""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from causalfusion_jax.common import files
from causalfusion_jax.common.charts import line_chart
from causalfusion_jax.common.errors import require
from causalfusion_jax.common.requests import require_same
from causalfusion_jax.config.workdir import load_config, measured_settings
from causalfusion_jax.data import scores as data_scores
from causalfusion_jax.sweeps.sweep import Run, Sweep, label, setting, value_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Result:
    """The scores of a run.

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


# --- Collecting -------------------------------------------------------------------


def check_same(folder: pathlib.Path, problem: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError, with `problem`, if a setting that both have differs.

    A setting that only one of them has was added or removed with the code, at its default.
    """
    common = stored.keys() & wanted.keys()
    stored, wanted = ({path: settings[path] for path in sorted(common)} for settings in (stored, wanted))
    require_same("--workdir", folder, stored, wanted, problem, "use another workdir")


def check_run(run: Run, folder: pathlib.Path) -> None:
    """Raises InputError where `folder` was trained by other settings than those of `run`."""
    if (folder / "config.json").is_file():
        saved = measured_settings(load_config(str(folder)))
        check_same(folder, "was trained by other settings", saved, measured_settings(run.config))


def gather(sweep: Sweep, runs: Iterable[Run], workdir: pathlib.Path, states: Mapping[str, str]) -> list[Result]:
    """The scores of all runs that have been measured so far, the best first.

    Args:
      sweep: the sweep.
      runs: its runs.
      workdir: folder of all runs.
      states: of runs without all their scores, by name; default: unfinished.

    Raises:
      InputError: the folder of a run was trained by other settings.
    """
    results = []
    for run in runs:
        folder, scores = workdir / run.name, {}
        check_run(run, folder)
        for ar_steps in run.ar_steps:
            path = run.samples_folder(workdir, ar_steps, sweep.num_samples) / "evaluation.json"
            measured = files.read_json(path) or {}
            if kept := {name: float(value) for name, value in measured.items() if name in data_scores.metrics()}:
                scores[ar_steps] = kept
        described = not scores or (folder / "config.json").is_file()
        require(described, "--workdir", str(folder), "has scores and no config.json, which says of what")
        state = "finished" if len(scores) == len(run.ar_steps) else states.get(run.name, "unfinished")
        results.append(Result(run, state, scores))
    return sort(sweep, results)


def sort(sweep: Sweep, results: Iterable[Result]) -> list[Result]:
    """The best by the sweep's metric, averaged over AR steps, first; unmeasured ones last."""
    sign = -1.0 if data_scores.higher_is_better(sweep.metric) else 1.0

    def rank(result):
        mean = result.mean(sweep.metric)
        return (mean is None or math.isnan(mean), sign * (mean or 0.0), result.run.name)

    return sorted(results, key=rank)


# --- Showing ----------------------------------------------------------------------


def metrics(sweep: Sweep, results: Iterable[Result]) -> tuple[str, ...]:
    """The scores that were measured, the sweep's metric first."""
    names = {name for result in results for scores in result.scores.values() for name in scores}
    return tuple(sorted(names, key=lambda name: (name != sweep.metric, name)))


def table(sweep: Sweep, results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: the settings swept over, every score at every number of AR steps, the state."""
    columns = [(metric, ar_steps) for metric in metrics(sweep, results) for ar_steps in sweep.all_ar_steps]
    header = [label(path) for path in sweep.paths] + [f"{metric} S={s}" for metric, s in columns] + ["state"]
    rows = [
        [value_text(setting(result.run.config, path)) for path in sweep.paths]
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
    """The table as CSV, with the name of each run in the first column."""
    header, rows = table(sweep, results)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *header])
    writer.writerows([result.run.name, *row] for result, row in zip(results, rows, strict=True))
    return file.getvalue()


def chart(sweep: Sweep, results: Sequence[Result]) -> "Figure":
    """A panel for each score over the number of AR steps, with a line for each run, best first."""
    lines = {result.run.name: result.scores for result in results if result.scores}
    return line_chart(lines, metrics(sweep, results), sorted(sweep.all_ar_steps), "AR steps S")
