"""The released CausalFusion and ACDiT transformers: their naming tables, and their settings.

The table follows from the configuration of the network. The configuration follows from the names and
shapes of a checkpoint, and for ACDiT from the training arguments in it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.presets import ACDIT
from causalfusion_jax.models.transformer import TIMESTEP_FEATURES
from causalfusion_jax.prepare.names import Table, array, linear, norm

Shapes = Mapping[str, tuple[int, ...]]
Geometry = Mapping[str, int | None]
"""Settings that do not follow from the shapes, from the user: patch_size, image_size (side in latents),
frames, block_size; None: not given."""


# --- Names ------------------------------------------------------------------------


def _blocks(c: TransformerConfig) -> Table:
    """The blocks, which have the same names in both models."""
    bias = c.norm == "layer"
    entries = []
    for i in range(c.layers):
        ours = ("blocks",)
        entries += norm(f"blocks.{i}.norm1", (*ours, "attention_norm"), c.hidden, bias=bias, layer=i)
        entries += linear(f"blocks.{i}.attn.qkv", (*ours, "qkv"), c.hidden, 3 * c.hidden, bias=c.qkv_bias, layer=i)
        for which in ("q_norm", "k_norm"):
            entries += norm(f"blocks.{i}.attn.{which}", (*ours, which), c.head_dim, bias=bias, layer=i)
        entries += linear(f"blocks.{i}.attn.proj", (*ours, "attention_out"), c.hidden, c.hidden, layer=i)
        entries += norm(f"blocks.{i}.norm2", (*ours, "mlp_norm"), c.hidden, bias=bias, layer=i)
        entries += linear(f"blocks.{i}.mlp.fc1", (*ours, "mlp_in"), c.hidden, c.mlp_hidden, layer=i)
        entries += linear(f"blocks.{i}.mlp.fc2", (*ours, "mlp_out"), c.mlp_hidden, c.hidden, layer=i)
    return entries


def _embedders(c: TransformerConfig) -> Table:
    """Timestep and label embeddings, which have the same names in both models."""
    return [
        *linear("t_embedder.mlp.0", ("timestep_in",), TIMESTEP_FEATURES, c.hidden),
        *linear("t_embedder.mlp.2", ("timestep_out",), c.hidden, c.hidden),
        *array("y_embedder.embedding_table.weight", (c.num_classes + 1, c.label_width), ("label_table", "embedding")),
    ]


def causalfusion_table(c: TransformerConfig) -> Table:
    """Every array of the released CausalFusion.

    Raises InputError if the network has another architecture.
    """
    _require_architecture(
        c,
        "causalfusion",
        conditioning="in_context",
        norm="layer",
        positions="learned",
        qk_norm=True,
        qkv_bias=False,
        token_bias=True,
        condition_repeats=1,
    )
    return [
        *array("pos_embed", (1, c.num_tokens, c.hidden), ("positions",)),
        *array("cond_pos_embed", (1, c.num_condition_tokens, c.hidden), ("condition_positions",)),
        *linear("x_proj", ("token_in",), c.token_dim, c.hidden),
        *_embedders(c),
        *_blocks(c),
        *norm("final_layer.0", ("final_norm",), c.hidden),
        *linear("final_layer.1", ("token_out",), c.hidden, c.token_dim),
    ]


def acdit_table(c: TransformerConfig) -> Table:
    """Every array of the released ACDiT.

    Raises InputError if the network has another architecture.
    """
    _require_architecture(c, "acdit", qk_norm=True, **ACDIT)
    modulations = []
    for i in range(c.layers):
        name = f"blocks.{i}.adaLN_modulation.1"
        modulations += linear(name, ("blocks", "modulation"), c.hidden, 6 * c.hidden, layer=i)
    return [
        *_embedders(c),
        *linear("x_embedder", ("token_in",), c.token_dim, c.hidden, bias=False),
        *_blocks(c),
        *modulations,
        *norm("final_layer.norm_final", ("final_norm",), c.hidden, bias=False),
        *linear("final_layer.linear", ("token_out",), c.hidden, c.token_dim),
        *linear("final_layer.adaLN_modulation.1", ("final_modulation",), c.hidden, 2 * c.hidden),
    ]


def _require_architecture(c: TransformerConfig, kind: str, **settings) -> None:
    for name, value in settings.items():
        given = getattr(c, name)
        require(given == value, f"config.model.{name}", given, f"must be {value!r} for the released format of {kind}")


# --- Settings ---------------------------------------------------------------------


def _shape(shapes: Shapes, name: str, kind: str, rank: int) -> tuple[int, ...]:
    """Shape of an array. Raises InputError if it is missing or has another rank."""
    require(name in shapes, "--checkpoint", name, f"not in the file: it is not a checkpoint of {kind}")
    shape = tuple(shapes[name])
    require(len(shape) == rank, "--checkpoint", name, f"has shape {list(shape)}, must have {rank} dimensions")
    return shape


def _network(shapes: Shapes, kind: str, token_in: str, condition_tokens: int) -> dict[str, Any]:
    """Settings of the network that follow from the same arrays in both models."""
    hidden, token_dim = _shape(shapes, f"{token_in}.weight", kind, 2)
    rows, _ = _shape(shapes, "y_embedder.embedding_table.weight", kind, 2)
    (head_dim,) = _shape(shapes, "blocks.0.attn.q_norm.weight", kind, 1)
    mlp_hidden, _ = _shape(shapes, "blocks.0.mlp.fc1.weight", kind, 2)
    layers = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    allowed = f"head dim {head_dim} must divide the hidden size {hidden}"
    require(hidden % head_dim == 0, "--checkpoint", "blocks.0.attn.q_norm.weight", allowed)
    return dict(
        hidden=hidden,
        heads=hidden // head_dim,
        layers=max(layers) + 1,
        mlp_ratio=mlp_hidden / hidden,
        num_condition_tokens=condition_tokens,
        token_dim=token_dim,
        num_classes=rows - 1,
    )


_DATASETS = {(1000, False): "imagenet2012", (101, True): "ucf101"}
"""Data sets of the released models by number of classes, and for images (False) or videos; they name the classes."""


def _sections(network: dict[str, Any], patch_size: int, side: int, frames: int) -> dict[str, Any]:
    """The `model` and `data` sections of a config; `side` is in latents."""
    token_dim, num_classes = network.pop("token_dim"), network.pop("num_classes")
    allowed = f"its square must divide the {token_dim} values of a token"
    require(patch_size >= 1 and token_dim % patch_size**2 == 0, "--patch_size", patch_size, allowed)
    return {
        "model": network | {"patch_size": patch_size},
        "data": dict(
            source="arrays",
            latents=True,
            image_size=side,
            frames=frames,
            channels=token_dim // patch_size**2,
            num_classes=num_classes,
            name=_DATASETS.get((num_classes, frames > 1), ""),
        ),
    }


def causalfusion_config(shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry) -> dict[str, Any]:
    """Sections of the config of a released CausalFusion.

    Args:
      shapes: names and shapes of the checkpoint.
      metadata: unused; the released file has no settings of the network.
      geometry: patch_size [1, as in all released models].

    Raises:
      InputError: it is not a checkpoint of this kind.
    """
    del metadata
    kind = "causalfusion"
    _, num_tokens, _ = _shape(shapes, "pos_embed", kind, 3)
    _, condition_tokens, _ = _shape(shapes, "cond_pos_embed", kind, 3)
    network = _network(shapes, kind, "x_proj", condition_tokens)
    side = math.isqrt(num_tokens)
    require(side**2 == num_tokens, "--checkpoint", "pos_embed", f"{num_tokens} tokens are not a square grid")
    patch_size = geometry.get("patch_size") or 1
    sections = _sections(network, patch_size, side * patch_size, frames=1)
    _refuse_other(geometry, {"image_size": side * patch_size, "frames": 1})
    sampling = dict(solver="ddpm", solver_steps=250, variance="large", ar_steps=1)
    return sections | {"sampling": sampling}


def _refuse_other(geometry: Geometry, known: Mapping[str, int]) -> None:
    """Raises InputError if the user gives other values than the checkpoint."""
    for name, value in known.items():
        given = geometry.get(name)
        require(given in (None, value), f"--{name}", given, f"the checkpoint has {value}; leave it out")
    given = geometry.get("block_size") if "block_size" not in known else None
    require(given is None, "--block_size", given, "has no meaning for this kind; leave it out")


ACDIT_DEFAULTS = {
    # values in a token: patch_size, image_size, frames, block_size of the released models
    4: dict(patch_size=1, image_size=32, frames=1, block_size=256),
    16: dict(patch_size=2, image_size=32, frames=16, block_size=1024),
}


def acdit_config(shapes: Shapes, metadata: Mapping[str, Any], geometry: Geometry) -> dict[str, Any]:
    """Sections of the config of a released ACDiT, image or video.

    The token grid does not follow from the weights, because positions are rotary. It is taken from
    the user, else from the training arguments in the file, else from the released model with tokens
    of the same size.

    Args:
      shapes: names and shapes of the checkpoint.
      metadata: other values of the file; `args` are the training arguments.
      geometry: patch_size, image_size (side in latents), frames, block_size; None: not given.

    Raises:
      InputError: it is not a checkpoint of this kind, or the grid is unknown.
    """
    kind = "acdit"
    network = _network(shapes, kind, "x_embedder", 0)
    network |= ACDIT
    sources = [geometry, _acdit_arguments(metadata.get("args") or {}), ACDIT_DEFAULTS.get(network["token_dim"], {})]
    known = {}
    for name in ("patch_size", "image_size", "frames", "block_size"):
        values = [source[name] for source in sources if source.get(name) is not None]
        require(bool(values), f"--{name}", None, "is not in the checkpoint; give it")
        known[name] = values[0]
    sections = _sections(network, known["patch_size"], known["image_size"], known["frames"])
    video = known["frames"] > 1
    block = known["block_size"]
    factorization = dict(steps="block", block_size=block, weight="none", order="raster", order_block=0)
    if not video:
        factorization |= dict(order="square_blocks", order_block=block)
    tokens = known["frames"] * (known["image_size"] // known["patch_size"]) ** 2
    require(tokens % block == 0, "--block_size", block, f"must divide the {tokens} tokens")
    return sections | {
        "factorization": factorization,
        "diffusion": dict(t_shared_by="step"),
        "sampling": dict(solver="dpmpp_2m", solver_steps=25, ar_steps=tokens // block, cfg_scale=2.5 if video else 1.5),
    }


def _acdit_arguments(args: Mapping[str, Any]) -> dict[str, int]:
    """Settings of the token grid in the training arguments of a released file."""

    def number(name):
        value = args.get(name)
        return value if isinstance(value, int) and value > 0 else None

    grid = {"patch_size": number("patch_size"), "frames": number("num_frames"), "block_size": number("block_size")}
    pixels, per_latent = number("image_size"), number("vae_patch_pixels")
    grid["image_size"] = pixels // per_latent if pixels and per_latent else None
    split = args.get("nd_split")
    if split not in (None, "1_1", "2_3_3"):
        raise InputError("--checkpoint", f"args.nd_split={split}", "rotary split must be 1_1 (image) or 2_3_3 (video)")
    return {name: value for name, value in grid.items() if value is not None}
