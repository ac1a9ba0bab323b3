"""Released checkpoint files, and files with released names that this package exported: reading and writing them."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.store import open_converted
from causalfusion_jax.prepare import conversion
from causalfusion_jax.prepare.conversion import KINDS, export_table
from causalfusion_jax.prepare.exported import TRANSFORMERS, Exported, from_metadata
from causalfusion_jax.prepare.names import Table, from_released, to_released
from causalfusion_jax.prepare.released_transformers import Geometry
from causalfusion_jax.prepare.tensors import open_checkpoint, sha256, write_safetensors
from causalfusion_jax.sampling.trained import WeightsChoice


class Imported(NamedTuple):
    """A released or exported file, as it is written to a converted folder.

    Attributes:
      kind: one of KINDS.
      settings: of the network; of a transformer the sections of its config.
      table: released names of the parameters.
      params: the parameters.
      source: name and checksum of the file, and which weights these are.
      class_names: of an exported transformer; () if they are not known.
      unused: names in the file that are not used.
    """

    kind: str
    settings: dict[str, Any]
    table: Table
    params: Params
    source: dict[str, Any]
    class_names: tuple[str, ...]
    unused: list[str]


def read_released(path: str, kind: str | None, weights: str | None, geometry: Geometry) -> Imported:
    """Reads a released file, or an exported one, whose metadata hold all settings.

    Args:
      path: the file.
      kind: one of KINDS; None: as in the file's metadata.
      weights: `ema` or `model`; None: `ema` if the file holds both.
      geometry: patch_size, image_size, frames and block_size; None: not given.

    Raises:
      InputError: the file is damaged, not of this kind, or contradicts an argument.
    """
    with open_checkpoint(path, weights or "ema") as checkpoint:
        exported = from_metadata(checkpoint.metadata)
        if exported is None:
            require(kind is not None, "--kind", None, f"is required: one of {', '.join(KINDS)}")
            plan = conversion.make_plan(
                kind, checkpoint.shapes, checkpoint.metadata, geometry, lambda s: experiment.from_dict(s).transformer
            )
            allowed = f"the file holds one set of weights, called {checkpoint.weights or 'nothing'}; leave it out"
            require(weights in (None, checkpoint.weights), "--weights", weights, allowed)
            settings, origin = plan.settings, {"weights": checkpoint.weights}
            if kind in TRANSFORMERS:
                settings = experiment.to_dict(experiment.from_dict(settings))
        else:
            config = _check_exported(exported, kind, weights, geometry)
            kind = exported.kind
            plan = conversion.plan_of_exported(exported, checkpoint.shapes, config and config.transformer)
            settings, origin = exported.settings, {"weights": exported.weights, "step": exported.step}
        params = from_released(plan.table, checkpoint, plan.shapes)
        unused = sorted(set(plan.ignored) & set(checkpoint.shapes))
    source = {"file": pathlib.Path(path).name, "sha256": sha256(path)}
    source |= {name: value for name, value in origin.items() if value is not None}
    class_names = exported.class_names if exported else ()
    return Imported(kind, settings, plan.table, params, source=source, class_names=class_names, unused=unused)


def _check_exported(
    exported: Exported, kind: str | None, weights: str | None, geometry: Geometry
) -> ExperimentConfig | None:
    """The config of an exported transformer, or None. Raises InputError if an argument contradicts the file."""
    require_one_of("--checkpoint", exported.kind, KINDS)
    require(kind in (None, exported.kind), "--kind", kind, f"the file was exported as {exported.kind}; leave it out")
    allowed = f"the file holds one set of weights{f' ({exported.weights})' if exported.weights else ''}; leave it out"
    require(weights is None or weights == exported.weights, "--weights", weights, allowed)
    config, known = None, {}
    if exported.kind in TRANSFORMERS:
        config = experiment.from_dict(exported.settings)
        known = {
            "patch_size": config.model.patch_size,
            "image_size": config.data.image_size,
            "frames": config.data.frames,
        }
        if config.factorization.steps == "block":
            known["block_size"] = config.factorization.block_size
    for name, given in geometry.items():
        value = known.get(name)
        allowed = "has no meaning for this file" if value is None else f"the file was exported with {value}"
        require(given in (None, value), f"--{name}", given, f"{allowed}; leave it out")
    return config


class Export(NamedTuple):
    """What is exported.

    Attributes:
      metadata: kind, settings and origin of the weights.
      table: released names of the parameters.
      params: reads the parameters.
      description: the run or file of the weights, and their step.
    """

    metadata: Exported
    table: Table
    params: Callable[[], Params]
    description: str


def write_exported(
    folder: str, out: pathlib.Path, kind: str | None = None, weights: str | None = None, step: int | str | None = None
) -> Export:
    """Writes a converted folder or a run to a file with the released names, and all settings as its metadata.

    Args:
      folder: the converted checkpoint, or the run.
      out: the new file.
      kind: one of KINDS; None: the kind of `folder`.
      weights, step: of a run, see `WeightsChoice`.

    Raises:
      InputError: the released format cannot hold such a model, or `folder` holds none; nothing is written.
    """
    is_run = (pathlib.Path(folder) / "config.json").is_file()
    choice = WeightsChoice(*((folder, None) if is_run else (None, folder)), weights, step)
    export = _of_run(choice) if is_run else _of_converted(folder)
    exported_kind = export.metadata.kind
    require(kind in (None, exported_kind), "--kind", kind, f"{folder} is of kind {exported_kind}; leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, to_released(export.table, export.params()), export.metadata.to_metadata())
    return export


def _of_run(choice: WeightsChoice) -> Export:
    """The transformer of a run. Raises InputError if no released format can hold it."""
    trained = choice.open()
    config, settings = trained.config, experiment.to_dict(trained.config)
    allowed = "is a model of texts and images, which the released formats cannot hold"
    require(not config.text.is_on, "--checkpoint", choice.workdir, allowed)
    metadata = Exported(
        "acdit" if config.model.conditioning == "adaln" else "causalfusion",
        settings,
        trained.class_names,
        # Released files call the last weights so.
        weights="model" if trained.origin["weights"] == "params" else "ema",
        step=trained.origin["step"],
    )
    table, _ = export_table(metadata.kind, settings, config.transformer)
    return Export(metadata, table, trained.params, trained.description)


def _of_converted(folder: str) -> Export:
    """The network of a converted checkpoint. Raises InputError if `folder` does not hold one."""
    converted = open_converted("--checkpoint", folder, tuple(KINDS))
    source, settings = converted.source, converted.settings
    metadata = Exported(
        converted.kind, settings, converted.class_names, weights=source.get("weights"), step=source.get("step")
    )
    model = experiment.from_dict(settings).transformer if converted.kind in TRANSFORMERS else None
    table, shapes = export_table(converted.kind, settings, model)
    return Export(metadata, table, lambda: converted.params(shapes), converted.description)
