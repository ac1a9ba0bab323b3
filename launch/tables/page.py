"""The page of tables: our scores beside the papers', and whether the papers' claims hold for ours."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import scipy.stats
import tables
from tables import Cell, Claim, Table

from causalfusion_jax.sweeps import sweep as sweeps
from causalfusion_jax.sweeps.results import gather

METRICS = {"digits": "fd", "imagenet": "fid"}
CONFIDENCE = 0.95
RULE = f"""\
**Rule.** A claim says that one score is lower than another. Δ is the mean of the score that should be higher
minus the mean of the other, over seeds; its margin is Student's t at {CONFIDENCE:.0%}, two-sided, times the pooled
standard error, sqrt(s² (1/n + 1/m)) with s² the pooled variance of n and m seeds. *agrees*: Δ above the
margin; *disagrees*: below minus the margin; *within the spread*: between them. A claim that something is
immaterial *agrees* where Δ is within the margin, which with few seeds is weak support, and *disagrees*
beyond it. *not run* and *one seed*: no verdict. Claims are tested one by one, so one in twenty false claims
may seem to hold."""

Scores = dict[Cell, dict[str, list[float]]]
"""The scores of each cell, by metric; one for each seed that was measured."""


class Verdict(NamedTuple):
    """Whether a claim holds.

    Attributes:
      word: agrees, disagrees, within the spread, one seed, not run.
      difference, margin: of the scores; NaN with too few seeds.
    """

    word: str
    difference: float = math.nan
    margin: float = math.nan


def verdict(claim: Claim, better: Sequence[float], worse: Sequence[float]) -> Verdict:
    """Whether `claim` holds for our scores, by RULE.

    Args:
      claim: the paper's claim.
      better, worse: scores of the two cells, one for each seed; lower is better.
    """
    if not better or not worse:
        return Verdict("not run")
    difference = statistics.fmean(worse) - statistics.fmean(better)
    if len(better) < 2 or len(worse) < 2:
        return Verdict("one seed", difference)
    degrees = len(better) + len(worse) - 2
    squares = sum((len(scores) - 1) * statistics.variance(scores) for scores in (better, worse))
    error = math.sqrt(squares / degrees * (1 / len(better) + 1 / len(worse)))
    margin = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    if claim.immaterial:
        return Verdict("agrees" if abs(difference) <= margin else "disagrees", difference, margin)
    word = "agrees" if difference > margin else "disagrees" if difference < -margin else "within the spread"
    return Verdict(word, difference, margin)


def collect(
    workdir: pathlib.Path,
    names: Sequence[str],
    on: str,
    seeds: int,
    num: int,
    overrides: sweeps.Overrides | None = None,
) -> dict[str, Scores]:
    """The scores of each table in `workdir`.

    Args:
      workdir: folder that run.py was given.
      names: of the tables.
      on, seeds, num: as given to run.py.
      overrides: settings of all runs, as given to launch/sweep.py.

    Raises:
      InputError: a run in it was trained by other settings.
    """
    collected = {}
    for folder, group in tables.groups(names, on).items():
        sweep = tables.joined(group, on, seeds, num)
        sweep = dataclasses.replace(sweep, fixed={**sweep.fixed, **(overrides or {})})
        runs = sweeps.expand(sweep, tables.base_of(sweep.config))
        results = {result.run.name: result for result in gather(sweep, runs, workdir / folder, {})}
        by_key = {
            tuple(sorted(overrides.items())): results[run.name]
            for overrides, run in zip(sweep.overrides, runs, strict=True)
        }
        for name in group:
            scores: Scores = {}
            for entry in tables.entries(tables.TABLES[name], on, seeds):
                for ar_steps in entry.ar_steps:
                    cell_scores = scores.setdefault(Cell(entry.row, ar_steps), {})
                    for metric, value in by_key[entry.key].scores.get(ar_steps, {}).items():
                        cell_scores.setdefault(metric, []).append(value)
            collected[name] = scores
    return {name: collected[name] for name in names}


def number(value: float) -> str:
    """A score, rounded for the table."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def ours(scores: dict[str, list[float]], metric: str) -> str:
    """Mean ± standard deviation over seeds, and the mean accuracy."""
    values = scores.get(metric, [])
    if not values:
        return ""
    text = number(statistics.fmean(values))
    text += f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
    return text + (f" ({statistics.fmean(scores['accuracy']):.3f})" if "accuracy" in scores else "")


def table_lines(table: Table, scores: Scores, metric: str) -> Iterable[str]:
    """The table in Markdown: for each number of AR steps the paper's figure, then our score."""
    columns = sorted({s for figures in table.figures.values() for s in figures} | {cell.ar_steps for cell in scores})
    rows = dict.fromkeys([*table.figures, *(cell.row for cell in scores)])
    paper = bool(table.figures)
    header = [""] + [name for s in columns for name in ([f"paper, S_eval = {s}"] if paper else []) + [f"ours, {s}"]]
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        cells = [row]
        for s in columns:
            figure = table.figures.get(row, {}).get(s)
            cells += ["" if figure is None else f"{figure:g}"] if paper else []
            cells.append(ours(scores[Cell(row, s)], metric) if Cell(row, s) in scores else "—")
        yield f"| {' | '.join(cells)} |"


def figures_of(table: Table, claim: Claim) -> tuple[float, float]:
    """The paper's figures of the two cells that a claim compares."""
    return claim.figures or tuple(table.figures[row][s] for row, s in (claim.better, claim.worse))


def claim_lines(table: Table, scores: Scores, metric: str) -> Iterable[tuple[Verdict, str]]:
    """The verdict on each claim about cells that we run, and a line of Markdown with all its numbers."""
    for claim in table.claims:
        if claim.better not in scores or claim.worse not in scores:
            continue
        better, worse = (scores[cell].get(metric, []) for cell in (claim.better, claim.worse))
        result = verdict(claim, better, worse)
        paper = "{:g} against {:g}".format(*figures_of(table, claim))
        line = f"- {claim.text}: **{result.word}** (paper {paper}"
        if not math.isnan(result.difference):
            line += f"; ours {number(statistics.fmean(better))} against {number(statistics.fmean(worse))}"
            line += f", Δ = {result.difference:.3f}"
        if not math.isnan(result.margin):
            line += f", margin {result.margin:.3f}"
        yield result, f"{line})"


def render(
    scores: dict[str, Scores], on: str, seeds: int, num: int, header: str = "", overrides: Sequence[str] = ()
) -> str:
    """The whole page; `overrides` as launch/sweep.py was given them."""
    passed = " ".join(["--parallel=2", *(f"--override={text}" for text in overrides)])
    metric, parts, counts = METRICS[on], [], {}
    for name, table_scores in scores.items():
        table = tables.TABLES[name]
        claims = list(claim_lines(table, table_scores, metric))
        for result, _ in claims:
            counts[result.word] = counts.get(result.word, 0) + 1
        command = f"python launch/tables/run.py --table={name} --on={on} --seeds={seeds}"
        parts.append(
            "\n".join(
                [
                    f"## {table.title}\n",
                    f"`{command} --workdir=DIR -- {passed}`: {tables.describe([name], on, seeds, num)}\n",
                    *table_lines(table, table_scores, metric),
                    "",
                    *(line for _, line in claims),
                    *(["", table.note] if table.note else []),
                ]
            )
        )
    sweep = tables.joined(tables.groups(list(scores), on).popitem()[1], on, seeds, num)
    score = f"{metric} of {sweep.num_samples} images, mean ± standard deviation over {seeds} seeds"
    score += " (mean accuracy)" if on == "digits" else ""
    total = ", ".join(f"{word}: {count}" for word, count in sorted(counts.items()))
    lines = [
        "# The papers' ablations beside ours\n",
        *([f"{header}\n"] if header else []),
        f"Ours: {on}, {score}; lower is better except for accuracy. Papers: FID-10k on ImageNet at 256x256, so only "
        "the claims compare, not the numbers. S_eval is the number of AR steps in sampling; — is not run.\n",
        f"{RULE}\n",
        f"Of all claims, {total}.\n",
    ]
    return "\n".join(lines) + "\n" + "\n\n".join(parts) + "\n"
