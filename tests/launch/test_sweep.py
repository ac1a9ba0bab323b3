"""Sweeps: combining overrides, their files, and launch/sweep.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, command_env, expanded, finish_run, run_python, wait_for

from causalfusion_jax.cli import app
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.sweeps import sweep as sweeps
from causalfusion_jax.sweeps.sweep import Sweep, chain, grid, product, together

sys.path.insert(0, str(ROOT / "launch"))
from shell_template import fill

GAMMA, WEIGHT, SEED = "factorization.gamma", "factorization.weight_max", "train.seed"
FILES = {
    # file: runs on digits, runs on ImageNet
    "fixed_steps": (6, 6),
    "gamma": (5, 5),
    "order": (4, 5),
    "ar_weight": (5, 5),
    "condition_tokens": (5, 5),
    "t_sharing": (4, 4),
    "baseline": (5, 6),
    "block_size": (3, 3),
}


# --- Combining overrides ------------------------------------------------------------------


def test_overrides_are_combined():
    assert grid({GAMMA: [1.0, 0.9], SEED: [0, 1]}) == (
        {GAMMA: 1.0, SEED: 0}, {GAMMA: 1.0, SEED: 1}, {GAMMA: 0.9, SEED: 0}, {GAMMA: 0.9, SEED: 1},
    )  # fmt: skip
    pairs = together({GAMMA: [1.0, 0.9], SEED: range(2)})
    assert pairs == ({GAMMA: 1.0, SEED: 0}, {GAMMA: 0.9, SEED: 1})
    assert product(grid({WEIGHT: [1.0, 2.0]}), pairs)[1] == {WEIGHT: 1.0, GAMMA: 0.9, SEED: 1}
    assert len(product(grid({WEIGHT: [1.0, 2.0]}), pairs)) == 4
    assert chain(pairs, [{}]) == (*pairs, {})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid({GAMMA: 0.9}), "must be a list"),
        (lambda: grid({GAMMA: []}), "must be a list"),
        (lambda: grid({"data.path": "ab"}), "must be a list"),
        (lambda: grid({}), "at least one path"),
        (lambda: grid({GAMMA: [0.9, 0.9]}), "run twice"),
        (lambda: together({GAMMA: [0.9], SEED: [0, 1]}), "as many values"),
        (lambda: chain(grid({GAMMA: [0.9]}), grid({GAMMA: [0.9, 1.0]})), "run twice"),
        (lambda: product(grid({GAMMA: [0.9]}), grid({GAMMA: [1.0]})), "set twice"),
        (lambda: Sweep("configs/digits.py", ()), "at least one run"),
        (lambda: Sweep("configs/digits.py", ({},), metric="acuracy"), "did you mean accuracy"),
        (lambda: Sweep("configs/digits.py", ({},), ar_steps=(4, 4)), "different numbers"),
        (lambda: Sweep("configs/digits.py", ({},), ar_steps=((4,), (1,))), "for each of the 1 runs"),
        (lambda: Sweep("configs/digits.py", grid({SEED: [0, 1]}), ar_steps=((4,), (1, 1))), "different numbers"),
    ],
)
def test_wrong_combinations(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_runs_are_named_and_flagged():
    runs = expanded(
        chain(grid({SEED: [1], GAMMA: [1]}), [{}], grid({"train.steps": [20]}), grid({"model.norm": ["rms"]})),
        fixed={"sampling.step_sizes": (4, 12)},
    )
    assert [run.name for run in runs] == ["gamma=1.0,seed=1", "base", "train.steps=20", "norm=rms"]
    flags = ("--config.sampling.step_sizes=(4, 12)", "--config.train.seed=1", "--config.factorization.gamma=1.0")
    assert runs[0].flags == flags
    assert runs[0].config.factorization.gamma == 1.0 and runs[0].config.sampling.step_sizes == (4, 12)
    base = experiment.default_config().to_dict()
    base["data"] |= dict(source="image_folder", num_classes=2)
    paths = ("/data/a b", "/data/a-b", "/data/" + 200 * "x")
    names = [run.name for run in sweeps.expand(Sweep("", grid({"data.path": paths})), base)]
    assert len(set(names)) == 3 and all("/" not in name and " " not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("overrides", "kwargs", "words"),
    [
        (grid({"factorization.gama": [0.9]}), {}, "config.factorization.gama=0.9.*did you mean gamma"),
        (grid({"factorisation.gamma": [0.9]}), {}, "config.factorisation.*did you mean factorization"),
        (grid({"gamma": [0.9]}), {}, "SECTION.NAME"),
        (grid({GAMMA: [0.9, "high"]}), {}, "must be of type float"),
        (grid({SEED: [True]}), {}, "must be of type int"),
        (grid({GAMMA: [0.9, 2.0]}), {}, "config.factorization.gamma=2.0"),
        (grid({GAMMA: [1, 1.0]}), {}, "same settings as gamma=1.0"),
        (chain([{}], grid({GAMMA: [0.9]})), {}, "same settings as base"),
        (grid({GAMMA: [0.9, 1.0]}), {"fixed": {GAMMA: 0.8}}, "run by run"),
        (grid({GAMMA: [0.9]}), {"ar_steps": (1, 17)}, "gamma=0.9: sampling.ar_steps=17"),
    ],
)
def test_wrong_runs(overrides, kwargs, words):
    with pytest.raises(InputError, match=words):
        expanded(overrides, **kwargs)


def test_overrides_are_read_by_type():
    text = "train.steps=20,sampling.step_sizes=(4,12),data.flip=true,optimizer.learning_rate=1e-3,data.path=/a,b"
    assert sweeps.parse_overrides("--override", text) == {
        "train.steps": 20, "sampling.step_sizes": (4, 12), "data.flip": True, "optimizer.learning_rate": 1e-3,
        "data.path": "/a,b",
    }  # fmt: skip
    for wrong in ("train.steps=many", "train.steps=2.5", "data.flip=1", "steps=5", "train.steps", "train.seed=1,"):
        with pytest.raises(InputError, match="--override"):
            sweeps.parse_overrides("--override", wrong)


# --- The files --------------------------------------------------------------------


def read(location):
    sweep = sweeps.load("--sweep", f"configs/sweeps/{location}", "get_sweep", ROOT)
    return sweep, sweeps.expand(sweep, sweeps.load("config", sweep.config, "get_config", ROOT).to_dict())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("data", "column"), [("digits", 0), ("imagenet", 1)])
def test_papers_ablations(name, data, column):
    sweep, runs = read(f"{name}.py:{data}")
    assert len(runs) == FILES[name][column]
    assert sweep.num_samples == {"digits": 1000, "imagenet": 10_000}[data]
    assert sweeps.with_metric(sweep, runs).metric == {"digits": "fd", "imagenet": "fid"}[data]
    # The paper's one ablation of weights found 2; those before it trained with none.
    weighs = {run.config.factorization.weight for run in runs}
    linear = {"ar_weight": {"linear", "none"}, "condition_tokens": {"linear"}, "t_sharing": {"linear"}}
    assert weighs == linear.get(name, {"none"})


def test_every_sweep_has_a_case():
    assert {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.py")} == {*FILES, "digits_ablation"}
    sweep, runs = read("digits_ablation.py")
    assert len(runs) == 8 and sweep.ar_steps == (1, 4, 16)


@pytest.mark.parametrize(
    ("location", "words"),
    [("nothing.py", "no such file"), ("gamma.py:digit", "did you mean digits"), ("digits_ablation.py:x", "left out")],
)
def test_wrong_files(location, words):
    with pytest.raises(InputError, match=words):
        read(location)


# --- launch/sweep.py --------------------------------------------------------------

STUB = """
import pathlib, signal, sys, time
kind, product = sys.argv[1], pathlib.Path(sys.argv[2])
def save(number, frame):
    product.with_name("saved").write_text(signal.Signals(number).name)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
product.parent.mkdir(exist_ok=True, parents=True)
if kind == "fail":
    sys.exit("error: no luck")
if kind == "preempted" and not product.with_name("saved").exists():
    save(signal.SIGTERM, None)
if kind == "nothing":
    sys.exit(0)
if kind == "slow" and not product.with_name("saved").exists():
    print("at work", flush=True)
    product.with_name("started").touch()
    time.sleep(60)
product.write_text("{}")
"""

DRIVER = """
import pathlib, sys
sys.path.insert(0, "launch")
import jobs
folder = pathlib.Path(sys.argv[1])
(folder / "logs").mkdir(exist_ok=True)
def stage(run, name, kind):
    product = folder / run / name / "product.json"
    return jobs.Stage(name, ("stub", kind, str(product)), product)
with jobs.held(folder) as lock:
    planned = [
        jobs.Job(f"{i}-{kind}", (stage(f"{i}-{kind}", "training", kind), stage(f"{i}-{kind}", "scoring", "ok")),
                 folder / "logs" / f"{i}.log")
        for i, kind in enumerate(sys.argv[3:])
    ]
    signal_name = jobs.run_jobs(planned, int(sys.argv[2]), lock)
    print(signal_name, [job.state for job in planned])
"""


def drive(folder, parallel, *kinds):
    """Runs jobs whose stages are stubs."""
    (folder / "stub.py").write_text(STUB)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(parallel), *kinds],
        cwd=ROOT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    output, errors = drive(tmp_path, 2, "ok", "fail", "ok").communicate(timeout=600)
    assert output.splitlines()[-1] == "None ['finished', 'failed', 'finished']", errors
    assert "failed    1-fail  training: error: no luck (see" in output
    assert (tmp_path / "2-ok" / "scoring" / "product.json").is_file()
    assert not (tmp_path / "1-fail" / "scoring").exists()
    again, _ = drive(tmp_path, 1, "ok").communicate(timeout=600)
    assert "finished  0-ok  was there already" in again


def test_a_run_that_was_preempted_is_interrupted_and_continued(tmp_path):
    output, errors = drive(tmp_path, 1, "preempted", "ok", "nothing").communicate(timeout=600)
    assert output.splitlines()[-1] == "None ['interrupted', 'finished', 'failed']", errors
    assert not (tmp_path / "0-preempted" / "scoring").exists()
    output, errors = drive(tmp_path, 1, "preempted").communicate(timeout=600)
    assert output.splitlines()[-1] == "None ['finished']", errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_runs_which_save_and_resume(tmp_path, number):
    process = drive(tmp_path, 2, "slow", "slow", "ok")
    wait_for(lambda: len(list(tmp_path.glob("*/training/started"))) == 2)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert output.splitlines()[-1] == f"{number.name} ['interrupted', 'interrupted', 'waiting']", errors
    assert {path.read_text() for path in tmp_path.glob("*/training/saved")} == {number.name}
    output, _ = drive(tmp_path, 2, "slow", "slow", "ok").communicate(timeout=600)
    assert output.splitlines()[-1] == "None ['finished', 'finished', 'finished']"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death of a parent is signalled on Linux only")
def test_runs_save_when_the_sweep_is_killed(tmp_path):
    process = drive(tmp_path, 1, "slow")
    wait_for(lambda: list(tmp_path.glob("*/training/started")))
    # Another sweep stays out meanwhile.
    _, errors = drive(tmp_path, 1, "ok").communicate(timeout=600)
    assert "another sweep is running there, or a run that it started is still saving" in errors
    process.kill()
    process.communicate()
    wait_for(lambda: list(tmp_path.glob("*/training/saved")))


def test_launcher_template_is_quoted_as_the_shell_needs_it():
    nasty = "python -m x '--a=(1, 2)' && echo \"$HOME\" `id` \\ it's"
    template = 'printf \'%s\\n\' {command} \'{command}\' "{command}" "cd x; {command}" {name} \\"{name} ${X}'
    filled = fill(template, dict(command=nasty, name="n"))
    shown = subprocess.run(["bash", "-c", filled], capture_output=True, text=True, env={"X": "y"})
    assert shown.stdout.splitlines() == [nasty, nasty, nasty, f"cd x; {nasty}", "n", '"n', "y"], filled
    for wrong, word in (("echo {name}", "must hold {command}"), ("{command} {nam}", "must be one of command, name")):
        with pytest.raises(InputError, match=word):
            fill(wrong, dict(command="x", name="n"))


def run_sweep(*args):
    return run_python("launch/sweep.py", *args)


def test_dry_run_prints_commands_and_changes_nothing(tmp_path):
    args = ("--sweep=configs/sweeps/order.py:imagenet", f"--workdir={tmp_path / 'sweep'}", "--dry_run")
    overrides = ("--override=data.path=/data/latents,train.seed=3", "--override=train.steps=7")
    args = (*args, "--evaluate_flags=--inception=/data/inception")
    done = run_sweep(*args, *overrides, "--sample_flags=--vae=/data/vae")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line.split()[2].rpartition(".")[2] for line in lines] == ["train", "sample", "evaluate"] * 5
    assert "--config=configs/imagenet_causalfusion.py:L,ablation" in lines[3]
    assert "--config.data.path=/data/latents" in lines[3] and "--config.factorization.order_block=8" in lines[3]
    assert "--config.train.seed=3" in lines[3] and "--config.train.steps=7" in lines[3], "given twice, both hold"
    assert "--num=10000 --ar_steps=1 --vae=/data/vae" in lines[4]
    jobs = run_sweep(*args, '--launcher=submit {index} --command="{command}"')
    assert [line.partition(" --command=")[0] for line in jobs.stdout.splitlines()] == [f"submit {i}" for i in range(5)]
    assert not list(tmp_path.iterdir())


SEVERAL = """
import json, sys
sys.path.insert(0, "launch")
import sweep
from absl import flags
from causalfusion_jax.common.errors import InputError
for args in json.loads(sys.argv[1]):
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["sweep", *args])
    try:
        sweep.main(["sweep"])
        status = 0
    except SystemExit as end:
        status = end.code
    except InputError as error:
        status = str(error)
    print("ended:", json.dumps(status), flush=True)
"""


def sweep_several(*commands):
    """How launch/sweep.py ends with each of several command lines: its exit status, or the InputError."""
    arguments = json.dumps([[str(arg) for arg in args] for args in commands])
    done = run_python("-c", SEVERAL, arguments)
    ends = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert len(ends) == len(commands), done.stdout + done.stderr
    return ends


def test_wrong_input_touches_nothing(tmp_path):
    workdir, gamma = f"--workdir={tmp_path / 'sweep'}", "--sweep=configs/sweeps/gamma.py"
    done = run_sweep(workdir, gamma, "--override=train.stpes=5")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "config.train.stpes" in done.stderr and "did you mean steps" in done.stderr
    videos, pairs = tmp_path / "videos.py", tmp_path / "pairs.py"
    videos.write_text(VIDEOS)
    pairs.write_text(VIDEOS.replace("ucf101_acdit.py:XL", "digit_pairs.py"))
    scored = ("--sample_flags=--vae=/vae", "--override=data.path=/latents")
    cases = [
        ([f"{gamma}:imagenet", "--evaluate_flags=--inception=x"], "config.data.path='': ", "give --override=data.path"),
        ([f"{gamma}:imagenet", *scored], "must hold --inception=FOLDER: fid is measured with it"),
        ([f"{gamma}:imagenet", "--evaluate_flags=--inception=x --metrics=kid", *scored], "must measure fid"),
        ([f"{gamma}:imagenet", "--evaluate_flags=--inception=x --i3d=y", *scored], "--i3d is not of images"),
        ([f"--sweep={videos}", "--evaluate_flags=--inception=x", *scored], "must hold --i3d=FOLDER: fvd is measured"),
        ([f"--sweep={videos}", "--evaluate_flags=--i3d=x", scored[1]], "must hold --vae=FOLDER"),
        ([f"--sweep={pairs}"], "must hold --prompts=FILE: accuracy compares images"),
        ([gamma, "--parallel=0"], "--parallel=0", ">= 1"),
        ([gamma, "--workdir=configs"], "--workdir", "exists with other content"),
    ]
    # Videos with what FVD needs are started.
    good = [f"--sweep={videos}", "--evaluate_flags=--i3d=x --reference=y", *scored, "--launcher=exit 3 #{command}"]
    *errors, started = sweep_several(
        *([workdir, *args] for args, *_ in cases), [f"--workdir={tmp_path / 'x/y'}", *good]
    )
    for error, (_, *words) in zip(errors, cases, strict=True):
        assert all(word in error for word in words), error
    assert started == 1, "the launcher's status"
    assert set(tmp_path.iterdir()) == {videos, pairs}


VIDEOS = """
from causalfusion_jax.sweeps import Sweep, grid

def get_sweep():
    return Sweep(config="configs/ucf101_acdit.py:XL", overrides=grid({"train.seed": [0]}), ar_steps=(4,))
"""


def test_results_and_jobs_of_other_settings_are_refused(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    sweep, workdir = f"--sweep={tmp_path / 'tiny.py'}", tmp_path / "sweep"
    loaded = sweeps.load("--sweep", str(tmp_path / "tiny.py"), "get_sweep", ROOT)
    base = sweeps.load("config", loaded.config, "get_config", ROOT).to_dict()
    (run,) = sweeps.expand(loaded, base)
    finish_run(workdir, loaded, run, fd=1.5, accuracy=0.5)
    args, launcher = (sweep, f"--workdir={workdir}"), "--launcher=true # {command}"
    other = "--override=train.batch_size=16"
    ends = sweep_several(
        [*args, other, "--results_only"],
        [*args, other, launcher],
        [*args, launcher, "--sample_flags=--cfg_scale=2"],
        [*args, "--results_only"],
        [*args, "--results_only", "--sample_flags=--cfg_scale=2"],
    )
    for refused in ends[:2]:
        assert "trained by other settings (train.batch_size 48, now 16)" in refused
    # The jobs' flags are on record from here on.
    assert ends[2] == 0 and "belongs to another sweep (--sample_flags '--cfg_scale=2', now ''" in ends[3]
    assert ends[4] == 0 and "| **1.500** |" in (workdir / "results.md").read_text()


TINY = """
from causalfusion_jax.sweeps import Sweep, grid

def get_sweep(arg="0.9"):
    return Sweep(
        config="configs/digits.py",
        overrides=grid({"factorization.gamma": [float(gamma) for gamma in arg.split("+")]}),
        fixed={
            "model.hidden": 32, "model.heads": 2, "model.layers": 2, "train.steps": 60, "optimizer.warmup_steps": 3,
            "logging.every": 1, "logging.sample_every": 0, "checkpoint.every": 20, "sampling.solver_steps": 2,
        },
        ar_steps=(1, 4), num_samples=20,
    )
"""


@pytest.mark.slow
def test_sweep_is_interrupted_resumed_extended_and_refused(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    sweep, folder = f"--sweep={tmp_path / 'tiny.py'}:0.9", tmp_path / "sweep"
    args = (f"--workdir={folder}", "--parallel=2")
    process = subprocess.Popen(
        [sys.executable, "launch/sweep.py", sweep, *args],
        cwd=ROOT,
        env=command_env(),
        text=True,
        stdout=subprocess.PIPE,
    )
    log = folder / "logs" / "gamma=0.9.log"
    wait_for(lambda: log.is_file() and "\nstep " in log.read_text(), 300)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == app.INTERRUPTED and "SIGINT: 0 of 1 runs finished" in output
    assert "SIGINT: saved step" in log.read_text()

    done = run_sweep(sweep + "+0.5", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming" in log.read_text() and "resuming" not in (folder / "logs" / "gamma=0.5.log").read_text()
    assert {"results.md", "results.csv", "results.png"} <= {path.name for path in folder.iterdir()}
    table = (folder / "results.md").read_text()
    scores = json.loads((folder / "gamma=0.5" / "samples_ar4_n20" / "evaluation.json").read_text())
    assert f"{scores['accuracy']:.3f}" in table and "| fd S=1 | fd S=4 |" in table

    fewer = run_sweep(sweep, *args)
    assert "gamma=0.9  was there already" in fewer.stdout and "no longer of this sweep: gamma=0.5" in fewer.stdout
    other = run_sweep(sweep, *args, "--override=train.batch_size=16")
    assert other.returncode == 2 and "train.batch_size 48, now 16" in other.stderr
