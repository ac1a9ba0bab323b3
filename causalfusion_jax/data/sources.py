"""Random-access image sources: `len(source)`, `source[i] -> {"image", "label"}`.

Images are float32 [(frames,) height, width, channels] in [-1, 1] (latents: scaled as the
model takes them), labels int32. Where captions were asked for, there is "caption" too, a str.
A record whose bytes cannot be decoded raises CorruptRecord, one whose bytes cannot be read another
InputError. Further sources: `tfds_source`, `tar_shards`, `clip_folder`, `latents`.
"""

import collections
import concurrent.futures
import functools
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class CorruptRecord(InputError):
    """A record that was read and cannot be decoded; `value` is its name, `allowed` the reason."""


class Listing(NamedTuple):
    """What identifies the examples of a source, see `data.fingerprint`.

    Attributes:
      root: the folder of the data.
      paths: their files below it, in the order of the examples.
      details: what else there is to tell, as plain values.
    """

    root: pathlib.Path
    paths: Sequence[pathlib.Path]
    details: Sequence[Any] = ()


def record_error(field: str, name: str, error: Exception, kind: str = "record") -> InputError:
    """What to raise for a record that could not be read.

    Args:
      field: the option that names the data.
      name: of the record.
      error: what reading or decoding it raised.
      kind: what it should have been.

    Returns:
      InputError for an I/O error, which says nothing of the record; else CorruptRecord.
    """
    # Decoders name what they were given, which may be bytes in memory.
    reason = str(error).partition(" <_io.")[0].replace(name, pathlib.Path(name).name)
    reason = f"{type(error).__name__}: {' '.join(reason.split())}"
    if files.is_io_error(error):
        return InputError(field, name, f"could not be read ({reason}); I/O errors are not skipped as corrupt records")
    return CorruptRecord(field, name, f"not a readable {kind} ({reason}); mend or remove it")


def read_file(field: str, path: pathlib.Path) -> bytes:
    """The bytes of a file that is one record. Raises InputError where they cannot be read."""
    try:
        return files.retry_io(path.read_bytes)
    except OSError as error:
        raise record_error(field, str(path), error) from None


class ImageFormat(NamedTuple):
    """What encoded images are decoded to.

    Attributes:
      size: side in pixels, to which images are scaled and centre-cropped.
      channels: 1 (grey) or 3 (RGB).
    """

    size: int
    channels: int

    def decode(self, name: str, file: BinaryIO | pathlib.Path) -> np.ndarray:
        """An encoded image as float32 [size, size, channels] in [-1, 1].

        Args:
          name: of the record, for errors.
          file: its path, or the open file.

        Raises:
          CorruptRecord: it cannot be decoded.
          InputError: it cannot be read.
        """
        return self.fit(self.open(name, file))

    def fit(self, image: Image.Image) -> np.ndarray:
        """A whole image of any mode as float32 [size, size, channels] in [-1, 1]."""
        pixels = np.asarray(center_crop(image.convert(self.mode), self.size), np.float32)
        return pixels.reshape(self.size, self.size, self.channels) / 127.5 - 1.0

    @property
    def mode(self) -> str:
        """What Pillow calls its colours."""
        return "L" if self.channels == 1 else "RGB"

    def open(self, name: str, file: BinaryIO | pathlib.Path, field: str = "path") -> Image.Image:
        """The whole image, decoded. Raises as `decode`; `field` names the option."""
        if isinstance(file, pathlib.Path):
            # Read first: Pillow's own errors are of the image then.
            file = io.BytesIO(read_file(field, file))
        try:
            with Image.open(file) as image:
                return image.convert(self.mode)
        except Exception as error:  # Pillow raises whatever damage leads its decoders to
            raise record_error(field, name, error, "image") from None


class DigitsSource:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes.

    A stratified half (`random_state=0`) is for training, the other half is held out.
    """

    num_classes = 10
    class_names = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        train, held_out = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
        chosen = {"train": train, "held_out": held_out}[split]
        # 17 grey levels, 0..16.
        self.images = (pixels[chosen].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
        self.labels = labels[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


class ImageFolderSource:
    """Images at `root/class/*.png|jpg|jpeg`; classes are the folders, sorted by name.

    Args:
      root: the folder.
      image_size: side in pixels; images are scaled and cropped at the centre.
      channels: 1 (grey) or 3 (RGB).
      verify: decode every image once now, so that a bad one is named before training.

    Raises:
      InputError: no such folder, no images in it, or an image that cannot be read.
    """

    def __init__(self, root: str, image_size: int, channels: int, verify: bool = True):
        self.root, self.format = pathlib.Path(root), ImageFormat(image_size, channels)
        require(self.root.is_dir(), "path", root, "must be a folder with one folder of images for each class")
        folders = class_folders(self.root)
        found, self.skipped = files_of_classes(folders, lambda path: path.suffix.lower() in IMAGE_SUFFIXES)
        require(bool(found), "path", root, f"holds no images: need {root}/CLASS/*{'|'.join(IMAGE_SUFFIXES)}")
        self.class_names = tuple(folder.name for folder in folders)
        self.num_classes = len(folders)
        self.paths = [path for path, _ in found]
        self.labels = np.array([label for _, label in found], np.int32)
        if verify:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                # Read all, so that the first bad image by name is the one reported; none is kept.
                for _ in pool.map(lambda path: self.format.open(str(path), path) is None, self.paths):
                    pass

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path = self.paths[index]
        return {"image": self.format.decode(str(path), path), "label": self.labels[index]}

    def listing(self) -> Listing:
        """The images' files."""
        return Listing(self.root, self.paths)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.paths[index])


def files_of_classes(
    folders: Sequence[pathlib.Path], is_example: Callable[[pathlib.Path], bool]
) -> tuple[list[tuple[pathlib.Path, int]], dict[str, int]]:
    """What lies in the folders of classes.

    Args:
      folders: of the classes, in the order of their labels.
      is_example: whether what has this path is an example.

    Returns:
      (path, label) of each example; and the number of other entries by kind: `*.SUFFIX`, `folders`
      or `files without suffix`.
    """
    found, skipped = [], collections.Counter()
    for label, folder in enumerate(folders):
        for path in sorted(folder.iterdir()):
            if is_example(path):
                found.append((path, label))
            else:
                named = f"*{path.suffix.lower()}" if path.suffix else "files without suffix"
                skipped["folders" if path.is_dir() else named] += 1
    return found, dict(skipped.most_common())


def class_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of classes below `root`, in the order of their labels."""
    return sorted(path for path in root.iterdir() if path.is_dir())


class ArraysSource:
    """Examples of two files, mapped into memory: images, videos or latents of any number.

    `image.npy` is [num, *shape]: uint8 0..255, or a float type, already scaled;
    `label.npy` is int [num].

    Args:
      root: the folder with both.
      shape: of one example, [(frames,) height, width, channels].
      latents: whether the values are latents, which cannot be uint8.
      num_classes: labels are in 0..num_classes-1.

    Raises:
      InputError: a file is missing, cannot be read, or is not of this kind.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, root: str, shape: tuple[int, ...], latents: bool, num_classes: int):
        self.num_classes = num_classes
        self.images, self.labels = (self._open(pathlib.Path(root) / name) for name in ("image.npy", "label.npy"))
        path, kind = str(pathlib.Path(root) / "image.npy"), self.images.dtype
        require(
            self.images.shape[1:] == shape and len(self.images) > 0,
            "data.path",
            path,
            f"must be [num, {', '.join(map(str, shape))}]; it is {list(self.images.shape)}",
        )
        allowed = "a float type" if latents else "uint8 or a float type"
        fits = kind.kind == "f" or (kind == np.uint8 and not latents)
        require(fits, "data.path", path, f"must be {allowed}, not {kind}")
        path = str(pathlib.Path(root) / "label.npy")
        require(
            self.labels.shape == self.images.shape[:1] and self.labels.dtype.kind in "iu",
            "data.path",
            path,
            f"must be int [{len(self.images)}]; it is {self.labels.dtype} {list(self.labels.shape)}",
        )
        low, high = int(self.labels.min()), int(self.labels.max())
        require(
            low >= 0 and high < num_classes,
            "data.path",
            path,
            f"labels must be in 0..{num_classes - 1} (data.num_classes); they are {low}..{high}",
        )

    @staticmethod
    def _open(path: pathlib.Path) -> np.ndarray:
        require(path.is_file(), "data.path", str(path), "no such file; source arrays needs image.npy and label.npy")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError("data.path", str(path), f"not a readable .npy file ({error})") from None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = np.asarray(self.images[index])
        image = image / np.float32(127.5) - 1 if image.dtype == np.uint8 else image.astype(np.float32)
        return {"image": image, "label": np.int32(self.labels[index])}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Centre crop to size x size as ADM does: halve with a box while that leaves twice `size`, bicubic, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@functools.cache
def digits(split: str) -> DigitsSource:
    """One shared copy of a half of the digits."""
    return DigitsSource(split)
