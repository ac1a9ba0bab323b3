"""A tiny model of digits, and what several tests do with it."""

import atexit
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import quick_compilation

from causalfusion_jax.common import files, sharding
from causalfusion_jax.config import experiment
from causalfusion_jax.evaluation.periodic import Evaluator
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.transformer import TransformerConfig, abstract_model
from causalfusion_jax.prepare.released_inception import ignored_names
from causalfusion_jax.sampling.preview import Preview
from causalfusion_jax.sweeps import sweep as sweeps
from causalfusion_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def tiny_config(**sections) -> dict:
    """Settings of a small, fast run; `sections` change some of them."""
    config = experiment.default_config().to_dict()
    tiny = dict(
        model=dict(hidden=32, heads=2, layers=2),
        train=dict(steps=12, batch_size=16),
        checkpoint=dict(every=4),
        logging=dict(every=4),
        sampling=dict(solver_steps=4),
    )
    for changes in (tiny, sections):
        for section, values in changes.items():
            config[section] |= values
    return config


def train_run(config, workdir, watch=None):
    """Trains as the command does, with evaluations and previews."""
    return loop.train(config, str(workdir), watch, make_evaluator=Evaluator, make_preview=Preview)


def expanded(overrides, **kwargs):
    """The runs of a sweep of the default settings."""
    sweep = sweeps.Sweep(config="", overrides=overrides, **kwargs)
    return sweeps.expand(sweep, experiment.to_dict(experiment.ExperimentConfig()))


def finish_run(workdir, sweep, run, **scores):
    """What a finished run leaves, with made-up scores."""
    for ar_steps in run.ar_steps:
        folder = sweeps.samples_folder(workdir, run, ar_steps, sweep)
        folder.mkdir(parents=True)
        files.write_json(folder / "evaluation.json", scores)
    files.write_json(workdir / run.name / "config.json", experiment.to_dict(run.config))


def random_params(config: TransformerConfig, scale: float = 0.15) -> Params:
    """Parameters without a zero among them, so that every one of them matters."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        values = scale * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + 1.0 if path[-1].key == "scale" else values)

    return jax.tree_util.tree_map_with_path(draw, abstract_model(config)[1])


def shaken(params: Params, scale: float = 0.1) -> Params:
    """`params` with noise on every one of them."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(7)
    return jax.tree.unflatten(tree, [leaf + scale * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def inception_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """The weights that the goldens of Inception were computed with, by released name."""

    def weight(name, shape):
        z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            return 1 + 0.2 * np.abs(z)
        if name.endswith(("running_mean", ".bias")):
            return 0.1 * z
        if name.endswith("bn.weight"):
            return 1 + 0.1 * z
        return z * np.float32(np.sqrt(2 / np.prod(shape[1:])))

    return {name: weight(name, shape) for name, shape in shapes.items() if name not in ignored_names()}


def make_batch(config: experiment.ExperimentConfig, mesh):
    """A random batch on the mesh, and its shapes."""
    rng, shapes = np.random.default_rng(0), config.batch_shapes
    arrays = {
        "image": rng.uniform(-1, 1, shapes["image"][0]).astype(np.float32),
        "label": rng.integers(0, config.data.num_classes, shapes["label"][0]).astype(np.int32),
    }
    if "text" in shapes:
        arrays["text"] = rng.integers(0, config.transformer.text_vocab, shapes["text"][0]).astype(np.int32)
    return jax.device_put(jax.tree.map(jnp.asarray, arrays), sharding.batch_sharding(mesh)), shapes


def command(name: str, *args: str) -> subprocess.CompletedProcess:
    """Runs `python -m causalfusion_jax.NAME ARGS`, in a fork of a process that has its imports.

    Implicit host reads of device arrays fail in it, as `host_reads` says.
    """
    module = f"causalfusion_jax.{name}"
    # Preflight compiles for devices that are not there.
    return run_module(module, *args) if name == "preflight" else run_module("host_reads", module, *args)


def run_module(name: str, *args: str) -> subprocess.CompletedProcess:
    """`command` for a module of any name, of `tests` too."""
    server, folder = command_server()
    request = {"module": name, "args": [str(arg) for arg in args]}
    if name.endswith(".preflight"):
        # The TPU compiler does not know all options of the CPU's.
        request["unset"] = ["XLA_FLAGS"]
    paths = {stream: folder / stream for stream in ("stdout", "stderr")}
    server.stdin.write(json.dumps(request | {stream: str(path) for stream, path in paths.items()}) + "\n")
    server.stdin.flush()
    _, status = server.stdout.readline(), int(server.stdout.readline())
    written = {stream: path.read_text() for stream, path in paths.items()}
    return subprocess.CompletedProcess([name, *args], status, **written)


@functools.cache
def command_server() -> tuple[subprocess.Popen, pathlib.Path]:
    """The process that `command` forks, and a folder for what commands print."""
    folder = tempfile.TemporaryDirectory(prefix="causalfusion_jax-commands-")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "command_server.py")],
        cwd=ROOT,
        env=command_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(lambda: (server.stdin.close(), server.wait(), folder.cleanup()))
    return server, pathlib.Path(folder.name)


def start_processes(count: int, module: str, *args: str) -> list[subprocess.Popen]:
    """Starts `python -m MODULE ARGS` as `count` processes of one job; implicit host reads fail in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "host_reads", module, *map(str, args), *job, f"--process_id={i}"],
            cwd=ROOT,
            env=command_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def all_done(processes: list[subprocess.Popen], timeout: float = 600) -> list[str]:
    """Waits for processes that must all succeed. Returns what each printed."""
    printed = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return [out for out, _ in printed]


@functools.cache
def command_env() -> dict[str, str]:
    """The environment of commands: one device; what one compiled, the next one reuses."""
    env = os.environ | {"XLA_FLAGS": quick_compilation.FLAGS}
    cache = tempfile.TemporaryDirectory(prefix="causalfusion_jax-compiled-")
    atexit.register(cache.cleanup)
    return env | {
        # This checkout's package, whatever is installed, and what tests run commands by.
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
