"""Examples in two .npy files."""

import pathlib

import numpy as np

from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.data.source import DataSettings, SourceKind


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
        allowed = f"must be [num, {', '.join(map(str, shape))}]; it is {list(self.images.shape)}"
        require(self.images.shape[1:] == shape and len(self.images) > 0, "data.path", path, allowed)
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
        allowed = f"labels must be in 0..{num_classes - 1} (data.num_classes); they are {low}..{high}"
        require(low >= 0 and high < num_classes, "data.path", path, allowed)

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


def _check(settings: DataSettings) -> None:
    allowed = "must be False for arrays of latents: encode flipped images instead"
    require(not (settings.latents and settings.flip), "flip", settings.flip, allowed)


ARRAYS = SourceKind(
    name="arrays",
    summary="images, videos or latents in image.npy in `path`, their classes in label.npy",
    open=lambda settings, captions: ArraysSource(settings.path, settings.shape, settings.latents, settings.num_classes),
    check=_check,
    needs_path=True,
)
