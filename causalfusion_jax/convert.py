"""Converts released checkpoints to this package's, and back.

    python -m causalfusion_jax.convert --kind=causalfusion --checkpoint=CausalFusion-XL.pt --out=converted/xl
    python -m causalfusion_jax.convert --kind=mar_vae --checkpoint=kl16.ckpt --out=converted/kl16
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --out=samples/xl

Kinds: causalfusion, acdit (image or video), mar_vae, sd_vae, fid_inception, fvd_i3d. CHECKPOINT
is a .pt, .pth or .ckpt file of PyTorch (or TorchScript), .safetensors or .npz; PyTorch is not
needed, and nothing that a pickle holds is ever executed. Size and settings are recognised from names and
shapes, and every name and shape is checked before OUT is written. What shapes do not tell
(rotary positions leave no trace) comes from the training arguments in the file, else from
the released models, else from --patch_size, --image_size, --frames and --block_size.

And back, to the released names, for a converted folder or a training run:

    python -m causalfusion_jax.convert --reverse --checkpoint=converted/xl --out=xl.safetensors
    python -m causalfusion_jax.convert --reverse --checkpoint=runs/digits --out=digits.safetensors
"""

import json
import math
import pathlib

from absl import flags

from causalfusion_jax import cli
from causalfusion_jax.errors import InputError, require

_KINDS = ["causalfusion", "acdit", "mar_vae", "sd_vae", "fid_inception", "fvd_i3d"]
_KIND = flags.DEFINE_enum("kind", None, _KINDS, "What CHECKPOINT is; told by itself with --reverse.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Released file; with --reverse a converted folder, or a run.")
_OUT = flags.DEFINE_string("out", None, "New folder to write; with --reverse a new .safetensors file.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "model"], "Averaged weights, or the last ones.")
_REVERSE = flags.DEFINE_bool("reverse", False, "Write released names from this package's parameters.")
_GEOMETRY = {
    "patch_size": flags.DEFINE_integer("patch_size", None, "Side of a token in latents, where it cannot be told."),
    "image_size": flags.DEFINE_integer("image_size", None, "Side of an image in latents, where it cannot be told."),
    "frames": flags.DEFINE_integer("frames", None, "Frames of a video (1: image), where it cannot be told."),
    "block_size": flags.DEFINE_integer("block_size", None, "Tokens in an AR step, where it cannot be told."),
}


def _config(sections):
    """The whole config of a converted transformer from what is known of it."""
    from causalfusion_jax import experiment

    merged = experiment.default_config().to_dict()
    for name, values in sections.items():
        merged[name] |= values
    return experiment.from_dict(merged)


def _import():
    """Released file to converted folder."""
    from causalfusion_jax import experiment, files
    from causalfusion_jax.models.store import write_converted
    from causalfusion_jax.released.conversion import make_plan
    from causalfusion_jax.released.names import from_released
    from causalfusion_jax.released.tensors import open_checkpoint, sha256

    require(_KIND.value is not None, "--kind", None, f"is required: one of {', '.join(_KINDS)}")
    out = pathlib.Path(_OUT.value)
    files.require_new("--out", out)
    geometry = {name: flag.value for name, flag in _GEOMETRY.items()}
    for name, value in geometry.items():
        require(value is None or value >= 1, f"--{name}", value, "must be >= 1")
    with open_checkpoint(_CHECKPOINT.value, _WEIGHTS.value) as checkpoint:
        plan = make_plan(
            _KIND.value, checkpoint.shapes, checkpoint.metadata, geometry, lambda s: _config(s).transformer
        )
        settings = plan.settings
        if _KIND.value in ("causalfusion", "acdit"):
            settings = experiment.to_dict(_config(settings))
        params = from_released(plan.table, checkpoint, plan.shapes)
    source = {
        "file": pathlib.Path(_CHECKPOINT.value).name, "sha256": sha256(_CHECKPOINT.value), "weights": _WEIGHTS.value,
    }
    write_converted(out, _KIND.value, settings, source, params)
    values = sum(math.prod(entry.shape) for entry in plan.table)
    print(f"{_KIND.value}: {len(plan.table)} arrays, {values:,} values, written to {out}")
    unused = sorted(set(plan.ignored) & set(checkpoint.shapes))
    if unused:
        print(f"{len(unused)} arrays not used: {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}")
    print(json.dumps({name: plan.settings[name] for name in ("model", "data") if name in plan.settings} or settings))


def _export():
    """Converted folder or run to a file with the released names."""
    from causalfusion_jax import experiment
    from causalfusion_jax.models.store import open_converted
    from causalfusion_jax.released.conversion import export_table
    from causalfusion_jax.released.names import to_released
    from causalfusion_jax.released.tensors import write_safetensors
    from causalfusion_jax.sampling.trained import from_run

    out, folder = pathlib.Path(_OUT.value), pathlib.Path(_CHECKPOINT.value)
    require(out.suffix == ".safetensors", "--out", str(out), "must be a .safetensors file")
    require(not out.exists(), "--out", str(out), "exists; give a new file")
    if (folder / "config.json").is_file():
        trained = from_run(str(folder), "ema" if _WEIGHTS.value == "ema" else "params")
        text = trained.config.text
        require(not text.is_on, "--checkpoint", str(folder), "knows text, for which the released models have no names")
        kind = "acdit" if trained.config.model.conditioning == "adaln" else "causalfusion"
        settings = experiment.to_dict(trained.config)
        table, _ = export_table(kind, settings, trained.config.transformer)
        params = trained.params()
    else:
        converted = open_converted("--checkpoint", str(folder), tuple(_KINDS))
        kind, settings = converted.kind, converted.settings
        model = experiment.from_dict(settings).transformer if kind in ("causalfusion", "acdit") else None
        table, shapes = export_table(kind, settings, model)
        params = converted.params(shapes)
    require(_KIND.value in (None, kind), "--kind", _KIND.value, f"{folder} is of kind {kind}; leave it out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, to_released(table, params), {"kind": kind, "settings": json.dumps(settings)})
    print(f"{kind}: {len(table)} arrays, written to {out}")


def main(argv):
    """Runs the command."""
    del argv
    for name, flag in _GEOMETRY.items():
        if _REVERSE.value and flag.value is not None:
            raise InputError(f"--{name}", flag.value, "has no meaning with --reverse; leave it out")
    _export() if _REVERSE.value else _import()


if __name__ == "__main__":
    cli.run(main, required=("checkpoint", "out"))
