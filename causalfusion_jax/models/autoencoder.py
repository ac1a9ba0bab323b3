"""The autoencoder of latent diffusion, from images to latents and back; one network for both releases.

The convolutional variational autoencoder of Latent Diffusion (arXiv 2112.10752). The KL-16
autoencoder of MAR and CausalFusion and the one of Stable Diffusion are settings of it:
`MAR_VAE` and `SD_VAE`. Arrays are NHWC, parameters float32. It is not trained here.

Float32 products have the precision of `jax_default_matmul_precision`; accelerators round their
factors unless it is `highest`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.models.params import DTYPES, Params

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Static settings of the autoencoder. A level is a resolution; level 0 is that of the image.

    Attributes:
      channels: width of the first convolution, which the multipliers multiply.
      channel_multipliers: width of every level, from level 0 on; each further level halves the
        resolution.
      latent_channels: channels of a latent.
      scaling_factor: factor of the latents, for a standard deviation near 1.
      residual_blocks: residual blocks in a level of the encoder; the decoder has one more.
      encoder_attention, decoder_attention: levels with attention after every residual block.
      mid_attention: attention between the two residual blocks of the lowest resolution.
      image_channels: channels of an image.
      norm_groups: groups of the group normalizations.
      dtype: compute type; parameters are float32.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    latent_channels: int
    scaling_factor: float
    residual_blocks: int = 2
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    mid_attention: bool = True
    image_channels: int = 3
    norm_groups: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("channels", "latent_channels", "residual_blocks", "image_channels", "norm_groups"):
            require_number(name, getattr(self, name), 1)
        multipliers = self.channel_multipliers
        require(
            len(multipliers) > 0 and all(isinstance(m, int) and m >= 1 for m in multipliers),
            "channel_multipliers",
            multipliers,
            "must be one or more whole numbers >= 1",
        )
        require(
            all(width % self.norm_groups == 0 for width in (self.channels, *self.widths)),
            "norm_groups",
            self.norm_groups,
            f"must divide the widths {self.channels}, {self.widths}",
        )
        for name in ("encoder_attention", "decoder_attention"):
            levels = getattr(self, name)
            allowed = f"must be levels, 0 to {len(multipliers) - 1}"
            require(set(levels) <= set(range(len(multipliers))), name, levels, allowed)
        require_number("scaling_factor", self.scaling_factor, 0.0, open_low=True)
        require_one_of("dtype", self.dtype, DTYPES)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from level 0 on."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsampling(self) -> int:
        """Image rows per latent row."""
        return 2 ** (len(self.channel_multipliers) - 1)


MAR_VAE = AutoencoderConfig(
    channels=128, channel_multipliers=(1, 1, 2, 2, 4), latent_channels=16, scaling_factor=0.2325, encoder_attention=(4,)
)
"""KL-16 of MAR and CausalFusion: 256x256x3 to 16x16x16."""

SD_VAE = AutoencoderConfig(channels=128, channel_multipliers=(1, 2, 4, 4), latent_channels=4, scaling_factor=0.18215)
"""KL-f8 of Stable Diffusion, also of DiT and ACDiT: 256x256x3 to 32x32x4."""


def _norm(config, channels, rngs):
    # The fast variance, E[x^2] - E[x]^2, loses precision if the mean is large.
    return nnx.GroupNorm(
        channels,
        num_groups=config.norm_groups,
        epsilon=NORM_EPS,
        dtype=config.dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def _conv(config, in_channels, out_channels, rngs, **settings):
    """3x3 convolution, of stride 1 with padding by default."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        **{"padding": 1, **settings},
        dtype=config.dtype,
        kernel_init=nnx.initializers.zeros,
        rngs=rngs,
    )


def _linear(config, in_channels, out_channels, rngs):
    """1x1 convolution."""
    return nnx.Linear(in_channels, out_channels, dtype=config.dtype, kernel_init=nnx.initializers.zeros, rngs=rngs)


class ResidualBlock(nnx.Module):
    """Two normalized 3x3 convolutions, and a 1x1 shortcut where the width changes."""

    def __init__(self, config: AutoencoderConfig, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        self.norm_1 = _norm(config, in_channels, rngs)
        self.conv_1 = _conv(config, in_channels, out_channels, rngs)
        self.norm_2 = _norm(config, out_channels, rngs)
        self.conv_2 = _conv(config, out_channels, out_channels, rngs)
        self.shortcut = _linear(config, in_channels, out_channels, rngs) if in_channels != out_channels else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        h = self.conv_2(jax.nn.silu(self.norm_2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention of all pixels, with a residual connection."""

    def __init__(self, config: AutoencoderConfig, channels: int, rngs: nnx.Rngs):
        self.norm = _norm(config, channels, rngs)
        self.query = _linear(config, channels, channels, rngs)
        self.key = _linear(config, channels, channels, rngs)
        self.value = _linear(config, channels, channels, rngs)
        self.out = _linear(config, channels, channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = self.norm(x).reshape(batch, height * width, 1, channels)
        h = jax.nn.dot_product_attention(self.query(h), self.key(h), self.value(h))
        return x + self.out(h).reshape(x.shape)


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention if `attention`."""

    def __init__(self, config, in_channels: int, out_channels: int, blocks: int, attention: bool, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nnx.List([ResidualBlock(config, *pair, rngs) for pair in itertools.pairwise(widths)])
        self.attentions = nnx.List(
            [AttentionBlock(config, out_channels, rngs) for _ in range(blocks if attention else 0)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for block, attention in itertools.zip_longest(self.blocks, self.attentions):
            x = block(x)
            x = x if attention is None else attention(x)
        return x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        channels = config.widths[-1]
        self.block_1 = ResidualBlock(config, channels, channels, rngs)
        self.attention = AttentionBlock(config, channels, rngs) if config.mid_attention else None
        self.block_2 = ResidualBlock(config, channels, channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block_1(x)
        x = x if self.attention is None else self.attention(x)
        return self.block_2(x)


class Encoder(nnx.Module):
    """Images [batch, H, W, channels] to [batch, h, w, 2 * latent_channels]."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        c = config
        pairs = itertools.pairwise((c.channels, *c.widths))
        self.conv_in = _conv(c, c.image_channels, c.channels, rngs)
        self.levels = nnx.List(
            [
                Level(c, *pair, blocks=c.residual_blocks, attention=level in c.encoder_attention, rngs=rngs)
                for level, pair in enumerate(pairs)
            ]
        )
        # Padding at the bottom and right only.
        self.downsamples = nnx.List(
            [_conv(c, width, width, rngs, strides=2, padding=((0, 1), (0, 1))) for width in c.widths[:-1]]
        )
        self.middle = Middle(c, rngs)
        self.norm_out = _norm(c, c.widths[-1], rngs)
        self.conv_out = _conv(c, c.widths[-1], 2 * c.latent_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level, downsample in itertools.zip_longest(self.levels, self.downsamples):
            x = level(x)
            x = x if downsample is None else downsample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents [batch, h, w, latent_channels] to images; `levels` run from the lowest resolution up."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        c = config
        upward = c.widths[::-1]
        attention = [level in c.decoder_attention for level in range(len(upward))][::-1]
        pairs = itertools.pairwise((upward[0], *upward))
        self.conv_in = _conv(c, c.latent_channels, upward[0], rngs)
        self.middle = Middle(c, rngs)
        self.levels = nnx.List(
            [
                Level(c, *pair, blocks=c.residual_blocks + 1, attention=attends, rngs=rngs)
                for pair, attends in zip(pairs, attention, strict=True)
            ]
        )
        self.upsamples = nnx.List([_conv(c, width, width, rngs) for width in upward[:-1]])
        self.norm_out = _norm(c, upward[-1], rngs)
        self.conv_out = _conv(c, upward[-1], c.image_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level, upsample in itertools.zip_longest(self.levels, self.upsamples):
            x = level(x)
            x = x if upsample is None else upsample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder and decoder, and the 1x1 convolutions on both sides of the latent."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        c, self.config = config, config
        self.encoder = Encoder(c, rngs)
        self.quant_conv = _linear(c, 2 * c.latent_channels, 2 * c.latent_channels, rngs)
        self.post_quant_conv = _linear(c, c.latent_channels, c.latent_channels, rngs)
        self.decoder = Decoder(c, rngs)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and clipped log-variance of unscaled latents, float32."""
        h = self.quant_conv(self.encoder(images.astype(self.config.dtype)))
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents to images, float32."""
        return self.decoder(self.post_quant_conv(latents.astype(self.config.dtype))).astype(jnp.float32)


@functools.cache
def abstract_autoencoder(config: AutoencoderConfig) -> tuple[nnx.GraphDef, Params]:
    """The autoencoder without parameter values.

    Returns:
      graph: to `nnx.merge(graph, params)` into an Autoencoder.
      shapes: parameters as jax.ShapeDtypeStruct.
    """
    graph, state = nnx.split(jax.eval_shape(lambda: Autoencoder(config, nnx.Rngs(params=jax.random.key(0)))))
    return graph, nnx.to_pure_dict(state)


@functools.partial(jax.jit, static_argnums=0)
def init_autoencoder(config: AutoencoderConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: kernels normal with variance 1 / fan-in, biases zero."""
    params = nnx.to_pure_dict(nnx.state(Autoencoder(config, nnx.Rngs(params=key))))
    leaves, tree = jax.tree.flatten(params)
    # One random draw for all kernels, because a hundred small ones take a minute to compile.
    sizes = [leaf.size if leaf.ndim > 1 else 0 for leaf in leaves]
    draws = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return jax.tree.unflatten(
        tree,
        [
            draw.reshape(leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else leaf
            for leaf, draw in zip(leaves, draws, strict=True)
        ],
    )


def _in_micro_batches(run: Callable, x: jax.Array, micro_batch: int):
    """`run(x)` on at most `micro_batch` images at a time."""
    batch = len(x)
    if batch <= micro_batch:
        return run(x)
    rounds = -(-batch // micro_batch)
    size = -(-batch // rounds)
    x = jnp.pad(x, [(0, rounds * size - batch)] + [(0, 0)] * (x.ndim - 1))
    # Image i is in round i % rounds, so that in every round each device has images of its part of the batch.
    out = jax.lax.map(run, x.reshape(size, rounds, *x.shape[1:]).swapaxes(0, 1))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(size * rounds, *y.shape[2:])[:batch], out)


def _check_batch(name, x, channels, multiple, micro_batch):
    """Raises InputError unless x is float [batch, n * multiple, m * multiple, channels]."""
    require(x.ndim == 4 and x.shape[-1] == channels, name, x.shape, f"must be [batch, height, width, {channels}]")
    allowed = f"height and width must be multiples of {multiple}"
    require(min(x.shape[1:3]) > 0 and all(size % multiple == 0 for size in x.shape[1:3]), name, x.shape, allowed)
    require(jnp.issubdtype(x.dtype, jnp.floating), name, str(x.dtype), "must be floating-point")
    require_number("micro_batch", micro_batch, 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _moments(config, params, images, micro_batch):
    graph, _ = abstract_autoencoder(config)
    return _in_micro_batches(lambda x: nnx.merge(graph, params).moments(x), images, micro_batch)


def moments(
    config: AutoencoderConfig, params: Params, images: jax.Array, micro_batch: int = 16
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the Gaussian latent of each image.

    Args:
      config: the autoencoder's settings.
      params: its parameters.
      images: float [batch, H, W, image_channels] in [-1, 1]; H and W multiples of
        `config.downsampling`.
      micro_batch: images that are encoded at a time; for a batch that is split over devices a
        multiple of their number.

    Returns:
      Mean and log-variance (clipped to [-30, 20]) of the unscaled latents, float32
      [batch, H / downsampling, W / downsampling, latent_channels].

    Raises:
      InputError: images of another shape or type.
    """
    _check_batch("images", images, config.image_channels, config.downsampling, micro_batch)
    return _moments(config, params, images, micro_batch)


@functools.partial(jax.jit, static_argnums=0)
def _latents(config, mean, log_variance, key):
    if key is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(mean)))
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        mean = mean + jnp.exp(0.5 * log_variance) * noise
    return mean * config.scaling_factor


def encode(
    config: AutoencoderConfig, params: Params, images: jax.Array, key: jax.Array | None = None, micro_batch: int = 16
) -> jax.Array:
    """Encodes images to latents.

    Args:
      config: the autoencoder's settings.
      params: its parameters.
      images: see `moments`.
      key: PRNG key to draw samples of the Gaussians; None: take their means. The noise of an image
        depends on the key and its index in the batch, not on `micro_batch`.
      micro_batch: see `moments`.

    Returns:
      Latents times `config.scaling_factor`, float32
      [batch, H / downsampling, W / downsampling, latent_channels].

    Raises:
      InputError: images of another shape or type.
    """
    return _latents(config, *moments(config, params, images, micro_batch), key)


def overlapping_tiles(length: int, tile: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping tiles along one axis.

    Args:
      length: rows of the latent.
      tile: rows of a tile.
      factor: image rows of a latent row.

    Returns:
      The first latent row of each tile, int [tiles], and the weights of its image rows, float32
      [tiles, tile * factor]: a linear ramp over a quarter of a tile at each end that is inside the
      image. The weights of an image row sum to 1.
    """
    if tile >= length:
        return np.zeros(1, np.int32), np.ones((1, length * factor), np.float32)
    overlap = max(1, tile // 4)
    count = -(-(length - overlap) // (tile - overlap))
    starts = np.round(np.linspace(0, length - tile, count)).astype(np.int32)
    ramp = np.minimum((np.arange(tile * factor) + 0.5) / (overlap * factor), 1.0)
    weights, total = np.ones((count, tile * factor)), np.zeros(length * factor)
    weights[1:] *= ramp
    weights[:-1] *= ramp[::-1]
    rows = starts[:, None] * factor + np.arange(tile * factor)
    np.add.at(total, rows, weights)
    return starts, (weights / total[rows]).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode(config, params, latents, micro_batch, tile):
    graph, _ = abstract_autoencoder(config)
    latents = latents.astype(jnp.float32) / config.scaling_factor
    batch, height, width, channels = latents.shape
    factor = config.downsampling

    def run(x):
        return _in_micro_batches(lambda x: nnx.merge(graph, params).decode(x), x, micro_batch)

    if tile is None:
        return run(latents)
    rows, row_weights = overlapping_tiles(height, tile, factor)
    columns, column_weights = overlapping_tiles(width, tile, factor)
    size = (batch, min(tile, height), min(tile, width), channels)

    def add_tile(canvas, tile_index):
        row, column = tile_index
        image = run(jax.lax.dynamic_slice(latents, (0, rows[row], columns[column], 0), size))
        image *= row_weights[row][:, None, None] * column_weights[column][:, None]
        corner = (0, rows[row] * factor, columns[column] * factor, 0)
        blended = jax.lax.dynamic_slice(canvas, corner, image.shape) + image
        return jax.lax.dynamic_update_slice(canvas, blended, corner), None

    rows, row_weights, columns, column_weights = map(jnp.asarray, (rows, row_weights, columns, column_weights))
    tile_indices = jnp.indices((len(rows), len(columns))).reshape(2, -1)
    canvas = jnp.zeros((batch, height * factor, width * factor, config.image_channels))
    return jax.lax.scan(add_tile, canvas, tuple(tile_indices))[0]


def decode(
    config: AutoencoderConfig, params: Params, latents: jax.Array, micro_batch: int = 16, tile: int | None = None
) -> jax.Array:
    """Decodes latents to images.

    Args:
      config: the autoencoder's settings.
      params: its parameters.
      latents: float [batch, h, w, latent_channels], scaled like those of `encode`.
      micro_batch: latents that are decoded at a time; see `moments`.
      tile: latent rows and columns of square tiles that are decoded one after the other and blended
        linearly over a quarter of a tile, which bounds the memory of large images. This is an
        approximation, because group normalization and attention then act on a tile instead of the
        image. None, or at least the size of the latent: the whole latent at once.

    Returns:
      Images, float32 [batch, h * downsampling, w * downsampling, image_channels] in about
      [-1, 1], not clipped.

    Raises:
      InputError: latents of another shape or type.
    """
    _check_batch("latents", latents, config.latent_channels, 1, micro_batch)
    if tile is not None:
        require_number("tile", tile, 2)
        tile = None if tile >= max(latents.shape[1:3]) else tile
    return _decode(config, params, latents, micro_batch, tile)
