"""Regenerates a part of images, with a model that was not trained to edit.

    python -m causalfusion_jax.edit --workdir=runs/digits --image=runs/digits/samples_4/samples.npz \
        --mask=bottom --label=3 --ar_steps=4 --out=runs/digits/edited
    python -m causalfusion_jax.edit --checkpoint=converted/xl --vae=converted/kl16 --image=cat.png \
        --mask=mask.png --label=207 --num=4 --cfg_scale=3.0 --out=edited
    python -m causalfusion_jax.edit --workdir=runs/pairs --image=pair.png --mask=right --prompt="three seven" \
        --out=runs/pairs/edited

What is kept is clean context for what is regenerated, in one AR step or many, in any order.
--mask names what is regenerated: a half (top, bottom, left, right), the middle (center), all
but the middle (outer), a rectangle of pixels x0,y0,x1,y1, or an image file of the same size,
bright where to regenerate. Tokens are regenerated whole: a mask is rounded outward to them.
Models trained in random order take any mask; those of a fixed order only one that keeps its
beginning.

--canvas=WIDTH,HEIGHT places the images on a larger canvas (--offset=X,Y, in the middle
unless given) and generates what is around them, with models whose positions continue
(model.positions sincos or rope).

Kept pixels come back bit for bit. With --vae the result is decoded from latents, which
alone changes every pixel a little: the kept pixels are pasted over it, unless --nopaste asks
for the decoder's own. A model of latents without --vae edits latents, kept ones bit for bit;
masks then count in latents.

Models of texts take --prompt, or --prompts with a line for each image, instead of --label
or beside it.

OUT receives samples.npz (`arr_0`: results, `arr_1`: their labels, --num for each image in
turn; `prompts`, where there were any; `before`: the images on the canvas; `mask`: what was
regenerated, bool [height, width]), mask.png, strip.png (before, mask, results), the results as
000.png ... (the first 100), and request.json. The same request gives the same bytes; other
content of OUT is never overwritten.
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from causalfusion_jax.cli import app, condition_flags, config_flags, sampling_flags
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import require

_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_IMAGE = flags.DEFINE_string("image", None, "Image file, or npz with arr_0 as sample and edit write it.")
_MASK = flags.DEFINE_string(
    "mask", None, "What to regenerate: center, top, bottom, left, right, outer, x0,y0,x1,y1, or an image file."
)
_CONDITIONS = condition_flags.define(
    "label",
    labels_help="Class, or one for each image: otter,3,7 [arr_1 of an npz].",
    prompts_help="File with one prompt in each line, one for each image.",
)
_NUM = flags.DEFINE_integer("num", 1, "Results for each image.")
_CANVAS = flags.DEFINE_string("canvas", None, "Larger canvas to fill, in pixels: WIDTH,HEIGHT.")
_OFFSET = flags.DEFINE_string("offset", None, "Where the image lies on it: X,Y [in the middle].")
_PASTE = flags.DEFINE_boolean("paste", None, "With --vae: paste the kept pixels over what was decoded [true].")
for _module in (condition_flags, sampling_flags):
    flags.adopt_module_key_flags(_module)
MAX_FILES = 100
MAX_STRIPS = 20


def _images(config, scale: int, latents: bool):
    """The images of --image, checked against what the model takes, and their labels or None."""
    import numpy as np

    from causalfusion_jax.sampling.images import read_image_file

    channels = config.data.channels if not config.data.latents else 3
    images, labels = read_image_file("--image", pathlib.Path(_IMAGE.value), channels)
    height, width = (side * scale for side in config.data.shape[-3:-1])
    shape = (height, width, config.data.channels if latents else channels)
    require(
        images.shape[1:] == shape and len(images) > 0,
        "--image",
        _IMAGE.value,
        f"must be {'x'.join(map(str, shape))} (height, width, channels), as the model's; "
        f"it is {'x'.join(map(str, images.shape[1:]))}",
    )
    needs = "an npz of float latents (or give --vae to edit pixels)" if latents else "pixels, uint8"
    require((images.dtype == np.uint8) != latents, "--image", _IMAGE.value, f"must be {needs}, not {images.dtype}")
    return images.astype(np.float32) if latents else images, labels


def _canvas(images, cell: int):
    """The images on the canvas, and the mask of what they leave free."""
    import numpy as np

    height, width = images.shape[1:3]
    if _CANVAS.value is None:
        require(_OFFSET.value is None, "--offset", _OFFSET.value, "needs --canvas")
        return images, np.zeros((height, width), bool)
    pair = config_flags.numbers("canvas", _CANVAS.value, int)
    require(
        len(pair) == 2 and pair[0] >= width and pair[1] >= height and pair[0] % cell == pair[1] % cell == 0,
        "--canvas",
        _CANVAS.value,
        f"must be WIDTH,HEIGHT of at least {width},{height}, multiples of {cell}",
    )
    room = (pair[0] - width, pair[1] - height)
    offset = config_flags.numbers("offset", _OFFSET.value, int) or tuple(r // 2 // cell * cell for r in room)
    require(
        len(offset) == 2 and all(0 <= o <= r and o % cell == 0 for o, r in zip(offset, room, strict=True)),
        "--offset",
        _OFFSET.value,
        f"must be X,Y from 0,0 to {room[0]},{room[1]}, multiples of {cell}",
    )
    x, y = offset
    around = ((y, room[1] - y), (x, room[0] - x))
    free = np.pad(np.zeros((height, width), bool), around, constant_values=True)
    return np.pad(images, ((0, 0), *around, (0, 0))), free


def _mask(free):
    """What --mask asks to regenerate, with what is `free` on the canvas; bool [height, width]."""
    import numpy as np

    from causalfusion_jax.sampling import editing
    from causalfusion_jax.sampling.images import read_image_file

    height, width = free.shape
    if _MASK.value is None:
        require(bool(free.any()), "--mask", None, "is required; see --help")
        return free
    path = pathlib.Path(_MASK.value)
    if _MASK.value in editing.MASKS:
        mask = editing.named_mask(_MASK.value, height, width)
    elif path.is_file():
        pixels, _ = read_image_file("--mask", path, 1)
        allowed = f"must be a picture of {width}x{height} pixels; it is {pixels.shape[2]}x{pixels.shape[1]}"
        require(pixels.shape == (1, height, width, 1) and pixels.dtype == np.uint8, "--mask", _MASK.value, allowed)
        mask = pixels[0, ..., 0] >= 128
    elif "," in _MASK.value:
        box = config_flags.numbers("mask", _MASK.value, int)
        require(len(box) == 4, "--mask", _MASK.value, "must be x0,y0,x1,y1")
        mask = editing.rectangle_mask(box, height, width)
    else:
        mask = editing.named_mask(_MASK.value, height, width)
    return mask | free


def _plan(config, mask, cell: int):
    """The mask as the model takes it; says on stderr what is regenerated beyond it."""
    from causalfusion_jax.sampling import editing

    plan = editing.plan_edit(config, editing.tokens_of_mask(mask, cell))
    rounded = editing.pixels_of_tokens(plan.hidden, cell)
    more = int((rounded & ~mask).sum())
    if more:
        what = f"AR steps of whole {cell}x{cell} tokens" if plan.ar_steps else f"whole tokens of {cell}x{cell}"
        print(
            f"mask rounded outward to {what}: {int(rounded.sum())} pixels are regenerated instead of {int(mask.sum())}",
            file=sys.stderr,
        )
    return plan, rounded


def main(argv):
    """Runs the command."""
    del argv
    import hashlib

    import numpy as np

    from causalfusion_jax.sampling import editing
    from causalfusion_jax.sampling.generation import SamplingJob
    from causalfusion_jax.sampling.trained import make_autoencoder

    out, vae = pathlib.Path(_OUT.value), None
    sampling_flags.check_seed_and_batch()
    require(_NUM.value >= 1, "--num", _NUM.value, "must be >= 1")
    with app.as_flags():
        trained = sampling_flags.trained()
        config = trained.config
        require(config.data.frames == 1, "--workdir", "a model of videos", "continue videos with sample --condition")
        if sampling_flags.VAE.value is not None:
            vae = make_autoencoder(sampling_flags.VAE.value, config)
        require(vae is not None or _PASTE.value is None, "--paste", _PASTE.value, "needs --vae; leave it out")
        scale = vae.downsampling if vae else 1
        latents, cell = config.data.latents and vae is None, scale * config.model.patch_size
        images, own_labels = _images(config, scale, latents)
        conditions = _CONDITIONS.of_images(trained, len(images), own_labels)
        images, free = _canvas(images, cell)
        plan, mask = _plan(config, _mask(free), cell)
        sampler = sampling_flags.sampler(config.sampling)
        config.check_sampler(dataclasses.replace(sampler, ar_steps=1, step_sizes=()))
        sampler = editing.edit_sampler(sampler, plan, sampling_flags.ar_steps_given())
    request = {
        **trained.origin,
        "vae": vae.fingerprint if vae else None,
        "paste": _PASTE.value in (None, True),
        "seed": sampling_flags.SEED.value,
        "batch_size": sampling_flags.BATCH.value,
        "num": _NUM.value,
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "labels": conditions.labels.tolist(),
        "regenerated": ["".join(".#"[token] for token in row) for row in plan.hidden.tolist()],
        "sampler": json.loads(json.dumps(dataclasses.asdict(sampler))),
        **({} if conditions.prompts is None else {"prompts": conditions.prompts}),
    }
    if sampling_flags.is_done(out, request, ("samples.npz", "strip.png", "mask.png")):
        print(f"{out} already holds these {len(images) * _NUM.value} results")
        return
    conditions = conditions.repeat(_NUM.value)
    seed, batch_size = sampling_flags.SEED.value, sampling_flags.BATCH.value
    job = SamplingJob(config, sampler, conditions.condition(config), seed, batch_size, vae and vae.decode)
    results = _edit(job, trained.announced_params(), plan, images, vae)
    if request["paste"]:
        results = np.where(mask[:, :, None], results, images.repeat(_NUM.value, axis=0))
    _write(out, images, mask, results, conditions, request)


def _edit(job, params, plan, images, vae):
    """The results of `job`, --num for each image in turn."""
    import jax
    import numpy as np

    from causalfusion_jax.sampling.editing import edit_images

    scaled = images if images.dtype != np.uint8 else images / np.float32(127.5) - 1
    if vae is not None:
        scaled = jax.device_get(vae.encode(scaled))

    def progress(done):
        print(f"edited {done}/{job.num}", flush=True)

    return edit_images(job, params, plan, scaled.repeat(_NUM.value, axis=0), progress)


def _write(out: pathlib.Path, images, mask, results, conditions, request: dict) -> None:
    """Writes the folder `out`, whole or not at all."""
    import numpy as np

    from causalfusion_jax.common.pictures import edit_strip, save_png

    def fill(folder):
        prompts = {} if conditions.prompts is None else {"prompts": np.array(conditions.prompts)}
        np.savez(folder / "samples.npz", results, conditions.labels, before=images, mask=mask, **prompts)
        save_png(folder / "mask.png", (mask[:, :, None] * np.uint8(255)).astype(np.uint8))
        save_png(folder / "strip.png", edit_strip(images[:MAX_STRIPS], mask, results[: MAX_STRIPS * _NUM.value]))
        for index, result in enumerate(results[:MAX_FILES] if results.dtype == np.uint8 else ()):
            save_png(folder / f"{index:03d}.png", result)
        files.write_json(folder / "request.json", request)

    files.write_folder(out, fill)
    print(f"wrote {len(results)} results to {out / 'samples.npz'} and {out / 'strip.png'}")


if __name__ == "__main__":
    app.run(main, required=("out", "image"))
