"""What images are generated from, and what classifier-free guidance and dropout leave out of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from causalfusion_jax.core.layouts import NO_TOKEN


class Condition(NamedTuple):
    """The condition of a batch of images: a class, a text, or both.

    Attributes:
      labels: int [batch], class of each image; `num_classes` stands for no class.
      text: int32 [batch, T], token ids, NO_TOKEN in empty slots; None: no text.
    """

    labels: jax.Array
    text: jax.Array | None = None

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.labels.shape[0]

    @property
    def num_steps(self) -> int:
        """AR steps before the first one of the image: one for each text slot."""
        return 0 if self.text is None else self.text.shape[1]

    def select(self, indices) -> "Condition":
        """The conditions of some examples; `indices` is a slice, or int or bool [num]."""
        return jax.tree.map(lambda leaf: leaf[indices], self)

    def without_class(self, dropped: jax.Array, num_classes: int) -> "Condition":
        """Class dropout: no class where `dropped`, bool [batch]."""
        return self._replace(labels=jnp.where(dropped, num_classes, self.labels))

    def with_unconditional(self, num_classes: int) -> "Condition":
        """The pairs of classifier-free guidance: `[condition; no class and no text]`, [2 * batch]."""
        absent = Condition(num_classes, NO_TOKEN if self.text is not None else None)
        return jax.tree.map(lambda leaf, fill: jnp.concatenate([leaf, jnp.full_like(leaf, fill)]), self, absent)
