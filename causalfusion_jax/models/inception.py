"""The Inception-v3 network of FID, as a function from images to features.

The network of 2015 (arXiv 1512.00567) as implemented in TensorFlow: average pools exclude the
padding from the mean, the last block has a maximum pool, 1008 logits, batch norm with fixed
statistics. torch-fidelity and pytorch-fid released its weights for PyTorch; the names of blocks
and branches are theirs. Images are NHWC.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causalfusion_jax.common.errors import require
from causalfusion_jax.models.inception_layers import PRECISION, Block, Branch, Conv, LayerStack, Pool, block_channels
from causalfusion_jax.models.params import Params

SIDE = 299
"""Images are resized to this side."""
SPATIAL_CHANNELS = 7
"""Channels of the spatial features; 7 of them make 7 * 17 * 17 = 2023 values, close to 2048."""
LOGITS = 1008

AVERAGE = Pool("average")
HALVE = Pool("max", 2, "VALID")


def _branch(name: str, *steps: Pool | Conv | tuple[Conv, ...]) -> Branch:
    """Names the convolutions of a branch: a single one like the branch, steps _1, _2, ..., parallel ones a, b."""
    numbered = sum(not isinstance(step, Pool) for step in steps) > 1
    branch, number = [], 0
    for step in steps:
        if isinstance(step, Pool):
            branch.append(step)
            continue
        number += 1
        base = f"{name}_{number}" if numbered else name
        if isinstance(step, Conv):
            branch.append((step._replace(name=base),))
        else:
            branch.append(tuple(conv._replace(name=base + letter) for conv, letter in zip(step, "ab", strict=True)))
    return tuple(branch)


def _block_35(pool_channels: int) -> Block:
    """35 x 35 to 35 x 35."""
    return (
        _branch("branch1x1", Conv(64)),
        _branch("branch5x5", Conv(48), Conv(64, (5, 5))),
        _branch("branch3x3dbl", Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3))),
        _branch("branch_pool", AVERAGE, Conv(pool_channels)),
    )


def _block_17(c: int) -> Block:
    """17 x 17 to 17 x 17; c channels between factorized 7 x 7 convolutions."""
    row, column = (1, 7), (7, 1)
    return (
        _branch("branch1x1", Conv(192)),
        _branch("branch7x7", Conv(c), Conv(c, row), Conv(192, column)),
        _branch("branch7x7dbl", Conv(c), Conv(c, column), Conv(c, row), Conv(c, column), Conv(192, row)),
        _branch("branch_pool", AVERAGE, Conv(192)),
    )


def _block_8(pool: Pool) -> Block:
    """8 x 8 to 8 x 8."""
    both = (Conv(384, (1, 3)), Conv(384, (3, 1)))
    return (
        _branch("branch1x1", Conv(320)),
        _branch("branch3x3", Conv(384), both),
        _branch("branch3x3dbl", Conv(448), Conv(384, (3, 3)), both),
        _branch("branch_pool", pool, Conv(192)),
    )


REDUCE_35: Block = (
    _branch("branch3x3", Conv(384, (3, 3), 2, "VALID")),
    _branch("branch3x3dbl", Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3), 2, "VALID")),
    _branch("branch_pool", HALVE),
)
REDUCE_17: Block = (
    _branch("branch3x3", Conv(192), Conv(320, (3, 3), 2, "VALID")),
    _branch("branch7x7x3", Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, (3, 3), 2, "VALID")),
    _branch("branch_pool", HALVE),
)

LAYERS: dict[str, Conv | Pool | Block] = {
    "Conv2d_1a_3x3": Conv(32, (3, 3), 2, "VALID"),
    "Conv2d_2a_3x3": Conv(32, (3, 3), 1, "VALID"),
    "Conv2d_2b_3x3": Conv(64, (3, 3)),
    "MaxPool_1": HALVE,
    "Conv2d_3b_1x1": Conv(80),
    "Conv2d_4a_3x3": Conv(192, (3, 3), 1, "VALID"),
    "MaxPool_2": HALVE,
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": REDUCE_35,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": REDUCE_17,
    "Mixed_7b": _block_8(AVERAGE),
    "Mixed_7c": _block_8(Pool("max")),
}
POOLED_FEATURES = {"MaxPool_1": "64", "MaxPool_2": "192", "Mixed_6e": "768", "Mixed_7c": "2048"}
"""Layers whose output, averaged over all positions, is a feature; and the name of the feature."""
SPATIAL_LAYER = "Mixed_6d"
"""`mixed_6` in the TensorFlow graph."""


def feature_channels() -> int:
    """Channels of the last block's output."""
    return block_channels(list(LAYERS.values())[-1])


class InceptionV3(LayerStack):
    """Inception-v3 with fixed batch statistics."""

    def __init__(self):
        super().__init__(LAYERS)
        self.fc = nnx.Linear(feature_channels(), LOGITS, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Features of images [batch, 299, 299, 3] with values in 0..255; see `inception_features`."""
        features = {}
        for name, x in self.run(LAYERS, (images - 128.0) / 128.0):
            if name in POOLED_FEATURES:
                features[POOLED_FEATURES[name]] = jnp.mean(x, axis=(1, 2))
            if name == SPATIAL_LAYER:
                # The first channels of a block are those of its 1x1 convolution.
                features["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        features["logits_unbiased"] = jnp.dot(features["2048"], self.fc.kernel[...], precision=PRECISION)
        features["logits"] = features["logits_unbiased"] + self.fc.bias[...]
        return features


@functools.cache
def abstract_inception() -> tuple[nnx.GraphDef, Params]:
    """The network without values of its parameters.

    Returns:
      graph: to `nnx.merge(graph, params)` into an InceptionV3.
      shapes: parameters, including batch statistics, as jax.ShapeDtypeStruct.
    """
    graph, state = nnx.split(jax.eval_shape(InceptionV3))
    return graph, nnx.to_pure_dict(state)


@jax.jit
def init_inception(key: jax.Array) -> Params:
    """Random float32 parameters, for tests; scores need the released ones."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_inception()[1])
    # One draw for all kernels, not fused into their use: a draw for each takes minutes to compile.
    normal = jax.random.normal(key, (sum(math.prod(leaf.shape) for _, leaf in leaves),))
    normal = jax.lax.optimization_barrier(normal)
    params, start = [], 0
    for path, leaf in leaves:
        name, stop = path[-1].key, start + math.prod(leaf.shape)
        if name == "kernel":
            scale = math.sqrt(2.0 / math.prod(leaf.shape[:-1]))
            params.append(scale * normal[start:stop].reshape(leaf.shape))
        else:
            params.append(jnp.full(leaf.shape, float(name in ("scale", "var"))))
        start = stop
    return jax.tree.unflatten(tree, params)


def _source_positions(num_in: int, num_out: int, half_pixel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every output position, the input positions below and above it and its distance from the one below."""
    offset = np.float32(0.5 if half_pixel else 0.0)
    source = (np.arange(num_out, dtype=np.float32) + offset) * np.float32(num_in / num_out) - offset
    source = np.clip(source, 0, num_in - 1)
    low = source.astype(np.int32)
    return low, np.minimum(low + 1, num_in - 1), source - low.astype(np.float32)


def resize_bilinear(images: jax.Array, size: tuple[int, int], half_pixel: bool) -> jax.Array:
    """Bilinear resize without antialiasing.

    Args:
      images: [..., height, width, channels], any type.
      size: rows and columns of the result.
      half_pixel: as in PyTorch, the centre of output pixel i is at (i + 1/2) * in / out; else, as in
        TensorFlow 1, output pixel i is at i * in / out.

    Returns:
      float32 [..., *size, channels], in the range of `images`.
    """
    x = jnp.asarray(images, jnp.float32)
    for axis in (-2, -3):
        low, high, weight = _source_positions(x.shape[axis], size[axis + 3], half_pixel)
        weight = weight.reshape(-1, *(1,) * (-1 - axis))
        below = jnp.take(x, low, axis=axis)
        x = below + (jnp.take(x, high, axis=axis) - below) * weight
    return x


def resize_tf1(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`resize_bilinear` as in TensorFlow 1, as FID is defined."""
    return resize_bilinear(images, size, half_pixel=False)


_resize = jax.jit(resize_tf1, static_argnums=1)


@jax.jit
def _features(params, images):
    return nnx.merge(abstract_inception()[0], params)(images)


def lower_resize(images_uint8: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The first program of `inception_features`, lowered for images of a shape and sharding."""
    return _resize.lower(images_uint8, (SIDE, SIDE))


def lower_features(params: Params, images_uint8: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """The second program of `inception_features`, lowered; arguments as shapes with shardings."""
    resized = (images_uint8.shape[0], SIDE, SIDE, images_uint8.shape[-1])
    return _features.lower(params, jax.ShapeDtypeStruct(resized, jnp.float32, sharding=images_uint8.sharding))


def inception_features(params: Params, images_uint8: jax.Array) -> dict[str, jax.Array]:
    """Features of images of any size.

    Two programs: the large one depends on the batch size, not on the size of the images.

    Args:
      params: as from `prepare.inception`; on the device, otherwise every call copies them there.
      images_uint8: uint8 [batch, height, width, 3].

    Returns:
      float32 arrays:
        `64`, `192`, `768`, `2048`: [batch, number of channels], averages over positions after the
          first and second pool, the last 17 x 17 block and the last block. FID, KID,
          precision and recall use `2048`.
        `spatial`: [batch, 2023], seven channels at 17 x 17 positions, for sFID as ADM
          defines it (`mixed_6/conv:0`: after its ReLU, rows, columns, then channels).
        `logits_unbiased`, `logits`: [batch, 1008]. The Inception Score uses the first.

    Raises:
      InputError: images of another shape or type.
    """
    shape, dtype = jnp.shape(images_uint8), images_uint8.dtype
    require(len(shape) == 4 and shape[-1] == 3, "images_uint8", shape, "must be [batch, height, width, 3]")
    require(dtype == jnp.uint8, "images_uint8", str(dtype), "must be uint8")
    return _features(params, _resize(images_uint8, (SIDE, SIDE)))
