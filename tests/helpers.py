"""A tiny model of digits, and what several tests do with it."""

import atexit
import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax import experiment, sharding
from causalfusion_jax.models.transformer import Params, TransformerConfig, init_params

ROOT = pathlib.Path(__file__).resolve().parent.parent


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


def shaken(params: Params, scale: float = 0.1) -> Params:
    """Parameters without a zero among them, so that every one of them matters."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_params(config: TransformerConfig, scale: float = 0.1) -> Params:
    """`shaken` fresh parameters, as one program."""
    return shaken(init_params(config, jax.random.key(0)), scale)


def make_batch(config: experiment.ExperimentConfig, mesh):
    """A random batch on the mesh, and its shapes."""
    rng = np.random.default_rng(0)
    size, batch = config.data.image_size, config.train.batch_size
    arrays = {
        "image": rng.uniform(-1, 1, (batch, size, size, config.data.channels)).astype(np.float32),
        "label": rng.integers(0, config.data.num_classes, batch).astype(np.int32),
    }
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return jax.device_put(jax.tree.map(jnp.asarray, arrays), sharding.batch_sharding(mesh)), shapes


def command(name: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """Runs `python -m causalfusion_jax.NAME ARGS` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", f"causalfusion_jax.{name}", *map(str, args)],
        cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=900, **kwargs,
    )


@functools.cache
def command_env() -> dict[str, str]:
    """The environment of commands: one device; what one compiled, the next one reuses."""
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    cache = tempfile.TemporaryDirectory(prefix="causalfusion_jax-compiled-")
    atexit.register(cache.cleanup)
    return env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
