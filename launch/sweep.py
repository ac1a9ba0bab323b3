"""Trains, samples and scores every run of a sweep.

    python launch/sweep.py --sweep=configs/sweeps/digits_ablation.py --workdir=sweeps/digits
    python launch/sweep.py --sweep=configs/sweeps/gamma.py:digits --workdir=sweeps/gamma --override=train.steps=500
    python launch/sweep.py --sweep=configs/sweeps/order.py:imagenet --workdir=sweeps/order --dry_run

All runs are checked before the first one starts. WORKDIR receives a folder for each run,
named after its overrides, logs/, and results.md, results.csv and results.png. Run the same
command again to continue: finished runs are kept, interrupted ones resume, runs added to the
sweep file are started. Ctrl-C or SIGTERM is passed to the runs, which save. A run that fails
does not stop the others; the exit status is then 1. It is 75 where runs were interrupted and
none failed: the same command continues them.

On other machines: --launcher is a shell command that starts one job. {command} stands for the
commands of a run, {name}, {index} and {workdir} for the run; each is quoted as the shell needs
it there.

    --launcher='sbatch --job-name={name} --gpus=1 --wrap="{command}"'

With --dry_run the commands are printed. Once the jobs are done, --results_only writes the
table. A model of latents needs --sample_flags=--vae=FOLDER and --evaluate_flags with --inception,
a model of videos with --i3d. A WORKDIR of runs with other settings is refused where that can be
seen from here.
"""

import dataclasses
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags
from jobs import ROOT, Job, Stage, held, run_jobs
from shell_template import fill

from causalfusion_jax.checkpoints.manifests import manifest_path
from causalfusion_jax.cli import app
from causalfusion_jax.common import files
from causalfusion_jax.common.charts import save_chart
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.workdir import measured_settings
from causalfusion_jax.data import scores as data_scores
from causalfusion_jax.sweeps import results as sweep_results, sweep as sweeps
from causalfusion_jax.sweeps.results import Result
from causalfusion_jax.sweeps.sweep import Run, Sweep

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file: configs/sweeps/NAME.py or configs/sweeps/NAME.py:ARG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs; new, empty, or that of this sweep to continue.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time. A TPU belongs to one process: leave it 1 there.")
_OVERRIDE = flags.DEFINE_multi_string("override", [], "Settings of all runs: train.steps=200,train.batch_size=32.")
_TRAIN_FLAGS = flags.DEFINE_string("train_flags", "", "Further flags of causalfusion_jax.train, not of its config.")
_SAMPLE_FLAGS = flags.DEFINE_string("sample_flags", "", "Further flags of causalfusion_jax.sample.")
_EVALUATE_FLAGS = flags.DEFINE_string("evaluate_flags", "", "Further flags of causalfusion_jax.evaluate.")
_LAUNCHER = flags.DEFINE_string("launcher", "", "Shell command that starts one job on another machine; see above.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the sweep and print its commands; change nothing.")
_RESULTS_ONLY = flags.DEFINE_bool("results_only", False, "Start nothing; write the table of the scores so far.")


# --- The sweep and its commands ---------------------------------------------------


def read_sweep() -> tuple[Sweep, dict[str, Any], tuple[Run, ...]]:
    """The sweep with the overrides of the command line, the settings of its config, and its runs; all checked."""
    here = pathlib.Path.cwd()
    root = here if (here / _SWEEP.value.partition(":")[0]).is_file() else ROOT
    sweep = sweeps.load("--sweep", _SWEEP.value, "get_sweep", root)
    require(isinstance(sweep, Sweep), "--sweep", _SWEEP.value, "its get_sweep must return a Sweep")
    base = sweeps.load("config", sweep.config, "get_config", ROOT).to_dict()
    overrides = sweeps.parse_overrides("--override", ",".join(_OVERRIDE.value))
    sweep = dataclasses.replace(sweep, fixed={**sweep.fixed, **overrides})
    runs = sweeps.expand(sweep, base)
    return sweeps.with_metric(sweep, runs), base, runs


def make_job(sweep: Sweep, run: Run, workdir: pathlib.Path) -> Job:
    """The commands of a run."""
    folder = workdir / run.name
    train = (f"--config={sweep.config}", f"--workdir={folder}", *run.flags, *shlex.split(_TRAIN_FLAGS.value))
    # The manifest of a checkpoint is the last file that is written of it.
    saved = manifest_path(folder, run.config.train.steps)
    stages = [Stage("training", ("causalfusion_jax.train", *train), saved)]
    for ar_steps in run.ar_steps:
        out = run.samples_folder(workdir, ar_steps, sweep.num_samples)
        sample = (f"--workdir={folder}", f"--out={out}", f"--num={sweep.num_samples}", f"--ar_steps={ar_steps}")
        sample = ("causalfusion_jax.sample", *sample, *shlex.split(_SAMPLE_FLAGS.value))
        evaluate = (f"--workdir={folder}", f"--samples={out / 'samples.npz'}", *shlex.split(_EVALUATE_FLAGS.value))
        evaluate = ("causalfusion_jax.evaluate", *evaluate)
        stages.append(Stage(f"sampling S={ar_steps}", sample, out / "request.json"))
        stages.append(Stage(f"scoring S={ar_steps}", evaluate, out / "evaluation.json"))
    return Job(run.name, tuple(stages), workdir / "logs" / f"{run.name}.log")


def score_requirements(sweep: Sweep, run: Run) -> Iterator[tuple[bool, str, str, str]]:
    """What a run needs in order to be trained and scored: whether it is met, then field, value and message."""
    metric, data = sweep.metric, run.config.data
    sample_flags = ("--sample_flags", _SAMPLE_FLAGS.value)
    evaluate_flags = ("--evaluate_flags", _EVALUATE_FLAGS.value)
    given = {word.lstrip("-").partition("=")[0]: word for word in shlex.split(_EVALUATE_FLAGS.value)}
    network = data_scores.metrics()[metric].network
    measured = given.get("metrics", f"--metrics={metric}").partition("=")[2].split(",")
    other, kind = ("i3d", "images") if data.frames == 1 else ("inception", "videos")
    has_data = data.source in ("digits", "digit_pairs", "moving_digits", "tfds") or bool(data.path)
    has_classes = (
        not data_scores.metrics()[metric].needs_classes or run.config.knows_classes or "--prompt" in _SAMPLE_FLAGS.value
    )
    yield (
        not network or network in given,
        *evaluate_flags,
        f"must hold --{network}=FOLDER: {metric} is measured with it",
    )
    yield metric in measured, *evaluate_flags, f"must measure {metric}, by which the runs are sorted"
    message = f"source {data.source} needs the path of its folder; give --override=data.path=FOLDER"
    yield has_data, "config.data.path", data.path, message
    message = "must hold --vae=FOLDER: samples of a model of latents are scored as pixels"
    yield not data.latents or "--vae" in _SAMPLE_FLAGS.value, *sample_flags, message
    message = f"must hold --prompts=FILE: {metric} compares images with what they were sampled for"
    yield has_classes, *sample_flags, message
    yield other not in given, *evaluate_flags, f"--{other} is not of {kind}, as those of {run.name}"


def check_can_score(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Raises InputError where a run could not be trained, or not be scored once it is trained."""
    for run in runs:
        for is_met, field, value, message in score_requirements(sweep, run):
            require(is_met, field, value, message)


# --- The folder of a sweep --------------------------------------------------------


def shared_settings(sweep: Sweep, base: dict[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a sweep share, and that must not change, by path."""
    settings = measured_settings(sweeps.merge(base, sweep.fixed))
    return settings | {"--sample_flags": _SAMPLE_FLAGS.value, "--evaluate_flags": _EVALUATE_FLAGS.value}


def check_workdir(workdir: pathlib.Path, shared: dict[str, Any], runs: Sequence[Run], must_record: bool) -> list[str]:
    """Checks that `workdir` is new, or this sweep's; changes nothing.

    Runs, numbers of AR steps and of samples may change, but not what all runs share.

    Args:
      workdir: the folder of all runs.
      shared: from `shared_settings`.
      runs: of the sweep.
      must_record: whether a folder that is not empty must hold sweep.json; False where only jobs on other machines
        may have written there.

    Returns:
      Names of the runs that the folder is to hold: those of the sweep, and those that were in it before.

    Raises:
      InputError: it holds something else.
    """
    record, names = workdir / "sweep.json", {run.name for run in runs}
    if record.is_file():
        saved = files.read_json(record)
        require(isinstance(saved, dict), "--workdir", str(workdir), "its sweep.json cannot be read")
        sweep_results.check_same(workdir, "belongs to another sweep", saved["shared"], shared)
        others = sorted(set(saved["runs"]) - names)
        if others:
            print(f"kept, but no longer of this sweep: {', '.join(others)}")
        names |= set(others)
    elif must_record:
        files.require_new("--workdir", workdir)
    for run in runs:
        sweep_results.check_run(run, workdir / run.name)
    return sorted(names)


def write_record(workdir: pathlib.Path, shared: dict[str, Any], names: list[str]) -> None:
    """Writes sweep.json, for `check_workdir`."""
    files.write_json(workdir / "sweep.json", {"sweep": _SWEEP.value, "shared": shared, "runs": names})


def write_results(sweep: Sweep, results: Sequence[Result], workdir: pathlib.Path) -> None:
    """Writes and prints the table, and plots it."""
    table = sweep_results.markdown(sweep, results)
    shared = [f"`{path}={value}`" for path, value in sweep.fixed.items()]
    (workdir / "results.md").write_text(
        f"# {_SWEEP.value}\n\n`{sweep.config}`{' with ' + ', '.join(shared) if shared else ''};"
        f" {sweep.num_samples} samples at each number S of AR steps. Best first.\n\n{table}"
    )
    (workdir / "results.csv").write_text(sweep_results.csv_text(sweep, results))
    print(f"\n{table}")
    if any(result.scores for result in results):
        save_chart(workdir / "results.png", sweep_results.chart(sweep, results))
    print(f"wrote {workdir / 'results.md'}, results.csv and results.png")


# --- The command ------------------------------------------------------------------


def submit(jobs: Sequence[Job], workdir: pathlib.Path) -> int:
    """Runs the launcher for every job, or prints it with --dry_run. Returns how many failed."""
    failed = 0
    for index, job in enumerate(jobs):
        command = " && ".join(f"python -m {shlex.join(stage.args)}" for stage in job.stages)
        values = dict(command=command, name=job.name, index=str(index), workdir=str(workdir / job.name))
        command = fill(_LAUNCHER.value, values)
        print(command if _DRY_RUN.value else f"submitting {job.name}", flush=True)
        if not _DRY_RUN.value and subprocess.run(["bash", "-c", command], cwd=ROOT).returncode:
            print(f"failed    {job.name}: the launcher's exit status is not 0", file=sys.stderr)
            failed += 1
    return failed


def exit_status(jobs: Sequence[Job], signal_name: str | None) -> int:
    """Prints what failed or was interrupted, and returns the exit status of the sweep."""
    states = [job.state for job in jobs]
    for job in jobs:
        if job.state == "failed":
            print(f"failed: {job.name}: {job.message}", file=sys.stderr)
    if signal_name or "interrupted" in states:
        finished = f"{states.count('finished')} of {len(jobs)} runs finished"
        print(f"{signal_name or 'interrupted'}: {finished}; run the same command again to continue")
    if "failed" in states:
        return 1
    return 0 if set(states) == {"finished"} else app.INTERRUPTED


def check_flags() -> None:
    """Raises InputError for a flag that cannot be read."""
    require(_PARALLEL.value >= 1, "--parallel", _PARALLEL.value, "must be >= 1")
    for flag in (_TRAIN_FLAGS, _SAMPLE_FLAGS, _EVALUATE_FLAGS):
        try:
            shlex.split(flag.value)
        except ValueError as error:
            raise InputError(f"--{flag.name}", flag.value, f"cannot be read: {error}") from None


def main(argv):
    """Runs the command."""
    del argv
    check_flags()
    # Nothing is computed here: an accelerator belongs to the runs.
    jax.config.update("jax_platforms", "cpu")
    sweep, base, runs = read_sweep()
    # On other machines a relative path is relative to the launcher's folder there.
    workdir = pathlib.Path(_WORKDIR.value) if _LAUNCHER.value else pathlib.Path(_WORKDIR.value).absolute()
    shared = shared_settings(sweep, base)
    names = check_workdir(workdir, shared, runs, must_record=not (_LAUNCHER.value or _RESULTS_ONLY.value))
    if _RESULTS_ONLY.value:
        require(workdir.is_dir(), "--workdir", str(workdir), "no such folder")
        write_results(sweep, sweep_results.gather(sweep, runs, workdir, {}), workdir)
        return
    if not _DRY_RUN.value:
        check_can_score(sweep, runs)
    jobs = [make_job(sweep, run, workdir) for run in runs]
    unfinished = [job for job in jobs if not job.is_finished]
    if _LAUNCHER.value:
        if not _DRY_RUN.value and workdir.parent.is_dir():
            workdir.mkdir(exist_ok=True)
            write_record(workdir, shared, names)
        sys.exit(1 if submit(unfinished, workdir) else 0)
    if _DRY_RUN.value:
        for job in unfinished:
            print("".join(f"python -m {shlex.join(stage.args)}\n" for stage in job.stages))
        return
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    with held(workdir) as lock:
        write_record(workdir, shared, names)
        signal_name = run_jobs(jobs, _PARALLEL.value, lock)
        results = sweep_results.gather(sweep, runs, workdir, {job.name: job.state for job in jobs})
        write_results(sweep, results, workdir)
    sys.exit(exit_status(jobs, signal_name))


if __name__ == "__main__":
    app.run(main, required=("sweep", "workdir"))
