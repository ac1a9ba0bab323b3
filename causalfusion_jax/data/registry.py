"""The data sources, by name, and what can be done with any of them.

To add a source, declare its `SourceKind` in a module of its own and list it here.
"""

import dataclasses
import pathlib

from causalfusion_jax.common.errors import require
from causalfusion_jax.data.arrays import ARRAYS
from causalfusion_jax.data.caption_folder import CAPTION_FOLDER
from causalfusion_jax.data.clip_folder import CLIP_FOLDER
from causalfusion_jax.data.digit_pairs import DIGIT_PAIRS
from causalfusion_jax.data.digits import DIGITS
from causalfusion_jax.data.image_folder import IMAGE_FOLDER
from causalfusion_jax.data.latents import LATENTS
from causalfusion_jax.data.moving_digits import MOVING_DIGITS
from causalfusion_jax.data.source import DataSettings, HeldOutCaptions, Source, SourceKind
from causalfusion_jax.data.tar_shards import TAR
from causalfusion_jax.data.tfds_source import TFDS, data_set_class_names

_KINDS = (DIGITS, DIGIT_PAIRS, MOVING_DIGITS, IMAGE_FOLDER, CLIP_FOLDER, CAPTION_FOLDER, TFDS, TAR, LATENTS, ARRAYS)
SOURCES: dict[str, SourceKind] = {kind.name: kind for kind in _KINDS}


def make_source(config: DataSettings, captions: bool = False) -> Source:
    """Opens the training source.

    Args:
      config: settings of the data.
      captions: examples have "caption" too.

    Raises:
      InputError: it is not what `config` says, has no captions, or has yet to be encoded.
    """
    kind = SOURCES[config.source]
    require(
        not (config.latents and kind.encodable),
        "config.data.source",
        config.source,
        "gives pixels, and the model takes latents: encode them by"
        " causalfusion_jax.encode, then give source=latents and as path its --out",
    )
    require(kind.has_captions or not captions, "config.data.source", config.source, "has no captions")
    # Checked here and not with the settings: configs are complete except for where the data are.
    needed = f"source {config.source} needs the path of its folder"
    require(bool(config.path) or not kind.needs_path, "config.data.path", config.path, needed)
    source = kind.open(config, captions)
    same = source.num_classes == config.num_classes
    require(same, "num_classes", config.num_classes, f"{config.name or config.path} has {source.num_classes} classes")
    return source


def make_held_out_source(config: DataSettings, path: str = "", split: str = "validation") -> Source:
    """Opens labelled examples of the training source's kind that training does not see.

    Args:
      config: settings of the training data.
      path: their folder, for sources that are a folder; of tfds, its data_dir, "": the same.
      split: their split, for sources with a `split` setting.

    Raises:
      InputError: as `make_source`; no path, or that of the training source; fewer than two classes.
    """
    require(config.num_classes > 1, "config.data.num_classes", config.num_classes, "needs at least two classes")
    kind = SOURCES[config.source]
    if kind.open_held_out is not None:
        require(path == "", "config.probe.held_out_path", path, f"must be '': source {config.source} has its own")
        return kind.open_held_out(config)
    if "split" in kind.own:
        field, value, different = "config.probe.held_out_split", split, split != config.split
        held_out = dataclasses.replace(config, split=split, path=path or config.path)
    else:
        field, value = "config.probe.held_out_path", path
        different = bool(path) and pathlib.Path(path).resolve() != pathlib.Path(config.path).resolve()
        held_out = dataclasses.replace(config, path=path)
    require(different, field, value, "must name images that were not trained on")
    source, trained = make_source(held_out), class_names(config)
    both_named = bool(source.class_names) and bool(trained)
    same = not both_named or tuple(source.class_names) == trained
    require(same, field, value, "has other classes than those trained on")
    return source


def require_encodable(config: DataSettings) -> None:
    """Raises InputError unless the source holds images that `encode` makes latents of."""
    names = [name for name, kind in SOURCES.items() if kind.encodable]
    allowed = f"must be one of images to encode, {', '.join(names)}"
    require(config.source in names, "config.data.source", config.source, allowed)


def held_out_captions(field: str, split: str, config: DataSettings) -> HeldOutCaptions | None:
    """The held-out captions of the source, if `split` names a split of them; None for other words.

    Raises InputError, with `field` as the option, if it is a split of another source.
    """
    captions = {name: kind.held_out_captions for name, kind in SOURCES.items() if kind.held_out_captions}
    owners = {name: held_out for name, held_out in captions.items() if split in held_out.splits}
    fits = not owners or config.source in owners
    require(fits, field, split, f"is for models of data.source={' or '.join(owners)}")
    return owners.get(config.source)


def class_names(config: DataSettings) -> tuple[str, ...]:
    """Names of the classes, without reading an image; () if they have none.

    Raises InputError if the data that say so are missing.
    """
    kind = SOURCES[config.source]
    return data_set_class_names(config) if kind.class_names is None else kind.class_names(config)


def describe(source: Source, config: DataSettings) -> str:
    """One line on the training data: source, number and shape of examples, classes, files left out."""
    examples = "latents" if config.latents else "videos" if config.frames > 1 else "images"
    axes = f"{'frames x ' if config.frames > 1 else ''}height x width x channels"
    classes = "class" if config.num_classes == 1 else "classes"
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in getattr(source, "skipped", {}).items())
    return (
        f"data: {' '.join(filter(None, (config.source, config.name, config.path)))}: {len(source):,} {examples} of"
        f" {'x'.join(map(str, config.shape))} ({axes}), {config.num_classes:,} {classes}"
        + (f"; left out in the folders of classes: {skipped}" if skipped else "")
    )
