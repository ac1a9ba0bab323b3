"""Converts released checkpoints to this package's format, and back.

    python -m causalfusion_jax.convert --kind=causalfusion --checkpoint=CausalFusion-XL.pt --out=converted/xl
    python -m causalfusion_jax.convert --kind=mar_vae --checkpoint=kl16.ckpt --out=converted/kl16
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --out=samples/xl

Kinds: causalfusion, acdit (image or video), mar_vae, sd_vae, fid_inception, fvd_i3d. CHECKPOINT
is a .pt, .pth or .ckpt file of PyTorch (or TorchScript), .safetensors or .npz; PyTorch is not
needed, and no code in a pickle is executed. Size and settings follow from names and
shapes, and every name and shape is checked before OUT is written. Settings that shapes do not
determine (rotary positions have no parameters) are taken from --patch_size, --image_size, --frames
and --block_size, else from the training arguments in the file, else from the released models.

Export to the released names, from a converted folder or a training run (--weights and --step as
for sample; by default the averaged weights of the newest intact checkpoint):

    python -m causalfusion_jax.convert --reverse --checkpoint=converted/xl --out=xl.safetensors
    python -m causalfusion_jax.convert --reverse --checkpoint=runs/digits --out=digits.safetensors
    python -m causalfusion_jax.convert --checkpoint=digits.safetensors --out=converted/digits

The metadata of an exported file hold all settings, the class names, the step and which weights
it has. Imported again, it samples what the run samples; --kind is not needed, and flags that
contradict the file are refused. Models of texts and images have no released format.
"""

import json
import math
import pathlib

from absl import flags

from causalfusion_jax.cli import app, weights_flags
from causalfusion_jax.common.errors import InputError, require, require_one_of

_KIND = flags.DEFINE_string("kind", None, "Kind of CHECKPOINT [as stored in exported files and folders].")
_TRAINED = weights_flags.define(None, "Released file; with --reverse a converted folder, or a run.")
_OUT = flags.DEFINE_string("out", None, "New folder to write; with --reverse a new .safetensors file.")
_REVERSE = flags.DEFINE_bool("reverse", False, "Write released names from this package's parameters.")
_GEOMETRY = {
    name: flags.DEFINE_integer(name, None, f"{text} [as found in the file].")
    for name, text in {
        "patch_size": "Side of a token in latents",
        "image_size": "Side of an image in latents",
        "frames": "Frames of a video; 1: an image",
        "block_size": "Tokens in an AR step",
    }.items()
}


def _import() -> None:
    """Released file to converted folder."""
    from causalfusion_jax.common import files
    from causalfusion_jax.models.store import describe_source, write_converted
    from causalfusion_jax.sampling.released import read_released

    out = pathlib.Path(_OUT.value)
    files.require_new("--out", out)
    geometry = {name: flag.value for name, flag in _GEOMETRY.items()}
    for name, value in geometry.items():
        require(value is None or value >= 1, f"--{name}", value, "must be >= 1")
    require(_TRAINED.step.value is None, "--step", _TRAINED.step.value, "needs --reverse")
    weights = _TRAINED.values()["weights"]
    # Released files call the last weights so.
    read = read_released(_TRAINED.checkpoint.value, _KIND.value, "model" if weights == "params" else weights, geometry)
    write_converted(out, read.kind, read.settings, read.source, read.params, class_names=read.class_names)
    values = sum(math.prod(entry.shape) for entry in read.table)
    print(f"weights: {describe_source(read.source)}")
    print(f"{read.kind}: {len(read.table)} arrays, {values:,} values, written to {out}")
    if read.unused:
        more = ", ..." if len(read.unused) > 5 else ""
        print(f"{len(read.unused)} arrays not used: {', '.join(read.unused[:5])}{more}")
    shown = {name: read.settings[name] for name in ("model", "data") if name in read.settings}
    print(json.dumps(shown or read.settings))


def _export() -> None:
    """Converted folder or run to a file with the released names."""
    from causalfusion_jax.sampling.released import write_exported

    out = pathlib.Path(_OUT.value)
    require(out.suffix == ".safetensors", "--out", str(out), "must be a .safetensors file")
    require(not out.exists(), "--out", str(out), "exists; give a new file")
    with app.as_flags():
        export = write_exported(_TRAINED.checkpoint.value, out, _KIND.value, **_TRAINED.values())
    print(f"weights: {export.description}")
    print(f"{export.metadata.kind}: {len(export.table)} arrays, written to {out}")


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.prepare.conversion import KINDS

    if _KIND.value is not None:
        require_one_of("--kind", _KIND.value, KINDS)
    for name, flag in _GEOMETRY.items():
        if _REVERSE.value and flag.value is not None:
            raise InputError(f"--{name}", flag.value, "has no meaning with --reverse; leave it out")
    _export() if _REVERSE.value else _import()


if __name__ == "__main__":
    app.run(main, required=("checkpoint", "out"))
