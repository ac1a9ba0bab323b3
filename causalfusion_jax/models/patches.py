"""Images to tokens and back."""

import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[batch, height, width, channels] to tokens [batch, L, patch_size^2 * channels].

    Tokens are in raster order; inside one, values run over rows, columns, channels.
    """
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Inverse of `patchify`: tokens [batch, L, dim] of a token grid to images."""
    b, p = tokens.shape[0], patch_size
    x = tokens.reshape(b, *grid, p, p, -1).swapaxes(2, 3)
    return x.reshape(b, grid[0] * p, grid[1] * p, -1)
