"""Clips in files: chosen frames of a video, of a GIF, or of a folder of images."""

import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES
from causalfusion_jax.data.records import CorruptRecord, read_file, record_error

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
      CorruptRecord: it cannot be decoded, or what `choose` raises.
      InputError: it cannot be read, or takes PyAV, which is not installed.
    """
    read = _read_folder if path.is_dir() else _read_gif if path.suffix.lower() == ".gif" else _read_video
    if read is _read_video:
        require_decoder(path)
    try:
        return files.retry_io(lambda: read(path, choose))
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever damage leads them to
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
    """The images right in a folder, in the order of their names, in which frame2 comes before frame10."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]

    def key(path: pathlib.Path):
        # Text and numbers take turns, so that like is compared with like.
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    return sorted(found, key=key)


def _read_folder(folder: pathlib.Path, choose: Choose) -> list[Image.Image]:
    paths, frames = frame_files(folder), []
    for index in choose(len(paths)):
        content = read_file("path", paths[index])
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        except Exception as error:  # named by the frame: the record is the whole folder
            raise ValueError(f"{paths[index].name}: {type(error).__name__}: {error}") from None
        frames.append(image)
    return frames


def _read_gif(path: pathlib.Path, choose: Choose) -> list[Image.Image]:
    frames = []
    with path.open("rb") as file, Image.open(file) as movie:
        for index in choose(movie.n_frames):
            movie.seek(index)
            frames.append(movie.convert("RGB"))
    return frames


def _read_video(path: pathlib.Path, choose: Choose) -> list[Image.Image]:
    """The chosen frames of a video file. Raises ValueError where PyAV cannot decode it."""
    import av

    # Opened here: an OSError is one of reading then, and one of PyAV's, which have an errno too, of decoding.
    with path.open("rb") as file:
        try:
            return _decode_chosen(file, choose)
        except av.error.FFmpegError as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _decode_chosen(file: BinaryIO, choose: Choose) -> list[Image.Image]:
    """By seeking where the file tells when each frame is shown; else, and where that is not true, in order."""
    import av

    with av.open(file) as container:
        stream = _first_video(container)
        times = _frame_times(container, stream)
        if times is not None:
            wanted = [times[index] for index in choose(len(times))]
            try:
                container.seek(wanted[0], stream=stream)
                found = _decode_times(container, stream, wanted)
            except av.error.FFmpegError:
                found = {}
            if len(found) == len(wanted):
                return [found[time] for time in wanted]
    # What is decoded counts, and where a clip begins is chosen by that.
    count = sum(1 for _ in _decode(file))
    numbers = set(choose(count))
    return [_picture(frame) for index, frame in enumerate(_decode(file)) if index in numbers]


def _frame_times(container: Any, stream: Any) -> list[int] | None:
    """When each frame is shown, ascending; None where the file does not tell, or tells it of two frames."""
    # Times alone are kept: packets hold the compressed video.
    times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    distinct = set(times) - {None}
    return sorted(distinct) if len(distinct) == len(times) else None


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


def _decode(file: BinaryIO):
    """All frames in order."""
    import av

    file.seek(0)
    with av.open(file) as container:
        yield from container.decode(_first_video(container))


def _picture(frame: Any) -> Image.Image:
    """A decoded frame, upright. Raises ValueError where the decoder had to guess at it."""
    if frame.is_corrupt:
        raise ValueError("a damaged frame")
    image = frame.to_image()
    # Phones write how they were held beside the picture.
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
