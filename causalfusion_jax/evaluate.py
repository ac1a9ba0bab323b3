"""Scores generated images, videos and captions.

    python -m causalfusion_jax.evaluate --workdir=runs/digits --samples=runs/digits/samples_4/samples.npz
    python -m causalfusion_jax.evaluate --samples=samples/xl --reference=VIRTUAL_imagenet256_labeled.npz \
        --inception=converted/inception

Prints one JSON line and writes it as evaluation.json beside the samples, which are an .npz
with uint8 images as arr_0, the OUT of causalfusion_jax.sample, or a folder of image files.

With --inception (converted by causalfusion_jax.convert, kind fid_inception) and --reference:
`fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid`, or those of --metrics, as ADM
defines them, in one pass over all local devices. `precision`, `recall` and `kid` need a
reference with images (arr_0); without a reference only the Inception Score is measured.

With --i3d (kind fvd_i3d) and --reference, of videos: `fvd` of the first --fvd_frames=16 frames, resized
according to --fvd_resize; --samples and --reference may be an .npz of videos, the OUT of sample, or a
folder of video files, GIFs and folders of frames.

With --workdir, pixels against the training data of the run. For source digits: `accuracy`, the
share of images that an SVC fitted on the held-out half reads as the class asked for, and `fd`,
the Fréchet distance of their 64 pixels, scaled to [-1, 1], to the held-out half (real training
digits: 0.29). For digit_pairs: `accuracy`, the share of images of which it reads both digits of
the prompt (or class), and `left` and `right`, of one digit each. For moving_digits: `accuracy`,
over all frames, and `motion_error`, the distance of the tracked path to a straight line with
bounce, in pixels; for longer videos also both of the frames beyond the training length. For
other images: `fd` of pixels, averaged down to at most 16x16, to the training images.

    python -m causalfusion_jax.evaluate --workdir=runs/pairs --captions=runs/pairs/captions/captions.jsonl

For captions, as written by causalfusion_jax.caption, of images with reference captions:
`exact_match`, and `cider` (CIDEr-D, times 10 as published).

--probe=KIND runs `causalfusion_jax.probe --kind=KIND`.

Reference statistics are computed from images, or from the data set of a config:

    python -m causalfusion_jax.evaluate --make_reference --samples=IMAGES --inception=converted/inception --out=ref.npz
    python -m causalfusion_jax.evaluate --make_reference --config=CONFIG --inception=converted/inception --out=ref.npz
    python -m causalfusion_jax.evaluate --make_reference --config=CONFIG --i3d=converted/i3d --out=videos.npz
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from causalfusion_jax.cli import app, probe_flags
from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require, require_one_of

_WORKDIR = probe_flags.WEIGHTS.workdir
_SAMPLES = flags.DEFINE_string("samples", None, "Images: .npz, OUT of causalfusion_jax.sample, or folder of files.")
_CAPTIONS = flags.DEFINE_string(
    "captions", None, "captions.jsonl, as written by causalfusion_jax.caption, instead of samples."
)
_REFERENCE = flags.DEFINE_string("reference", None, "Reference statistics: .npz in ADM's layout.")
_INCEPTION = flags.DEFINE_string("inception", None, "Folder of the converted Inception (kind fid_inception).")
_METRICS = flags.DEFINE_list("metrics", None, "Metrics to measure, for example fid,kid [all that can be].")
_I3D = flags.DEFINE_string("i3d", None, "Folder of the converted I3D (kind fvd_i3d): samples are videos.")
_FVD_FRAMES = flags.DEFINE_integer("fvd_frames", 16, "Number of frames of a video that are compared, its first ones.")
_FVD_RESIZE = flags.DEFINE_string(
    "fvd_resize", "tf1", "Resize to 224x224 as TensorFlow 1 (tf1) or PyTorch (half_pixel)."
)
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "Images (videos) in the network at a time, over all devices [64, 16]."
)
_MAKE_REFERENCE = flags.DEFINE_bool("make_reference", False, "Write reference statistics of images to --out.")
_PROBE = flags.DEFINE_string("probe", None, "Run causalfusion_jax.probe with this --kind instead.")
_OUT = flags.DEFINE_string("out", None, "The new file: with --make_reference an .npz, with --probe a .json.")
_NUM_IMAGES = flags.DEFINE_integer("num_reference_images", 10_000, "With --make_reference: images stored in it.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "With --make_reference: config of the data; with --probe: data and settings of the probe."
)
flags.adopt_module_key_flags(probe_flags)
flags.adopt_module_key_flags(app)


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
        images.dtype == np.uint8 and images.ndim in (4, 5) and len(images) == len(labels),
        "--samples",
        str(path),
        f"arr_0 must be uint8 images or videos, arr_1 a label of each; arr_0 is {images.dtype} {images.shape}",
    )
    return images, labels, prompts


def _score_captions(path: pathlib.Path) -> dict:
    """Scores of a captions file."""
    from causalfusion_jax.metrics.captions import score_captions

    require(path.is_file(), "--captions", str(path), "no such file")
    try:
        records = [json.loads(line) for line in files.read_lines("--captions", path)]
        captions, references = ([record[key] for record in records] for key in ("caption", "references"))
    except (ValueError, KeyError, TypeError):
        raise InputError("--captions", str(path), "not a captions.jsonl with caption and references") from None
    try:
        return {"captions": str(path), "num": len(records), **score_captions(captions, references)}
    except InputError as error:
        raise InputError("--captions", str(path), error.allowed) from None


def _requested(known) -> tuple[str, ...]:
    """The names among `known` that --metrics lists; without --metrics all of them."""
    return tuple(name for name in known if _METRICS.value is None or name in _METRICS.value)


def _pixel_scores() -> dict[str, float]:
    """Scores against the training data of --workdir."""
    from causalfusion_jax.config.workdir import load_config
    from causalfusion_jax.data.class_names import names_difference, stored_class_names
    from causalfusion_jax.data.registry import class_names
    from causalfusion_jax.data.scores import metrics, pixel_metrics, score

    data = load_config(_WORKDIR.value).data
    known = pixel_metrics(data)
    of_pixels = {name for name, metric in metrics().items() if not metric.network}
    needed = "inception" if data.frames == 1 else "i3d"
    require(
        bool(known) or _INCEPTION.value is not None or _I3D.value is not None,
        f"--{needed}",
        None,
        f"{_WORKDIR.value} was trained on {'latents' if data.latents else 'videos'}, so its samples are scored by"
        f" --{needed} and --reference",
    )
    for name in _METRICS.value or ():
        require(name in known or name not in of_pixels, "--metrics", name, f"is not of source {data.source}")
    requested = _requested(known)
    if not requested:
        return {}
    path = pathlib.Path(_SAMPLES.value)
    images, labels, prompts = _read(path / "samples.npz" if path.is_dir() else path)
    if prompts is not None and data.kind.held_out_captions is not None:
        labels = data.kind.held_out_captions.labels(prompts)
    scores = score(data, images, labels)
    for name in _METRICS.value or ():
        require(name in scores or name not in requested, "--metrics", name, "needs videos longer than those trained on")
    stored = stored_class_names(_WORKDIR.value)
    renamed = names_difference(stored, class_names(data)) if stored else None
    if renamed is not None:
        print(f"warning: {renamed}: these are not the data that the run was trained on", file=sys.stderr)
    return {"num": len(images)} | {n: value for n, value in scores.items() if n in requested or n not in of_pixels}


def _inception_scores() -> dict[str, float]:
    """Scores by Inception's features."""
    from causalfusion_jax.evaluation import inception_metrics
    from causalfusion_jax.evaluation.images import open_images
    from causalfusion_jax.metrics.registry import FEATURE_METRICS

    images = open_images("--samples", _SAMPLES.value)
    known = {name: metric for name, metric in FEATURE_METRICS.items() if metric.network == "inception"}
    metrics, reference = _requested(known), None
    if _REFERENCE.value is not None:
        reference = inception_metrics.Reference("--reference", _REFERENCE.value)
    without = [name for name in metrics if known[name].reference and reference is None]
    if _METRICS.value is None:
        metrics = [m for m in metrics if m not in without and (reference is None or reference.supports(m))]
    elif without:
        raise InputError("--reference", None, f"is needed for {', '.join(without)}")
    if not metrics:
        return {}
    inception_metrics.check_counts("--samples", metrics, images.num, reference)
    inception = _inception(images.num)
    if reference is not None:
        reference.prepare(metrics, inception)
    collected = inception_metrics.Collected(metrics)
    collected.add_all(inception.features(images.batches, collected.names), _progress(images.num))
    _warn(inception_metrics.bias_warning(metrics, images.num))
    scores = inception_metrics.compute(metrics, collected, reference)
    return {"num": images.num, "reference": _REFERENCE.value, **scores}


def _warn(warning: str | None) -> None:
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def _inception(num: int):
    """The network of --inception, for `num` images."""
    from causalfusion_jax.evaluation.inception_metrics import BATCH_SIZE, Inception

    return Inception("--inception", _INCEPTION.value, batch_size=min(_BATCH.value or BATCH_SIZE, num))


def _i3d(num: int):
    """The network of --i3d, for `num` videos."""
    from causalfusion_jax.evaluation.video_metrics import BATCH_SIZE, I3DNetwork

    batch_size = min(_BATCH.value or BATCH_SIZE, num)
    return I3DNetwork("--i3d", _I3D.value, batch_size=batch_size, resize=_FVD_RESIZE.value)


def _protocol():
    """The protocol of FVD."""
    from causalfusion_jax.evaluation.video_metrics import VideoProtocol

    protocol = VideoProtocol(_FVD_FRAMES.value, _FVD_RESIZE.value)
    protocol.check()
    return protocol


def _video_scores() -> dict[str, float]:
    """Scores by I3D's features."""
    from causalfusion_jax.evaluation import video_metrics
    from causalfusion_jax.evaluation.images import open_videos
    from causalfusion_jax.evaluation.inception_metrics import bias_warning

    if not _requested(["fvd"]):
        return {}
    require(_REFERENCE.value is not None, "--reference", None, "is needed for fvd")
    protocol = _protocol()
    videos = open_videos("--samples", _SAMPLES.value, protocol.frames)
    reference = video_metrics.VideoReference("--reference", _REFERENCE.value, protocol)
    scores = video_metrics.score_videos(videos, reference, _i3d(videos.num), _progress(videos.num))
    _warn(bias_warning(["fvd"], videos.num))
    return {"num": videos.num, "reference": _REFERENCE.value, **protocol._asdict(), **scores}


def _make_video_reference(out: pathlib.Path) -> None:
    """Writes --out, the statistics of videos."""
    from causalfusion_jax.config import experiment
    from causalfusion_jax.data.registry import make_source
    from causalfusion_jax.evaluation import video_metrics
    from causalfusion_jax.evaluation.images import images_of_source, open_videos

    protocol = _protocol()
    if _SAMPLES.value is not None:
        videos = open_videos("--samples", _SAMPLES.value, protocol.frames)
    else:
        source = make_source(experiment.from_dict(_CONFIG.value.to_dict()).data)
        videos = images_of_source("config.data", source, protocol.frames)
    network = _i3d(videos.num)
    out.parent.mkdir(parents=True, exist_ok=True)
    video_metrics.make_video_reference(videos, network, protocol, out, _progress(videos.num))
    print(f"wrote statistics of {videos.num} videos of {protocol.frames} frames to {out}")


def _progress(num: int):
    """A callback that prints progress to stderr, if it is a terminal."""

    def show(done: int) -> None:
        print(f"\r{done}/{num} images", end="\n" if done == num else "", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda done: None


def _make_reference() -> None:
    """Writes --out."""
    from causalfusion_jax.config import experiment
    from causalfusion_jax.data.registry import make_source
    from causalfusion_jax.evaluation import inception_metrics
    from causalfusion_jax.evaluation.images import images_of_source, open_images

    for name, flag in {"workdir": _WORKDIR, "reference": _REFERENCE, "metrics": _METRICS}.items():
        require(flag.value is None, f"--{name}", flag.value, "has no meaning with --make_reference; leave it out")
    given = (_SAMPLES.value is None) + (_CONFIG.value is None)
    require(given == 1, "--samples", _SAMPLES.value, "give --samples, or --config, and not both")
    needed = {"out": _OUT} if _I3D.value is not None else {"inception": _INCEPTION, "out": _OUT}
    for name, flag in needed.items():
        require(flag.value is not None, f"--{name}", None, "is required with --make_reference")
    require(_NUM_IMAGES.value >= 2, "--num_reference_images", _NUM_IMAGES.value, "must be >= 2")
    out = pathlib.Path(_OUT.value)
    require(out.suffix == ".npz", "--out", str(out), "must be an .npz file")
    require(not out.exists(), "--out", str(out), "exists; give a new file")
    if _I3D.value is not None:
        _make_video_reference(out)
        return
    if _SAMPLES.value is not None:
        images = open_images("--samples", _SAMPLES.value)
    else:
        images = images_of_source("config.data", make_source(experiment.from_dict(_CONFIG.value.to_dict()).data))
    inception = _inception(images.num)
    out.parent.mkdir(parents=True, exist_ok=True)
    inception_metrics.make_reference(images, inception, out, _NUM_IMAGES.value, progress=_progress(images.num))
    print(f"wrote statistics of {images.num} images, {min(images.num, _NUM_IMAGES.value)} of them kept, to {out}")


def _probe() -> None:
    """Runs the command `probe`."""
    from causalfusion_jax.config.probe import PROBES
    from causalfusion_jax.evaluation.probing import Probe, run_probe

    others = _SAMPLES, _CAPTIONS, _REFERENCE, _INCEPTION, _METRICS, _BATCH, _MAKE_REFERENCE, _NUM_IMAGES
    for flag in (*others, _I3D, _FVD_FRAMES, _FVD_RESIZE):
        require(not flag.present, f"--{flag.name}", flag.value, "has no meaning with --probe; leave it out")
    require_one_of("--probe", _PROBE.value, PROBES)
    probe_flags.run(Probe, run_probe, _PROBE.value, _CONFIG.value, _OUT.value)


def _check_flags() -> None:
    """Raises InputError for flags that do not fit together."""
    from causalfusion_jax.data.scores import metrics

    for name in probe_flags.NAMES:
        require(not flags.FLAGS[name].present, f"--{name}", flags.FLAGS[name].value, "needs --probe")
    require(_BATCH.value is None or _BATCH.value >= 1, "--batch_size", _BATCH.value, "must be >= 1")
    for name in _METRICS.value or ():
        require_one_of("--metrics", name, metrics())
    both = _INCEPTION.value is not None and _I3D.value is not None
    require(not both, "--i3d", _I3D.value, "is of videos, --inception of images; give one of them")
    for name, flag in {"fvd_frames": _FVD_FRAMES, "fvd_resize": _FVD_RESIZE}.items():
        require(not flag.present or _I3D.value is not None, f"--{name}", flag.value, "needs --i3d")
    stores_images = _NUM_IMAGES.present and _I3D.value is not None
    allowed = "has no meaning with --i3d, which keeps no videos"
    require(not stores_images, "--num_reference_images", _NUM_IMAGES.value, allowed)
    if _MAKE_REFERENCE.value:
        return
    for name, flag in {"out": _OUT, "config": _CONFIG}.items():
        require(flag.value is None, f"--{name}", str(flag.value), "needs --make_reference or --probe")
    given = (_SAMPLES.value is None) + (_CAPTIONS.value is None)
    require(given == 1, "--samples", _SAMPLES.value, "give --samples, or --captions, and not both; see --help")


def _check_needed_flags() -> None:
    """Raises InputError if --workdir, --inception, --i3d or --reference is missing."""
    from causalfusion_jax.data.scores import metrics

    needed = {"workdir": _WORKDIR, "inception": _INCEPTION, "i3d": _I3D}
    allowed = "is required, or --inception (videos: --i3d) with --reference; see --help"
    require(any(flag.value is not None for flag in needed.values()), "--workdir", None, allowed)
    for name in _METRICS.value or ():
        flag = metrics()[name].network or "workdir"
        require(needed[flag].value is not None, f"--{flag}", None, f"is needed for {name}")
    require(
        _REFERENCE.value is None or _INCEPTION.value is not None or _I3D.value is not None,
        "--inception",
        None,
        "is needed with --reference",
    )


def main(argv):
    """Runs the command."""
    del argv
    if _PROBE.value is not None:
        _probe()
        return
    _check_flags()
    if _MAKE_REFERENCE.value:
        _make_reference()
        return
    if _CAPTIONS.value is not None:
        path = pathlib.Path(_CAPTIONS.value)
        _write(json.dumps(_score_captions(path)), path.parent)
        return
    _check_needed_flags()
    scores = _pixel_scores() if _WORKDIR.value is not None else {}
    if _INCEPTION.value is not None:
        scores |= _inception_scores()
    if _I3D.value is not None:
        scores |= _video_scores()
    path = pathlib.Path(_SAMPLES.value)
    _write(json.dumps({"samples": _SAMPLES.value, **scores}), path if path.is_dir() else path.parent)


def _write(line: str, folder: pathlib.Path) -> None:
    """Prints the result and stores it in `folder`."""
    (folder / "evaluation.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    app.run(main)
