"""Editing without training to edit: kept tokens are clean context, the others are generated.

What is kept enters the cache before anything is generated, as if the model had generated
it; the masked tokens follow in one or many AR steps (CausalFusion, zero-shot editing).
A model trained on random orders takes any mask. One trained on a single order has only
ever seen clean tokens that come first in it, and takes the masks that leave those.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from causalfusion_jax.common import distributed
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core import factorization
from causalfusion_jax.core.factorization import FactorizationConfig
from causalfusion_jax.models.config import TransformerConfig
from causalfusion_jax.models.patches import patchify
from causalfusion_jax.sampling.generation import Known, generate_images
from causalfusion_jax.sampling.sampler import image_keys

MASKS = ("center", "top", "bottom", "left", "right", "outer")


# --- Masks: True is what is regenerated --------------------------------------------


def named_mask(name: str, height: int, width: int) -> np.ndarray:
    """A half of the image, its middle (half of each side), or all but the middle (`outer`).

    Returns bool [height, width]. Raises InputError for a name that is none of MASKS.
    """
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    # In whole pixels, grown outward where a side is odd.
    middle = lambda a, size: (a > size // 4) & (a < size - size // 4)
    center = middle(y, height) & middle(x, width)
    masks = {
        "center": center,
        "outer": ~center,
        "top": y < (height + 1) // 2,
        "bottom": y > height // 2,
        "left": x < (width + 1) // 2,
        "right": x > width // 2,
    }
    if name not in masks:
        raise InputError("mask", name, f"must be one of {', '.join(MASKS)}, x0,y0,x1,y1, or an image file")
    return np.broadcast_to(masks[name], (height, width)).copy()


def rectangle_mask(box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """The rectangle x0 <= x < x1, y0 <= y < y1; bool [height, width]. Raises InputError where it is not inside."""
    x0, y0, x1, y1 = box
    require(
        0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height,
        "mask",
        box,
        f"must be x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}",
    )
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def tokens_of_mask(mask: np.ndarray, cell: int) -> np.ndarray:
    """The tokens of `cell` x `cell` pixels that a mask touches; bool [height / cell, width / cell]."""
    height, width = mask.shape
    return mask.reshape(height // cell, cell, width // cell, cell).any(axis=(1, 3))


def pixels_of_tokens(hidden: np.ndarray, cell: int) -> np.ndarray:
    """Inverse of `tokens_of_mask`, for a mask of whole tokens; bool [rows * cell, columns * cell]."""
    return hidden.repeat(cell, axis=0).repeat(cell, axis=1)


# --- What a model can do with a mask -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class EditPlan:
    """A mask as one model takes it.

    Attributes:
      model: the network, on the grid of the canvas.
      hidden: bool [(frames,) rows, columns], the tokens generated: those asked for, or more.
      known_step: int32 [K], AR steps of the kept tokens in their order.
      ar_steps: AR steps of the masked tokens as trained; 0 where those were drawn.
    """

    model: TransformerConfig
    hidden: np.ndarray
    known_step: np.ndarray
    ar_steps: int

    @property
    def num_hidden(self) -> int:
        """Tokens that are generated."""
        return int(self.hidden.sum())


def plan_edit(config: ExperimentConfig, hidden: np.ndarray) -> EditPlan:
    """Fits a mask to what the model was trained on.

    Args:
      config: the model's settings.
      hidden: bool [(frames,) rows, columns] of the canvas, the tokens to regenerate.

    Raises:
      InputError: the mask is all or nothing, or the model cannot edit so; the message says why.
    """
    trained, grid = config.factorization, hidden.shape
    if grid != config.transformer.grid:
        require(
            trained.steps != "fixed",
            "canvas",
            grid,
            f"must be {config.transformer.grid} tokens: the model was trained on {trained.num_steps} AR steps of these",
        )
    try:
        trained.check_grid(grid)
        model = config.transformer.on_grid(grid)
    except InputError as error:
        raise InputError("canvas", grid, error.allowed) from None
    require(hidden.any(), "mask", "nothing", "must cover at least one pixel")
    require(not hidden.all(), "mask", "everything", "leaves nothing to keep; that is sampling, not editing")
    steps = factorization.static_steps(trained, hidden.size)
    require(
        steps is None or steps[-1] > 0,
        "mask",
        int(hidden.sum()),
        "the model was trained on a single AR step, so it has never seen a clean token and cannot edit",
    )
    if trained.order != "random":
        hidden = _suffix(trained, hidden, steps)
    num_known = hidden.size - int(hidden.sum())
    if steps is None:
        return EditPlan(model, hidden, np.zeros(num_known, np.int32), 0)
    starts = np.flatnonzero(np.diff(steps, prepend=-1))
    require(
        num_known in starts,
        "mask",
        f"{num_known} of {hidden.size} tokens kept",
        f"the model was trained on {len(starts)} AR steps, so it can keep {', '.join(map(str, starts[1:]))} tokens",
    )
    return EditPlan(model, hidden, steps[:num_known], int(steps[-1]) + 1 - int(steps[num_known]))


def _suffix(trained: FactorizationConfig, hidden: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    """The mask rounded outward to whole AR steps of the one order the model knows.

    Raises InputError unless it then is all that follows some place in that order.
    """
    places = factorization.token_order(trained, hidden.shape)
    at_place = hidden.reshape(-1)[places]
    if steps is not None:
        at_place = np.isin(steps, steps[at_place])
    require(
        not at_place.all(),
        "mask",
        "everything",
        "the model regenerates whole AR steps, and this mask touches all of them",
    )
    first = int(np.argmax(at_place))
    require(
        bool(at_place[first:].all()),
        "mask",
        f"{int((~at_place[first:]).sum())} tokens kept after masked ones",
        f"the model was trained in the order {trained.order} alone, so only the last tokens of that order "
        "can be regenerated; a model trained in random order takes any mask",
    )
    rounded = np.zeros(hidden.size, bool)
    rounded[places] = at_place
    return rounded.reshape(hidden.shape)


def edit_sampler(sampler: SamplerConfig, plan: EditPlan, chosen: bool) -> SamplerConfig:
    """The sampler for the masked tokens alone.

    Args:
      sampler: for whole images, or for these tokens.
      plan: which tokens.
      chosen: whether its AR steps were chosen for these tokens. Otherwise they are as
        trained, or no more than there are tokens.

    Raises:
      InputError: the AR steps do not fit the tokens.
    """
    if not chosen:
        ar_steps = plan.ar_steps or min(len(sampler.step_sizes) or sampler.ar_steps, plan.num_hidden)
        sampler = dataclasses.replace(sampler, ar_steps=ar_steps, step_sizes=())
    sampler.sizes(plan.num_hidden)
    return sampler


def known_tokens(
    config: ExperimentConfig, sampler: SamplerConfig, plan: EditPlan, images: np.ndarray, keys: jax.Array
) -> Known:
    """The kept tokens of images, and the order in which the others follow.

    That order is the sampler's (or as trained), the kept tokens taken out and put first.

    Args:
      config: the model's settings.
      sampler: names the order.
      plan: which tokens are kept.
      images: float [num, (frames,) height, width, channels], as the model takes them.
      keys: of random orders, one an image; those it is then generated with.
    """
    order_config, hidden = sampler.order_config(config.factorization), plan.hidden.reshape(-1)

    def draw(key):
        # As `generate` does.
        order_key, _ = jax.random.split(key)
        return factorization.token_order(order_config, plan.model.grid, order_key)

    if order_config.order == "random":
        order = distributed.everywhere(jax.vmap(draw)(keys))
    else:
        order = np.tile(factorization.token_order(order_config, plan.model.grid), (len(images), 1))
    order = np.take_along_axis(order, np.argsort(hidden[order], axis=1, kind="stable"), axis=1)
    tokens = jax.device_get(patchify(images, config.model.patch_size))
    kept = np.take_along_axis(tokens, order[:, : len(plan.known_step), None], axis=1)
    return Known(plan.model, order, kept, plan.known_step)


def edit_images(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    params,
    plan: EditPlan,
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    text: np.ndarray | None = None,
) -> np.ndarray:
    """Regenerates the masked tokens of images under the given classes or prompts.

    Result i depends on (seed, i, images[i], labels[i], text[i]) alone.

    Args:
      config: what `params` were trained as.
      sampler: from `edit_sampler`.
      params: the Transformer's parameters.
      plan: from `plan_edit`.
      images: float [num, height, width, channels], as the model takes them.
      labels: int [num].
      seed, batch_size, progress, decode, text: as of `generate_images`.

    Returns:
      As `generate_images`. Kept pixels of a model of pixels, and kept latents that are not
      decoded, are those of `images`.
    """
    known = known_tokens(config, sampler, plan, images, image_keys(seed, np.arange(len(images))))
    return generate_images(config, sampler, params, labels, seed, batch_size, progress, decode, known, text)
