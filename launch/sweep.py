"""Trains, samples and scores every run of a sweep.

    python launch/sweep.py --sweep=configs/sweeps/digits_ablation.py --workdir=sweeps/digits
    python launch/sweep.py --sweep=configs/sweeps/gamma.py:digits --workdir=sweeps/gamma --override=train.steps=500
    python launch/sweep.py --sweep=configs/sweeps/order.py:imagenet --workdir=sweeps/order --dry_run

All runs are checked before the first one starts. WORKDIR receives a folder for each run,
named after its overrides, logs/, and results.md, results.csv and results.png. Run the same
command again to continue: finished runs are kept, interrupted ones resume, runs that the
sweep file has gained are added. Ctrl-C or SIGTERM is passed to the runs, which save. A run
that fails does not stop the others; the exit status is then 1. It is 75 where runs were
interrupted and none failed: the same command continues them.

Elsewhere than here: --launcher is a shell command that starts one job. {command} stands for
the job, {name}, {index} and {workdir} for its run; each is quoted as its place needs.

    --launcher='sbatch --job-name={name} --gpus=1 --wrap="{command}"'

With --dry_run the commands are printed. Once the jobs are done, --results_only makes the
table. A model of latents needs --sample_flags=--vae=FOLDER and --evaluate_flags with --inception,
one of videos with --i3d. A WORKDIR of runs by other settings is refused, as far as it can be seen here.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
from command_server import Forked, die_with_parent
from shell_template import fill

from causalfusion_jax.cli import app
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

ROOT = pathlib.Path(__file__).resolve().parent.parent

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file: configs/sweeps/NAME.py or configs/sweeps/NAME.py:ARG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs; new, empty, or that of this sweep to continue.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time. A TPU belongs to one process: leave it 1 there.")
_OVERRIDE = flags.DEFINE_multi_string("override", [], "Settings of all runs: train.steps=200,train.batch_size=32.")
_TRAIN_FLAGS = flags.DEFINE_string("train_flags", "", "Further flags of causalfusion_jax.train, not of its config.")
_SAMPLE_FLAGS = flags.DEFINE_string("sample_flags", "", "Further flags of causalfusion_jax.sample.")
_EVALUATE_FLAGS = flags.DEFINE_string("evaluate_flags", "", "Further flags of causalfusion_jax.evaluate.")
_LAUNCHER = flags.DEFINE_string("launcher", "", "Shell command that starts one job elsewhere; see above.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the sweep and print its commands; change nothing.")
_FORK = flags.DEFINE_bool("fork", False, "Spare each command the seconds of importing; not where there is a TPU.")
_RESULTS_ONLY = flags.DEFINE_bool("results_only", False, "Start nothing; make the table of what is there.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a run: what it is called, what follows `python -m`, and the file it leaves."""

    name: str
    args: tuple[str, ...]
    product: pathlib.Path

    @property
    def is_done(self) -> bool:
        """Whether its file is there, whole."""
        return files.read_json(self.product) is not None


def stages(sweep, run, workdir: pathlib.Path) -> tuple[Stage, ...]:
    """The commands of a run, in order."""
    from causalfusion_jax.checkpoints.manifests import manifest_path
    from causalfusion_jax.sweeps.sweep import samples_folder

    folder = workdir / run.name
    train = (
        "causalfusion_jax.train",
        f"--config={sweep.config}",
        f"--workdir={folder}",
        *run.flags,
        *shlex.split(_TRAIN_FLAGS.value),
    )
    # The manifest of a checkpoint is the last thing that is written of it.
    planned = [Stage("training", train, manifest_path(folder, run.config.train.steps))]
    for ar_steps in run.ar_steps:
        out = samples_folder(workdir, run, ar_steps, sweep)
        sample = (
            "causalfusion_jax.sample",
            f"--workdir={folder}",
            f"--out={out}",
            f"--num={sweep.num_samples}",
            f"--ar_steps={ar_steps}",
            *shlex.split(_SAMPLE_FLAGS.value),
        )
        evaluate = (
            "causalfusion_jax.evaluate",
            f"--workdir={folder}",
            f"--samples={out / 'samples.npz'}",
            *shlex.split(_EVALUATE_FLAGS.value),
        )
        planned.append(Stage(f"sampling S={ar_steps}", sample, out / "request.json"))
        planned.append(Stage(f"scoring S={ar_steps}", evaluate, out / "evaluation.json"))
    return tuple(planned)


def is_finished(planned: tuple[Stage, ...]) -> bool:
    """Whether every score of a run is there."""
    return all(stage.is_done for stage in planned if stage.name.startswith("scoring"))


# --- The folder of a sweep --------------------------------------------------------


def shared_settings(sweep, base: dict) -> dict:
    """What must not change under the runs of a sweep, by path."""
    from causalfusion_jax.sweeps import sweep as sweeps

    settings = sweeps.measured_settings(sweeps.merge(base, sweep.fixed))
    return settings | {"--sample_flags": _SAMPLE_FLAGS.value, "--evaluate_flags": _EVALUATE_FLAGS.value}


def check_workdir(workdir: pathlib.Path, shared: dict, runs, recorded: bool = True) -> list[str]:
    """Checks that `workdir` is new, or this sweep's; touches nothing.

    Runs may come and go, and numbers of AR steps and samples change; not what all runs share.

    Args:
      workdir: the folder of all runs.
      shared: from `shared_settings`.
      runs: those of the sweep.
      recorded: the sweep keeps sweep.json there; False: only its jobs were sure to see the folder.

    Returns:
      The runs it is to hold: those of the sweep, and those that were of it.

    Raises:
      InputError: it holds something else.
    """
    from causalfusion_jax.sweeps import sweep as sweeps

    record, names = workdir / "sweep.json", {run.name for run in runs}
    if record.is_file():
        saved = files.read_json(record)
        require(isinstance(saved, dict), "--workdir", str(workdir), "its sweep.json cannot be read")
        # A setting that either side does not know came or went with the code, at its default.
        changed = [
            f"{path}={shared[path]!r} (it has {value!r})"
            for path, value in saved["shared"].items()
            if shared.get(path, value) != value
        ]
        require(
            not changed,
            "--workdir",
            str(workdir),
            f"belongs to another sweep: {', '.join(changed)}; use another workdir",
        )
        others = sorted(set(saved["runs"]) - names)
        if others:
            print(f"kept, but no longer of this sweep: {', '.join(others)}")
        names |= set(others)
    elif recorded:
        files.require_new("--workdir", workdir)
    for run in runs:
        sweeps.check_run(run, workdir / run.name)
    return sorted(names)


def write_record(workdir: pathlib.Path, shared: dict, names: list[str]) -> None:
    """Notes what the folder is of, for `check_workdir`."""
    files.write_json(workdir / "sweep.json", {"sweep": _SWEEP.value, "shared": shared, "runs": names})


@contextlib.contextmanager
def held(workdir: pathlib.Path):
    """Keeps other sweeps out of `workdir` for as long as this process, or a run it started, lives."""
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "--workdir", str(workdir), "a sweep, or a run that it left to save, is at work there; wait for it"
            ) from None
        except OSError:
            # A file system without locks: nothing to hold.
            pass
        yield lock


# --- Running ----------------------------------------------------------------------


class Job:
    """A run on its way through its stages.

    Attributes:
      state: waiting, running, finished, failed, interrupted.
      message: why it failed or was interrupted.
    """

    def __init__(self, run, planned: tuple[Stage, ...], log: pathlib.Path, servers: list | None = None):
        """`servers`: command servers that are idle, for all jobs; None: each command is a process of its own."""
        self.run, self.stages, self.log, self._servers = run, planned, log, servers
        self.state = "finished" if is_finished(planned) else "waiting"
        self.message = "was there already" if self.state == "finished" else ""
        self.stage, self._process, self._next = None, None, iter(planned)

    def start(self, lock) -> None:
        """Starts the next stage that is not done, if there is one."""
        # Training is always started: it alone can tell that its checkpoint is intact.
        self.stage = next((s for s in self._next if s.name == "training" or not s.is_done), None)
        if self.stage is None:
            self.state = "finished"
            return
        self.state = "running"
        # Samples that were being written when they were stopped.
        for left in self.stage.product.parent.parent.glob(".samples_*"):
            shutil.rmtree(left, ignore_errors=True)
        with self.log.open("a") as log:
            log.write(f"$ python -m {shlex.join(self.stage.args)}\n")
            log.flush()
            if self._servers is None:
                command = ["-m", *self.stage.args]
                self._process = self._popen(lock, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                return
        if not self._servers:
            command = [str(ROOT / "launch" / "command_server.py")]
            with (self.log.parent / "command_server.log").open("a") as log:
                self._servers.append(
                    self._popen(lock, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0)
                )
        self._process = Forked(self._servers.pop(), self.stage.args, self.log)

    def _popen(self, lock, args: list[str], **streams) -> subprocess.Popen:
        # A session of its own: the terminal's Ctrl-C must reach it once, through `signal`.
        return subprocess.Popen(
            [sys.executable, *args],
            cwd=ROOT,
            env=self._env(),
            start_new_session=True,
            preexec_fn=die_with_parent,
            pass_fds=(lock.fileno(),),
            **streams,
        )

    def _env(self) -> dict[str, str]:
        """Runs of one shape share what they compile."""
        cache = str(self.log.parent.parent / "compiled")
        # As `-m` finds it: the package of this checkout.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ, "PYTHONPATH": path}

    def poll(self, lock, stopping: bool) -> None:
        """Goes on to the next stage where one has ended."""
        if self.state != "running" or self._process.poll() is None:
            return
        code = self._process.returncode
        if isinstance(self._process, Forked) and self._process.server.poll() is None:
            self._servers.append(self._process.server)
        if code == 0 and self.stage.is_done:
            if stopping:
                self.state, self.message = "interrupted", f"after {self.stage.name}"
            else:
                self.start(lock)
        elif stopping or code == app.INTERRUPTED:
            self.state, self.message = "interrupted", self.progress()
        else:
            self.state, self.message = "failed", f"{self.stage.name}: {self.progress()} (see {self.log})"

    def signal(self, number: int) -> None:
        """Passes a signal on."""
        if self.state == "running" and self._process.poll() is None:
            self._process.send_signal(number)

    def progress(self) -> str:
        """The last line that its current stage printed."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            return lines[-1] if lines and not lines[-1].startswith("$ ") else ""
        return ""

    def line(self) -> str:
        """One line: what it is doing."""
        doing = f"{self.stage.name}: {self.progress()}" if self.state == "running" else self.message
        return f"{self.state:<8}  {self.run.name}  {doing}".rstrip()


class Board:
    """One status line for each run, rewritten in place on a terminal, else printed when it changes."""

    def __init__(self):
        self._height, self._shown = 0, {}

    def show(self, jobs: list[Job]) -> None:
        """Brings the lines up to date."""
        if not sys.stdout.isatty():
            for job in jobs:
                key = (job.state, job.stage)
                if self._shown.get(job.run.name, ("waiting", None)) != key:
                    print(job.line() if job.state != "running" else f"running   {job.run.name}  {job.stage.name}")
                self._shown[job.run.name] = key
            sys.stdout.flush()
            return
        columns, rows = shutil.get_terminal_size()
        lines = [job.line() for job in jobs]
        if len(lines) >= rows:
            counts = {state: sum(job.state == state for job in jobs) for state in dict.fromkeys(j.state for j in jobs)}
            lines = [job.line() for job in jobs if job.state == "running"][: rows - 2]
            lines.append(", ".join(f"{count} {state}" for state, count in counts.items()))
        up = f"\x1b[{self._height}A" if self._height else ""
        text = "".join(f"\x1b[2K{line[: columns - 1]}\n" for line in lines)
        sys.stdout.write(f"{up}{text}\x1b[J")
        sys.stdout.flush()
        self._height = len(lines)


def run_jobs(jobs: list[Job], parallel: int, lock) -> str | None:
    """Runs all jobs. Returns the signal that stopped them, if one did."""
    received, passed, board = [], 0, Board()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        while True:
            for number in received[passed:]:
                passed += 1
                for job in jobs:
                    job.signal(number)
            for job in jobs:
                job.poll(lock, bool(received))
            for job in jobs:
                busy = sum(other.state == "running" for other in jobs)
                if job.state == "waiting" and busy < parallel and not received:
                    job.start(lock)
            board.show(jobs)
            if not any(job.state == "running" for job in jobs) and (
                received or not any(job.state == "waiting" for job in jobs)
            ):
                return signal.Signals(received[0]).name if received else None
            time.sleep(0.2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- Elsewhere --------------------------------------------------------------------


def job_command(planned: tuple[Stage, ...]) -> str:
    """All commands of a run as one line of shell."""
    return " && ".join(f"python -m {shlex.join(stage.args)}" for stage in planned)


def submit(todo, workdir: pathlib.Path, template: str, dry_run: bool) -> int:
    """Prints, or runs, the launcher of every unfinished run. Returns how many failed."""
    failed = 0
    for index, (run, planned) in enumerate(todo):
        values = dict(command=job_command(planned), name=run.name, index=str(index), workdir=str(workdir / run.name))
        command = fill(template, values)
        print(command if dry_run else f"submitting {run.name}", flush=True)
        if not dry_run and subprocess.run(["bash", "-c", command], cwd=ROOT).returncode:
            print(f"failed    {run.name}: the launcher's exit status is not 0", file=sys.stderr)
            failed += 1
    return failed


# --- Results ----------------------------------------------------------------------


def write_results(sweep, results, workdir: pathlib.Path) -> None:
    """Writes and prints the table, and plots it."""
    from causalfusion_jax.sweeps import sweep as sweeps

    table = sweeps.markdown(sweep, results)
    shared = [f"`{path}={value}`" for path, value in sweep.fixed.items()]
    (workdir / "results.md").write_text(
        f"# {_SWEEP.value}\n\n`{sweep.config}`{' with ' + ', '.join(shared) if shared else ''};"
        f" {sweep.num_samples} samples at each number S of AR steps. Best first.\n\n{table}"
    )
    (workdir / "results.csv").write_text(sweeps.csv_text(sweep, results))
    print(f"\n{table}")
    if any(result.scores for result in results):
        sweeps.plot(sweep, results).save(workdir / "results.png")
    print(f"wrote {workdir / 'results.md'}, results.csv and results.png")


# --- The command ------------------------------------------------------------------


def read_sweep():
    """The sweep as the command line has it, the settings it starts from, and its runs; all checked."""
    import jax

    # Nothing is computed here: an accelerator belongs to the runs.
    jax.config.update("jax_platforms", "cpu")
    from causalfusion_jax.sweeps import sweep as sweeps

    here = pathlib.Path.cwd()
    root = here if (here / _SWEEP.value.partition(":")[0]).is_file() else ROOT
    sweep = sweeps.load("--sweep", _SWEEP.value, "get_sweep", root)
    require(isinstance(sweep, sweeps.Sweep), "--sweep", _SWEEP.value, "its get_sweep must return a Sweep")
    base = sweeps.load("config", sweep.config, "get_config", ROOT).to_dict()
    overrides = sweeps.parse_overrides("--override", ",".join(_OVERRIDE.value))
    sweep = dataclasses.replace(sweep, fixed={**sweep.fixed, **overrides})
    runs = sweeps.expand(sweep, base)
    return sweeps.with_metric(sweep, runs), base, runs


def check_can_score(sweep, runs) -> None:
    """Raises InputError where runs would only fail once they are trained, or about to be."""
    from causalfusion_jax.data.scores import metrics as known_metrics

    metric = known_metrics()[sweep.metric]
    needed = metric.network
    given = {word.lstrip("-").partition("=")[0]: word for word in shlex.split(_EVALUATE_FLAGS.value)}
    require(
        not needed or needed in given,
        "--evaluate_flags",
        _EVALUATE_FLAGS.value,
        f"must hold --{needed}=FOLDER: {sweep.metric} is measured with it",
    )
    metrics = given.get("metrics", f"--metrics={sweep.metric}").partition("=")[2].split(",")
    require(
        sweep.metric in metrics,
        "--evaluate_flags",
        _EVALUATE_FLAGS.value,
        f"must measure {sweep.metric}, by which the runs are sorted",
    )
    for run in runs:
        data = run.config.data
        require(
            not data.kind.needs_path or bool(data.path),
            "config.data.path",
            data.path,
            f"source {data.source} needs the path of its folder; give --override=data.path=FOLDER",
        )
        require(
            not data.latents or "--vae" in _SAMPLE_FLAGS.value,
            "--sample_flags",
            _SAMPLE_FLAGS.value,
            "must hold --vae=FOLDER: what a model of latents samples is scored as pixels",
        )
        require(
            not metric.needs_classes or run.config.knows_classes or "--prompt" in _SAMPLE_FLAGS.value,
            "--sample_flags",
            _SAMPLE_FLAGS.value,
            f"must hold --prompts=FILE: {sweep.metric} compares images with what they were sampled for",
        )
        other = "i3d" if data.frames == 1 else "inception"
        require(
            other not in given,
            "--evaluate_flags",
            _EVALUATE_FLAGS.value,
            f"--{other} is not of {'images' if data.frames == 1 else 'videos'}, as those of {run.name}",
        )


def run_here(sweep, runs, workdir: pathlib.Path, shared: dict, names: list[str]) -> int:
    """Runs the sweep on this machine. Returns the exit status."""
    from causalfusion_jax.sweeps import sweep as sweeps

    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    with held(workdir) as lock:
        write_record(workdir, shared, names)
        servers = [] if _FORK.value else None
        jobs = [Job(run, stages(sweep, run, workdir), workdir / "logs" / f"{run.name}.log", servers) for run in runs]
        stopped_by = run_jobs(jobs, _PARALLEL.value, lock)
        for server in servers or ():
            server.stdin.close()
            server.wait()
        results = sweeps.gather(sweep, runs, workdir, {job.run.name: job.state for job in jobs})
        write_results(sweep, results, workdir)
    # In full: a terminal's lines are cut to its width.
    for job in jobs:
        if job.state == "failed":
            print(f"failed: {job.run.name}: {job.message}", file=sys.stderr)
    states = [job.state for job in jobs]
    if stopped_by or "interrupted" in states:
        finished = f"{states.count('finished')} of {len(jobs)} runs finished"
        print(f"{stopped_by or 'interrupted'}: {finished}; run the same command again to continue")
    if "failed" in states:
        return 1
    return 0 if set(states) == {"finished"} else app.INTERRUPTED


def main(argv):
    """Runs the command."""
    del argv
    require(_PARALLEL.value >= 1, "--parallel", _PARALLEL.value, "must be >= 1")
    for flag in (_TRAIN_FLAGS, _SAMPLE_FLAGS, _EVALUATE_FLAGS):
        try:
            shlex.split(flag.value)
        except ValueError as error:
            raise InputError(f"--{flag.name}", flag.value, f"cannot be read: {error}") from None
    sweep, base, runs = read_sweep()
    # Elsewhere a path means what it means there.
    workdir = pathlib.Path(_WORKDIR.value) if _LAUNCHER.value else pathlib.Path(_WORKDIR.value).absolute()
    # Jobs elsewhere may be the first to see the folder.
    shared, recorded = shared_settings(sweep, base), not (_LAUNCHER.value or _RESULTS_ONLY.value)
    names = check_workdir(workdir, shared, runs, recorded)
    if _RESULTS_ONLY.value:
        from causalfusion_jax.sweeps import sweep as sweeps

        require(workdir.is_dir(), "--workdir", str(workdir), "no such folder")
        write_results(sweep, sweeps.gather(sweep, runs, workdir, {}), workdir)
        return
    if not _DRY_RUN.value:
        check_can_score(sweep, runs)
    todo = [(run, planned) for run in runs if not is_finished(planned := stages(sweep, run, workdir))]
    if _LAUNCHER.value:
        if not _DRY_RUN.value and workdir.parent.is_dir():
            workdir.mkdir(exist_ok=True)
            write_record(workdir, shared, names)
        sys.exit(1 if submit(todo, workdir, _LAUNCHER.value, _DRY_RUN.value) else 0)
    if _DRY_RUN.value:
        for _, planned in todo:
            print("".join(f"python -m {shlex.join(stage.args)}\n" for stage in planned))
        return
    sys.exit(run_here(sweep, runs, workdir, shared, names))


if __name__ == "__main__":
    app.run(main, required=("sweep", "workdir"))
