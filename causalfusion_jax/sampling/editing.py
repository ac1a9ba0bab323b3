"""Zero-shot editing: kept tokens are clean context, masked tokens are generated.

The kept tokens are committed to the cache before any other is generated, as if the model had
generated them; the masked tokens follow in one or more AR steps (CausalFusion, zero-shot
editing). A model trained on random orders takes any mask. A model trained on a single order
has only seen clean tokens at its beginning, and takes masks that keep those.
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
from causalfusion_jax.sampling.generation import SamplingJob, generate_images
from causalfusion_jax.sampling.sampler import Given, image_keys

MASKS = ("center", "top", "bottom", "left", "right", "outer")


# --- Masks: True where pixels are regenerated ---------------------------------------


def named_mask(name: str, height: int, width: int) -> np.ndarray:
    """The mask of a half of the image, its center (half of each side), or all but the center (`outer`).

    Returns bool [height, width]. Raises InputError for a name that is not in MASKS.
    """
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    # In whole pixels, rounded outward where a side is odd.
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
    """The rectangle x0 <= x < x1, y0 <= y < y1; bool [height, width]. Raises InputError if it is not inside."""
    x0, y0, x1, y1 = box
    allowed = f"must be x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
    require(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, "mask", box, allowed)
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


# --- Masks that fit a model ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EditPlan:
    """A mask fitted to a model.

    Attributes:
      model: the network, on the grid of the canvas.
      hidden: bool [(frames,) rows, columns], the tokens to generate: those requested, or more.
      known_step: int32 [K], AR steps of the kept tokens, in the order of generation.
      ar_steps: number of AR steps of the masked tokens in training; 0 if those were drawn.
    """

    model: TransformerConfig
    hidden: np.ndarray
    known_step: np.ndarray
    ar_steps: int

    @property
    def num_hidden(self) -> int:
        """Number of tokens to generate."""
        return int(self.hidden.sum())


def plan_edit(config: ExperimentConfig, hidden: np.ndarray) -> EditPlan:
    """Fits a mask to the orders and AR steps that the model was trained on.

    Args:
      config: the model's settings.
      hidden: bool [(frames,) rows, columns] of the canvas, the tokens to regenerate.

    Raises:
      InputError: the mask is full or empty, or does not fit the model.
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
    allowed = "the model was trained on a single AR step, so it has never seen a clean token and cannot edit"
    require(steps is None or steps[-1] > 0, "mask", int(hidden.sum()), allowed)
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
    """The mask rounded outward to whole AR steps of the order that the model was trained on.

    Raises InputError unless it then is a suffix of that order.
    """
    order = factorization.token_order(trained, hidden.shape)
    masked = hidden.reshape(-1)[order]
    if steps is not None:
        masked = np.isin(steps, steps[masked])
    allowed = "the model regenerates whole AR steps, and this mask touches all of them"
    require(not masked.all(), "mask", "everything", allowed)
    first = int(np.argmax(masked))
    require(
        bool(masked[first:].all()),
        "mask",
        f"{int((~masked[first:]).sum())} tokens kept after masked ones",
        f"the model was trained in the order {trained.order} alone, so only the last tokens of that order "
        "can be regenerated; a model trained in random order takes any mask",
    )
    rounded = np.zeros(hidden.size, bool)
    rounded[order] = masked
    return rounded.reshape(hidden.shape)


def edit_sampler(sampler: SamplerConfig, plan: EditPlan, explicit_steps: bool) -> SamplerConfig:
    """The sampler for the masked tokens alone.

    Args:
      sampler: for whole images, or for these tokens.
      plan: the masked tokens.
      explicit_steps: the sampler's AR steps are meant for these tokens. Otherwise they are those
        of training, or at most as many as there are masked tokens.

    Raises:
      InputError: the AR steps do not fit the tokens.
    """
    if not explicit_steps:
        ar_steps = plan.ar_steps or min(len(sampler.step_sizes) or sampler.ar_steps, plan.num_hidden)
        sampler = dataclasses.replace(sampler, ar_steps=ar_steps, step_sizes=())
    sampler.sizes(plan.num_hidden)
    return sampler


def known_tokens(
    config: ExperimentConfig, sampler: SamplerConfig, plan: EditPlan, images: np.ndarray, keys: jax.Array
) -> Given:
    """The kept tokens of images, and an order in which the others follow them.

    It is the order of the sampler (or of training), with the kept tokens moved to the front.

    Args:
      config: the model's settings.
      sampler: for the order.
      plan: which tokens are kept.
      images: float [num, (frames,) height, width, channels], in the model's range.
      keys: PRNG keys [num] that the images are then generated with, for random orders.
    """
    order_config, hidden = sampler.order_config(config.factorization), plan.hidden.reshape(-1)

    def draw(key):
        # As `generate` draws it.
        order_key, _ = jax.random.split(key)
        return factorization.token_order(order_config, plan.model.grid, order_key)

    if order_config.order == "random":
        order = distributed.everywhere(jax.vmap(draw)(keys))
    else:
        order = np.tile(factorization.token_order(order_config, plan.model.grid), (len(images), 1))
    order = np.take_along_axis(order, np.argsort(hidden[order], axis=1, kind="stable"), axis=1)
    tokens = jax.device_get(patchify(images, config.model.patch_size))
    kept = np.take_along_axis(tokens, order[:, : len(plan.known_step), None], axis=1)
    return Given(order, kept, plan.known_step)


def edit_images(
    job: SamplingJob, params, plan: EditPlan, images: np.ndarray, progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Regenerates the masked tokens of images.

    Result i depends on (seed, i, images[i], condition i) alone.

    Args:
      job: the results, one for each image; its sampler from `edit_sampler`.
      params: the Transformer's parameters.
      plan: from `plan_edit`.
      images: float [num, height, width, channels], in the model's range.
      progress: called with the number of results done.

    Returns:
      As `generate_images`. Kept pixels of a model of pixels, and kept latents that are not
      decoded, are those of `images`.
    """
    given = known_tokens(job.config, job.sampler, plan, images, image_keys(job.seed, np.arange(len(images))))
    return generate_images(dataclasses.replace(job, given=given, grid=plan.model.grid), params, progress)
