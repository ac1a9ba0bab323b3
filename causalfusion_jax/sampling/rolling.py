"""Videos longer than training clips, and continuations of clips, with a rolling window.

A video is generated window by window. A window has the frames of a training clip; once it is
full, its first frames are dropped, the others become its beginning, and the frames after them
are generated. Memory is that of one clip for videos of any length, and one compiled program
generates all windows after the first.

The kept frames are committed to a new cache, at their positions in the new window, so that all
positions are among those of training. Keeping the old keys at increasing positions would not
work: learned positions end with the training clip, and ACDiT's rotary positions as released do
not depend on distances alone (`positions.rotate` pairs values of different axes). The old keys
would also depend on frames that are no longer in the window. The pass over the kept frames
costs no more than one of the noise levels of the new frames.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from causalfusion_jax.common import distributed, sharding
from causalfusion_jax.common.errors import InputError, require, require_number
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.core import factorization
from causalfusion_jax.sampling.editing import EditPlan, edit_sampler, known_tokens, plan_edit
from causalfusion_jax.sampling.generation import SamplingJob, Share, batches, collect, generate_batch


@dataclasses.dataclass(frozen=True)
class RollingConfig:
    """Length of videos, and how the window rolls.

    Attributes:
      frames: number of frames of a video, at least those of a training clip.
      stride: number of frames generated, and dropped, each time the window rolls; 0: the fewest
        AR steps of training that are whole frames, or a quarter of the clip if AR steps were drawn.
      sink_frames: number of frames at the beginning of the video that are never dropped.
    """

    frames: int
    stride: int = 0
    sink_frames: int = 0

    def __post_init__(self):
        require_number("frames", self.frames, 1)
        require_number("window_stride", self.stride, 0)
        require_number("sink_frames", self.sink_frames, 0)


@dataclasses.dataclass(frozen=True)
class Window:
    """A window to fill.

    Attributes:
      kept: number of known frames at its beginning.
      plan: the other frames, which are generated; None: all are.
      sampler: how to sample them.
    """

    kept: int
    plan: EditPlan | None
    sampler: SamplerConfig


def make_window(
    config: ExperimentConfig, sampler: SamplerConfig, kept: int, explicit_steps: bool, setting: tuple[str, int]
) -> Window:
    """The window with `kept` known frames.

    Args:
      config: the model's settings.
      sampler: for a whole clip; the window gets its part of the AR steps.
      kept: number of known frames.
      explicit_steps: whether the sampler's AR steps were requested, rather than those of training.
      setting: field and value that `kept` follows from, for errors.

    Raises:
      InputError: the model cannot continue `kept` frames.
    """
    if not kept:
        return Window(0, None, sampler)
    frames = config.data.frames
    hidden = np.zeros(config.transformer.grid, bool)
    hidden[kept:] = True
    try:
        plan = plan_edit(config, hidden)
    except InputError as error:
        raise InputError(*setting, f"leaves {kept} of {frames} frames known: {error.allowed}") from None
    require(
        bool((plan.hidden == hidden).all()),
        *setting,
        f"leaves {kept} of {frames} frames known, but the model generates whole AR steps of "
        f"{config.factorization.block_size} tokens, {hidden[0].size} to a frame",
    )
    share = max(1, round((len(sampler.step_sizes) or sampler.ar_steps) * (frames - kept) / frames))
    explicit_steps = explicit_steps or not plan.ar_steps
    if explicit_steps:
        sampler = dataclasses.replace(sampler, ar_steps=min(share, plan.num_hidden), step_sizes=())
    return Window(kept, plan, edit_sampler(sampler, plan, explicit_steps))


def least_stride(config: ExperimentConfig) -> int:
    """The stride for `RollingConfig.stride` = 0."""
    frames, model = config.data.frames, config.transformer
    steps = factorization.static_steps(config.factorization, model.num_tokens)
    if steps is None:
        return max(1, frames // 4)
    starts = np.flatnonzero(np.diff(steps, prepend=-1))
    whole = starts[starts % (model.num_tokens // frames) == 0]
    return frames - int(whole[-1]) // (model.num_tokens // frames)


def make_windows(
    config: ExperimentConfig,
    sampler: SamplerConfig,
    rolling: RollingConfig,
    keep_frames: int = 0,
    explicit_steps: bool = False,
) -> tuple[Window, Window | None]:
    """The first window, and the window of all rolls after it (None if it does not roll).

    Args:
      config: the model's settings.
      sampler: for a whole clip.
      rolling: length of the videos, and how the window rolls.
      keep_frames: number of frames given at the beginning.
      explicit_steps: whether the sampler's AR steps were requested, rather than those of training.

    Raises:
      InputError: the model does not generate videos, or not these.
    """
    frames = config.data.frames
    require(frames > 1, "frames", rolling.frames, "the model makes images, not videos")
    require_number("frames", rolling.frames, frames)
    require_number("keep_frames", keep_frames, 0, frames - 1)
    first = make_window(config, sampler, keep_frames, explicit_steps, ("keep_frames", keep_frames))
    if rolling.frames == frames:
        neutral = rolling.stride == rolling.sink_frames == 0
        require(neutral, "frames", rolling.frames, f"the window does not roll: a training clip has {frames} frames")
        return first, None
    stride = rolling.stride or least_stride(config)
    allowed = f"must be {frames}: no AR steps of training but all together are a whole number of frames"
    require(rolling.stride > 0 or stride < frames, "frames", rolling.frames, allowed)
    require_number("window_stride", stride, 1, frames - 1)
    require_number("sink_frames", rolling.sink_frames, 0, frames - stride - 1)
    return first, make_window(config, sampler, frames - stride, explicit_steps, ("window_stride", stride))


def roll(
    job: SamplingJob,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    params,
    keys: jax.Array,
    clips: np.ndarray | None = None,
) -> np.ndarray:
    """One batch of videos, not decoded.

    Args:
      job: the videos; the samplers are those of the windows.
      windows: from `make_windows`.
      rolling: length of the videos, and how the window rolls.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one for each video. The first window is generated as without rolling.
      clips: the frames at the beginning, [batch, keep_frames, height, width, channels], in the
        model's range.

    Returns:
      float32 [batch, rolling.frames, height, width, channels], `clips` first.
    """
    first, rolled = windows

    def fill(window: Window, keys, begin):
        window_job = dataclasses.replace(job, sampler=window.sampler)
        if window.plan is not None:
            free = np.zeros((job.num, job.config.data.frames - window.kept, *begin.shape[2:]), np.float32)
            frames = np.concatenate([begin, free], axis=1)
            given = known_tokens(job.config, window.sampler, window.plan, frames, keys)
            window_job = dataclasses.replace(window_job, given=given)
        return distributed.everywhere(generate_batch(window_job, params, keys))

    video = [fill(first, keys, clips)]
    sinks, count = video[0][:, : rolling.sink_frames], video[0].shape[1]
    window = video[0]
    while count < rolling.frames:
        recent = rolled.kept - rolling.sink_frames
        begin = np.concatenate([sinks, window[:, window.shape[1] - recent :]], axis=1)
        next_keys = jax.vmap(functools.partial(jax.random.fold_in, data=count))(keys)
        window = fill(rolled, sharding.place(next_keys, keys.sharding), begin)
        video.append(window[:, rolled.kept :])
        count += video[-1].shape[1]
    return np.concatenate(video, axis=1)[:, : rolling.frames]


def generate_videos(
    job: SamplingJob,
    params,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    clips: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Videos of any length. Video i depends on (seed, i, condition i, clips[i]) alone.

    Args:
      job, params, windows, rolling, clips: as for `video_batches`.
      progress: called with the number of videos done.

    Returns:
      uint8 [num, frames, height, width, channels]; float32 for latents that are not decoded.
    """
    return collect(video_batches(job, params, windows, rolling, clips), progress)


def video_batches(
    job: SamplingJob,
    params,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    clips: np.ndarray | None = None,
    wanted: Iterable[int] | None = None,
) -> Iterator[np.ndarray]:
    """Videos of any length, batch by batch.

    Args:
      job, windows, rolling: as for `roll`, of all videos.
      params: the Transformer's parameters.
      clips: the frames at the beginning, [num, keep_frames, height, width, channels], or None.
      wanted: numbers of the batches, as for `generation.batches`.

    Yields:
      uint8 [batch, frames, height, width, channels]; float32 for latents that are not decoded.
    """

    def videos_of(share: Share, indices: np.ndarray) -> np.ndarray:
        begin = None if clips is None else clips[indices]
        videos = roll(job.select(indices), windows, rolling, share.params, share.keys, begin)
        if job.decode is not None:
            videos = distributed.everywhere(job.decode(sharding.place(videos, share.keys.sharding)))
        return videos

    for batch in batches(job, params, wanted):
        # One thread for each share, as rolling waits for every window.
        with concurrent.futures.ThreadPoolExecutor(len(batch.shares)) as pool:
            parts = pool.map(lambda share, batch=batch: videos_of(share, batch.indices[share.rows]), batch.shares)
            videos = np.concatenate(list(parts))
        yield job.finish(videos)[: batch.count]
