"""Captions images, with a model trained on texts and images together.

    python -m causalfusion_jax.caption --workdir=runs/pairs --images=PATH --out=runs/pairs/captions
    python -m causalfusion_jax.caption --workdir=runs/pairs --images=held_out --num=500 --num_beams=3 --out=OUT
    python -m causalfusion_jax.caption --workdir=runs/pairs --images=PATH --score --out=OUT

--images: an image file; a folder of them, with or without captions.jsonl (a line
{"file_name": ..., "caption": ...} for each image); an .npz with `arr_0`, uint8 images, and optionally
`captions`; or, for a model of digit pairs, `held_out` (digits and pairs not in the training data) or
`held_out_digits` (held-out digits in all pairs).

OUT receives captions.jsonl: for each image `caption`, `log_prob` (nats, of the tokens after
the prompt) and its `references`, which `causalfusion_jax.evaluate --captions=` compares.
Decoding is greedy unless --num_beams or --temperature is given. Captions can be given a beginning:
--prompt for all images, or --prompts, a file with a line for each image.

--score: the probability of the captions that the images came with: `log_prob`, and over all
captions `bits_per_token`, where the end of a text counts as a token.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from causalfusion_jax.cli import app, config_flags, weights_flags
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.sampling import CaptionConfig

_TRAINED = weights_flags.define()
_IMAGES = flags.DEFINE_string("images", None, "Image file, folder, .npz, or held_out.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new or empty.")
_NUM = flags.DEFINE_integer("num", None, "Maximum number of images [all; of held_out 500].")
_PROMPT = flags.DEFINE_string("prompt", "", "Beginning of every caption.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with the beginning of each caption, a line for each image.")
_SETTINGS = config_flags.define(CaptionConfig)
_SCORE = flags.DEFINE_bool("score", False, "Score the captions that the images came with.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed, with --temperature.")
_BATCH = flags.DEFINE_integer("batch_size", 250, "Images processed at a time.")


def _prompts(num: int) -> list[str]:
    """The beginning of each caption."""
    if _PROMPTS.value is None:
        return [_PROMPT.value] * num
    require(not _PROMPT.value, "--prompt", _PROMPT.value, "give --prompt or --prompts, and not both")
    path = pathlib.Path(_PROMPTS.value)
    require(path.is_file(), "--prompts", str(path), "no such file")
    lines = files.read_lines("--prompts", path)
    require(len(lines) == num, "--prompts", str(path), f"must have {num} lines, as images; it has {len(lines)}")
    return lines


def _generate(config, params, read) -> list[dict]:
    """A record with the caption of each image."""
    from causalfusion_jax.data.tokenizers import to_slots
    from causalfusion_jax.sampling.caption_batches import caption_images

    prompts = _prompts(len(read.names))
    for prompt in prompts:
        try:
            to_slots(config.text, prompt, ended=False)
        except InputError as error:
            raise InputError("--prompt", prompt, error.allowed) from None

    captions, log_probs = caption_images(
        config,
        _SETTINGS.make(),
        params(),
        read.images,
        prompts,
        seed=_SEED.value,
        batch_size=_BATCH.value,
        progress=lambda done: print(f"captioned {done}/{len(read.names)}", flush=True),
    )
    return [
        {"image": name, "caption": caption, "log_prob": float(log_prob), "references": list(references)}
        for name, caption, log_prob, references in zip(read.names, captions, log_probs, read.references, strict=True)
    ]


def _score(config, params, read) -> list[dict]:
    """A record with the score of each caption that an image came with."""
    from causalfusion_jax.metrics.captions import bits_per_token
    from causalfusion_jax.sampling.caption_batches import score_captions_of_images

    for name, references in zip(read.names, read.references, strict=True):
        require(bool(references), "--images", _IMAGES.value, f"--score needs captions, and image {name} has none")
    log_probs, counted = score_captions_of_images(config, params(), read.images, read.references, _BATCH.value)
    num = sum(map(len, read.references))
    print(json.dumps({"num": num, "bits_per_token": bits_per_token(log_probs, counted)}))
    return [
        {"image": name, "caption": caption, "log_prob": float(row.sum()), "tokens": int(is_token.sum())}
        for name, captions, rows, counts in zip(read.names, read.references, log_probs, counted, strict=True)
        for caption, row, is_token in zip(captions, rows, counts, strict=False)
    ]


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.sampling.images import read_captioned_images

    out = pathlib.Path(_OUT.value)
    files.require_new("--out", out)
    require(_BATCH.value >= 1, "--batch_size", _BATCH.value, "must be >= 1")
    require(_NUM.value is None or _NUM.value >= 1, "--num", _NUM.value, "must be >= 1")
    settings = _SETTINGS.make()
    with app.as_flags():
        trained = _TRAINED.choice().open()
    config = trained.config
    require(config.text.is_on, "--workdir", _TRAINED.workdir.value, "the model was trained without text")
    read = read_captioned_images(config, _IMAGES.value, _NUM.value)
    # The weights are printed to stderr: with --score, the first line of stdout is JSON.
    records = (_score if _SCORE.value else _generate)(config, lambda: trained.announced_params(sys.stderr), read)
    name = "scores.jsonl" if _SCORE.value else "captions.jsonl"

    def fill(folder):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        options = {flag.name: flag.value for flag in (_IMAGES, _NUM, _PROMPT, _PROMPTS, _SCORE, _SEED, _BATCH)}
        files.write_json(folder / "request.json", {**trained.origin, **options, **dataclasses.asdict(settings)})

    files.write_folder(out, fill)
    for record in records[:8]:
        print(f"{record['image']}: {record['caption']}")
    print(f"wrote {len(records)} {'scores' if _SCORE.value else 'captions'} to {out / name}")


if __name__ == "__main__":
    app.run(main, required=("images", "out"))
