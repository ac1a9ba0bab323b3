"""The I3D of FVD: names and layouts of those who released it.

The same weights (TF-Hub's deepmind/i3d-kinetics-400, which published FVD values are of) go round
as a TorchScript file (StyleGAN-V's i3d_torchscript.pt, named as kinetics_i3d_pytorch), as a
state dict named as pytorch-i3d (VideoGPT's i3d_pretrained_400.pt), and can be written from
TensorFlow as an .npz of its variables by name, without the ":0". pytorch-i3d's rgb_imagenet.pt has the same names and
other weights, trained on ImageNet before.
"""

from collections.abc import Mapping
from typing import NamedTuple

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models import i3d
from causalfusion_jax.models.inception_layers import Conv, block_channels, convolutions
from causalfusion_jax.prepare import names

SCOPE = "RGB/inception_i3d/"
"""Of TensorFlow's variables."""


class Layout(NamedTuple):
    """How one release calls things.

    Attributes:
      probe: a name that only it has.
      norm: its name of a batch norm, "" for TensorFlow.
    """

    probe: str
    norm: str


LAYOUTS = {
    "pytorch-i3d": Layout("Conv3d_1a_7x7.conv3d.weight", "bn"),
    "kinetics_i3d_pytorch": Layout("conv3d_1a_7x7.conv3d.weight", "batch3d"),
    "tensorflow": Layout(f"{SCOPE}Conv3d_1a_7x7/conv_3d/w", ""),
}
_BRANCHES = {
    "kinetics_i3d_pytorch": {
        "b0": "branch_0",
        "b1a": "branch_1.0",
        "b1b": "branch_1.1",
        "b2a": "branch_2.0",
        "b2b": "branch_2.1",
        "b3b": "branch_3.1",
    },
    "tensorflow": {
        "b0": "Branch_0/Conv3d_0a_1x1",
        "b1a": "Branch_1/Conv3d_0a_1x1",
        "b1b": "Branch_1/Conv3d_0b_3x3",
        "b2a": "Branch_2/Conv3d_0a_1x1",
        "b2b": "Branch_2/Conv3d_0b_3x3",
        "b3b": "Branch_3/Conv3d_0b_1x1",
    },
}
_LOGITS = {
    "pytorch-i3d": "logits",
    "kinetics_i3d_pytorch": "conv3d_0c_1x1",
    "tensorflow": f"{SCOPE}Logits/Conv3d_0c_1x1",
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which of LAYOUTS a checkpoint is in. Raises InputError where it is none."""
    for name, layout in LAYOUTS.items():
        if layout.probe in shapes:
            return name
    first = next(iter(shapes), None)
    probes = ", ".join(layout.probe for layout in LAYOUTS.values())
    raise InputError("--checkpoint", first, f"not a checkpoint of fvd_i3d, which has one of {probes}")


def i3d_table(layout: str = "pytorch-i3d") -> names.Table:
    """Every array that the network has, as one of LAYOUTS names it."""
    table, out = [], _LOGITS[layout]
    for path, in_channels, conv in convolutions(i3d.LAYERS):
        table += _unit(layout, _released_name(layout, path), path, in_channels, conv)
    channels = block_channels(i3d.LAYERS["Mixed_5c"])
    if layout == "tensorflow":
        kernel = names.array(f"{out}/conv_3d/w", (1, 1, 1, channels, i3d.LOGITS), ("logits", "kernel"))
        return table + kernel + names.array(f"{out}/conv_3d/b", (i3d.LOGITS,), ("logits", "bias"))
    return table + names.conv(f"{out}.conv3d", ("logits",), channels, i3d.LOGITS, (1, 1, 1))


def ignored_names(layout: str) -> list[str]:
    """Released arrays that the network does not use: counts of training batches."""
    norm = LAYOUTS[layout].norm
    every = [path for path, _, _ in convolutions(i3d.LAYERS)]
    return [f"{_released_name(layout, path)}.{norm}.num_batches_tracked" for path in every] if norm else []


def _released_name(layout: str, path: tuple[str, ...]) -> str:
    """What a convolution is called."""
    if layout == "pytorch-i3d":
        return ".".join(path)
    block, *branch = path
    inner = [_BRANCHES[layout][name] for name in branch]
    if layout == "kinetics_i3d_pytorch":
        return ".".join([block.lower(), *inner])
    if path == ("Mixed_5b", "b2b"):
        # As released.
        inner = ["Branch_2/Conv3d_0a_3x3"]
    return SCOPE + "/".join([block, *inner])


def _unit(layout: str, name: str, path: tuple[str, ...], in_channels: int, conv: Conv) -> names.Table:
    """The arrays of a convolution and its batch norm."""
    c = conv.channels
    if layout == "tensorflow":
        # Its batch norm has no scale.
        return (
            names.array(f"{name}/conv_3d/w", (*conv.size, in_channels, c), (*path, "kernel"))
            + [
                entry
                for released, ours in {"beta": "bias", "moving_mean": "mean", "moving_variance": "var"}.items()
                for entry in names.array(f"{name}/batch_norm/{released}", (1, 1, 1, 1, c), (*path, ours))
            ]
            + names.ones((c,), (*path, "scale"))
        )
    norm = f"{name}.{LAYOUTS[layout].norm}"
    table = names.conv(f"{name}.conv3d", path, in_channels, c, conv.size, bias=False) + names.norm(norm, path, c)
    table += names.array(f"{norm}.running_mean", (c,), (*path, "mean"))
    return table + names.array(f"{norm}.running_var", (c,), (*path, "var"))
