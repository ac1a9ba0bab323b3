"""Samples images (or videos) from a trained model.

    python -m causalfusion_jax.sample --workdir=runs/digits --num=1000 --ar_steps=4 --out=runs/digits/samples_4
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --num=8 --out=samples/xl
    python -m causalfusion_jax.sample --workdir=runs/moving_digits --frames=64 --out=runs/moving_digits/samples_64

OUT receives samples.npz (`arr_0`: uint8 images [num, (frames,) height, width, channels];
`arr_1`: int labels, classes balanced unless --labels is given), grid.png (a video is a row of
its frames), clips.gif for videos, and request.json, the settings of the samples. The same
request gives the same bytes; if OUT already holds it, the command does nothing. Options default to
the run's config (`config.sampling`).

Batches are written to OUT/parts as they are done: after any interruption, the same command
continues to the same bytes. All local devices share a batch (the last digit may depend on their
number). On several hosts, which must all have access to OUT, run it on each with --multihost (or
--coordinator_address, --num_processes, --process_id, as in training); or, if they cannot reach
each other, with --host_index and --num_hosts, and once without them when all are done.

A text-conditioned model takes --prompt="three seven", or --prompts=FILE with one prompt in each
line (a model of digit pairs also --prompts=held_out, pairs that are not in its training data);
samples.npz then holds `prompts`.

A model of latents needs the autoencoder that decodes them, --vae, converted by
causalfusion_jax.convert. Without it `arr_0` is the latents, float32, and the grid shows three
of their channels in false colour.

--ar_steps ranges from diffusion (1) to token-by-token autoregression (the number of tokens);
--order, --step_sizes and --solver may also differ from training.

--frames generates videos longer than training clips: a window of a clip's length rolls over
them, in the memory of one clip. --condition=clips.npz --keep_frames=4 continues clips (or an
image; --condition=clip.mp4, a GIF or a folder of frames, cropped as in training, with
--labels); their frames come first, bit-identical.
"""

import dataclasses
import json
import pathlib

from absl import flags

from causalfusion_jax.cli import app, condition_flags, sampling_flags
from causalfusion_jax.common.errors import require

_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_NUM = flags.DEFINE_integer("num", None, "Number of images [100, or one for each of --labels].")
_CONDITIONS = condition_flags.define(
    "labels",
    labels_help="Classes, one for each image: otter,3,3,7. Default: all classes in turn.",
    prompts_help="File with one prompt in each line, taken in turn; or held_out.",
)
_FRAMES = flags.DEFINE_integer("frames", None, "Frames of a video, at least the run's; more roll a window over it.")
_CLIPS = flags.DEFINE_string("condition", None, "Clips to continue: npz, video, GIF, folder of frames, image.")
_KEEP_FRAMES = flags.DEFINE_integer("keep_frames", None, "Number of their first frames to keep [all].")
_FRAME_STRIDE = flags.DEFINE_integer("frame_stride", None, "Take every n-th frame of a video [the run's].")
_WINDOW_STRIDE = flags.DEFINE_integer("window_stride", None, "Frames generated each time the window rolls [fewest].")
_SINK_FRAMES = flags.DEFINE_integer("sink_frames", None, "First frames that never leave the window [0].")
_VIDEO_FLAGS = (_FRAMES, _CLIPS, _KEEP_FRAMES, _FRAME_STRIDE, _WINDOW_STRIDE, _SINK_FRAMES)
_HOST = flags.DEFINE_integer("host_index", None, "Of hosts that cannot reach each other: number of this one, from 0.")
_HOSTS = flags.DEFINE_integer("num_hosts", None, "Number of such hosts; each samples its share.")
_join_processes = app.define_processes()
for _module in (app, condition_flags, sampling_flags):
    flags.adopt_module_key_flags(_module)


def _videos(config, sampler, vae):
    """The `clips.LongVideos` that the flags ask for; None where they ask for images, or clips as in training."""
    from causalfusion_jax.sampling.clips import LongVideos, read_clips
    from causalfusion_jax.sampling.rolling import RollingConfig, make_windows

    given = {flag.name: flag.value for flag in _VIDEO_FLAGS if flag.value is not None}
    if not given:
        return None
    require(config.data.frames > 1, f"--{min(given)}", given[min(given)], "the model makes images, not videos")
    for name in ("keep_frames", "frame_stride"):
        require(name not in given or "condition" in given, f"--{name}", given.get(name), "needs --condition")
    clips, keep = None, 0
    if "condition" in given:
        clips = read_clips(config, _CLIPS.value, _KEEP_FRAMES.value, _FRAME_STRIDE.value, vae)
        keep = clips.frames.shape[1]
    frames = config.data.frames if _FRAMES.value is None else _FRAMES.value
    rolling = RollingConfig(frames, _WINDOW_STRIDE.value or 0, _SINK_FRAMES.value or 0)
    windows = make_windows(config, sampler, rolling, keep, sampling_flags.ar_steps_given())
    return LongVideos(clips, rolling, windows)


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.common import distributed
    from causalfusion_jax.sampling.generation import SamplingJob
    from causalfusion_jax.sampling.shards import SampleFolder
    from causalfusion_jax.sampling.trained import make_autoencoder

    sampling_flags.check_seed_and_batch()
    given = (_HOST.value is None) + (_HOSTS.value is None)
    require(given != 1, "--host_index", _HOST.value, "give --host_index and --num_hosts, or neither")
    require(
        given == 2 or 0 <= _HOST.value < _HOSTS.value, "--host_index", _HOST.value, f"must be in 0..{_HOSTS.value}-1"
    )
    _join_processes()
    with app.as_flags():
        trained = sampling_flags.trained()
        config = trained.config
        sampler = sampling_flags.sampler(config.sampling)
        config.check_sampler(sampler)
        vae = None if sampling_flags.VAE.value is None else make_autoencoder(sampling_flags.VAE.value, config)
        videos = _videos(config, sampler, vae)
        alone = videos is None or not _CONDITIONS.has_prompts
        require(alone, "--prompt", _CONDITIONS.prompt.value, "is for images, not for longer videos")
        conditions = _CONDITIONS.of_samples(trained, _NUM.value, videos and videos.clips)
    seed, batch_size = sampling_flags.SEED.value, sampling_flags.BATCH.value
    request = {
        **trained.origin,
        "vae": vae and vae.fingerprint,
        "seed": seed,
        "batch_size": batch_size,
        "labels": conditions.labels.tolist(),
        "sampler": json.loads(json.dumps(dataclasses.asdict(sampler))),
        **(videos.request if videos else {}),
        **({} if conditions.prompts is None else {"prompts": conditions.prompts}),
    }
    job = SamplingJob(config, sampler, conditions.condition(config), seed, batch_size, vae and vae.decode)
    samples = SampleFolder(pathlib.Path(_OUT.value), request, min(batch_size, job.num))
    if distributed.on_primary(lambda: int(samples.check() or samples.is_done), 0):
        if distributed.is_primary():
            print(f"{_OUT.value} already holds these {job.num} samples")
        return
    _sample_to(samples, trained, job, videos)


def _batches(job, params, videos, wanted):
    """The batches of numbers `wanted`; frames of --condition are as they were given."""
    from causalfusion_jax.sampling.generation import image_batches
    from causalfusion_jax.sampling.rolling import video_batches

    if videos is None:
        yield from image_batches(job, params, wanted)
        return
    clips = videos.clips
    encoded = None if clips is None else clips.encoded
    generated = video_batches(job, params, videos.windows, videos.rolling, encoded, wanted)
    for index, batch in zip(wanted, generated, strict=True):
        if clips is not None:
            # With an autoencoder the kept frames were decoded.
            start = index * min(job.batch_size, job.num)
            batch[:, : clips.frames.shape[1]] = clips.frames[start : start + len(batch)]
        yield batch


def _sample_to(samples, trained, job, videos) -> None:
    """Samples the share of this process, and joins the parts when all are there."""
    import jax

    from causalfusion_jax.common import distributed

    distributed.on_primary(samples.claim, None)
    host, hosts = jax.process_index(), jax.process_count()
    if _HOSTS.value is not None:
        require(hosts == 1, "--num_hosts", _HOSTS.value, "has no meaning where the processes know of each other")
        host, hosts = _HOST.value, _HOSTS.value
    wanted = samples.missing(host, hosts)
    if wanted:
        done = samples.num_parts - len(samples.missing())
        generated = _batches(job, trained.announced_params(), videos, wanted)
        for count, (index, images) in enumerate(zip(wanted, generated, strict=True), done + 1):
            samples.write(index, images)
            if distributed.is_primary():
                print(f"sampled {min(count * job.batch_size, job.num)}/{job.num}", flush=True)
    distributed.wait_for_all("sampled")
    if _HOSTS.value is not None:
        print(f"host {host} of {hosts} has done its share; when all have, the command without --num_hosts joins them")
        return
    classes = trained.config.data.num_classes
    distributed.on_primary(lambda: samples.join(classes if classes <= 20 else 10), None)
    if distributed.is_primary():
        print(f"wrote {job.num} samples to {_OUT.value}/samples.npz and {_OUT.value}/grid.png")


if __name__ == "__main__":
    app.run(main, required=("out",))
