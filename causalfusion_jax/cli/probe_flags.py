"""Flags of a probe, and its run; the commands `probe` and `evaluate --probe` share them."""

from collections.abc import Callable
from typing import Any

from absl import flags

from causalfusion_jax.cli import app, weights_flags

WEIGHTS = weights_flags.define(
    "Folder of a training run: the one to probe, or that the samples are from.",
    "Folder of a converted checkpoint to probe, instead of --workdir.",
)
_UNTRAINED = flags.DEFINE_bool("untrained", False, "Also probe the same network with fresh weights.")
_join_processes = app.define_processes()
NAMES = (
    "untrained",
    "checkpoint",
    "weights",
    "step",
    "multihost",
    "coordinator_address",
    "num_processes",
    "process_id",
)
"""Flags that only a probe has, but not --workdir."""


def run(make_probe: Callable[..., Any], run_probe: Callable[[Any], None], kind: str, config: Any, out: str | None):
    """Runs the probe that the flags describe.

    Args:
      make_probe, run_probe: `Probe` and `run_probe` of evaluation/probing.py.
      kind: of probe.
      config: value of --config, a ConfigDict or None.
      out: value of --out.
    """
    from causalfusion_jax.config import experiment

    settings = None if config is None else experiment.from_dict(config.to_dict())
    with app.as_flags(), app.exit_status_of_training():
        probe = make_probe(kind, WEIGHTS.choice(), untrained=_UNTRAINED.value, config=settings, out=out)
        _join_processes()
        run_probe(probe)
