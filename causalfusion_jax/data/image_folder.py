"""Images in folders of classes."""

import concurrent.futures
import os
import pathlib

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.image_files import (
    IMAGE_SUFFIXES,
    ImageFormat,
    class_folders,
    files_of_classes,
    names_of_class_folders,
)
from causalfusion_jax.data.records import Listing
from causalfusion_jax.data.source import SourceKind, require_path


class ImageFolderSource:
    """Images at `root/class/*.png|jpg|jpeg`; classes are the folders, sorted by name.

    Args:
      root: the folder.
      image_size: side in pixels; images are scaled and cropped at the centre.
      channels: 1 (grey) or 3 (RGB).
      verify: decode every image once now, so that a corrupt one is reported before training.

    Raises:
      InputError: no such folder, no images in it, or an image that cannot be read.
    """

    def __init__(self, root: str, image_size: int, channels: int, verify: bool = True):
        self.root, self.format = pathlib.Path(root), ImageFormat(image_size, channels)
        require(self.root.is_dir(), "path", root, "must be a folder with one folder of images for each class")
        folders = class_folders(self.root)
        examples, self.skipped = files_of_classes(folders, lambda path: path.suffix.lower() in IMAGE_SUFFIXES)
        require(bool(examples), "path", root, f"holds no images: need {root}/CLASS/*{'|'.join(IMAGE_SUFFIXES)}")
        self.class_names = tuple(folder.name for folder in folders)
        self.num_classes = len(folders)
        self.paths = [path for path, _ in examples]
        self.labels = np.array([label for _, label in examples], np.int32)
        if verify:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                # All are read, so that the first corrupt image by name is reported; none is kept.
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


IMAGE_FOLDER = SourceKind(
    name="image_folder",
    summary="image files in one folder for each class",
    open=lambda settings, captions: ImageFolderSource(
        settings.path, settings.image_size, settings.channels, settings.verify
    ),
    fixed={"image_width": 0, "frames": 1},
    check=require_path,
    needs_path=True,
    class_names=names_of_class_folders,
    encodable=True,
)
