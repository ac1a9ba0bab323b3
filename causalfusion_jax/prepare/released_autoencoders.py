"""Released autoencoders: their naming tables, and their settings from the shapes of a checkpoint.

One network has two families of names: those of Latent Diffusion, for the KL-16 autoencoder of MAR and
CausalFusion and the original Stable Diffusion files; and those of diffusers, for the republished
Stable Diffusion autoencoder, whose attention was renamed once.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.models.autoencoder import MAR_VAE, SD_VAE, AutoencoderConfig
from causalfusion_jax.prepare import names

Shapes = Mapping[str, tuple[int, ...]]

UNUSED = ("loss.", "model_ema.")
"""Prefixes of names of a checkpoint that belong to training and not to the autoencoder."""


class Spelling(NamedTuple):
    """Names of the parts of the network in a checkpoint.

    Attributes:
      down, up: residual blocks, by level and block. `up` counts levels from the lowest resolution
        if `upward`.
      down_attention, up_attention: attention after such a block.
      downsample, upsample: the convolution that changes the resolution, by level.
      middle: first residual block, attention, second residual block.
      norm_out: last normalization of the encoder and of the decoder.
      shortcut: 1x1 convolution of a residual block.
      attention: normalization, query, key, value and output of attention.
      pointwise: the matrices of attention are 1x1 convolutions, [out, in, 1, 1].
      upward: see `up`.
      prefix: prefix of all names.
    """

    down: str
    up: str
    down_attention: str
    up_attention: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    norm_out: str
    shortcut: str
    attention: tuple[str, ...]
    pointwise: bool
    upward: bool
    prefix: str = ""


LDM = Spelling(
    down="encoder.down.{}.block.{}",
    up="decoder.up.{}.block.{}",
    down_attention="encoder.down.{}.attn.{}",
    up_attention="decoder.up.{}.attn.{}",
    downsample="encoder.down.{}.downsample.conv",
    upsample="decoder.up.{}.upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    shortcut="nin_shortcut",
    attention=("norm", "q", "k", "v", "proj_out"),
    pointwise=True,
    upward=False,
)
DIFFUSERS = Spelling(
    down="encoder.down_blocks.{}.resnets.{}",
    up="decoder.up_blocks.{}.resnets.{}",
    down_attention="encoder.down_blocks.{}.attentions.{}",
    up_attention="decoder.up_blocks.{}.attentions.{}",
    downsample="encoder.down_blocks.{}.downsamplers.0.conv",
    upsample="decoder.up_blocks.{}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    pointwise=False,
    upward=True,
)
OLD_DIFFUSERS = DIFFUSERS._replace(attention=("group_norm", "query", "key", "value", "proj_attn"))


def _spelling(shapes: Shapes, known: tuple[Spelling, ...]) -> Spelling:
    """The spelling of a checkpoint: one of `known`, with its prefix and the shape of its attention matrices."""
    first = "encoder.conv_in.weight"
    prefixes = [name.removesuffix(first) for name in shapes if name.endswith(first)]
    if len(prefixes) != 1:
        problem = "missing" if not prefixes else f"there {len(prefixes)} times"
        raise InputError("--checkpoint", first, f"{problem}: not the checkpoint of one autoencoder")
    prefix = prefixes[0]

    def query(spelling):
        return f"{prefix}encoder.{spelling.middle[1]}.{spelling.attention[1]}.weight"

    family = [s for s in known if f"{prefix}{s.down.format(0, 0)}.conv1.weight" in shapes]
    if not family:
        wanted = " or ".join(dict.fromkeys(f"{prefix}{s.down.format(0, 0)}.conv1.weight" for s in known))
        raise InputError("--checkpoint", wanted, "missing: not an autoencoder of this kind")
    # Without attention the members of a family cannot be distinguished, and are the same.
    spelling = next((s for s in family if query(s) in shapes), family[0])
    rank = len(shapes.get(query(spelling), ()))
    return spelling._replace(prefix=prefix, pointwise={2: False, 4: True}.get(rank, spelling.pointwise))


def _config(shapes: Shapes, spelling: Spelling, scaling_factor: float, norm_groups: int) -> AutoencoderConfig:
    """The settings of the autoencoder, from the shapes of a checkpoint."""
    s = spelling

    def shape(name):
        if s.prefix + name not in shapes:
            raise InputError("--checkpoint", s.prefix + name, "missing: not a whole autoencoder")
        return shapes[s.prefix + name]

    def count(pattern):
        return next(n for n in itertools.count() if s.prefix + pattern(n) not in shapes)

    channels, image_channels = shape("encoder.conv_in.weight")[:2]
    levels = count(lambda level: f"{s.down.format(level, 0)}.conv1.weight")
    widths = [shape(f"{s.down.format(level, 0)}.conv1.weight")[0] for level in range(levels)]
    for level, width in enumerate(widths):
        if width % channels:
            name = f"{s.prefix}{s.down.format(level, 0)}.conv1.weight"
            raise InputError("--checkpoint", name, f"has {width} channels, must be a multiple of {channels}")

    def attended(pattern, level):
        return f"{s.prefix}{pattern.format(level, 0)}.{s.attention[1]}.weight" in shapes

    upward = [attended(s.up_attention, level) for level in range(levels)]
    from_level_0 = upward[::-1] if s.upward else upward
    return AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        latent_channels=shape("decoder.conv_in.weight")[1],
        scaling_factor=scaling_factor,
        residual_blocks=count(lambda block: f"{s.down.format(0, block)}.conv1.weight"),
        encoder_attention=tuple(level for level in range(levels) if attended(s.down_attention, level)),
        decoder_attention=tuple(level for level in range(levels) if from_level_0[level]),
        mid_attention=f"{s.prefix}encoder.{s.middle[1]}.{s.attention[1]}.weight" in shapes,
        image_channels=image_channels,
        norm_groups=norm_groups,
    )


def mar_vae_config(shapes: Shapes, norm_groups: int = 32) -> AutoencoderConfig:
    """Settings of a checkpoint of MAR's and CausalFusion's autoencoder.

    Args:
      shapes: released name to shape.
      norm_groups: groups of the group normalizations, which do not follow from the shapes.

    Raises:
      InputError: it is not such a checkpoint; names the missing array.
    """
    return _config(shapes, _spelling(shapes, (LDM,)), MAR_VAE.scaling_factor, norm_groups)


def sd_vae_config(
    shapes: Shapes, norm_groups: int = 32, scaling_factor: float = SD_VAE.scaling_factor
) -> AutoencoderConfig:
    """Settings of a checkpoint of Stable Diffusion's autoencoder, in any of its spellings.

    Args:
      shapes: released name to shape.
      norm_groups: groups of the group normalizations, which do not follow from the shapes.
      scaling_factor: factor of the latents, which does not follow from the shapes.

    Raises:
      InputError: it is not such a checkpoint; names the missing array.
    """
    return _config(shapes, _spelling(shapes, (DIFFUSERS, OLD_DIFFUSERS, LDM)), scaling_factor, norm_groups)


def mar_vae_table(config: AutoencoderConfig, shapes: Shapes | None = None) -> names.Table:
    """Naming table of MAR's and CausalFusion's autoencoder.

    Args:
      config: the autoencoder's settings.
      shapes: shapes of the arrays of a checkpoint, whose prefix is used; None: no prefix.
    """
    return _table(config, LDM if shapes is None else _spelling(shapes, (LDM,)))


def sd_vae_table(config: AutoencoderConfig, shapes: Shapes | None = None) -> names.Table:
    """Naming table of Stable Diffusion's autoencoder.

    Args:
      config: the autoencoder's settings.
      shapes: shapes of the arrays of a checkpoint, whose spelling is used; None: that of current diffusers.
    """
    known = (DIFFUSERS, OLD_DIFFUSERS, LDM)
    return _table(config, DIFFUSERS if shapes is None else _spelling(shapes, known))


def ignored_names(shapes: Shapes) -> list[str]:
    """Names in the checkpoint of an autoencoder that no table uses.

    They belong to the training loss and moving averages, or to other parts of a larger model.
    """
    prefix = _spelling(shapes, (LDM, DIFFUSERS, OLD_DIFFUSERS)).prefix
    return [name for name in shapes if not name.startswith(prefix) or name.removeprefix(prefix).startswith(UNUSED)]


def _residual(s: Spelling, name: str, path: names.Path, in_channels: int, out_channels: int) -> names.Table:
    """A residual block."""
    shortcut = names.conv(f"{name}.{s.shortcut}", (*path, "shortcut"), in_channels, out_channels, (1, 1))
    return [
        *names.norm(f"{name}.norm1", (*path, "norm_1"), in_channels),
        *names.conv(f"{name}.conv1", (*path, "conv_1"), in_channels, out_channels),
        *names.norm(f"{name}.norm2", (*path, "norm_2"), out_channels),
        *names.conv(f"{name}.conv2", (*path, "conv_2"), out_channels, out_channels),
        *(shortcut if in_channels != out_channels else []),
    ]


def _attention(s: Spelling, name: str, path: names.Path, channels: int) -> names.Table:
    """An attention block."""
    norm, *matrices = s.attention
    table = names.norm(f"{name}.{norm}", (*path, "norm"), channels)
    for matrix, ours in zip(matrices, ("query", "key", "value", "out"), strict=True):
        if s.pointwise:
            table += names.conv(f"{name}.{matrix}", (*path, ours), channels, channels, (1, 1))
        else:
            table += names.linear(f"{name}.{matrix}", (*path, ours), channels, channels)
    return table


def _middle(s: Spelling, config: AutoencoderConfig, side: str) -> names.Table:
    """The lowest resolution of the encoder or decoder."""
    width, path = config.widths[-1], (side, "middle")
    block_1, attention, block_2 = (f"{side}.{name}" for name in s.middle)
    return [
        *_residual(s, block_1, (*path, "block_1"), width, width),
        *(_attention(s, attention, (*path, "attention"), width) if config.mid_attention else []),
        *_residual(s, block_2, (*path, "block_2"), width, width),
    ]


def _encoder(s: Spelling, c: AutoencoderConfig) -> names.Table:
    """The encoder."""
    table = names.conv("encoder.conv_in", ("encoder", "conv_in"), c.image_channels, c.channels)
    for level, (previous, width) in enumerate(itertools.pairwise((c.channels, *c.widths))):
        path = ("encoder", "levels", level)
        for block in range(c.residual_blocks):
            in_channels = width if block else previous
            table += _residual(s, s.down.format(level, block), (*path, "blocks", block), in_channels, width)
            if level in c.encoder_attention:
                table += _attention(s, s.down_attention.format(level, block), (*path, "attentions", block), width)
        if level + 1 < len(c.widths):
            table += names.conv(s.downsample.format(level), ("encoder", "downsamples", level), width, width)
    table += _middle(s, c, "encoder")
    table += names.norm(f"encoder.{s.norm_out}", ("encoder", "norm_out"), c.widths[-1])
    return table + names.conv("encoder.conv_out", ("encoder", "conv_out"), c.widths[-1], 2 * c.latent_channels)


def _decoder(s: Spelling, c: AutoencoderConfig) -> names.Table:
    """The decoder."""
    upward = c.widths[::-1]
    table = names.conv("decoder.conv_in", ("decoder", "conv_in"), c.latent_channels, upward[0])
    table += _middle(s, c, "decoder")
    for index, (previous, width) in enumerate(itertools.pairwise((upward[0], *upward))):
        level = len(upward) - 1 - index
        number, path = index if s.upward else level, ("decoder", "levels", index)
        for block in range(c.residual_blocks + 1):
            in_channels = width if block else previous
            table += _residual(s, s.up.format(number, block), (*path, "blocks", block), in_channels, width)
            if level in c.decoder_attention:
                table += _attention(s, s.up_attention.format(number, block), (*path, "attentions", block), width)
        if level:
            table += names.conv(s.upsample.format(number), ("decoder", "upsamples", index), width, width)
    table += names.norm(f"decoder.{s.norm_out}", ("decoder", "norm_out"), upward[-1])
    return table + names.conv("decoder.conv_out", ("decoder", "conv_out"), upward[-1], c.image_channels)


def _table(config: AutoencoderConfig, spelling: Spelling) -> names.Table:
    """The whole autoencoder."""
    latent = config.latent_channels
    table = [
        *_encoder(spelling, config),
        *names.conv("quant_conv", ("quant_conv",), 2 * latent, 2 * latent, (1, 1)),
        *names.conv("post_quant_conv", ("post_quant_conv",), latent, latent, (1, 1)),
        *_decoder(spelling, config),
    ]
    return [entry._replace(name=spelling.prefix + entry.name) for entry in table]
