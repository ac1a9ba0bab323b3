"""Data sets prepared by TensorFlow Datasets, read from ArrayRecord without TensorFlow.

Nothing is downloaded or prepared here: a data set that is not on disk is an error that names the
command to prepare it.
"""

import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, nearest, require
from causalfusion_jax.data.array_records import read_record
from causalfusion_jax.data.image_files import ImageFormat
from causalfusion_jax.data.records import CorruptRecord, SourceFiles, record_error
from causalfusion_jax.data.source import DataSettings, SourceKind


class Keys(NamedTuple):
    """Names of the features of an example; nested ones as `outer/inner`, "" for none."""

    image: str = "image"
    label: str = "label"
    caption: str = ""


KNOWN = {
    "imagenet2012": Keys(),
    "cifar10": Keys(),
    "ucf101": Keys(image="video"),
    "coco_captions": Keys(label="", caption="captions/text"),
}
"""Features of known data sets; those of others are set in the config."""


def keys_of(settings: DataSettings) -> Keys:
    """The features of a data set: those set, else the known ones, else `image` and `label`."""
    known = KNOWN.get(plain_name(settings.name), Keys())
    return Keys(
        settings.image_key or known.image, settings.label_key or known.label, settings.caption_key or known.caption
    )


def plain_name(name: str) -> str:
    """The name of a data set without config and version."""
    return name.partition("/")[0].partition(":")[0]


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """English names of ImageNet's 1,000 classes, in the order of their labels, all different."""
    path = pathlib.Path(__file__).with_name("imagenet_classes.txt")
    return tuple(files.read_lines("data.name", path))


def builder_info(name: str, path: str) -> Any:
    """The tfds.core.DatasetInfo of a prepared data set.

    Args:
      name: as `tfds.load` takes it: `NAME`, `NAME/CONFIG`, `NAME:VERSION`.
      path: folder of all data sets (`data_dir`), or of this version of this one; "": the
        default folder, TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      InputError: it is not prepared there.
    """
    return _builder(name, path).info


def _builder(name: str, path: str):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder, registered

    if path and (pathlib.Path(path).expanduser() / "dataset_info.json").is_file():
        return tfds.builder_from_directory(str(pathlib.Path(path).expanduser()))
    require(bool(name), "data.name", name, "source tfds needs the data set's name, for example imagenet2012")
    # From the files alone: the code of a data set would access the network.
    try:
        return read_only_builder.builder_from_files(name, data_dir=path or None)
    except registered.DatasetNotFoundError:
        why = f"{name} is not prepared in {path or 'the default folder'}{_suggestion(name)}"
        raise InputError("data.path", path, f"{why}: {prepare(name, path)}") from None
    except ValueError as error:
        raise InputError("data.name", name, f"not the name of a data set ({error})") from None


def _suggestion(name: str) -> str:
    """A known name close to a mistaken one."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    plain = plain_name(name)
    return "" if plain in known else nearest(plain, known)


def prepare(name: str, path: str) -> str:
    """The command that prepares a data set."""
    where = f", data_dir={path!r}" if path else ""
    call = f"tfds.builder({name!r}{where}, file_format='array_record').download_and_prepare()"
    return f'prepare it by python -c "import tensorflow_datasets as tfds; {call}"'


class TfdsSource:
    """A split of a prepared data set.

    Of a video, `frames` frames `frame_stride` apart: the middle ones by index, from a random first
    one in `draw`; the last frame is repeated if the video is shorter. Without a label feature all
    labels are 0.

    Args:
      settings: name, path, split, features, shape and stride of the data.
      captions: examples have "caption" too: the first by index, a random one in `draw`.

    Raises:
      InputError: not prepared as ArrayRecord, no such split, or no such features.
    """

    def __init__(self, settings: DataSettings, captions: bool = False):
        import tensorflow_datasets as tfds

        builder = _builder(settings.name, settings.path)
        info, keys, frames = builder.info, keys_of(settings), settings.frames
        self.folder, self.split, self.keys = str(builder.data_path), settings.split, keys
        self.format, self.captions = ImageFormat(settings.image_size, settings.channels), captions
        self.frames, self.stride = frames, settings.frame_stride
        self.dataset = info.name
        features = _flat(info.features)
        is_image = isinstance(features.get(keys.image), tfds.features.Image if frames == 1 else tfds.features.Sequence)
        kind = "an image" if frames == 1 else "a sequence of images (data.frames > 1)"
        allowed = f"must be {kind}; {info.name} has {', '.join(sorted(features))}"
        require(is_image, "data.image_key", keys.image, allowed)
        self.class_names, self.num_classes = (), 1
        if keys.label:
            label = features.get(keys.label)
            allowed = f"must be a class label; {info.name} has {', '.join(sorted(features))}"
            require(isinstance(label, tfds.features.ClassLabel), "data.label_key", keys.label, allowed)
            self.num_classes, self.class_names = label.num_classes, class_names_of(info, keys)
        allowed = f"must be text for captions; {info.name} has {', '.join(sorted(features))}"
        require(not captions or keys.caption in features, "data.caption_key", keys.caption, allowed)
        try:
            self._length = len(self._records)
        except NotImplementedError:
            raise InputError(
                "data.path",
                settings.path,
                f"{info.name} is prepared as {info.file_format.value}, which is not random access:"
                f" {prepare(settings.name, '')}, with another data_dir",
            ) from None
        except (ValueError, KeyError) as error:
            raise InputError("data.split", self.split, f"{info.name} has {', '.join(info.splits)} ({error})") from None
        require(self._length > 0, "data.split", self.split, "holds no examples")

    @functools.cached_property
    def _records(self):
        """Random access to serialized examples; each process opens its own."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        return builder.as_data_source(self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __len__(self) -> int:
        return self._length

    def listing(self) -> SourceFiles:
        """The shards of the split, and the records of each that it holds."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        parts = builder.info.splits[self.split].file_instructions
        details = [builder.info.full_name, *([part.skip, part.take] for part in parts)]
        return SourceFiles(pathlib.Path(self.folder), [pathlib.Path(part.filename) for part in parts], details)

    def name(self, index: int) -> str:
        """Data set, split and index of a record."""
        return f"{self.dataset} {self.split}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._example(index, lambda count: (count - 1) // 2)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example with a random clip of a video, and a random one of its captions."""
        return self._example(index, lambda count: int(rng.integers(count)), rng)

    def captions_of(self, index: int) -> list[str]:
        """All captions of an example."""
        return self._parse(index)[2]

    def _example(
        self, index: int, pick: Callable[[int], int], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """The example; `pick` maps the number of possible first frames to one of them."""
        encoded, label, texts = self._parse(index)
        example = {"image": self._images(self.name(index), encoded, pick), "label": np.int32(label)}
        if self.captions:
            example["caption"] = texts[int(rng.integers(len(texts))) if rng is not None else 0]
        return example

    def _parse(self, index: int) -> tuple[list[bytes], int, list[str]]:
        """Encoded images, label and captions of a record. Raises CorruptRecord, or InputError for an I/O error."""
        from tensorflow_datasets.proto import tf_example_pb2

        name = self.name(index)
        try:
            parsed = tf_example_pb2.Example.FromString(read_record(self._records, index)).features.feature
            encoded = list(parsed[self.keys.image].bytes_list.value)
            label = parsed[self.keys.label].int64_list.value[0] if self.keys.label else 0
            texts = [text.decode() for text in parsed[self.keys.caption].bytes_list.value] if self.captions else []
        except Exception as error:  # ArrayRecord and protobuf raise kinds of their own
            raise record_error("data", name, error) from None
        if not encoded or (self.captions and not texts):
            raise CorruptRecord("data", name, "not a whole record (no image, or no caption)")
        return encoded, label, texts

    def _images(self, name: str, encoded: list[bytes], pick) -> np.ndarray:
        """The image, or a clip of the video."""
        if self.frames == 1:
            return self.format.decode(name, io.BytesIO(encoded[0]))
        first = pick(max(len(encoded) - (self.frames - 1) * self.stride, 1))
        indices = np.minimum(first + self.stride * np.arange(self.frames), len(encoded) - 1)
        return np.stack([self.format.decode(name, io.BytesIO(encoded[i])) for i in indices])


def data_set_class_names(settings: DataSettings, path: str = "") -> tuple[str, ...]:
    """Class names of the prepared data set `settings.name` in `path` ("": the default folder); () without a name.

    Raises InputError if it is not prepared there; ImageNet's names need no files.
    """
    if not settings.name:
        return ()
    if plain_name(settings.name) == "imagenet2012":
        return imagenet_class_names()
    return class_names_of(builder_info(settings.name, path), keys_of(settings))


def class_names_of(info: Any, keys: Keys) -> tuple[str, ...]:
    """The names of a data set's classes, from its info; for ImageNet in English, not WordNet's numbers."""
    label = _flat(info.features).get(keys.label)
    names = tuple(getattr(label, "names", None) or ())
    return imagenet_class_names() if names[:1] == ("n01440764",) and len(names) == 1000 else names


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """Features by their names in a record: nested ones as `outer/inner`."""
    flat = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", None)
        if hasattr(feature, "items"):
            flat |= _flat(feature, f"{prefix}{name}/")
        elif hasattr(inner, "items"):
            flat |= _flat(inner, f"{prefix}{name}/")
        else:
            flat[prefix + name] = feature
    return flat


TFDS = SourceKind(
    name="tfds",
    summary="images or videos prepared by TensorFlow Datasets in `path`, its data_dir ('': the default one)",
    open=TfdsSource,
    fixed={"image_width": 0},
    own=("split", "image_key", "label_key", "caption_key", "frame_stride"),
    class_names=lambda settings: data_set_class_names(settings, settings.path),
    has_captions=True,
    encodable=True,
)
