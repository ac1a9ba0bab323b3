"""Scores generated images.

    python -m causalfusion_jax.evaluate --workdir=runs/digits --samples=runs/digits/samples_4/samples.npz

Prints one JSON line and writes it as evaluation.json beside the samples. For source
digits: `accuracy`, how many of the images an SVC fitted on the held-out half reads as
the class they were asked for, and `fd`, the Fréchet distance of their 64 pixels, scaled
to [-1, 1], to the held-out half (real training digits: 0.29). For an image folder: `fd`
of pixels, averaged down to at most 16x16, to the training images. For digit pairs:
`accuracy`, how many of the images such SVCs read as both digits of their prompt (or class),
and `left` and `right` alone.

    python -m causalfusion_jax.evaluate --workdir=runs/pairs --captions=runs/pairs/captions/captions.jsonl

For captions, as written by causalfusion_jax.caption, of images that came with references:
`exact_match`, and `cider` (CIDEr-D, times 10 as published).
"""

import json
import pathlib

from absl import flags

from causalfusion_jax import cli
from causalfusion_jax.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run the samples are from.")
_SAMPLES = flags.DEFINE_string("samples", None, "samples.npz, as written by causalfusion_jax.sample.")
_CAPTIONS = flags.DEFINE_string("captions", None, "captions.jsonl, as written by causalfusion_jax.caption, instead.")


def _read(path: pathlib.Path):
    """Images and labels of a samples file, and its prompts or None."""
    import numpy as np

    require(path.is_file(), "--samples", str(path), "no such file")
    try:
        with np.load(path) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
            prompts = arrays["prompts"].tolist() if "prompts" in arrays else None
    except Exception as error:
        raise InputError(
            "--samples", str(path), f"not a samples.npz with arr_0 and arr_1 ({type(error).__name__})"
        ) from None
    require(
        images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(labels), "--samples", str(path),
        f"arr_0 must be uint8 [num, height, width, channels] with as many labels; it is {images.dtype} {images.shape}",
    )
    return images, labels, prompts


def _score_captions(path: pathlib.Path) -> dict:
    """Scores of a captions file."""
    from causalfusion_jax.evaluation.captions import score_captions

    require(path.is_file(), "--captions", str(path), "no such file")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        captions, references = ([record[key] for record in records] for key in ("caption", "references"))
    except (ValueError, KeyError, TypeError):
        raise InputError("--captions", str(path), "not a captions.jsonl with caption and references") from None
    try:
        return {"captions": str(path), "num": len(records), **score_captions(captions, references)}
    except InputError as error:
        raise InputError("--captions", str(path), error.allowed) from None


def _score_samples(path: pathlib.Path, config) -> dict:
    """Scores of a samples file."""
    from causalfusion_jax.evaluation.pairs import labels_of_prompts
    from causalfusion_jax.evaluation.scores import score

    images, labels, prompts = _read(path)
    if prompts is not None and config.data.source == "digit_pairs":
        labels = labels_of_prompts(prompts)
    return {"samples": str(path), "num": len(images), **score(config.data, images, labels)}


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax import experiment

    given = (_SAMPLES.value is None) + (_CAPTIONS.value is None)
    require(given == 1, "--samples", _SAMPLES.value, "give --samples, or --captions, and not both")
    config = experiment.load(_WORKDIR.value)
    path = pathlib.Path(_SAMPLES.value or _CAPTIONS.value)
    line = json.dumps(_score_captions(path) if _SAMPLES.value is None else _score_samples(path, config))
    (path.parent / "evaluation.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
