"""Images with captions of their own: a folder with captions.jsonl."""

import json
import pathlib

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.data.image_files import ImageFormat, center_crop
from causalfusion_jax.data.records import SourceFiles
from causalfusion_jax.data.source import SourceKind, require_path

CAPTIONS = "captions.jsonl"


def read_captions(root: pathlib.Path, field: str) -> list[tuple[str, tuple[str, ...]]]:
    """File names and captions of `root/captions.jsonl`, one {"file_name", "caption"} a line.

    `caption` is a text, or a list of several.

    Raises:
      InputError: no such file, or a line of another kind; `field` names the option.
    """
    path, records = root / CAPTIONS, []
    require(path.is_file(), field, str(path), 'no such file; each line of it is {"file_name": ..., "caption": ...}')
    for number, line in enumerate(files.read_lines(field, path), 1):
        try:
            record = json.loads(line)
            name, captions = record["file_name"], record["caption"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                field, str(path), f'line {number} must be {{"file_name": ..., "caption": ...}}, not {line[:80]}'
            ) from None
        captions = tuple(captions) if isinstance(captions, list) else (captions,)
        are_texts = bool(captions) and all(isinstance(caption, str) and caption for caption in captions)
        require(are_texts, field, str(path), f"line {number}: {name} has no caption")
        records.append((name, captions))
    require(bool(records), field, str(path), "is empty")
    return records


def load_image(path: pathlib.Path, shape: tuple[int, int, int], field: str) -> np.ndarray:
    """An image file as float32 [height, width, channels] in [-1, 1].

    For square models any image is scaled and cropped at the centre as in training; for others it
    must be of their size.

    Raises:
      CorruptRecord: it cannot be decoded.
      InputError: it cannot be read, or is of the wrong size; `field` names the option.
    """
    height, width, channels = shape
    image = ImageFormat(height, channels).open(str(path), path, field)
    if height == width:
        image = center_crop(image, height)
    allowed = f"is {image.width}x{image.height} pixels (width x height); the model takes {width}x{height}"
    require(image.size == (width, height), field, str(path), allowed)
    return np.asarray(image, np.float32).reshape(shape) / 127.5 - 1.0


class CaptionFolderSource:
    """The images that `root/captions.jsonl` names; all of one class.

    Args:
      root: the folder.
      shape: height, width and channels.
      captions: examples have "caption" too: the first if there are several, a random one in
        `draw`.

    Raises:
      InputError: captions.jsonl is missing or wrong, or an image is missing.
    """

    num_classes = 1
    class_names = ("image",)

    def __init__(self, root: str, shape: tuple[int, int, int], captions: bool):
        self.root, self.shape, self.captions = pathlib.Path(root), shape, captions
        self.records = read_captions(self.root, "data.path")
        for name, _ in self.records:
            path = self.root / name
            require(path.is_file(), "data.path", str(path), f"no such file, though {CAPTIONS} names it")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self._example(index, 0)

    def draw(self, index: int, rng: np.random.Generator) -> dict:
        """The example with a random one of its captions."""
        return self._example(index, int(rng.integers(len(self.records[index][1]))))

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return list(self.records[index][1])

    def listing(self) -> SourceFiles:
        """The images' files, and their captions."""
        return SourceFiles(
            self.root, [self.root / name for name, _ in self.records], [list(c) for _, c in self.records]
        )

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.records[index][0])

    def _example(self, index: int, caption: int) -> dict:
        name, captions = self.records[index]
        example = {"image": load_image(self.root / name, self.shape, "data.path"), "label": np.int32(0)}
        return example | {"caption": captions[caption]} if self.captions else example


CAPTION_FOLDER = SourceKind(
    name="caption_folder",
    summary="images and their captions, which captions.jsonl in `path` lists",
    open=lambda settings, captions: CaptionFolderSource(settings.path, settings.shape, captions),
    fixed={"frames": 1, "latents": False, "num_classes": 1},
    check=require_path,
    needs_path=True,
    has_captions=True,
)
