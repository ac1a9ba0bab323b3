"""Flags of a probe, which the commands `probe` and `evaluate` take."""

from typing import Any

from absl import flags

from causalfusion_jax.cli import command as cli

_UNTRAINED = flags.DEFINE_bool("untrained", False, "Also probe the same network with fresh weights.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a converted checkpoint to probe, not --workdir.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "params"], "Of a run to probe: averaged weights [ema], or the last."
)
_STEP = flags.DEFINE_string("step", None, "Of a run to probe: a step, or `best` [the newest intact checkpoint].")
join_processes = cli.define_processes()
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


def values() -> dict[str, Any]:
    """Settings of `probing.Probe`, by name."""
    step = int(_STEP.value) if (_STEP.value or "").isdigit() else _STEP.value
    return dict(checkpoint=_CHECKPOINT.value, weights=_WEIGHTS.value, step=step, untrained=_UNTRAINED.value)
