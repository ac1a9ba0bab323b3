"""The I3D network that FVD is defined by, as a function from videos to logits.

Inception-v1 with every kernel inflated along time (arXiv 1705.07750), RGB, 400 classes of
Kinetics. The Fréchet Video Distance (arXiv 1812.01717) compares its logits, averaged over
time. All convolutions and maximum pools are padded as TensorFlow's SAME: as little as makes
the size out ceil(size in / stride), the odd one behind. Names of blocks and branches are those
of pytorch-i3d. Videos are NDHWC.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from causalfusion_jax.common.errors import require, require_one_of
from causalfusion_jax.models.inception import resize_bilinear
from causalfusion_jax.models.inception_layers import PRECISION, Block, Conv, Layers, LayerStack, Pool, block_channels
from causalfusion_jax.models.params import Params

SIDE = 224
"""Frames are resized to this side, whatever their aspect."""
LOGITS = 400
MIN_FRAMES = 9
"""Fewer leave less than the two steps in time that are pooled at the end."""
RESIZES = ("tf1", "half_pixel")
"""TensorFlow 1's, by which FVD was published, or PyTorch's; see `inception.resize_bilinear`."""


def _pool(frames: int, side: int, strides: tuple[int, int]) -> Pool:
    """A maximum pool; `strides` in time and in space."""
    return Pool("max", (strides[0], strides[1], strides[1]), "SAME", (frames, side, side))


def _unit(channels: int, side: int = 1, name: str = "", stride: int = 1) -> Conv:
    """A convolution with a cube as its kernel."""
    return Conv(channels, (side,) * 3, stride, "SAME", name)


def _mixed(c0: int, c1a: int, c1b: int, c2a: int, c2b: int, c3b: int) -> Block:
    """Branches of a 1-cube, two of a 3-cube after a 1-cube, and a pool; channels of each convolution."""
    return (
        ((_unit(c0, 1, "b0"),),),
        ((_unit(c1a, 1, "b1a"),), (_unit(c1b, 3, "b1b"),)),
        ((_unit(c2a, 1, "b2a"),), (_unit(c2b, 3, "b2b"),)),
        (_pool(3, 3, (1, 1)), (_unit(c3b, 1, "b3b"),)),
    )


LAYERS: Layers = {
    "Conv3d_1a_7x7": _unit(64, 7, stride=2),
    "MaxPool3d_2a_3x3": _pool(1, 3, (1, 2)),
    "Conv3d_2b_1x1": _unit(64),
    "Conv3d_2c_3x3": _unit(192, 3),
    "MaxPool3d_3a_3x3": _pool(1, 3, (1, 2)),
    "Mixed_3b": _mixed(64, 96, 128, 16, 32, 32),
    "Mixed_3c": _mixed(128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": _pool(3, 3, (2, 2)),
    "Mixed_4b": _mixed(192, 96, 208, 16, 48, 64),
    "Mixed_4c": _mixed(160, 112, 224, 24, 64, 64),
    "Mixed_4d": _mixed(128, 128, 256, 24, 64, 64),
    "Mixed_4e": _mixed(112, 144, 288, 32, 64, 64),
    "Mixed_4f": _mixed(256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": _pool(2, 2, (2, 2)),
    "Mixed_5b": _mixed(256, 160, 320, 32, 128, 128),
    "Mixed_5c": _mixed(384, 192, 384, 48, 128, 128),
}


class I3D(LayerStack):
    """Inception-v1 I3D with fixed batch statistics."""

    def __init__(self):
        super().__init__(LAYERS)
        channels = block_channels(LAYERS["Mixed_5c"])
        self.logits = nnx.Linear(channels, LOGITS, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))

    def __call__(self, videos: jax.Array) -> jax.Array:
        """Logits [batch, 400] of videos [batch, frames, height, width, 3] with values in [-1, 1].

        Released for a height and width of 224, which end as 7 places, all averaged.
        """
        for _, x in self.run(LAYERS, videos):
            pass
        # Two steps in time at a time: of more than two, those at the ends count half.
        x = jnp.mean(x, axis=(2, 3))
        x = jnp.mean((x[:, :-1] + x[:, 1:]) / 2, axis=1)
        return jnp.dot(x, self.logits.kernel[...], precision=PRECISION) + self.logits.bias[...]


@functools.cache
def abstract_i3d() -> tuple[nnx.GraphDef, Params]:
    """The network without its numbers.

    Returns:
      graph: to `nnx.merge(graph, params)` into an I3D.
      shapes: parameters, batch statistics among them, as jax.ShapeDtypeStruct.
    """
    graph, state = nnx.split(jax.eval_shape(I3D))
    return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resize(videos, side, resize):
    return resize_bilinear(videos, (side, side), resize == "half_pixel") * (2.0 / 255.0) - 1.0


@jax.jit
def _logits(params, videos):
    return nnx.merge(abstract_i3d()[0], params)(videos)


def lower_resize(videos_uint8: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The first program of `i3d_logits`, to be compiled, for videos of a shape and sharding."""
    return _resize.lower(videos_uint8, SIDE, "tf1")


def lower_logits(params: Params, videos_uint8: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The second program of `i3d_logits`, to be compiled; its arguments as shapes with shardings."""
    resized = (*videos_uint8.shape[:2], SIDE, SIDE, videos_uint8.shape[-1])
    return _logits.lower(params, jax.ShapeDtypeStruct(resized, jnp.float32, sharding=videos_uint8.sharding))


def i3d_logits(params: Params, videos_uint8: jax.Array, resize: str = "tf1", side: int = SIDE) -> jax.Array:
    """What FVD compares.

    Two programs: the large one depends on batch size and frames alone, not on the frames' size.

    Args:
      params: as from `released.i3d`; on the device, or every call copies them there.
      videos_uint8: uint8 [batch, frames, height, width, 3], of at least MIN_FRAMES frames.
      resize: one of RESIZES.
      side: that frames are resized to; scores call for the default.

    Returns:
      float32 [batch, 400], before the softmax, averaged over time.

    Raises:
      InputError: videos of another shape or type.
    """
    shape, dtype = jnp.shape(videos_uint8), videos_uint8.dtype
    fits = len(shape) == 5 and shape[-1] == 3 and shape[1] >= MIN_FRAMES
    require(fits, "videos_uint8", shape, f"must be [batch, frames >= {MIN_FRAMES}, height, width, 3]")
    require(dtype == jnp.uint8, "videos_uint8", str(dtype), "must be uint8")
    require_one_of("resize", resize, RESIZES)
    return _logits(params, _resize(videos_uint8, side, resize))
