"""Texts and images in one sequence: ways to fill in roles and AR steps.

A text token is CLEAN with an AR step of its own; an image brings its clean and its noisy
tokens with the AR steps of its plan. What comes after sees what comes before by the one
rule (`factorization.attends`), wherever in the array its tokens stand, so one static frame

    [condition | texts | clean images | noisy images]

holds every layout: text before or after an image, either alone, images before and after a
text. What a layout leaves out is PAD.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.core.factorization import CONDITION_STEP, Role

NO_TOKEN = -1
"""Id of a text slot that holds no token."""


class Layout(enum.IntEnum):
    """What is given, and what is generated."""

    TEXT_TO_IMAGE = 0
    IMAGE_TO_TEXT = 1
    TEXT = 2
    IMAGE = 3


LAYOUTS = tuple(layout.name.lower() for layout in Layout)
"""Their names, in order."""

WITH_NEW_IMAGE = (Layout.TEXT_TO_IMAGE, Layout.IMAGE)
WITH_NEW_TEXT = (Layout.IMAGE_TO_TEXT, Layout.TEXT)
"""Layouts whose image, or text, is generated rather than given."""


class TextPart(NamedTuple):
    """A text in the sequence.

    Attributes:
      used: bool [..., T], the slots that hold a token.
      begin: int [...], AR step of the first slot.
    """

    used: jax.Array
    begin: jax.Array


class ImagePart(NamedTuple):
    """An image in the sequence.

    Attributes:
      step: int [..., L], AR step of each place, from 0.
      begin: int [...], AR step of the first.
      clean: bool [...], whether its clean tokens are there, for what comes later.
      noisy: bool [...], whether its noisy tokens are there: whether it is generated; None: it
        has no slots for them.
      num_clean: the first so many places have a slot for a clean token.
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
      texts, images: the parts, in the order of their slots.

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
    layout, num_condition: int, text_used, step, num_clean: int, read_in_one_step: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of one text and one image, `[condition | text | clean | noisy]`.

    - text_to_image: the text's steps, then those of the image, clean and noisy.
    - image_to_text: the clean image, then the text.
    - text, image: that alone.

    Args:
      layout: int [...], of `Layout`: each example its own.
      num_condition: number of condition tokens.
      text_used: bool [..., T], the text slots that hold a token.
      step: int [..., L], AR step of each place of the image.
      num_clean: the first so many places have a clean token.
      read_in_one_step: a given image is one AR step, whatever `step` says.

    Returns:
      role, step: int32 [..., C + T + K + L].
    """
    layout, step = jnp.asarray(layout), jnp.asarray(step)
    read = layout == Layout.IMAGE_TO_TEXT
    text = TextPart(text_used & (layout != Layout.IMAGE)[..., None], jnp.where(read, step.shape[-1], 0))
    image = ImagePart(
        step=jnp.where(read[..., None] & read_in_one_step, 0, step),
        begin=jnp.where(layout == Layout.TEXT_TO_IMAGE, text_used.shape[-1], 0),
        clean=layout != Layout.TEXT,
        noisy=generates(WITH_NEW_IMAGE, layout),
        num_clean=num_clean,
    )
    return sequence_layout(num_condition, [text], [image])


def single_image_layout(layout, num_condition: int, text_used, step) -> tuple[jax.Array, jax.Array]:
    """The same for a frame with one copy of the image, `[condition | text | image]`.

    Transfusion's: the image is one AR step, so nobody needs clean tokens beside its noisy
    ones. Where it is given and not generated, its tokens are CLEAN instead, to be seen.

    Args:
      layout: int [...], of `Layout`.
      num_condition: number of condition tokens.
      text_used: bool [..., T].
      step: int [..., L], all 0.

    Returns:
      role, step: int32 [..., C + T + L].
    """
    with_clean = pair_layout(layout, num_condition, text_used, step, step.shape[-1])
    read = (jnp.asarray(layout) == Layout.IMAGE_TO_TEXT)[..., None]
    head = num_condition + text_used.shape[-1]

    def one_copy(a):
        clean, noisy = jnp.split(a[..., head:], 2, axis=-1)
        return jnp.concatenate([a[..., :head], jnp.where(read, clean, noisy)], axis=-1)

    role, step = with_clean
    return one_copy(role), one_copy(step)


def image_text_image_layout(
    num_condition: int, first_step, text_used, second_step, num_clean: int
) -> tuple[jax.Array, jax.Array]:
    """Roles and steps of an image, a text and an image that is generated after both.

    Args:
      num_condition: number of condition tokens.
      first_step, second_step: int [..., L], AR steps of the images' places.
      text_used: bool [..., T].
      num_clean: the first so many places of the second image have a clean token.

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


def generates(which: Sequence[Layout], layout) -> jax.Array:
    """Whether each of `layout` is one of `which` (WITH_NEW_IMAGE, WITH_NEW_TEXT); bool, its shape."""
    return jnp.isin(jnp.asarray(layout), np.array(which))
