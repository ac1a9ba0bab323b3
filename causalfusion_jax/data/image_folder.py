"""Images in folders of classes."""

import concurrent.futures
import os

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.class_folders import ClassFolderSource, names_of_class_folders
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES, ImageFormat
from causalfusion_jax.data.source import SourceKind, require_path


class ImageFolderSource(ClassFolderSource):
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
        super().__init__(root, "images", lambda path: path.suffix.lower() in IMAGE_SUFFIXES)
        self.format = ImageFormat(image_size, channels)
        require(bool(self.paths), "path", root, f"holds no images: need {root}/CLASS/*{'|'.join(IMAGE_SUFFIXES)}")
        if verify:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                # All are read, so that the first corrupt image by name is reported; none is kept.
                for _ in pool.map(lambda path: self.format.open(str(path), path) is None, self.paths):
                    pass

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path = self.paths[index]
        return {"image": self.format.decode(str(path), path), "label": self.labels[index]}


IMAGE_FOLDER = SourceKind(
    name="image_folder",
    summary="image files; `path` has one folder for each class",
    open=lambda settings, captions: ImageFolderSource(
        settings.path, settings.image_size, settings.channels, settings.verify
    ),
    fixed={"image_width": 0, "frames": 1},
    check=require_path,
    needs_path=True,
    class_names=names_of_class_folders,
    encodable=True,
)
