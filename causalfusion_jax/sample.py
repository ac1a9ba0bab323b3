"""Samples images (or videos) from a trained model.

    python -m causalfusion_jax.sample --workdir=runs/digits --num=1000 --ar_steps=4 --out=runs/digits/samples_4
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --num=8 --out=samples/xl

OUT receives samples.npz (`arr_0`: uint8 images [num, (frames,) height, width, channels];
`arr_1`: int labels, classes balanced unless --labels is given), grid.png, and request.json,
which says how they were made. The same request gives the same bytes; where OUT already
holds it, nothing is done. Options left out are as in the run's config (`config.sampling`).

Batches go to OUT/parts as they are done: stopped in any way, the same command goes on from
there to the same bytes. All local devices share a batch (a last digit may depend on how many
they are). On several hosts, which must all see OUT, run it on each with --multihost (or
--coordinator_address, --num_processes, --process_id, as in training); or, where they cannot
reach each other, with --host_index and --num_hosts, and once more without them when all are done.

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

from causalfusion_jax import cli
from causalfusion_jax.errors import InputError, require

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run; or give --checkpoint.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a converted checkpoint.")
_VAE = flags.DEFINE_string("vae", None, "Folder of a converted autoencoder, for a model of latents.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_NUM = flags.DEFINE_integer("num", None, "Number of images [100, or one for each of --labels].")
_LABELS = flags.DEFINE_string("labels", None, "Classes, one an image: otter,3,3,7. Default: all classes in turn.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed; image i depends on it, i and its label alone.")
_BATCH = flags.DEFINE_integer("batch_size", 250, "Images sampled at a time.")
_WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "params"], "Of a run: averaged weights [ema], or the last ones.")
_STEP = flags.DEFINE_string("step", None, "Of a run: checkpoint to use, a step or `best` [the newest intact one].")
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
_HOST = flags.DEFINE_integer("host_index", None, "Of hosts that do not know of each other: this one's number, 0..")
_HOSTS = flags.DEFINE_integer("num_hosts", None, "How many such hosts there are; each samples its share.")
_join_processes = cli.define_processes()
flags.adopt_module_key_flags(cli)


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


def _labels(data):
    """The class of each image."""
    from causalfusion_jax.data.pipeline import class_names
    from causalfusion_jax.sampling.images import balanced_labels
    from causalfusion_jax.sampling.labels import parse_labels

    if _LABELS.value is None:
        num = 100 if _NUM.value is None else _NUM.value
        require(num >= 1, "--num", num, "must be >= 1")
        return balanced_labels(num, data.num_classes)
    labels = parse_labels(_LABELS.value, data.num_classes, lambda: class_names(data))
    require(
        _NUM.value in (None, len(labels)), "--num", _NUM.value,
        f"must be {len(labels)}, the number of --labels, or left out",
    )
    return labels


def _step() -> int | str | None:
    """The checkpoint that --step names."""
    if _STEP.value is None or _STEP.value == "best":
        return _STEP.value
    require(_STEP.value.isdigit(), "--step", _STEP.value, "must be a step, or best")
    return int(_STEP.value)


def _trained():
    """The model that --workdir or --checkpoint names."""
    from causalfusion_jax.sampling import trained

    given = (_WORKDIR.value is None) + (_CHECKPOINT.value is None)
    require(given == 1, "--workdir", _WORKDIR.value, "give --workdir, or --checkpoint, and not both")
    if _WORKDIR.value is not None:
        return trained.from_run(_WORKDIR.value, _WEIGHTS.value or "ema", _step())
    for name, flag in {"weights": _WEIGHTS, "step": _STEP}.items():
        require(flag.value is None, f"--{name}", flag.value, "a converted checkpoint has one; leave it out")
    return trained.from_converted(_CHECKPOINT.value)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.sampling.shards import SampleFolder
    from causalfusion_jax.sampling.trained import make_decoder

    out = pathlib.Path(_OUT.value)
    require(_BATCH.value >= 1, "--batch_size", _BATCH.value, "must be >= 1")
    require(0 <= _SEED.value < 2**32, "--seed", _SEED.value, "must be >= 0 and < 2**32")
    given = (_HOST.value is None) + (_HOSTS.value is None)
    require(given != 1, "--host_index", _HOST.value, "give --host_index and --num_hosts, or neither")
    require(
        given == 2 or 0 <= _HOST.value < _HOSTS.value, "--host_index", _HOST.value, f"must be in 0..{_HOSTS.value}-1"
    )
    _join_processes()
    try:
        config, origin, params = _trained()
        labels = _labels(config.data)
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
    }
    samples = SampleFolder(out, request, min(_BATCH.value, len(labels)))
    samples.check()
    if samples.is_done:
        print(f"{out} already holds these {len(labels)} samples")
        return
    _sample_to(samples, config, sampler, params, labels, decode)


def _sample_to(samples, config, sampler, params, labels, decode) -> None:
    """Samples what falls to this process, and joins the parts when all are there."""
    import jax

    from causalfusion_jax import distributed
    from causalfusion_jax.sampling.generation import image_batches, replicate

    distributed.on_primary(samples.claim, None)
    host, hosts = jax.process_index(), jax.process_count()
    if _HOSTS.value is not None:
        require(hosts == 1, "--num_hosts", _HOSTS.value, "has no meaning where the processes know of each other")
        host, hosts = _HOST.value, _HOSTS.value
    wanted = samples.missing(host, hosts)
    # Reading the parameters takes all processes, also one that has nothing left to do.
    if distributed.on_primary(lambda: len(samples.missing()), 0):
        params = params()
        if len(jax.local_devices()) > 1:
            params = replicate(params, jax.local_devices())
        batches = image_batches(config, sampler, params, labels, _SEED.value, _BATCH.value, decode, wanted)
        done = samples.num_parts - len(samples.missing())
        for count, (index, images) in enumerate(zip(wanted, batches, strict=True), done + 1):
            samples.write(index, images)
            if distributed.is_primary():
                print(f"sampled {min(count * _BATCH.value, len(labels))}/{len(labels)}", flush=True)
    distributed.wait_for_all("sampled")
    if _HOSTS.value is not None:
        print(f"host {host} of {hosts} has done its share; when all have, the command without --num_hosts joins them")
        return
    classes = config.data.num_classes
    distributed.on_primary(lambda: samples.join(classes if classes <= 20 else 10), None)
    if distributed.is_primary():
        print(f"wrote {len(labels)} samples to {_OUT.value}/samples.npz and {_OUT.value}/grid.png")


if __name__ == "__main__":
    cli.run(main, required=("out",))
