"""Samples images (or videos) from a trained model.

    python -m causalfusion_jax.sample --workdir=runs/digits --num=1000 --ar_steps=4 --out=runs/digits/samples_4
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --num=8 --out=samples/xl
    python -m causalfusion_jax.sample --workdir=runs/moving_digits --frames=64 --out=runs/moving_digits/samples_64

OUT receives samples.npz (`arr_0`: uint8 images [num, (frames,) height, width, channels];
`arr_1`: int labels, classes balanced unless --labels is given), grid.png (a video is a row of
its frames), of videos clips.gif, and request.json, which says how they were made. The same
request gives the same bytes; where OUT already holds it, nothing is done. Options left out are
as in the run's config (`config.sampling`).

A model of latents needs the autoencoder that decodes them, --vae, converted by
causalfusion_jax.convert. Without it `arr_0` is the latents themselves, float32, and the
grid shows three of their channels in false colour.

--ar_steps is the dial between diffusion (1) and token-by-token autoregression (the number
of tokens); --order, --step_sizes and --solver are free too, whatever was trained.

--frames makes videos longer than those trained on: a window of a training clip's length rolls
over them, in the memory of one clip. --condition=clips.npz --keep_frames=4 continues clips
(or an image); their frames come first, bit for bit.
"""

import dataclasses
import json
import pathlib

from absl import flags

from causalfusion_jax import cli, files, sampling_flags, video_flags
from causalfusion_jax.errors import require

_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_NUM = flags.DEFINE_integer("num", None, "Number of images [100, or one for each of --labels].")
_LABELS = flags.DEFINE_string("labels", None, "Class numbers, one an image: 3,3,7. Default: all classes in turn.")
flags.adopt_module_key_flags(sampling_flags)
flags.adopt_module_key_flags(video_flags)


def _labels(num_classes: int, video):
    """The class of each image; of clips that are continued, their own unless given."""
    import numpy as np

    from causalfusion_jax.sampling.images import balanced_labels

    labels = sampling_flags.numbers("labels", _LABELS.value, int)
    clips = None if video is None else video.before
    if labels is None and clips is not None:
        require(video.labels is not None, "--labels", None, "must be given: the clips come without")
        labels = video.labels.tolist()
    require(
        labels is None or clips is None or len(labels) == len(clips), "--labels", _LABELS.value,
        f"must be {0 if clips is None else len(clips)}, one for each clip",
    )
    if labels is None:
        num = 100 if _NUM.value is None else _NUM.value
        require(num >= 1, "--num", num, "must be >= 1")
        return balanced_labels(num, num_classes)
    require(len(labels) >= 1, "--labels", _LABELS.value, "must name at least one class")
    for label in labels:
        require(0 <= label < num_classes, "--labels", label, f"must be class numbers in 0..{num_classes - 1}")
    require(
        _NUM.value in (None, len(labels)), "--num", _NUM.value,
        f"must be {len(labels)}, the number of --labels, or left out",
    )
    return np.array(labels, np.int32)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.sampling.trained import make_autoencoder

    out = pathlib.Path(_OUT.value)
    sampling_flags.check_seed_and_batch()
    with sampling_flags.as_flags():
        config, origin, params = sampling_flags.trained()
        sampler = sampling_flags.sampler(config.sampling)
        config.check_sampler(sampler)
        vae = None if sampling_flags.VAE.value is None else make_autoencoder(sampling_flags.VAE.value, config)
        video = video_flags.read(config, sampler, vae)
        labels = _labels(config.data.num_classes, video)
    request = {
        **origin, "vae": vae and vae.fingerprint, "seed": sampling_flags.SEED.value,
        "batch_size": sampling_flags.BATCH.value, "labels": labels.tolist(),
        "sampler": json.loads(json.dumps(dataclasses.asdict(sampler))), **(video.request if video else {}),
    }
    written = ("samples.npz", "grid.png", *(("clips.gif",) if config.data.frames > 1 else ()))
    if sampling_flags.is_done(out, request, written):
        print(f"{out} already holds these {len(labels)} samples")
        return
    _sample_to(out, config, sampler, params(), labels, request, vae and vae.decode, video)


def _sample_to(out: pathlib.Path, config, sampler, params, labels, request: dict, decode, video) -> None:
    """Samples, and makes `out` appear whole."""
    import numpy as np

    from causalfusion_jax.sampling.generation import generate_images
    from causalfusion_jax.sampling.images import frames_in_rows, make_grid, save_gif, save_png
    from causalfusion_jax.sampling.rolling import generate_videos

    def progress(done):
        print(f"sampled {done}/{len(labels)}", flush=True)

    how = (params, labels, request["seed"], request["batch_size"], progress, decode)
    if video is None:
        images = generate_images(config, sampler, *how)
    else:
        images = generate_videos(config, video.windows, video.rolling, *how, video.clips)
        if video.before is not None:
            # With an autoencoder they were decoded.
            images[:, : video.before.shape[1]] = video.before
    classes = config.data.num_classes

    def fill(folder):
        np.savez(folder / "samples.npz", images, labels)
        grid = make_grid(*frames_in_rows(images[:100], classes if classes <= 20 else 10))
        save_png(folder / "grid.png", grid)
        if images.ndim == 5:
            save_gif(folder / "clips.gif", images[:100], 10)
        files.write_json(folder / "request.json", request)

    files.write_folder(out, fill)
    print(f"wrote {len(images)} samples to {out / 'samples.npz'} and {out / 'grid.png'}")


if __name__ == "__main__":
    cli.run(main, required=("out",))
