"""Converts released checkpoints to this package's, and back.

    python -m causalfusion_jax.convert --kind=causalfusion --checkpoint=CausalFusion-XL.pt --out=converted/xl
    python -m causalfusion_jax.convert --kind=mar_vae --checkpoint=kl16.ckpt --out=converted/kl16
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --out=samples/xl

Kinds: causalfusion, acdit (image or video), mar_vae, sd_vae, fid_inception, fvd_i3d. CHECKPOINT
is a .pt, .pth or .ckpt file of PyTorch (or TorchScript), .safetensors or .npz; PyTorch is not
needed, and nothing that a pickle holds is ever executed. Size and settings are recognised from names and
shapes, and every name and shape is checked before OUT is written. What shapes do not tell
(rotary positions leave no trace) comes from --patch_size, --image_size, --frames and
--block_size, else from the training arguments in the file, else from the released models.

And back, to the released names, for a converted folder or a training run (of which the newest
intact step is taken):

    python -m causalfusion_jax.convert --reverse --checkpoint=converted/xl --out=xl.safetensors
    python -m causalfusion_jax.convert --reverse --checkpoint=runs/digits --out=digits.safetensors
    python -m causalfusion_jax.convert --checkpoint=digits.safetensors --out=converted/digits

The metadata of such a file hold all settings, the class names, the step and which weights
these are. Imported again, it samples what the run samples; no --kind is needed, and flags that
contradict the file are refused. Models of texts and images have no released format.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

from causalfusion_jax.cli import command as cli
from causalfusion_jax.common.errors import InputError, require, require_one_of

_KINDS = ["causalfusion", "acdit", "mar_vae", "sd_vae", "fid_inception", "fvd_i3d"]
_KIND = flags.DEFINE_enum("kind", None, _KINDS, "What CHECKPOINT is [as it says, with --reverse or once exported].")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Released file; with --reverse a converted folder, or a run.")
_OUT = flags.DEFINE_string("out", None, "New folder to write; with --reverse a new .safetensors file.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "model"], "Averaged weights [ema], or the last ones.")
_REVERSE = flags.DEFINE_bool("reverse", False, "Write released names from this package's parameters.")
_GEOMETRY = {
    "patch_size": flags.DEFINE_integer("patch_size", None, "Side of a token in latents, where it cannot be told."),
    "image_size": flags.DEFINE_integer("image_size", None, "Side of an image in latents, where it cannot be told."),
    "frames": flags.DEFINE_integer("frames", None, "Frames of a video (1: image), where it cannot be told."),
    "block_size": flags.DEFINE_integer("block_size", None, "Tokens in an AR step, where it cannot be told."),
}


class _Imported(NamedTuple):
    """A released or exported file as it is written to a converted folder."""

    kind: str
    settings: dict[str, Any]
    table: list
    params: Any
    source: dict[str, Any]
    class_names: tuple[str, ...]
    unused: list[str]


def read_released(path: str, kind: str | None, weights: str | None, geometry: Mapping[str, int | None]) -> _Imported:
    """Reads a released file, or one that this command exported, whose metadata hold all settings.

    Args:
      path: the file.
      kind: what it is; None: as its metadata say.
      weights: `ema` or `model`; None: `ema` where the file holds both.
      geometry: patch_size, image_size, frames and block_size; None: not said.

    Raises:
      InputError: the file is not of this kind, is damaged, or contradicts what is said of it.
    """
    from causalfusion_jax.config import experiment
    from causalfusion_jax.prepare import conversion, exported
    from causalfusion_jax.prepare.names import from_released
    from causalfusion_jax.prepare.tensors import open_checkpoint, sha256

    with open_checkpoint(path, weights or "ema") as checkpoint:
        ours = exported.from_metadata(checkpoint.metadata)
        if ours is None:
            require(kind is not None, "--kind", None, f"is required: one of {', '.join(_KINDS)}")
            plan = conversion.make_plan(
                kind, checkpoint.shapes, checkpoint.metadata, geometry, lambda s: experiment.from_dict(s).transformer
            )
            require(
                weights in (None, checkpoint.weights),
                "--weights",
                weights,
                f"the file holds one set of weights, called {checkpoint.weights or 'nothing'}; leave it out",
            )
            settings, said = plan.settings, {"weights": checkpoint.weights}
            if kind in exported.TRANSFORMERS:
                settings = experiment.to_dict(experiment.from_dict(settings))
        else:
            config = _check_exported(ours, kind, weights, geometry)
            kind = ours.kind
            plan = conversion.plan_of_exported(ours, checkpoint.shapes, config and config.transformer)
            settings, said = ours.settings, {"weights": ours.weights, "step": ours.step}
        params = from_released(plan.table, checkpoint, plan.shapes)
        unused = sorted(set(plan.ignored) & set(checkpoint.shapes))
    source = {"file": pathlib.Path(path).name, "sha256": sha256(path)}
    source |= {name: value for name, value in said.items() if value is not None}
    return _Imported(kind, settings, plan.table, params, source, ours.class_names if ours else (), unused)


def _check_exported(ours, kind: str | None, weights: str | None, geometry: Mapping[str, int | None]):
    """The config of an exported transformer, or None. Raises InputError where the flags contradict the file."""
    from causalfusion_jax.config import experiment
    from causalfusion_jax.prepare.exported import TRANSFORMERS

    require_one_of("--checkpoint", ours.kind, _KINDS)
    require(kind in (None, ours.kind), "--kind", kind, f"the file was exported as {ours.kind}; leave it out")
    require(
        weights is None or weights == ours.weights,
        "--weights",
        weights,
        f"the file holds one set of weights{f' ({ours.weights})' if ours.weights else ''}; leave it out",
    )
    config, known = None, {}
    if ours.kind in TRANSFORMERS:
        config = experiment.from_dict(ours.settings)
        known = {
            "patch_size": config.model.patch_size,
            "image_size": config.data.image_size,
            "frames": config.data.frames,
        }
        if config.factorization.steps == "block":
            known["block_size"] = config.factorization.block_size
    for name, given in geometry.items():
        said = known.get(name)
        allowed = "has no meaning for this file" if said is None else f"the file was exported with {said}"
        require(given in (None, said), f"--{name}", given, f"{allowed}; leave it out")
    return config


def _import():
    """Released file to converted folder."""
    from causalfusion_jax.common import files
    from causalfusion_jax.models.store import describe_source, write_converted

    out = pathlib.Path(_OUT.value)
    files.require_new("--out", out)
    geometry = {name: flag.value for name, flag in _GEOMETRY.items()}
    for name, value in geometry.items():
        require(value is None or value >= 1, f"--{name}", value, "must be >= 1")
    read = read_released(_CHECKPOINT.value, _KIND.value, _WEIGHTS.value, geometry)
    write_converted(out, read.kind, read.settings, read.source, read.params, read.class_names)
    values = sum(math.prod(entry.shape) for entry in read.table)
    print(f"weights: {describe_source(read.source)}")
    print(f"{read.kind}: {len(read.table)} arrays, {values:,} values, written to {out}")
    if read.unused:
        more = ", ..." if len(read.unused) > 5 else ""
        print(f"{len(read.unused)} arrays not used: {', '.join(read.unused[:5])}{more}")
    shown = {name: read.settings[name] for name in ("model", "data") if name in read.settings}
    print(json.dumps(shown or read.settings))


def write_exported(folder: str, out: pathlib.Path, kind: str | None, weights: str | None) -> tuple[str, int, str]:
    """Writes a converted folder or a run to a file with the released names, and all settings as its metadata.

    Args:
      folder: the converted checkpoint, or the run, of which the newest intact step is taken.
      out: the new file.
      kind: what it is; None: as it says itself.
      weights: of a run, `ema` [default] or `model`; None for a converted checkpoint, which has one set.

    Returns:
      The kind, the number of arrays, and which weights they are.

    Raises:
      InputError: the released format cannot hold such a model, or `folder` is none; nothing is written.
    """
    from causalfusion_jax.config import experiment
    from causalfusion_jax.models.store import open_converted
    from causalfusion_jax.prepare.conversion import export_table
    from causalfusion_jax.prepare.exported import TRANSFORMERS, Exported
    from causalfusion_jax.prepare.names import to_released
    from causalfusion_jax.prepare.tensors import write_safetensors
    from causalfusion_jax.sampling.trained import from_run

    if (pathlib.Path(folder) / "config.json").is_file():
        weights = weights or "ema"
        trained = from_run(folder, "ema" if weights == "ema" else "params")
        config, settings = trained.config, experiment.to_dict(trained.config)
        require(
            not config.text.is_on,
            "--checkpoint",
            folder,
            "is a model of texts and images, which the released formats cannot hold",
        )
        exported = Exported(
            "acdit" if config.model.conditioning == "adaln" else "causalfusion",
            settings,
            trained.class_names,
            weights,
            trained.origin["step"],
        )
        table, _ = export_table(exported.kind, settings, config.transformer)
        read, description = trained.params, trained.description
    else:
        require(weights is None, "--weights", weights, "a converted checkpoint has one set; leave it out")
        converted = open_converted("--checkpoint", folder, tuple(_KINDS))
        source, settings = converted.source, converted.settings
        exported = Exported(converted.kind, settings, converted.class_names, source.get("weights"), source.get("step"))
        model = experiment.from_dict(settings).transformer if converted.kind in TRANSFORMERS else None
        table, shapes = export_table(converted.kind, settings, model)
        read, description = lambda: converted.params(shapes), converted.description
    require(kind in (None, exported.kind), "--kind", kind, f"{folder} is of kind {exported.kind}; leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, to_released(table, read()), exported.to_metadata())
    return exported.kind, len(table), description


def _export():
    """Converted folder or run to a file with the released names."""
    out = pathlib.Path(_OUT.value)
    require(out.suffix == ".safetensors", "--out", str(out), "must be a .safetensors file")
    require(not out.exists(), "--out", str(out), "exists; give a new file")
    kind, arrays, description = write_exported(_CHECKPOINT.value, out, _KIND.value, _WEIGHTS.value)
    print(f"weights: {description}")
    print(f"{kind}: {arrays} arrays, written to {out}")


def main(argv):
    """Runs the command."""
    del argv
    for name, flag in _GEOMETRY.items():
        if _REVERSE.value and flag.value is not None:
            raise InputError(f"--{name}", flag.value, "has no meaning with --reverse; leave it out")
    _export() if _REVERSE.value else _import()


if __name__ == "__main__":
    cli.run(main, required=("checkpoint", "out"))
