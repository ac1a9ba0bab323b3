"""Videos longer than those trained on, and continuations of clips: a window that rolls.

A video is generated window by window. The window has as many frames as a training clip; once
it is full, its first frames are dropped, the others become its beginning, and the frames
after them are generated. So memory is that of one clip, however long the video, and after
the first window one compiled program does all the rest.

The frames kept enter a fresh cache, at the positions that they now have in the window: every
position that the model sees is one it was trained on. To keep the old keys and let positions
run on would not do: learned positions end with the training clip, and ACDiT's rotary
positions do not depend on distances alone, as released (`positions.rotate` turns values of
different axes against each other). Nor would the old keys be what training shows, since they
have seen frames that are no longer there. The pass over the kept frames costs no more than one
of the many noise levels of the new ones.
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
from causalfusion_jax.sampling.generation import Share, batches, collect, finish, for_sampling, generate_batch


@dataclasses.dataclass(frozen=True)
class RollingConfig:
    """How long videos are, and how the window rolls.

    Attributes:
      frames: of a video, at least those of a training clip.
      stride: frames generated each time the window rolls, and dropped before; 0: as few whole
        AR steps of training as are whole frames, or a quarter of the clip where AR steps
        were drawn.
      sink_frames: the first so many frames of the video stay in the window for ever.
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
    """One fill of the window.

    Attributes:
      kept: its first frames, which are known.
      plan: what is generated after them; None: all.
      sampler: how.
    """

    kept: int
    plan: EditPlan | None
    sampler: SamplerConfig


def make_window(
    config: ExperimentConfig, sampler: SamplerConfig, kept: int, chosen: bool, given: tuple[str, int]
) -> Window:
    """The window with `kept` frames known.

    Args:
      config: the model's settings.
      sampler: for a whole clip; its AR steps are shared out where they were not trained so.
      kept: frames known.
      chosen: whether the sampler's AR steps were chosen, rather than those of training.
      given: the field that says how many they are, and its value, for errors.

    Raises:
      InputError: the model cannot continue after so many frames.
    """
    if not kept:
        return Window(0, None, sampler)
    frames = config.data.frames
    hidden = np.zeros(config.transformer.grid, bool)
    hidden[kept:] = True
    try:
        plan = plan_edit(config, hidden)
    except InputError as error:
        raise InputError(*given, f"leaves {kept} of {frames} frames known: {error.allowed}") from None
    require(
        bool((plan.hidden == hidden).all()),
        *given,
        f"leaves {kept} of {frames} frames known, but the model generates whole AR steps of "
        f"{config.factorization.block_size} tokens, {hidden[0].size} to a frame",
    )
    share = max(1, round((len(sampler.step_sizes) or sampler.ar_steps) * (frames - kept) / frames))
    chosen = chosen or not plan.ar_steps
    if chosen:
        sampler = dataclasses.replace(sampler, ar_steps=min(share, plan.num_hidden), step_sizes=())
    return Window(kept, plan, edit_sampler(sampler, plan, chosen))


def least_stride(config: ExperimentConfig) -> int:
    """The stride that `RollingConfig.stride` = 0 stands for."""
    frames, model = config.data.frames, config.transformer
    steps = factorization.static_steps(config.factorization, model.num_tokens)
    if steps is None:
        return max(1, frames // 4)
    starts = np.flatnonzero(np.diff(steps, prepend=-1))
    whole = starts[starts % (model.num_tokens // frames) == 0]
    return frames - int(whole[-1]) // (model.num_tokens // frames)


def make_windows(
    config: ExperimentConfig, sampler: SamplerConfig, rolling: RollingConfig, keep_frames: int = 0, chosen: bool = False
) -> tuple[Window, Window | None]:
    """The first window, and the one of all rolls after it; None where there are none.

    Args:
      config: the model's settings.
      sampler: for a whole clip.
      rolling: how long, and how.
      keep_frames: frames given to begin with.
      chosen: whether the sampler's AR steps were chosen, rather than those of training.

    Raises:
      InputError: the model makes no videos, or cannot make these.
    """
    frames = config.data.frames
    require(frames > 1, "frames", rolling.frames, "the model makes images, not videos")
    require_number("frames", rolling.frames, frames)
    require_number("keep_frames", keep_frames, 0, frames - 1)
    first = make_window(config, sampler, keep_frames, chosen, ("keep_frames", keep_frames))
    if rolling.frames == frames:
        neutral = rolling.stride == rolling.sink_frames == 0
        require(neutral, "frames", rolling.frames, f"the window does not roll: a training clip has {frames} frames")
        return first, None
    stride = rolling.stride or least_stride(config)
    require(
        rolling.stride > 0 or stride < frames,
        "frames",
        rolling.frames,
        f"must be {frames}: the model was trained on AR steps of no whole number of frames but all {frames}",
    )
    require_number("window_stride", stride, 1, frames - 1)
    require_number("sink_frames", rolling.sink_frames, 0, frames - stride - 1)
    return first, make_window(config, sampler, frames - stride, chosen, ("window_stride", stride))


def roll(
    config: ExperimentConfig,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    params,
    keys: jax.Array,
    labels: np.ndarray,
    clips: np.ndarray | None = None,
) -> np.ndarray:
    """One batch of videos.

    Args:
      config: what `params` were trained as.
      windows: from `make_windows`.
      rolling: how long, and how.
      params: the Transformer's parameters.
      keys: PRNG keys [batch], one a video. The first window is generated as without rolling.
      labels: int [batch].
      clips: the frames to begin with, [batch, keep_frames, height, width, channels] as the
        model takes them.

    Returns:
      float32 [batch, rolling.frames, height, width, channels], `clips` first.
    """
    first, rolled = windows

    def fill(window: Window, keys, begin):
        if window.plan is None:
            return distributed.everywhere(generate_batch(config, window.sampler, params, keys, labels))
        free = np.zeros((len(labels), config.data.frames - window.kept, *begin.shape[2:]), np.float32)
        known = known_tokens(config, window.sampler, window.plan, np.concatenate([begin, free], axis=1), keys)
        return distributed.everywhere(generate_batch(config, window.sampler, params, keys, labels, known))

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
    config: ExperimentConfig,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    clips: np.ndarray | None = None,
) -> np.ndarray:
    """Videos of any length. Video i depends on (seed, i, labels[i], clips[i]) alone.

    Args:
      config, windows, rolling, params, labels, seed, batch_size, decode, clips: as of `video_batches`.
      progress: called with the number of videos done.

    Returns:
      uint8 [num, frames, height, width, channels]; float32 for latents not decoded.
    """
    made = video_batches(config, windows, rolling, params, labels, seed, batch_size, decode, clips=clips)
    return collect(made, progress)


def video_batches(
    config: ExperimentConfig,
    windows: tuple[Window, Window | None],
    rolling: RollingConfig,
    params,
    labels: np.ndarray,
    seed: int,
    batch_size: int = 250,
    decode: Callable[[jax.Array], jax.Array] | None = None,
    wanted: Iterable[int] | None = None,
    clips: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Videos of any length, batch by batch.

    Args:
      config, windows, rolling, params: as of `roll`.
      labels: int [num].
      seed, batch_size, decode, wanted: as of `image_batches`.
      clips: [num, keep_frames, height, width, channels] to begin with, or None.

    Yields:
      uint8 [batch, frames, height, width, channels]; float32 for latents not decoded.
    """

    def videos_of(share: Share, indices: np.ndarray) -> np.ndarray:
        begin = None if clips is None else clips[indices]
        made = roll(config, windows, rolling, share.params, share.keys, labels[indices], begin)
        if decode is not None:
            made = distributed.everywhere(decode(sharding.place(made, share.keys.sharding)))
        return made

    for batch in batches(for_sampling(params), len(labels), seed, batch_size, wanted):
        # A thread for each share: rolling waits for every window.
        with concurrent.futures.ThreadPoolExecutor(len(batch.shares)) as pool:
            parts = pool.map(lambda share, batch=batch: videos_of(share, batch.indices[share.places]), batch.shares)
            made = np.concatenate(list(parts))
        yield finish(config, made, decode is not None)[: batch.count]
