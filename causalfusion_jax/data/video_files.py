"""Clips in files: selected frames of a video, of a GIF, or of a folder of images."""

import io
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES
from causalfusion_jax.data.records import CorruptRecord, read_file, record_error

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")
"""Files that PyAV decodes."""
CLIP_SUFFIXES = (".gif", *VIDEO_SUFFIXES)

Select = Callable[[int], Sequence[int]]
"""From the number of frames of a clip to the indices of those wanted, ascending; a pure function."""


def clip_indices(name: str, count: int, frames: int, stride: int, pick: Callable[[int], int]) -> range:
    """Indices of the frames to take from a clip.

    Args:
      name: name of the clip, for errors.
      count: number of its frames.
      frames: number of frames wanted.
      stride: distance between them.
      pick: from the number of possible first frames to one of them.

    Raises:
      CorruptRecord: it is too short.
    """
    span = (frames - 1) * stride + 1
    if count < span:
        raise CorruptRecord("path", name, f"has {count} frames; {frames} frames {stride} apart need {span}")
    first = pick(count - span + 1)
    return range(first, first + span, stride)


def read_frames(path: pathlib.Path, select: Select) -> list[Image.Image]:
    """The selected frames of a clip.

    Args:
      path: a file of CLIP_SUFFIXES, or a folder of images, in the order of their names.
      select: selects the frames.

    Raises:
      CorruptRecord: it cannot be decoded, or what `select` raises.
      InputError: it cannot be read, or needs PyAV, which is not installed.
    """
    read = _read_folder if path.is_dir() else _read_gif if path.suffix.lower() == ".gif" else _read_video
    if read is _read_video:
        require_decoder(path)
    try:
        return files.retry_io(lambda: read(path, select))
    except InputError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged files
        raise record_error("path", str(path), error, "clip") from None


def require_decoder(path: pathlib.Path) -> None:
    """Raises InputError unless the decoder of videos is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise InputError(
            "data.path", str(path), "needs PyAV to be decoded: pip install 'causalfusion_jax[video]' (or av)"
        ) from None


def frame_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images in a folder (not below it), by name; frame2 comes before frame10."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]

    def key(path: pathlib.Path):
        # Text and numbers alternate, so that text is compared with text and numbers with numbers.
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    return sorted(paths, key=key)


def _read_folder(folder: pathlib.Path, select: Select) -> list[Image.Image]:
    paths, frames = frame_files(folder), []
    for index in select(len(paths)):
        content = read_file("path", paths[index])
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        except Exception as error:  # named by the frame: the record is the whole folder
            raise ValueError(f"{paths[index].name}: {type(error).__name__}: {error}") from None
        frames.append(image)
    return frames


def _read_gif(path: pathlib.Path, select: Select) -> list[Image.Image]:
    frames = []
    with path.open("rb") as file, Image.open(file) as movie:
        for index in select(movie.n_frames):
            movie.seek(index)
            frames.append(movie.convert("RGB"))
    return frames


def _read_video(path: pathlib.Path, select: Select) -> list[Image.Image]:
    """The selected frames of a video file. Raises ValueError if PyAV cannot decode it."""
    import av

    # Opened here, so that an OSError means reading; PyAV's errors, which also have an errno, mean decoding.
    with path.open("rb") as file:
        try:
            return _decode_selected(file, select)
        except av.error.FFmpegError as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _decode_selected(file: BinaryIO, select: Select) -> list[Image.Image]:
    """Seeks if the file has a valid time for each frame; otherwise decodes in order."""
    import av

    with av.open(file) as container:
        stream = _first_video(container)
        times = frame_times(container, stream)
        if times is not None:
            wanted = [times[index] for index in select(len(times))]
            try:
                container.seek(wanted[0], stream=stream)
                frames = decode_times(container, stream, wanted)
            except av.error.FFmpegError:
                frames = {}
            if len(frames) == len(wanted):
                return [frames[time] for time in wanted]
    # The frames that can be decoded are counted, because `select` needs their number.
    count = sum(1 for _ in decode_all(file))
    numbers = set(select(count))
    return [to_image(frame) for index, frame in enumerate(decode_all(file)) if index in numbers]


def frame_times(container: Any, stream: Any) -> list[int] | None:
    """Presentation times of all frames, ascending; None if some are missing or equal."""
    # Only times are kept: packets hold the compressed video.
    times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    distinct = set(times) - {None}
    return sorted(distinct) if len(distinct) == len(times) else None


def _first_video(container: Any) -> Any:
    """The video stream, decoded in this thread only: callers read several clips in parallel."""
    if not container.streams.video:
        raise ValueError("no video in it")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    return stream


def decode_times(container: Any, stream: Any, wanted: list[int]) -> dict[int, Image.Image]:
    """The frames at the times `wanted`, by time; fewer if the times in the file are wrong."""
    frames = {}
    for frame in container.decode(stream):
        if frame.pts in wanted:
            frames[frame.pts] = to_image(frame)
        if frame.pts is None or frame.pts >= wanted[-1]:
            break
    return frames


def decode_all(file: BinaryIO) -> Iterator[Any]:
    """All frames in order."""
    import av

    file.seek(0)
    with av.open(file) as container:
        yield from container.decode(_first_video(container))


def to_image(frame: Any) -> Image.Image:
    """A decoded frame, upright. Raises ValueError if the decoder reports it as damaged."""
    if frame.is_corrupt:
        raise ValueError("a damaged frame")
    image = frame.to_image()
    # Phones store their orientation with the picture.
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
