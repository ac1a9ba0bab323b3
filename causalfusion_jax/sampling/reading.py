"""What the caption command reads: images in several kinds of file, prompts, and captions of their own."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.config.experiment import ExperimentConfig
from causalfusion_jax.data.caption_folder import CAPTIONS, load_image, read_captions
from causalfusion_jax.data.image_files import IMAGE_SUFFIXES
from causalfusion_jax.data.registry import held_out_captions
from causalfusion_jax.data.tokenizers import to_slots


class Images(NamedTuple):
    """Images to read.

    Attributes:
      names: what each is called.
      images: float32 [num, height, width, channels], as the model takes them, read when indexed.
      references: captions of each, () where there are none.
    """

    names: list[str]
    images: "ImagesOnDemand"
    references: list[tuple[str, ...]]


class ImagesOnDemand:
    """Images of which only those that are indexed are in memory: `len(images)`, `images[indices]`.

    Args:
      num: how many.
      load: from the number of an image to the image.
    """

    def __init__(self, num: int, load: Callable[[int], np.ndarray]):
        self._num, self._load = num, load

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Images [len(indices), ...], loaded by several threads."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._load, np.asarray(indices).tolist())))

    def check(self) -> None:
        """Loads every image once. Raises what the first one that cannot be loaded raises."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda index: self._load(index) is None, range(self._num)):
                pass


def read_images(config: ExperimentConfig, path: str, num: int | None) -> Images:
    """Images of a file, a folder, an .npz, or a held-out part of digit_pairs.

    Args:
      config: of the model that is to read them.
      path: an image file; a folder of them, with or without captions.jsonl; an .npz with
        `arr_0`, images uint8 (latents: float) [num, height, width, channels], and, if it has
        them, `captions`; `held_out` or `held_out_digits`, of a model of digit_pairs.
      num: at most so many; default: all, of digit_pairs 500.

    Raises:
      InputError: nothing of these, or images of the wrong size.
    """
    field = "--images"
    held_out = held_out_captions("--images", path, config.data)
    if held_out is not None:
        return _held_out(held_out.open(path), path, 500 if num is None else num)
    file = pathlib.Path(path)
    if file.suffix == ".npz":
        return _of_arrays(config, file, num)
    require(
        not config.data.latents,
        field,
        path,
        "the model reads latents: give an .npz with arr_0, latents as it was trained on",
    )
    require(file.exists(), field, path, "no such file or folder")
    if not file.is_dir():
        folder, records = file.parent, [(file.name, ())]
    elif (file / CAPTIONS).is_file():
        folder, records = file, read_captions(file, field)[:num]
    else:
        paths = sorted(path for path in file.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        folder, records = file, [(path.relative_to(file).as_posix(), ()) for path in paths][:num]
    require(bool(records), field, path, f"holds no images (*{'|'.join(IMAGE_SUFFIXES)})")
    names, captions = map(list, zip(*records, strict=True))
    images = ImagesOnDemand(len(names), lambda i: load_image(folder / names[i], config.data.shape, field))
    # A bad one is named before anything is computed.
    images.check()
    return Images(names, images, captions)


def _held_out(source, path, num) -> Images:
    require(1 <= num <= len(source), "--num", num, f"must be >= 1 and <= {len(source)}")
    chosen = np.random.default_rng(0).choice(len(source), num, replace=False)
    images = ImagesOnDemand(num, lambda i: source[int(chosen[i])]["image"])
    return Images([f"{path}/{i}" for i in chosen], images, [(source[int(i)]["caption"],) for i in chosen])


def _of_arrays(config, file, num) -> Images:
    require(file.is_file(), "--images", str(file), "no such file")
    try:
        with np.load(file) as arrays:
            images = arrays["arr_0"]
            captions = arrays["captions"] if "captions" in arrays else None
    except Exception as error:
        raise InputError("--images", str(file), f"not an .npz with arr_0 ({type(error).__name__})") from None
    shape, kind = config.data.shape, "f" if config.data.latents else "u"
    require(
        images.shape[1:] == shape and images.dtype.kind == kind and len(images) > 0,
        "--images",
        str(file),
        f"arr_0 must be {'float' if config.data.latents else 'uint8'} [num, {', '.join(map(str, shape))}];"
        f" it is {images.dtype} {list(images.shape)}",
    )
    require(
        captions is None or len(captions) == len(images),
        "--images",
        str(file),
        f"captions must be {len(images)}, as arr_0",
    )
    images = images[:num]
    references = [()] * len(images) if captions is None else [(str(caption),) for caption in captions[:num]]
    scale = (lambda values: values) if config.data.latents else (lambda values: values / np.float32(127.5) - 1)
    scaled = ImagesOnDemand(len(images), lambda i: scale(images[i].astype(np.float32)))
    return Images([str(i) for i in range(len(images))], scaled, references)


def read_prompts(
    config: ExperimentConfig, prompt: str | None, prompts: str | None, num: int | None
) -> list[str] | None:
    """Prompts of --prompt or --prompts, one an image; None where neither is given.

    Args:
      config: of the model.
      prompt: one for all images.
      prompts: a file with one a line, taken in turn; or `held_out`, of a model of digit_pairs.
      num: of images; default: 10 of one prompt, 500 of held_out, one for each line.

    Raises:
      InputError: both, no such file, or a prompt that the model's tokenizer cannot read whole.
    """
    if prompt is None and prompts is None:
        return None
    field, value = ("--prompt", prompt) if prompts is None else ("--prompts", prompts)
    require(prompt is None or prompts is None, "--prompt", prompt, "give --prompt or --prompts, and not both")
    require(config.text.is_on, field, value, "the model was trained without text; leave it out")
    require(num is None or num >= 1, "--num", num, "must be >= 1")
    if prompts is None:
        texts, num = [prompt], num or 10
    elif (held_out := held_out_captions(field, value, config.data)) is not None and value == held_out.splits[0]:
        texts, num = held_out.prompts(num or 500), num or 500
    else:
        require(pathlib.Path(prompts).is_file(), field, value, "no such file")
        texts = [line for line in files.read_lines(field, pathlib.Path(prompts)) if line.strip()]
        require(bool(texts), field, value, "holds no prompt")
        num = num or len(texts)
    for text in texts:
        try:
            to_slots(config.text, text)
        except InputError as error:
            raise InputError(field, text, error.allowed) from None
    return [texts[i % len(texts)] for i in range(num)]
