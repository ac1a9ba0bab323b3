"""Images and videos to tokens and back."""

import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """[batch, (frames,) height, width, channels] to tokens [batch, L, patch_size^2 * channels].

    Tokens are in raster order, frame after frame; inside one, values run over rows,
    columns, channels.
    """
    *lead, h, w, c = images.shape
    p = patch_size
    x = images.reshape(*lead, h // p, p, w // p, p, c).swapaxes(-4, -3)
    return x.reshape(lead[0], -1, p * p * c)


def unpatchify(tokens: jax.Array, grid: tuple[int, ...], patch_size: int) -> jax.Array:
    """Inverse of `patchify`: tokens [batch, L, dim] of a token grid to images or videos."""
    b, p = tokens.shape[0], patch_size
    *frames, rows, columns = grid
    x = tokens.reshape(b, *grid, p, p, -1).swapaxes(-4, -3)
    return x.reshape(b, *frames, rows * p, columns * p, x.shape[-1])
