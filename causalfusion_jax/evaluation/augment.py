"""Augmentation of images and labels for fine-tuning; every function takes one example, for `jax.vmap`."""

import jax
import jax.numpy as jnp

ASPECT = (3 / 4, 4 / 3)
"""Range of the aspect ratio of random crops."""


def shifted(image: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """The image shifted by up to `most` whole pixels on either axis, with repeated edges.

    Args:
      image: [..., height, width, channels].
      key: PRNG key.
      most: largest shift in pixels (or latents).
    """
    if most == 0:
        return image
    edge = [(0, 0)] * (image.ndim - 3) + [(most, most)] * 2 + [(0, 0)]
    start = jax.random.randint(key, (2,), 0, 2 * most + 1)
    begin = (*[0] * (image.ndim - 3), start[0], start[1], 0)
    return jax.lax.dynamic_slice(jnp.pad(image, edge, mode="edge"), begin, image.shape)


def cropped(image: jax.Array, key: jax.Array, least_area: float) -> jax.Array:
    """A random crop, scaled back to the image's size by linear interpolation.

    The area is uniform in least_area..1 of the area of the image, the aspect ratio log-uniform in
    ASPECT, the position uniform; a side is at most that of the image.

    Args:
      image: [..., height, width, channels].
      key: PRNG key.
      least_area: lower bound of the area; 1: no crop.
    """
    if least_area == 1.0:
        return image
    height, width = image.shape[-3:-1]
    area_key, aspect_key, position_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (), minval=least_area, maxval=1.0)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (), minval=jnp.log(ASPECT[0]), maxval=jnp.log(ASPECT[1])))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)]), 1.0)
    size = jnp.array([height, width], jnp.float32)
    begin = jax.random.uniform(position_key, (2,)) * (1.0 - sides) * size
    axes = (image.ndim - 3, image.ndim - 2)
    return jax.image.scale_and_translate(image, image.shape, axes, 1.0 / sides, -begin / sides, "linear")


def cut_box(key: jax.Array, height: int, width: int, weight: jax.Array) -> jax.Array:
    """A box that covers 1 - weight of an image, clipped at its sides (Yun et al. 2019, section 3.1).

    Args:
      key: PRNG key of its centre.
      height, width: of the image.
      weight: [], the fraction of the image that is kept.

    Returns:
      bool [height, width, 1].
    """
    centre = jax.random.uniform(key, (2,)) * jnp.array([height, width])
    sides = jnp.sqrt(1.0 - weight) * jnp.array([height, width])
    low, high = jnp.round(centre - sides / 2), jnp.round(centre + sides / 2)
    rows, columns = (
        (index >= low[i]) & (index < high[i]) for i, index in enumerate((jnp.arange(height), jnp.arange(width)))
    )
    return (rows[:, None] & columns[None, :])[..., None]


def mixed(
    image: jax.Array,
    other: jax.Array,
    target: jax.Array,
    other_target: jax.Array,
    key: jax.Array,
    *,
    mixup: float,
    cutmix: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixes two examples by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    Args:
      image, other: [..., height, width, channels].
      target, other_target: probabilities [classes].
      key: PRNG key.
      mixup, cutmix: parameter of the Beta distribution of the weight of `image`; 0: not used. If both
        are used, each is with probability 1/2.

    Returns:
      The mixed image, and its target: the two targets weighted by their fractions of the image.
    """
    if not mixup and not cutmix:
        return image, target
    choice_key, weight_key, box_key = jax.random.split(key, 3)
    cuts = jax.random.bernoulli(choice_key) if mixup and cutmix else jnp.bool(bool(cutmix))
    alpha = jnp.where(cuts, cutmix or 1.0, mixup or 1.0)
    weight = jax.random.beta(weight_key, alpha, alpha)
    box = cut_box(box_key, *image.shape[-3:-1], weight)
    weight = jnp.where(cuts, 1.0 - jnp.mean(box), weight)
    blended = weight * image + (1.0 - weight) * other
    image = jnp.where(cuts, jnp.where(box, other, image), blended)
    return image, weight * target + (1.0 - weight) * other_target


def smooth_one_hot(label: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Probabilities [classes] of a label, of which `smoothing` is spread over all classes."""
    return (1.0 - smoothing) * jax.nn.one_hot(label, num_classes) + smoothing / num_classes
