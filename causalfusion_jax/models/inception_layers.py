"""Layers of Inception networks: convolutions with batch norm, pools, blocks of branches.

For images [batch, height, width, channels] or videos [batch, frames, height, width, channels]:
the kernel of a convolution and the window of a pool determine the number of axes. A network is
a table of layers by name.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

BATCH_NORM_EPS = 1e-3
# Lower precision (bfloat16 on a TPU, TF32 on a GPU) changes the scores.
PRECISION = jax.lax.Precision.HIGHEST


class Conv(NamedTuple):
    """A convolution without bias, then batch norm and ReLU.

    Attributes:
      channels: output channels.
      size: (frames,) rows and columns of the kernel.
      stride: stride along every axis.
      padding: as in jax.lax.conv.
      name: its name in its block.
    """

    channels: int
    size: tuple[int, ...] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    name: str = ""


class Pool(NamedTuple):
    """A pool; `average` excludes the padding from the mean.

    Attributes:
      kind: `average` or `max`.
      stride: stride along every axis, or along each.
      padding: as in jax.lax.conv.
      size: (frames,) rows and columns of the window.
    """

    kind: str
    stride: int | tuple[int, ...] = 1
    padding: str = "SAME"
    size: tuple[int, ...] = (3, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, (frames,) height, width, channels] to the same with the strided axes reduced."""
        strides = (self.stride,) * len(self.size) if isinstance(self.stride, int) else self.stride
        if self.kind == "max":
            return nnx.max_pool(x, self.size, strides, self.padding)
        return nnx.avg_pool(x, self.size, strides, self.padding, count_include_pad=False)


Branch = tuple[Pool | tuple[Conv, ...], ...]
"""Sequential steps; the convolutions of one step run in parallel on the same input."""
Block = tuple[Branch, ...]
"""Branches that run in parallel on the same input."""
Layers = Mapping[str, Conv | Pool | Block]
"""A network, in order."""


def block_channels(block: Block) -> int:
    """Channels of a block's output, every branch of which ends in convolutions."""
    return sum(conv.channels for branch in block for conv in branch[-1])


def convolutions(layers: Layers, channels: int = 3) -> Iterator[tuple[tuple[str, ...], int, Conv]]:
    """All convolutions in order: (names of layer and, in a block, convolution), input channels, convolution."""
    for layer_name, layer in layers.items():
        if isinstance(layer, Conv):
            yield (layer_name,), channels, layer
            channels = layer.channels
        elif not isinstance(layer, Pool):
            channels_out = 0
            for branch in layer:
                inner = channels
                for step in branch:
                    if isinstance(step, Pool):
                        continue
                    for conv in step:
                        yield (layer_name, conv.name), inner, conv
                    inner = sum(conv.channels for conv in step)
                channels_out += inner
            channels = channels_out


class ConvUnit(nnx.Module):
    """A `Conv` with its parameters; batch norm is `scale * (x - mean) / sqrt(var + eps) + bias`."""

    def __init__(self, in_channels: int, conv: Conv):
        self.conv = conv
        self.kernel = nnx.Param(jnp.zeros((*conv.size, in_channels, conv.channels)))
        self.scale, self.bias = nnx.Param(jnp.ones(conv.channels)), nnx.Param(jnp.zeros(conv.channels))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(conv.channels)), nnx.BatchStat(jnp.ones(conv.channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        dims = len(self.conv.size)
        axes = "DHW"[-dims:]
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.conv.stride,) * dims,
            self.conv.padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision=PRECISION,
        )
        scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + BATCH_NORM_EPS)
        return jax.nn.relu((x - self.mean[...]) * scale + self.bias[...])


class Mixed(nnx.Module):
    """The convolutions of a block, by name."""

    def __call__(self, x: jax.Array, block: Block) -> jax.Array:
        """The outputs of all branches, concatenated along the channels."""
        return jnp.concatenate([self._run(branch, x) for branch in block], axis=-1)

    def _run(self, branch: Branch, x: jax.Array) -> jax.Array:
        for step in branch:
            if isinstance(step, Pool):
                x = step(x)
            else:
                x = jnp.concatenate([getattr(self, conv.name)(x) for conv in step], axis=-1)
        return x


class LayerStack(nnx.Module):
    """The convolutions of a table of layers, by name."""

    def __init__(self, layers: Layers):
        for (*block, name), in_channels, conv in convolutions(layers):
            parent = self
            if block:
                if not hasattr(self, block[0]):
                    setattr(self, block[0], Mixed())
                parent = getattr(self, block[0])
            setattr(parent, name, ConvUnit(in_channels, conv))

    def run(self, layers: Layers, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Every layer's name and output, in order."""
        for name, layer in layers.items():
            if isinstance(layer, Pool):
                x = layer(x)
            elif isinstance(layer, Conv):
                x = getattr(self, name)(x)
            else:
                x = getattr(self, name)(x, layer)
            yield name, x
