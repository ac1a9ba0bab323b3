"""Scores generated images.

    python -m causalfusion_jax.evaluate --workdir=runs/digits --samples=runs/digits/samples_4/samples.npz

Prints one JSON line and writes it as evaluation.json beside the samples. For source
digits: `accuracy`, how many of the images an SVC fitted on the held-out half reads as
the class they were asked for, and `fd`, the Fréchet distance of their 64 pixels, scaled
to [-1, 1], to the held-out half (real training digits: 0.29). For moving_digits: `accuracy`,
over all frames, and `motion_error`, the distance of the tracked path to a straight line with
bounce, in pixels; for longer videos both of what lies beyond. For an image folder: `fd`
of pixels, averaged down to at most 16x16, to the training images.
"""

import json
import pathlib

from absl import flags

from causalfusion_jax import cli
from causalfusion_jax.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run the samples are from.")
_SAMPLES = flags.DEFINE_string("samples", None, "samples.npz, as written by causalfusion_jax.sample.")


def _read(path: pathlib.Path):
    """Images and labels of a samples file."""
    import numpy as np

    require(path.is_file(), "--samples", str(path), "no such file")
    try:
        with np.load(path) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
    except Exception as error:
        raise InputError(
            "--samples", str(path), f"not a samples.npz with arr_0 and arr_1 ({type(error).__name__})"
        ) from None
    require(
        images.dtype == np.uint8 and images.ndim in (4, 5) and len(images) == len(labels), "--samples", str(path),
        f"arr_0 must be uint8 images or videos with as many labels; it is {images.dtype} {images.shape}",
    )
    return images, labels


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax import experiment
    from causalfusion_jax.evaluation.scores import score

    config = experiment.load(_WORKDIR.value)
    path = pathlib.Path(_SAMPLES.value)
    images, labels = _read(path)
    line = json.dumps({"samples": str(path), "num": len(images), **score(config.data, images, labels)})
    (path.parent / "evaluation.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    cli.run(main, required=("workdir", "samples"))
