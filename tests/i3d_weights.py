"""Random weights of the I3D, named and laid out as each release has them, written out from the architecture."""

import numpy as np

MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels in, and of the convolutions b0, b1a, b1b, b2a, b2b, b3b (arXiv 1409.4842, table 1)."""


def units() -> dict[str, tuple[int, int, int]]:
    """Channels in, channels out and side of the kernel of every convolution, by its name in pytorch-i3d."""
    found = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    for name, (c, c0, c1a, c1b, c2a, c2b, c3b) in MIXED.items():
        found |= {
            f"Mixed_{name}.{unit}": shape
            for unit, shape in {
                "b0": (c, c0, 1),
                "b1a": (c, c1a, 1),
                "b1b": (c1a, c1b, 3),
                "b2a": (c, c2a, 1),
                "b2b": (c2a, c2b, 3),
                "b3b": (c, c3b, 1),
            }.items()
        }
    return found


def pytorch_i3d(seed: int = 0) -> dict[str, np.ndarray]:
    """As rgb_imagenet.pt of pytorch-i3d; activations keep their size through the network."""
    rng, weights = np.random.default_rng(seed), {}
    for name, (c_in, c_out, side) in units().items():
        kernel = rng.standard_normal((c_out, c_in, side, side, side), np.float32)
        weights[f"{name}.conv3d.weight"] = kernel * np.float32(np.sqrt(2 / (c_in * side**3)))
        weights[f"{name}.bn.weight"] = 1 + 0.1 * rng.standard_normal(c_out, np.float32)
        weights[f"{name}.bn.bias"] = 0.1 * rng.standard_normal(c_out, np.float32)
        weights[f"{name}.bn.running_mean"] = 0.1 * rng.standard_normal(c_out, np.float32)
        weights[f"{name}.bn.running_var"] = 1 + 0.2 * np.abs(rng.standard_normal(c_out, np.float32))
        weights[f"{name}.bn.num_batches_tracked"] = np.array(0)
    weights["logits.conv3d.weight"] = rng.standard_normal((400, 1024, 1, 1, 1), np.float32) / np.float32(32)
    weights["logits.conv3d.bias"] = rng.standard_normal(400, np.float32)
    return weights


def kinetics_i3d_pytorch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as the TorchScript file of StyleGAN-V names them."""
    branches = {"b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0",
                "b2b": "branch_2.1", "b3b": "branch_3.1"}  # fmt: skip

    def renamed(name: str) -> str:
        block, *rest = name.split(".")
        rest = [{"bn": "batch3d", **branches}.get(part, part) for part in rest]
        return ".".join([{"logits": "conv3d_0c_1x1"}.get(block, block.lower()), *rest])

    return {renamed(name): array for name, array in weights.items()}


def tensorflow(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same as the variables of TensorFlow; of weights whose batch norms have a scale of 1."""
    branches = {
        "b0": "Branch_0/Conv3d_0a_1x1",
        "b1a": "Branch_1/Conv3d_0a_1x1",
        "b1b": "Branch_1/Conv3d_0b_3x3",
        "b2a": "Branch_2/Conv3d_0a_1x1",
        "b2b": "Branch_2/Conv3d_0b_3x3",
        "b3b": "Branch_3/Conv3d_0b_1x1",
    }
    parts = {"bn.bias": "batch_norm/beta", "bn.running_mean": "batch_norm/moving_mean",
             "bn.running_var": "batch_norm/moving_variance"}  # fmt: skip
    variables, scope = {}, "RGB/inception_i3d"
    for name in units():
        block, *branch = name.split(".")
        inner = "/".join([block, *(branches[b] for b in branch)])
        if name == "Mixed_5b.b2b":
            inner = "Mixed_5b/Branch_2/Conv3d_0a_3x3"
        variables[f"{scope}/{inner}/conv_3d/w"] = weights[f"{name}.conv3d.weight"].transpose(2, 3, 4, 1, 0)
        for ours, theirs in parts.items():
            variables[f"{scope}/{inner}/{theirs}"] = weights[f"{name}.{ours}"].reshape(1, 1, 1, 1, -1)
    head = f"{scope}/Logits/Conv3d_0c_1x1/conv_3d"
    variables[f"{head}/w"] = weights["logits.conv3d.weight"].transpose(2, 3, 4, 1, 0)
    return variables | {f"{head}/b": weights["logits.conv3d.bias"]}
