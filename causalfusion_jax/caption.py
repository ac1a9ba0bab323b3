"""Says what images show, by a model trained on texts and images together.

    python -m causalfusion_jax.caption --workdir=runs/pairs --images=PATH --out=runs/pairs/captions
    python -m causalfusion_jax.caption --workdir=runs/pairs --images=held_out --num=500 --num_beams=3 --out=OUT
    python -m causalfusion_jax.caption --workdir=runs/pairs --images=PATH --score --out=OUT

--images: an image file; a folder of them, with or without captions.jsonl (a line
{"file_name": ..., "caption": ...} an image); an .npz with `arr_0`, uint8 images, and maybe
`captions`; or, of a model of digit pairs, `held_out` (digits and pairs it never saw) or
`held_out_digits` (in all pairs).

OUT receives captions.jsonl: for each image `caption`, `log_prob` (nats, of what was added to
the prompt) and the `references` it came with; `causalfusion_jax.evaluate --captions=` compares
them. Greedy unless --num_beams or --temperature is given. Captions may begin as told: --prompt
for all images alike, or --prompts, a file with a line an image, which may differ in length.

--score: how probable the captions are that the images came with: `log_prob`, and over all
of them `bits_per_token`, the end of each text counted as a token.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from causalfusion_jax.cli import command as cli
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.")
_IMAGES = flags.DEFINE_string("images", None, "Image file, folder, .npz, or held_out.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new or empty.")
_NUM = flags.DEFINE_integer("num", None, "At most so many images [all; of held_out 500].")
_PROMPT = flags.DEFINE_string("prompt", "", "What every caption begins with.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with what each caption begins with, a line an image.")
_NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "Beams; 1 is greedy.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Draw tokens at this temperature; 0: do not draw.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the most probable tokens that together reach it.")
_SCORE = flags.DEFINE_bool("score", False, "Score the captions that the images came with.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed, for a temperature.")
_BATCH = flags.DEFINE_integer("batch_size", 250, "Images read at a time.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged weights, or the last ones.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use [the newest intact one].")


def _prompts(num: int) -> list[str]:
    """What each caption begins with."""
    if _PROMPTS.value is None:
        return [_PROMPT.value] * num
    require(not _PROMPT.value, "--prompt", _PROMPT.value, "give --prompt or --prompts, and not both")
    path = pathlib.Path(_PROMPTS.value)
    require(path.is_file(), "--prompts", str(path), "no such file")
    lines = files.read_lines("--prompts", path)
    require(len(lines) == num, "--prompts", str(path), f"must have {num} lines, as images; it has {len(lines)}")
    return lines


def _how():
    """The search."""
    from causalfusion_jax.sampling.captioning import CaptionConfig

    try:
        return CaptionConfig(_NUM_BEAMS.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    except InputError as error:
        raise InputError(f"--{error.field}", error.value, error.allowed) from None


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

    def progress(done):
        print(f"captioned {done}/{len(read.names)}", flush=True)

    captions, log_probs = caption_images(
        config, _how(), params(), read.images, prompts, _SEED.value, _BATCH.value, progress
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
        {"image": name, "caption": caption, "log_prob": float(row.sum()), "tokens": int(used.sum())}
        for name, captions, rows, useds in zip(read.names, read.references, log_probs, counted, strict=True)
        for caption, row, used in zip(captions, rows, useds)
    ]


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.sampling.images import read_captioned_images
    from causalfusion_jax.sampling.trained import from_run

    out = pathlib.Path(_OUT.value)
    files.require_new("--out", out)
    require(_BATCH.value >= 1, "--batch_size", _BATCH.value, "must be >= 1")
    require(_NUM.value is None or _NUM.value >= 1, "--num", _NUM.value, "must be >= 1")
    _how()
    trained = from_run(_WORKDIR.value, _WEIGHTS.value, _STEP.value)
    config = trained.config
    require(config.text.is_on, "--workdir", _WORKDIR.value, "the model was trained without text")
    read = read_captioned_images(config, _IMAGES.value, _NUM.value)
    # On stderr: with --score, a line of JSON comes first on stdout.
    records = (_score if _SCORE.value else _generate)(config, lambda: trained.announced_params(sys.stderr), read)
    name = "scores.jsonl" if _SCORE.value else "captions.jsonl"

    def fill(folder):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        how = {flag.name: flag.value for flag in (_IMAGES, _NUM, _PROMPT, _PROMPTS, _SCORE, _SEED, _BATCH)}
        files.write_json(folder / "request.json", {**trained.origin, **how, **dataclasses.asdict(_how())})

    files.write_folder(out, fill)
    for record in records[:8]:
        print(f"{record['image']}: {record['caption']}")
    print(f"wrote {len(records)} {'scores' if _SCORE.value else 'captions'} to {out / name}")


if __name__ == "__main__":
    cli.run(main, required=("workdir", "images", "out"))
