"""Clips in files: chosen frames of a video, of a GIF, or of a folder of images."""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from causalfusion_jax.data.sources import IMAGE_SUFFIXES, CorruptRecord
from causalfusion_jax.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")
"""What PyAV decodes."""
CLIP_SUFFIXES = (".gif", *VIDEO_SUFFIXES)

Choose = Callable[[int], Sequence[int]]
"""From how many frames a clip has to the numbers of those wanted, ascending; the same for the same number."""


def clip_indices(name: str, count: int, frames: int, stride: int, pick: Callable[[int], int]) -> range:
    """The frames of a clip that are taken.

    Args:
      name: of the clip, for errors.
      count: frames that it has.
      frames: frames wanted.
      stride: every so many-th one is taken.
      pick: from the number of possible first frames to one of them.

    Raises:
      CorruptRecord: it is too short.
    """
    span = (frames - 1) * stride + 1
    if count < span:
        raise CorruptRecord("path", name, f"has {count} frames; {frames} frames {stride} apart need {span}")
    first = pick(count - span + 1)
    return range(first, first + span, stride)


def read_frames(path: pathlib.Path, choose: Choose) -> list[Image.Image]:
    """The chosen frames of a clip.

    Args:
      path: a file of CLIP_SUFFIXES, or a folder of images: its frames in the order of their names.
      choose: which frames.

    Raises:
      CorruptRecord: it cannot be read, or what `choose` raises.
      InputError: it takes PyAV, which is not installed.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
        require_decoder(path)
    try:
        if path.is_dir():
            return _read_folder(path, choose)
        return _read_gif(path, choose) if path.suffix.lower() == ".gif" else _read_video(path, choose)
    except CorruptRecord:
        raise
    except Exception as error:  # decoders raise whatever damage leads them to
        reason = " ".join(str(error).replace(str(path), path.name).split())
        raise CorruptRecord("path", str(path), f"not a readable clip ({type(error).__name__}: {reason})") from None


def require_decoder(path: pathlib.Path) -> None:
    """Raises InputError unless the decoder of videos is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise InputError(
            "data.path", str(path), "needs PyAV to be decoded: pip install 'causalfusion_jax[video]' (or av)"
        ) from None


def frame_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images right in a folder, in the order of their names, in which frame2 comes before frame10."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]

    def key(path: pathlib.Path):
        # Text and numbers take turns, so that like is compared with like.
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    return sorted(found, key=key)


def _read_folder(folder: pathlib.Path, choose: Choose) -> list[Image.Image]:
    files, frames = frame_files(folder), []
    for index in choose(len(files)):
        with Image.open(files[index]) as image:
            image.load()
            frames.append(image)
    return frames


def _read_gif(path: pathlib.Path, choose: Choose) -> list[Image.Image]:
    frames = []
    with Image.open(path) as movie:
        for index in choose(movie.n_frames):
            movie.seek(index)
            frames.append(movie.convert("RGB"))
    return frames


def _read_video(path: pathlib.Path, choose: Choose) -> list[Image.Image]:
    """By seeking where the file tells when each frame is shown; else, and where that is not true, in order."""
    import av

    with av.open(str(path)) as container:
        stream = _first_video(container)
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = sorted({packet.pts for packet in packets if packet.pts is not None})
        if len(times) == len(packets):
            wanted = [times[index] for index in choose(len(times))]
            try:
                container.seek(wanted[0], stream=stream)
                found = _decode_times(container, stream, wanted)
            except av.error.FFmpegError:
                found = {}
            if len(found) == len(wanted):
                return [found[time] for time in wanted]
    # What is decoded counts, and where a clip begins is chosen by that.
    count = sum(1 for _ in _decode(path))
    numbers = set(choose(count))
    return [_picture(frame) for index, frame in enumerate(_decode(path)) if index in numbers]


def _first_video(container: Any) -> Any:
    """The video stream, decoded in this thread alone: processes and threads above share out the clips."""
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    return stream


def _decode_times(container: Any, stream: Any, wanted: list[int]) -> dict[int, Image.Image]:
    """The frames shown at `wanted`, by time; fewer where the file does not keep what it tells."""
    found = {}
    for frame in container.decode(stream):
        if frame.pts in wanted:
            found[frame.pts] = _picture(frame)
        if frame.pts is None or frame.pts >= wanted[-1]:
            break
    return found


def _decode(path: pathlib.Path):
    """All frames in order."""
    import av

    with av.open(str(path)) as container:
        yield from container.decode(_first_video(container))


def _picture(frame: Any) -> Image.Image:
    """A decoded frame, upright. Raises ValueError where the decoder had to guess at it."""
    if frame.is_corrupt:
        raise ValueError("a damaged frame")
    image = frame.to_image()
    # Phones write how they were held beside the picture.
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
