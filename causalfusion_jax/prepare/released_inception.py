"""The released Inception-v3 of FID (torch-fidelity, pytorch-fid): its names and array layouts.

Both release the same weights, as `weights-` and `pt_inception-2015-12-05-6726825d.pth`.
"""

from causalfusion_jax.models import inception
from causalfusion_jax.models.inception_layers import convolutions
from causalfusion_jax.prepare import names


def inception_table() -> names.Table:
    """Every released array that the network uses."""
    table = []
    for path, in_channels, conv in convolutions(inception.LAYERS):
        name, channels = ".".join(path), conv.channels
        table += names.conv(f"{name}.conv", path, in_channels, channels, conv.size, bias=False)
        table += names.norm(f"{name}.bn", path, channels)
        table += names.array(f"{name}.bn.running_mean", (channels,), (*path, "mean"))
        table += names.array(f"{name}.bn.running_var", (channels,), (*path, "var"))
    return table + names.linear("fc", ("fc",), inception.feature_channels(), inception.LOGITS)


def ignored_names() -> list[str]:
    """Released arrays that the network does not use: counts of training batches."""
    return [f"{'.'.join(path)}.bn.num_batches_tracked" for path, _, _ in convolutions(inception.LAYERS)]
