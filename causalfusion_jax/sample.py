"""Samples images (or videos) from a trained model.

    python -m causalfusion_jax.sample --workdir=runs/digits --num=1000 --ar_steps=4 --out=runs/digits/samples_4
    python -m causalfusion_jax.sample --checkpoint=converted/xl --vae=converted/kl16 --num=8 --out=samples/xl
    python -m causalfusion_jax.sample --workdir=runs/moving_digits --frames=64 --out=runs/moving_digits/samples_64

OUT receives samples.npz (`arr_0`: uint8 images [num, (frames,) height, width, channels];
`arr_1`: int labels, classes balanced unless --labels is given), grid.png (a video is a row of
its frames), of videos clips.gif, and request.json, which says how they were made. The same
request gives the same bytes; where OUT already holds it, nothing is done. Options left out are
as in the run's config (`config.sampling`).

Batches go to OUT/parts as they are done: stopped in any way, the same command goes on from
there to the same bytes. All local devices share a batch (a last digit may depend on how many
they are). On several hosts, which must all see OUT, run it on each with --multihost (or
--coordinator_address, --num_processes, --process_id, as in training); or, where they cannot
reach each other, with --host_index and --num_hosts, and once more without them when all are done.

A model of texts and images draws what --prompt="three seven" says, or each line of --prompts=FILE
(of a model of digit pairs also --prompts=held_out, pairs it never saw); `prompts` of samples.npz
keeps them.

A model of latents needs the autoencoder that decodes them, --vae, converted by
causalfusion_jax.convert. Without it `arr_0` is the latents themselves, float32, and the
grid shows three of their channels in false colour.

--ar_steps is the dial between diffusion (1) and token-by-token autoregression (the number
of tokens); --order, --step_sizes and --solver are free too, whatever was trained.

--frames makes videos longer than those trained on: a window of a training clip's length rolls
over them, in the memory of one clip. --condition=clips.npz --keep_frames=4 continues clips
(or an image; --condition=clip.mp4, a GIF or a folder of frames, cropped as in training, with
--labels); their frames come first, bit for bit.
"""

import dataclasses
import json
import pathlib

from absl import flags

from causalfusion_jax.cli import app, sampling_flags, video_flags
from causalfusion_jax.common.errors import require

_OUT = flags.DEFINE_string("out", None, "Folder to write; must be new, empty, or hold this very request.")
_NUM = flags.DEFINE_integer("num", None, "Number of images [100, or one for each of --labels].")
_LABELS = flags.DEFINE_string("labels", None, "Classes, one an image: otter,3,3,7. Default: all classes in turn.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text that says what to draw, for a model that knows text.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a prompt a line, taken in turn; or held_out.")
_HOST = flags.DEFINE_integer("host_index", None, "Of hosts that do not know of each other: this one's number, 0..")
_HOSTS = flags.DEFINE_integer("num_hosts", None, "How many such hosts there are; each samples its share.")
_join_processes = app.define_processes()
for _module in (app, sampling_flags, video_flags):
    flags.adopt_module_key_flags(_module)


def _labels(trained, video, prompts):
    """The class of each image; of clips that are continued, their own unless given; beside prompts, no class."""
    import numpy as np

    from causalfusion_jax.sampling.images import balanced_labels
    from causalfusion_jax.sampling.labels import parse_labels

    config = trained.config
    data, clips = config.data, None if video is None else video.before
    if prompts is not None and _LABELS.value is None:
        return np.full(len(prompts), data.num_classes, np.int32)
    if _LABELS.value is not None:
        config.check_classes("--labels", _LABELS.value)
        labels = parse_labels(_LABELS.value, data.num_classes, trained.read_class_names)
    elif clips is not None:
        require(video.labels is not None, "--labels", None, "must be given: the clips come without")
        labels = np.asarray(video.labels, np.int32)
        for label in labels.tolist():
            require(0 <= label < data.num_classes, "--condition", label, f"labels must be in 0..{data.num_classes - 1}")
    else:
        num = 100 if _NUM.value is None else _NUM.value
        require(num >= 1, "--num", num, "must be >= 1")
        labels = balanced_labels(num, data.num_classes)
        return labels if config.knows_classes else np.full_like(labels, data.num_classes)
    require(
        clips is None or len(labels) == len(clips),
        "--labels",
        _LABELS.value,
        f"must be {0 if clips is None else len(clips)}, one for each clip",
    )
    require(
        prompts is None or len(labels) == len(prompts),
        "--labels",
        _LABELS.value,
        f"must be {0 if prompts is None else len(prompts)}, as many as images of prompts",
    )
    require(
        prompts is not None or _NUM.value in (None, len(labels)),
        "--num",
        _NUM.value,
        f"must be {len(labels)}, the number of --labels, or left out",
    )
    return labels


def main(argv):
    """Runs the command."""
    del argv
    from causalfusion_jax.common import distributed
    from causalfusion_jax.sampling.reading import read_prompts
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
        video = video_flags.read(config, sampler, vae)
        prompts = read_prompts(config, _PROMPT.value, _PROMPTS.value, _NUM.value)
        require(prompts is None or video is None, "--prompt", _PROMPT.value, "is for images, not for longer videos")
        labels = _labels(trained, video, prompts)
    batch_size = sampling_flags.BATCH.value
    request = {
        **trained.origin,
        "vae": vae and vae.fingerprint,
        "seed": sampling_flags.SEED.value,
        "batch_size": batch_size,
        "labels": labels.tolist(),
        "sampler": json.loads(json.dumps(dataclasses.asdict(sampler))),
        **(video.request if video else {}),
        **({} if prompts is None else {"prompts": prompts}),
    }
    samples = SampleFolder(pathlib.Path(_OUT.value), request, min(batch_size, len(labels)))
    if distributed.on_primary(lambda: int(samples.check() or samples.is_done), 0):
        if distributed.is_primary():
            print(f"{_OUT.value} already holds these {len(labels)} samples")
        return
    _sample_to(samples, trained, sampler, labels, vae and vae.decode, video, prompts)


def _batches(config, sampler, params, labels, decode, video, prompts, wanted):
    """The batches of numbers `wanted`; of clips that are continued, their frames as they were given."""
    import numpy as np

    from causalfusion_jax.data.tokenizers import to_slots
    from causalfusion_jax.sampling.generation import image_batches
    from causalfusion_jax.sampling.rolling import video_batches

    how = params, labels, sampling_flags.SEED.value, sampling_flags.BATCH.value, decode, wanted
    if video is None:
        text = None if prompts is None else np.stack([to_slots(config.text, prompt) for prompt in prompts])
        yield from image_batches(config, sampler, *how, text=text)
        return
    made = video_batches(config, video.windows, video.rolling, *how, video.clips)
    for index, videos in zip(wanted, made, strict=True):
        if video.before is not None:
            # With an autoencoder they were decoded.
            start = index * min(sampling_flags.BATCH.value, len(labels))
            videos[:, : video.before.shape[1]] = video.before[start : start + len(videos)]
        yield videos


def _sample_to(samples, trained, sampler, labels, decode, video, prompts) -> None:
    """Samples what falls to this process, and joins the parts when all are there."""
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
        made = _batches(trained.config, sampler, trained.announced_params(), labels, decode, video, prompts, wanted)
        for count, (index, images) in enumerate(zip(wanted, made, strict=True), done + 1):
            samples.write(index, images)
            if distributed.is_primary():
                print(f"sampled {min(count * sampling_flags.BATCH.value, len(labels))}/{len(labels)}", flush=True)
    distributed.wait_for_all("sampled")
    if _HOSTS.value is not None:
        print(f"host {host} of {hosts} has done its share; when all have, the command without --num_hosts joins them")
        return
    classes = trained.config.data.num_classes
    distributed.on_primary(lambda: samples.join(classes if classes <= 20 else 10), None)
    if distributed.is_primary():
        print(f"wrote {len(labels)} samples to {_OUT.value}/samples.npz and {_OUT.value}/grid.png")


if __name__ == "__main__":
    app.run(main, required=("out",))
