"""Texts and images in one sequence: how tasks fill in roles and AR steps.

Text tokens are CLEAN, one AR step each. An image contributes clean and noisy tokens with the AR
steps of its plan. By the attention rule (`factorization.attends`) later steps attend to earlier
ones, whatever their positions in the array, so one static sequence

    [condition | texts | clean images | noisy images]

serves every task: text before or after an image, either alone, or a text between two images.
Tokens that a task does not use are PAD.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.core.factorization import CONDITION_STEP, Role

NO_TOKEN = -1
"""Token id of an empty text slot."""


class Task(enum.IntEnum):
    """What is given, and what is generated."""

    TEXT_TO_IMAGE = 0
    IMAGE_TO_TEXT = 1
    TEXT = 2
    IMAGE = 3


TASKS = tuple(task.name.lower() for task in Task)
"""Names of the tasks, in the order of their values."""

WITH_NEW_IMAGE = (Task.TEXT_TO_IMAGE, Task.IMAGE)
WITH_NEW_TEXT = (Task.IMAGE_TO_TEXT, Task.TEXT)
"""Tasks that generate an image, or a text."""


class TextPart(NamedTuple):
    """A text in the sequence.

    Attributes:
      used: bool [..., T], whether a slot holds a token.
      begin: int [...], AR step of the first slot.
    """

    used: jax.Array
    begin: jax.Array


class ImagePart(NamedTuple):
    """An image in the sequence.

    Attributes:
      step: int [..., L], AR step of each position, from 0.
      begin: int [...], added to `step`: AR step of the first position.
      clean: bool [...], whether the clean tokens are used, as context of later tokens.
      noisy: bool [...], whether the noisy tokens are used: whether the image is generated; None:
        the sequence has no noisy tokens of it.
      num_clean: the first `num_clean` positions have a clean token.
    """

    step: jax.Array
    begin: jax.Array
    clean: jax.Array
    noisy: jax.Array | None
    num_clean: int


def sequence_layout(
    num_condition: int, texts: Sequence[TextPart], images: Sequence[ImagePart]
) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of `[condition | texts | clean images | noisy images]`.

    Args:
      num_condition: number of condition tokens C.
      texts, images: the parts, in the order of the sequence.

    Returns:
      role, step: int32 [..., C + sum of T + sum of K + sum of L].
    """
    lead = jnp.broadcast_shapes(
        *(jnp.shape(part.used)[:-1] for part in texts),
        *(jnp.shape(part.step)[:-1] for part in images),
        *(jnp.shape(part.begin) for part in (*texts, *images)),
    )
    pieces = [(Role.CONDITION, np.full(num_condition, CONDITION_STEP), True)]
    for part in texts:
        slots = np.arange(part.used.shape[-1])
        pieces.append((Role.CLEAN, jnp.asarray(part.begin)[..., None] + slots, part.used))
    for part in images:
        steps = (jnp.asarray(part.begin)[..., None] + part.step)[..., : part.num_clean]
        pieces.append((Role.CLEAN, steps, jnp.asarray(part.clean)[..., None]))
    for part in (part for part in images if part.noisy is not None):
        steps = jnp.asarray(part.begin)[..., None] + part.step
        pieces.append((Role.NOISY, steps, jnp.asarray(part.noisy)[..., None]))
    roles, steps = [], []
    for role, step, used in pieces:
        shape = (*lead, np.shape(step)[-1])
        steps.append(jnp.broadcast_to(jnp.asarray(step, jnp.int32), shape))
        roles.append(jnp.broadcast_to(jnp.where(used, int(role), int(Role.PAD)), shape).astype(jnp.int32))
    return jnp.concatenate(roles, axis=-1), jnp.concatenate(steps, axis=-1)


def pair_layout(
    task, num_condition: int, text_used, step, num_clean: int, read_in_one_step: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of one text and one image, `[condition | text | clean | noisy]`.

    - text_to_image: the text's steps, then the image's, clean and noisy.
    - image_to_text: the clean image, then the text.
    - text, image: the text, or the image, alone.

    Args:
      task: int [...], a `Task` for each example.
      num_condition: number of condition tokens.
      text_used: bool [..., T], whether a text slot holds a token.
      step: int [..., L], AR step of each position of the image.
      num_clean: the first `num_clean` positions have a clean token.
      read_in_one_step: a given image is one AR step, instead of those in `step`.

    Returns:
      role, step: int32 [..., C + T + K + L].
    """
    task, step = jnp.asarray(task), jnp.asarray(step)
    read = task == Task.IMAGE_TO_TEXT
    text = TextPart(text_used & (task != Task.IMAGE)[..., None], jnp.where(read, step.shape[-1], 0))
    image = ImagePart(
        step=jnp.where(read[..., None] & read_in_one_step, 0, step),
        begin=jnp.where(task == Task.TEXT_TO_IMAGE, text_used.shape[-1], 0),
        clean=task != Task.TEXT,
        noisy=generates(WITH_NEW_IMAGE, task),
        num_clean=num_clean,
    )
    return sequence_layout(num_condition, [text], [image])


def single_image_layout(task, num_condition: int, text_used, step) -> tuple[jax.Array, jax.Array]:
    """`pair_layout` for a sequence with one copy of the image, `[condition | text | image]` (Transfusion).

    The image is one AR step, so its clean tokens would be unattended while it is generated. Where
    the image is given, its tokens are CLEAN instead of NOISY, so that the text attends to them.

    Args:
      task: int [...], a `Task` for each example.
      num_condition: number of condition tokens.
      text_used: bool [..., T].
      step: int [..., L], all 0.

    Returns:
      role, step: int32 [..., C + T + L].
    """
    with_clean = pair_layout(task, num_condition, text_used, step, step.shape[-1])
    read = (jnp.asarray(task) == Task.IMAGE_TO_TEXT)[..., None]
    begin = num_condition + text_used.shape[-1]

    def one_copy(a):
        clean, noisy = jnp.split(a[..., begin:], 2, axis=-1)
        return jnp.concatenate([a[..., :begin], jnp.where(read, clean, noisy)], axis=-1)

    role, step = with_clean
    return one_copy(role), one_copy(step)


def image_text_image_layout(
    num_condition: int, first_step, text_used, second_step, num_clean: int
) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of an image, a text and an image that is generated after both.

    Args:
      num_condition: number of condition tokens.
      first_step, second_step: int [..., L], AR steps of the images' positions.
      text_used: bool [..., T], whether a text slot holds a token.
      num_clean: the first `num_clean` positions of the second image have a clean token.

    Returns:
      role, step: int32 [..., C + T + L + K + L], of `[condition | text | first clean | second
      clean | second noisy]`.
    """
    length = jnp.shape(first_step)[-1]
    images = [
        ImagePart(first_step, jnp.int32(0), jnp.bool(True), None, length),
        ImagePart(second_step, jnp.int32(length + text_used.shape[-1]), jnp.bool(True), jnp.bool(True), num_clean),
    ]
    return sequence_layout(num_condition, [TextPart(text_used, jnp.int32(length))], images)


def generates(tasks: Sequence[Task], task) -> jax.Array:
    """Whether each of `task`, int [...], is one of `tasks` (WITH_NEW_IMAGE or WITH_NEW_TEXT); bool [...]."""
    return jnp.isin(jnp.asarray(task), np.array(tasks))
