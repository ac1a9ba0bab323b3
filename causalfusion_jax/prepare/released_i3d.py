"""Released I3D networks of FVD: their names and array layouts.

The weights of TF-Hub's deepmind/i3d-kinetics-400, with which FVD values are published, exist as a
TorchScript file (StyleGAN-V's i3d_torchscript.pt, with the names of kinetics_i3d_pytorch), as a state
dict with the names of pytorch-i3d (VideoGPT's i3d_pretrained_400.pt), and can be exported from
TensorFlow as an .npz of its variables by name, without the ":0". pytorch-i3d's rgb_imagenet.pt has the
same names but other weights, pretrained on ImageNet.
"""

from collections.abc import Mapping
from typing import NamedTuple

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models import i3d
from causalfusion_jax.models.inception_layers import Conv, block_channels, convolutions
from causalfusion_jax.prepare import names

SCOPE = "RGB/inception_i3d/"
"""Prefix of the variables in TensorFlow."""


class Release(NamedTuple):
    """Names of one release.

    Attributes:
      probe: a name that only this release has.
      norm: its name of a batch norm, "" for TensorFlow.
    """

    probe: str
    norm: str


RELEASES = {
    "pytorch-i3d": Release("Conv3d_1a_7x7.conv3d.weight", "bn"),
    "kinetics_i3d_pytorch": Release("conv3d_1a_7x7.conv3d.weight", "batch3d"),
    "tensorflow": Release(f"{SCOPE}Conv3d_1a_7x7/conv_3d/w", ""),
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
    """Name of the release of a checkpoint, one of RELEASES. Raises InputError if it is none of them."""
    for name, release in RELEASES.items():
        if release.probe in shapes:
            return name
    first = next(iter(shapes), None)
    probes = ", ".join(release.probe for release in RELEASES.values())
    raise InputError("--checkpoint", first, f"not a checkpoint of fvd_i3d, which has one of {probes}")


def i3d_table(release: str = "pytorch-i3d") -> names.Table:
    """Every array of the network, with its names in one of RELEASES."""
    table, out = [], _LOGITS[release]
    for path, in_channels, conv in convolutions(i3d.LAYERS):
        table += _unit(release, _released_name(release, path), path, in_channels, conv)
    channels = block_channels(i3d.LAYERS["Mixed_5c"])
    if release == "tensorflow":
        kernel = names.array(f"{out}/conv_3d/w", (1, 1, 1, channels, i3d.LOGITS), ("logits", "kernel"))
        return table + kernel + names.array(f"{out}/conv_3d/b", (i3d.LOGITS,), ("logits", "bias"))
    return table + names.conv(f"{out}.conv3d", ("logits",), channels, i3d.LOGITS, (1, 1, 1))


def ignored_names(release: str) -> list[str]:
    """Released arrays that the network does not use: counts of training batches."""
    norm = RELEASES[release].norm
    paths = [path for path, _, _ in convolutions(i3d.LAYERS)]
    return [f"{_released_name(release, path)}.{norm}.num_batches_tracked" for path in paths] if norm else []


def _released_name(release: str, path: tuple[str, ...]) -> str:
    """Released name of a convolution."""
    if release == "pytorch-i3d":
        return ".".join(path)
    block, *branch = path
    inner = [_BRANCHES[release][name] for name in branch]
    if release == "kinetics_i3d_pytorch":
        return ".".join([block.lower(), *inner])
    if path == ("Mixed_5b", "b2b"):
        # This exception is in the release.
        inner = ["Branch_2/Conv3d_0a_3x3"]
    return SCOPE + "/".join([block, *inner])


def _unit(release: str, name: str, path: tuple[str, ...], in_channels: int, conv: Conv) -> names.Table:
    """The arrays of a convolution and its batch norm."""
    c = conv.channels
    if release == "tensorflow":
        # The batch norm of the release has no scale.
        return (
            names.array(f"{name}/conv_3d/w", (*conv.size, in_channels, c), (*path, "kernel"))
            + [
                entry
                for released, ours in {"beta": "bias", "moving_mean": "mean", "moving_variance": "var"}.items()
                for entry in names.array(f"{name}/batch_norm/{released}", (1, 1, 1, 1, c), (*path, ours))
            ]
            + names.ones((c,), (*path, "scale"))
        )
    norm = f"{name}.{RELEASES[release].norm}"
    table = names.conv(f"{name}.conv3d", path, in_channels, c, conv.size, bias=False) + names.norm(norm, path, c)
    table += names.array(f"{norm}.running_mean", (c,), (*path, "mean"))
    return table + names.array(f"{norm}.running_var", (c,), (*path, "var"))
