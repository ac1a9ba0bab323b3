"""The I3D network of FVD, as a function from videos to logits.

Inception-v1 with every kernel inflated along time (arXiv 1705.07750), RGB, 400 classes of
Kinetics. The Fréchet Video Distance (arXiv 1812.01717) compares its logits, averaged over
time. All convolutions and maximum pools use TensorFlow's SAME padding: output size
ceil(input size / stride), an odd padding behind. Names of blocks and branches are those of
pytorch-i3d. Videos are NDHWC.
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
"""Frames are resized to this side, regardless of their aspect ratio."""
LOGITS = 400
MIN_FRAMES = 9
"""Fewer frames leave less than the two time steps that are pooled at the end."""
RESIZES = ("tf1", "half_pixel")
"""As in TensorFlow 1, as FVD was published, or as in PyTorch; see `inception.resize_bilinear`."""


def _pool(frames: int, side: int, strides: tuple[int, int]) -> Pool:
    """A maximum pool; `strides` in time and in space."""
    return Pool("max", (strides[0], strides[1], strides[1]), "SAME", (frames, side, side))


def _unit(channels: int, side: int = 1, name: str = "", stride: int = 1) -> Conv:
    """A convolution with a cubic kernel."""
    return Conv(channels, (side,) * 3, stride, "SAME", name)


def _mixed(c0: int, c1a: int, c1b: int, c2a: int, c2b: int, c3b: int) -> Block:
    """A block: a 1x1x1 branch, two 3x3x3 branches after a 1x1x1, and a pool; arguments are channels."""
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

        The released network is for a height and width of 224, which leave 7 x 7 positions, all averaged.
        """
        *_, (_, x) = self.run(LAYERS, videos)
        # An average pool over two time steps: of more than two, the first and last count half.
        x = jnp.mean(x, axis=(2, 3))
        x = jnp.mean((x[:, :-1] + x[:, 1:]) / 2, axis=1)
        return jnp.dot(x, self.logits.kernel[...], precision=PRECISION) + self.logits.bias[...]


@functools.cache
def abstract_i3d() -> tuple[nnx.GraphDef, Params]:
    """The network without values of its parameters.

    Returns:
      graph: to `nnx.merge(graph, params)` into an I3D.
      shapes: parameters, including batch statistics, as jax.ShapeDtypeStruct.
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
    """The first program of `i3d_logits`, lowered for videos of a shape and sharding."""
    return _resize.lower(videos_uint8, SIDE, "tf1")


def lower_logits(params: Params, videos_uint8: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The second program of `i3d_logits`, lowered; arguments as shapes with shardings."""
    resized = (*videos_uint8.shape[:2], SIDE, SIDE, videos_uint8.shape[-1])
    return _logits.lower(params, jax.ShapeDtypeStruct(resized, jnp.float32, sharding=videos_uint8.sharding))


def i3d_logits(params: Params, videos_uint8: jax.Array, resize: str = "tf1", side: int = SIDE) -> jax.Array:
    """Logits of videos, the feature that FVD compares.

    Two programs: the large one depends on batch size and number of frames, not on the size of frames.

    Args:
      params: as from `prepare.i3d`; on the device, otherwise every call copies them there.
      videos_uint8: uint8 [batch, frames, height, width, 3], of at least MIN_FRAMES frames.
      resize: one of RESIZES.
      side: side that frames are resized to; scores need the default.

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
