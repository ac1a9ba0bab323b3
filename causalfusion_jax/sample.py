"""Samples images (or videos) from a trained model.

    python -m causalfusion_jax.sample --workdir=runs/digits --num=1000 --ar_steps=4 --out=runs/digits/samples_4
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --num=8 --out=samples/xl

OUT receives samples.npz (`arr_0`: uint8 images [num, (frames,) height, width, channels];
`arr_1`: int labels, classes balanced unless --labels is given), grid.png, and request.json,
which says how they were made. The same request gives the same bytes; where OUT already
holds it, nothing is done. Options left out are as in the run's config (`config.sampling`).

A model of texts and images draws what --prompt="three seven" says, or each line of --prompts=FILE
(of a model of digit pairs also --prompts=held_out, pairs it never saw); `prompts` of samples.npz
keeps them.

A model of latents needs the autoencoder that decodes them, --vae, converted by
causalfusion_jax.convert. Without it `arr_0` is the latents themselves, float32, and the
grid shows three of their channels in false colour.

--ar_steps is the dial between diffusion (1) and token-by-token autoregression (the number
of tokens); --order, --step_sizes and --solver are free too, whatever was trained.
"""

import dataclasses
import json
import pathlib

from absl import flags

from causalfusion_jax import cli, files
from causalfusion_jax.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run; or give --checkpoint.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a converted checkpoint.")
_VAE = flags.DEFINE_string("vae", None, "Folder of a converted autoencoder, for a model of latents.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_NUM = flags.DEFINE_integer("num", None, "Number of images [100, or one for each of --labels].")
_LABELS = flags.DEFINE_string("labels", None, "Class numbers, one an image: 3,3,7. Default: all classes in turn.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text that says what to draw, for a model that knows text.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a prompt a line, taken in turn; or held_out.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed; image i depends on it, i and its label alone.")
_BATCH = flags.DEFINE_integer("batch_size", 250, "Images sampled at a time.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "params"], "Of a run: averaged weights [ema], or the last ones.")
_STEP = flags.DEFINE_integer("step", None, "Of a run: checkpoint to use [the newest intact one].")
_AR_STEPS = flags.DEFINE_integer("ar_steps", None, "AR steps of equal size: 1 is diffusion, L token by token.")
_STEP_SIZES = flags.DEFINE_string("step_sizes", None, "Tokens in each AR step instead: 1,3,12.")
_ORDER = flags.DEFINE_string("order", None, "raster, block_raster, dilated, random or square_blocks [as trained].")
_ORDER_BLOCK = flags.DEFINE_integer("order_block", None, "Block or stride of that order.")
_SOLVER = flags.DEFINE_string("solver", None, "ddpm, ddim, dpmpp_2m; for schedule flow also euler, heun.")
_SOLVER_STEPS = flags.DEFINE_integer("solver_steps", None, "Noise levels visited in each AR step.")
_SPACING = flags.DEFINE_string("spacing", None, "Timesteps visited: auto, respaced, leading, trailing, linspace.")
_VARIANCE = flags.DEFINE_string("variance", None, "Noise of ddpm: large or small.")
_ETA = flags.DEFINE_float("eta", None, "Noise of ddim, 0..1.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale; 1 is none.")
_CFG_SCHEDULE = flags.DEFINE_string("cfg_schedule", None, "constant, linear (in noise level) or ar_linear.")
_CFG_INTERVAL = flags.DEFINE_string("cfg_interval", None, "Timesteps with guidance: low,high.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Scale of the noise a stochastic solver adds.")
_CLIP_X_0 = flags.DEFINE_float("clip_x_0", None, "Bound on the predicted |x_0|, for data in pixels; 0 is none.")


def _numbers(flag, text: str | None, kind):
    """A comma-separated flag as a tuple, or None."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{flag}", text, f"must be {kind.__name__} values separated by commas") from None


def _sampler(default):
    """The run's sampler settings with those of the command line on top."""
    given = {
        "ar_steps": _AR_STEPS.value, "step_sizes": _numbers("step_sizes", _STEP_SIZES.value, int),
        "order": _ORDER.value, "order_block": _ORDER_BLOCK.value, "solver": _SOLVER.value,
        "solver_steps": _SOLVER_STEPS.value, "spacing": _SPACING.value, "variance": _VARIANCE.value,
        "eta": _ETA.value, "cfg_scale": _CFG_SCALE.value, "cfg_schedule": _CFG_SCHEDULE.value,
        "cfg_interval": _numbers("cfg_interval", _CFG_INTERVAL.value, float),
        "temperature": _TEMPERATURE.value, "clip_x_0": _CLIP_X_0.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    require(
        not {"ar_steps", "step_sizes"} <= set(given), "--step_sizes", _STEP_SIZES.value,
        "says how many AR steps there are; leave out --ar_steps",
    )
    if "cfg_interval" in given:
        require(len(given["cfg_interval"]) == 2, "--cfg_interval", _CFG_INTERVAL.value, "must be low,high")
    if "ar_steps" in given:
        given["step_sizes"] = ()
    if "order" in given:
        given.setdefault("order_block", 0)
    if "solver" in given:
        # What the config says of another solver does not carry over.
        for name, neutral in {"spacing": "auto", "variance": "large", "eta": 0.0, "temperature": 1.0}.items():
            if given["solver"] != default.solver:
                given.setdefault(name, neutral)
    return dataclasses.replace(default, **given)


def _labels(num_classes: int, prompts):
    """The class of each image; no class beside a prompt, unless --labels is given."""
    import numpy as np

    from causalfusion_jax.sampling.images import balanced_labels

    labels = _numbers("labels", _LABELS.value, int)
    if prompts is not None:
        require(
            labels is None or len(labels) == len(prompts), "--labels", _LABELS.value,
            f"must be {len(prompts)}, as many as images of prompts",
        )
        if labels is None:
            return np.full(len(prompts), num_classes, np.int32)
    elif labels is None:
        num = 100 if _NUM.value is None else _NUM.value
        require(num >= 1, "--num", num, "must be >= 1")
        return balanced_labels(num, num_classes)
    require(len(labels) >= 1, "--labels", _LABELS.value, "must name at least one class")
    for label in labels:
        require(0 <= label < num_classes, "--labels", label, f"must be class numbers in 0..{num_classes - 1}")
    require(
        prompts is not None or _NUM.value in (None, len(labels)), "--num", _NUM.value,
        f"must be {len(labels)}, the number of --labels, or left out",
    )
    return np.array(labels, np.int32)


def _is_done(out: pathlib.Path, request: dict) -> bool:
    """Whether OUT already holds this request. Raises InputError where it holds another."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        same = json.loads((out / "request.json").read_text()) == request
    except (OSError, ValueError):
        same = False
    require(same, "--out", str(out), "exists with other content; give a new or empty folder")
    return (out / "samples.npz").is_file() and (out / "grid.png").is_file()


def _trained():
    """The model that --workdir or --checkpoint names."""
    from causalfusion_jax.sampling import trained

    given = (_WORKDIR.value is None) + (_CHECKPOINT.value is None)
    require(given == 1, "--workdir", _WORKDIR.value, "give --workdir, or --checkpoint, and not both")
    if _WORKDIR.value is not None:
        return trained.from_run(_WORKDIR.value, _WEIGHTS.value or "ema", _STEP.value)
    for name, flag in {"weights": _WEIGHTS, "step": _STEP}.items():
        require(flag.value is None, f"--{name}", flag.value, "a converted checkpoint has one; leave it out")
    return trained.from_converted(_CHECKPOINT.value)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.sampling.reading import read_prompts
    from causalfusion_jax.sampling.trained import make_decoder

    out = pathlib.Path(_OUT.value)
    require(_BATCH.value >= 1, "--batch_size", _BATCH.value, "must be >= 1")
    require(0 <= _SEED.value < 2**32, "--seed", _SEED.value, "must be >= 0 and < 2**32")
    try:
        config, origin, params = _trained()
        prompts = read_prompts(config, _PROMPT.value, _PROMPTS.value, _NUM.value)
        labels = _labels(config.data.num_classes, prompts)
        sampler = _sampler(config.sampling)
        config.check_sampler(sampler)
    except InputError as error:
        raise error if error.field.startswith("--") else InputError(
            f"--{error.field}", error.value, error.allowed
        ) from None
    vae, decode = (None, None) if _VAE.value is None else make_decoder(_VAE.value, config)
    request = {
        **origin, "vae": vae, "seed": _SEED.value, "batch_size": _BATCH.value, "labels": labels.tolist(),
        "sampler": json.loads(json.dumps(dataclasses.asdict(sampler))),
        **({} if prompts is None else {"prompts": prompts}),
    }
    if _is_done(out, request):
        print(f"{out} already holds these {len(labels)} samples")
        return
    _sample_to(out, config, sampler, params(), labels, request, decode)


def _sample_to(out: pathlib.Path, config, sampler, params, labels, request: dict, decode) -> None:
    """Samples, and makes `out` appear whole."""
    import numpy as np

    from causalfusion_jax.data.tokenizers import to_slots
    from causalfusion_jax.sampling.generation import generate_images
    from causalfusion_jax.sampling.images import frames_in_rows, make_grid, save_png

    prompts = request.get("prompts")
    text = None if prompts is None else np.stack([to_slots(config.text, prompt) for prompt in prompts])

    def progress(done):
        print(f"sampled {done}/{len(labels)}", flush=True)

    images = generate_images(config, sampler, params, labels, _SEED.value, _BATCH.value, progress, decode, text)
    classes = config.data.num_classes

    def fill(folder):
        np.savez(folder / "samples.npz", images, labels, **({} if prompts is None else {"prompts": prompts}))
        grid = make_grid(*frames_in_rows(images[:100], classes if classes <= 20 else 10))
        save_png(folder / "grid.png", grid)
        files.write_json(folder / "request.json", request)

    files.write_folder(out, fill)
    print(f"wrote {len(images)} samples to {out / 'samples.npz'} and {out / 'grid.png'}")


if __name__ == "__main__":
    cli.run(main, required=("out",))
