"""Examples in folders of classes: `root/CLASS/EXAMPLE`, the classes sorted by name."""

import collections
import pathlib
from collections.abc import Callable

import numpy as np

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.records import SourceFiles
from causalfusion_jax.data.source import DataSettings


def class_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of classes below `root`, in the order of their labels."""
    return sorted(path for path in root.iterdir() if path.is_dir())


def names_of_class_folders(settings: DataSettings) -> tuple[str, ...]:
    """Names of the class folders in `settings.path`. Raises InputError for another number than `num_classes`."""
    root = pathlib.Path(settings.path)
    require(root.is_dir(), "data.path", settings.path, "must be a folder with one folder for each class")
    names = tuple(folder.name for folder in class_folders(root))
    allowed = f"has {len(names)} class folders, the config {settings.num_classes} classes"
    require(len(names) == settings.num_classes, "data.path", settings.path, allowed)
    return names


class ClassFolderSource:
    """Base of sources with an example for each file (or folder) in the folders of classes.

    Args:
      root: the folder.
      kind: what the examples are, for errors.
      is_example: whether a path is that of an example.

    Attributes:
      paths: of all examples, by class and name.
      labels: int32 [num].
      skipped: number of other entries by kind: `*.SUFFIX`, `folders` or `files without suffix`.

    Raises:
      InputError: no such folder.
    """

    def __init__(self, root: str, kind: str, is_example: Callable[[pathlib.Path], bool]):
        self.root = pathlib.Path(root)
        require(self.root.is_dir(), "path", root, f"must be a folder with one folder of {kind} for each class")
        folders = class_folders(self.root)
        self.class_names, self.num_classes = tuple(folder.name for folder in folders), len(folders)
        self.paths, labels, skipped = [], [], collections.Counter()
        for label, folder in enumerate(folders):
            for path in sorted(folder.iterdir()):
                if is_example(path):
                    self.paths.append(path)
                    labels.append(label)
                else:
                    suffix = f"*{path.suffix.lower()}" if path.suffix else "files without suffix"
                    skipped["folders" if path.is_dir() else suffix] += 1
        self.labels, self.skipped = np.array(labels, np.int32), dict(skipped.most_common())

    def __len__(self) -> int:
        return len(self.paths)

    def listing(self) -> SourceFiles:
        """The examples' files and folders."""
        return SourceFiles(self.root, self.paths)

    def name(self, index: int) -> str:
        """The example's path."""
        return str(self.paths[index])
