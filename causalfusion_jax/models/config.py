"""Settings of the transformer: what a run chooses, and the static shape that follows for its data."""

import dataclasses
import math

import jax

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.models.layers import NORMS
from causalfusion_jax.models.params import DTYPES
from causalfusion_jax.models.positions import ROPE_SPLITS
from causalfusion_jax.models.text import TEXT_HEADS

CONDITIONINGS = ("in_context", "adaln")
POSITIONS = ("learned", "sincos", "rope")
ATTENTIONS = ("auto", "dense", "flash")
REMATS = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Policy of `jax.checkpoint` for each value of `Architecture.remat`."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The part of the transformer's settings that does not depend on the data.

    Attributes:
      hidden, heads, layers: width, attention heads, depth.
      mlp_ratio: width of the MLP in units of `hidden`.
      conditioning: how class and timestep reach the noisy tokens: `in_context` (CausalFusion)
        or `adaln` (ACDiT).
      num_condition_tokens: condition tokens C of a class; 0 for adaln.
      condition_repeats: the C / condition_repeats embeddings learned for a class are repeated
        this often, each repeat with its own positions.
      norm: `layer`, `rms`, or `plain` (LayerNorm without scale and bias).
      positions: `learned` (initialized with sines and cosines), fixed `sincos`, or `rope`
        (rotary, on every axis).
      qk_norm: normalize queries and keys per head.
      qkv_bias, token_bias: biases of the query-key-value and the token projection.
      attention: `dense`, `flash` (tiled, without an array of [tokens, tokens]), or `auto`:
        flash for long sequences; see models/transformer.py.
      dtype: compute type; parameters are float32.
      remat: what the backward pass recomputes: `none`, everything but the matrix products
        (`dots`), or a whole block (`full`).
      scan_unroll: layers unrolled in one iteration of the scan over layers.
      text_head: `tied` to the embedding of text tokens, or `separate`.
    """

    hidden: int = 96
    heads: int = 3
    layers: int = 4
    mlp_ratio: float = 4.0
    conditioning: str = "in_context"
    num_condition_tokens: int = 4
    condition_repeats: int = 1
    norm: str = "layer"
    positions: str = "learned"
    qk_norm: bool = True
    qkv_bias: bool = False
    token_bias: bool = True
    attention: str = "auto"
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    text_head: str = "tied"

    def __post_init__(self):
        for name in ("hidden", "heads", "layers"):
            require_number(name, getattr(self, name), 1)
        require_one_of("conditioning", self.conditioning, CONDITIONINGS)
        if self.conditioning == "in_context":
            require_number("num_condition_tokens", self.num_condition_tokens, 1)
        else:
            allowed = "must be 0 for conditioning adaln, which has no condition tokens"
            require(self.num_condition_tokens == 0, "num_condition_tokens", self.num_condition_tokens, allowed)
        require_number("condition_repeats", self.condition_repeats, 1)
        require(
            max(self.num_condition_tokens, 1) % self.condition_repeats == 0,
            "condition_repeats",
            self.condition_repeats,
            f"must divide num_condition_tokens={self.num_condition_tokens}",
        )
        require(self.hidden % self.heads == 0, "heads", self.heads, f"must divide hidden={self.hidden}")
        require_one_of("norm", self.norm, NORMS)
        require_one_of("positions", self.positions, POSITIONS)
        allowed = "must be a multiple of 4 (2D sines and cosines)"
        require(self.positions == "rope" or self.hidden % 4 == 0, "hidden", self.hidden, allowed)
        require_number("mlp_ratio", self.mlp_ratio, 0.0, open_low=True)
        require_number("scan_unroll", self.scan_unroll, 1, self.layers)
        require_one_of("attention", self.attention, ATTENTIONS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("remat", self.remat, REMATS)
        require_one_of("text_head", self.text_head, TEXT_HEADS)

    @property
    def label_width(self) -> int:
        """Values learned for a class."""
        return max(self.num_condition_tokens, 1) // self.condition_repeats * self.hidden

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def clean_depends_on_class(self) -> bool:
        """Whether clean keys and values depend on the class, so that guidance needs both variants of them."""
        return self.conditioning == "in_context"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(Architecture):
    """Static shape of the transformer: its architecture, and what follows from the data.

    Attributes:
      grid: token rows and columns of an image, after frames for a video.
      token_dim: values in an image token, patch_size^2 * channels.
      num_classes: classes; one more row of the label table stands for no class.
      rope_grid: the grid that rope's frequencies were trained for, if `grid` has been
        enlarged since; empty: `grid`.
      text_vocab: size of the text vocabulary; 0: the model has no text.
      text_tokens: maximum length of a text in tokens.
    """

    grid: tuple[int, ...]
    token_dim: int
    num_classes: int
    rope_grid: tuple[int, ...] = ()
    text_vocab: int = 0
    text_tokens: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_number("num_classes", self.num_classes, 1)
        if self.positions == "rope":
            unit = 2 * sum(ROPE_SPLITS[len(self.grid)])
            allowed = f"hidden / heads={self.head_dim} must be a multiple of {unit} for rope on {len(self.grid)} axes"
            require(self.head_dim % unit == 0, "heads", self.heads, allowed)
        require_number("text_vocab", self.text_vocab, 0)
        require_number("text_tokens", self.text_tokens, 2 if self.text_vocab else 0)

    @property
    def num_tokens(self) -> int:
        """Image tokens L."""
        return math.prod(self.grid)

    def on_grid(self, grid: tuple[int, ...]) -> "TransformerConfig":
        """The same network on another token grid, where its positions can be extrapolated.

        Raises:
          InputError: positions are learned, one vector for each token of the trained grid.
        """
        if grid == self.grid:
            return self
        allowed = f"must be {self.grid}: positions are learned for that grid alone (sincos and rope continue)"
        require(self.positions != "learned", "grid", grid, allowed)
        return dataclasses.replace(self, grid=grid, rope_grid=self.rope_grid or self.grid)
