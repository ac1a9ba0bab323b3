"""The settings that a run keeps in WORKDIR/config.json, and which of them may change between its starts."""

import dataclasses
import json
import pathlib
from typing import Any

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.requests import plain, require_same
from causalfusion_jax.config.experiment import ExperimentConfig, from_dict, to_dict
from causalfusion_jax.data.tokenizers import with_checksum

FREE_SECTIONS = frozenset({"checkpoint", "logging", "sampling", "evaluation", "probe", "finetune", "mesh"})
"""Sections that do not change what is learned."""

EXECUTION = frozenset({
    # How files are read.
    "data.workers", "data.verify", "data.max_corrupt",
    # How a step is computed: results differ by rounding alone. No example's randomness depends on the parts of a batch.
    "model.attention", "model.remat", "model.scan_unroll", "train.grad_accum_steps",
})  # fmt: skip
"""Settings of other sections that change neither what is learned nor what is measured."""

FREE_SETTINGS = EXECUTION | {
    # Data that were moved, or the tokenizer's file, must be the same data: their checksums are compared.
    "data.path", "text.path",
    # To continue a run that diverged.
    "optimizer.learning_rate", "optimizer.clip_norm", "train.max_nonfinite_steps",
}  # fmt: skip
"""Settings of other sections that may change between the starts of a run."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value of each setting that changed, by its path: `optimizer.learning_rate`."""


def load_config(workdir: str) -> ExperimentConfig:
    """The settings of an existing run. Raises InputError if `workdir` is not the folder of one."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError("workdir", workdir, "is not the folder of a training run (it has no config.json)")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError("workdir", workdir, f"its config.json cannot be read: {error}") from None
    return from_dict(values)


def claim_workdir(workdir: str, config: ExperimentConfig) -> Changes:
    """Makes `workdir` the folder of this run, or checks that it already is.

    Returns:
      The settings that differ from the stored ones, which `record_changes` replaces.

    Raises:
      InputError: it holds other files, or a run with other settings that change what is learned.
    """
    folder = pathlib.Path(workdir)
    config = _with_checksums(config)
    if (folder / "config.json").is_file():
        stored, wanted = settings_by_path(load_config(workdir)), settings_by_path(config)
        changes = {path: (stored[path], value) for path, value in wanted.items() if value != stored[path]}
        _check_allowed(workdir, changes, config)
        return changes
    if not files.is_new(folder):
        raise InputError("workdir", workdir, "must be a new or empty folder, or that of a run to continue")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "config.json", to_dict(config))
    return {}


def record_changes(workdir: str, config: ExperimentConfig, changes: Changes, step: int) -> None:
    """Stores changed settings as the run's own, and from which step on they apply in `config_history.jsonl`."""
    if not changes:
        return
    folder = pathlib.Path(workdir)
    files.drop_torn_line(folder / "config_history.jsonl")
    line = {"step": step, "changed": {name: {"old": old, "new": new} for name, (old, new) in changes.items()}}
    with (folder / "config_history.jsonl").open("a") as history:
        history.write(json.dumps(line) + "\n")
    files.write_json(folder / "config.json", to_dict(_with_checksums(config)))


def settings_by_path(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting by its path, `train.steps`."""
    return {f"{section}.{name}": value for section, values in to_dict(config).items() for name, value in values.items()}


def measured_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Every setting that scores of samples depend on, by its path, as plain values."""
    # Sampling may change between starts of training, but scores depend on it. The checksum follows from the file.
    free = FREE_SECTIONS - {"sampling"}
    ignored = EXECUTION | {"text.checksum"}
    settings = settings_by_path(config)
    return plain({p: value for p, value in settings.items() if p.partition(".")[0] not in free and p not in ignored})


def _with_checksums(config: ExperimentConfig) -> ExperimentConfig:
    """The settings as a run stores them: with the checksum of the tokenizer's file."""
    return dataclasses.replace(config, text=with_checksum(config.text))


def _check_allowed(workdir: str, changes: Changes, config: ExperimentConfig) -> None:
    """Raises InputError naming the changes that would change what is learned."""
    free = FREE_SETTINGS | ({"train.steps"} if config.optimizer.schedule == "constant" else frozenset())
    if not changes.get("text.checksum", ("stored",))[0]:
        # The run is older than checksums.
        free |= {"text.checksum"}
    refused = {
        path: values
        for path, values in changes.items()
        if path.partition(".")[0] not in FREE_SECTIONS and path not in free
    }
    old, new = ({path: values[i] for path, values in refused.items()} for i in range(2))
    require_same("workdir", workdir, old, new, "belongs to another config", "use another workdir")
