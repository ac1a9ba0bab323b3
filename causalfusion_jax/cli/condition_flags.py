"""Flags of the commands that generate images: the condition of each image, its class or prompt.

Not a command itself. A command calls `define` once, and shows the flags in its --help by
`flags.adopt_module_key_flags(condition_flags)`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, nearest, require

NUM_SAMPLES, NUM_SAMPLES_OF_PROMPT, NUM_SAMPLES_HELD_OUT = 100, 10, 500
"""Default numbers of images: without a prompt, of --prompt, of --prompts=held_out."""


class GivenConditions(NamedTuple):
    """Classes and prompts of images, as plain values.

    Attributes:
      labels: int32 [num]; num_classes stands for no class.
      prompts: a text for each image, or None.
    """

    labels: np.ndarray
    prompts: list[str] | None

    def repeat(self, times: int) -> "GivenConditions":
        """The conditions of `times` results for each image in turn."""
        prompts = self.prompts and [prompt for prompt in self.prompts for _ in range(times)]
        return GivenConditions(self.labels.repeat(times), prompts)

    def condition(self, config):
        """The `conditions.Condition` of a model of `config`."""
        from causalfusion_jax.core.conditions import Condition
        from causalfusion_jax.data.tokenizers import to_slots

        text = self.prompts and np.stack([to_slots(config.text, prompt) for prompt in self.prompts])
        return Condition(self.labels, text)


class ConditionFlags(NamedTuple):
    """The flags of a command.

    Attributes:
      labels: classes, by name or number.
      prompt: one prompt for all images.
      prompts: a file of prompts.
    """

    labels: flags.FlagHolder
    prompt: flags.FlagHolder
    prompts: flags.FlagHolder

    @property
    def has_prompts(self) -> bool:
        """Whether --prompt or --prompts is given."""
        return self.prompt.value is not None or self.prompts.value is not None

    @property
    def labels_name(self) -> str:
        """The option of the classes, for errors."""
        return f"--{self.labels.name}"

    def parse_labels(self, trained):
        """The classes of the labels flag, int32 [num]. Raises InputError."""
        trained.config.check_classes(self.labels_name, self.labels.value)
        num_classes = trained.config.data.num_classes
        return parse_labels(self.labels.value, num_classes, trained.read_class_names, self.labels_name)

    def of_samples(self, trained, num: int | None, clips=None) -> GivenConditions:
        """The conditions of images to sample: those given, else all classes in turn.

        Args:
          trained: the model, `trained.Trained`.
          num: --num.
          clips: `clips.Clips` to continue, whose own classes are the default, or None.

        Raises:
          InputError: flags that contradict each other, or do not fit the model.
        """
        from causalfusion_jax.sampling.conditions import default_labels

        config, num_classes = trained.config, trained.config.data.num_classes
        prompts = read_prompts(config, self.prompt.value, self.prompts.value, num)
        if self.labels.value is None and prompts is not None:
            return GivenConditions(np.full(len(prompts), num_classes, np.int32), prompts)
        if self.labels.value is None and clips is None:
            num = NUM_SAMPLES if num is None else num
            require(num >= 1, "--num", num, "must be >= 1")
            return GivenConditions(default_labels(config, num), None)
        if self.labels.value is not None:
            labels = self.parse_labels(trained)
        else:
            require(clips.labels is not None, "--labels", None, "must be given: the clips come without")
            labels = np.asarray(clips.labels, np.int32)
            for label in labels.tolist():
                require(0 <= label < num_classes, "--condition", label, f"labels must be in 0..{num_classes - 1}")
        if clips is not None:
            allowed = f"must be {len(clips.frames)}, one for each clip"
            require(len(labels) == len(clips.frames), "--labels", self.labels.value, allowed)
        if prompts is not None:
            allowed = f"must be {len(prompts)}, one for each prompted image"
            require(len(labels) == len(prompts), "--labels", self.labels.value, allowed)
        else:
            allowed = f"must be {len(labels)}, the number of --labels, or left out"
            require(num in (None, len(labels)), "--num", num, allowed)
        return GivenConditions(labels, prompts)

    def of_images(self, trained, num_images: int, own_labels=None) -> GivenConditions:
        """The conditions of images to edit: those given, else the classes that the images came with.

        Args:
          trained: the model, `trained.Trained`.
          num_images: number of images.
          own_labels: the classes that the images came with, int [num_images], or None.

        Raises:
          InputError: flags that do not fit the images or the model, or no condition.
        """
        config, num_classes = trained.config, trained.config.data.num_classes
        prompts = read_prompts(config, self.prompt.value, self.prompts.value, None)
        if self.prompt.value is not None:
            prompts = prompts[:1] * num_images
        elif prompts is not None:
            allowed = f"must be {num_images} lines, one for each image"
            require(len(prompts) == num_images, "--prompts", self.prompts.value, allowed)
        if self.labels.value is not None:
            labels = self.parse_labels(trained)
            allowed = f"must be one class, or {num_images}, one for each image"
            require(len(labels) in (1, num_images), self.labels_name, self.labels.value, allowed)
        elif prompts is not None or not config.knows_classes:
            require(
                prompts is not None, "--prompt", None, "is required: the model was trained on texts without classes"
            )
            return GivenConditions(np.full(num_images, num_classes, np.int32), prompts)
        else:
            require(own_labels is not None, self.labels_name, None, "is required: the images come without labels")
            labels = own_labels
        for label in labels:
            allowed = f"must be class numbers in 0..{num_classes - 1}"
            require(0 <= label < num_classes, self.labels_name, int(label), allowed)
        return GivenConditions(np.broadcast_to(np.asarray(labels, np.int32), num_images), prompts)


def define(labels: str, labels_help: str, prompts_help: str) -> ConditionFlags:
    """Defines the flags of a command; `labels` is the name of the flag of classes."""
    return ConditionFlags(
        flags.DEFINE_string(labels, None, labels_help),
        flags.DEFINE_string("prompt", None, "Text to generate images from, for a text-conditioned model."),
        flags.DEFINE_string("prompts", None, prompts_help),
    )


# --- Prompts ------------------------------------------------------------------------


def read_prompts(config, prompt: str | None, prompts: str | None, num: int | None) -> list[str] | None:
    """Prompts of --prompt or --prompts, one for each image; None if neither is given.

    Args:
      config: settings of the model.
      prompt: one prompt for all images.
      prompts: a file with one prompt in each line, taken in turn; or `held_out`, if the data
        source has held-out captions.
      num: number of images; default: 10 of one prompt, 500 of held_out, one for each line.

    Raises:
      InputError: both, no such file, or a prompt that the model's tokenizer cannot read whole.
    """
    from causalfusion_jax.data.registry import held_out_captions
    from causalfusion_jax.data.tokenizers import to_slots

    if prompt is None and prompts is None:
        return None
    field, value = ("--prompt", prompt) if prompts is None else ("--prompts", prompts)
    require(prompt is None or prompts is None, "--prompt", prompt, "give --prompt or --prompts, and not both")
    require(config.text.is_on, field, value, "the model was trained without text; leave it out")
    require(num is None or num >= 1, "--num", num, "must be >= 1")
    if prompts is None:
        texts, num = [prompt], num or NUM_SAMPLES_OF_PROMPT
    elif (held_out := held_out_captions(field, prompts, config.data)) is not None and prompts == held_out.splits[0]:
        num = num or NUM_SAMPLES_HELD_OUT
        texts = held_out.prompts(num)
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


# --- Classes ------------------------------------------------------------------------


def parse_labels(
    text: str, num_classes: int, names: Callable[[], Sequence[str]] = tuple, field: str = "--labels"
) -> np.ndarray:
    """Classes, one for each image, from a list like `golden retriever,otter,207`.

    Names match regardless of case, `_` and `-`; a class with several names, separated by commas,
    matches by each of them.

    Args:
      text: names or numbers, separated by commas.
      num_classes: the greatest class is num_classes - 1, also by name.
      names: returns the names of the classes, in order; called if a name is given; empty if they
        have none.
      field: the option that gives them, for errors.

    Returns:
      int32 [num].

    Raises:
      InputError: an unknown or ambiguous class, one out of range, or names that cannot be read.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    require(bool(words), field, text, "must name at least one class")
    known: dict[str, set[int]] = {}
    if not all(map(_is_number, words)):
        for number, name in enumerate(_read_names(names, num_classes, field, text)):
            for synonym in name.split(","):
                known.setdefault(_normalized(synonym), set()).add(number)
    return np.array([_class_of(word, num_classes, known, field) for word in words], np.int32)


def _read_names(names, num_classes: int, field: str, text: str) -> Sequence[str]:
    """`names()`; its InputError names `field`, as the command has no setting of the data."""
    try:
        return names()
    except InputError as error:
        raise InputError(
            field,
            text,
            f"the run keeps no class names, and they cannot be read from its data ({error.value!r} {error.allowed});"
            f" give class numbers in 0..{num_classes - 1}",
        ) from None


def _is_number(word: str) -> bool:
    return word.removeprefix("-").isdigit()


def _class_of(word: str, num_classes: int, known: dict[str, set[int]], field: str) -> int:
    """The number of one class. Raises InputError."""
    if _is_number(word):
        require(0 <= int(word) < num_classes, field, int(word), f"must be class numbers in 0..{num_classes - 1}")
        return int(word)
    numbers = sorted(known.get(_normalized(word), ()))
    if len(numbers) == 1:
        (number,) = numbers
        require(
            number < num_classes,
            field,
            word,
            f"is class {number} of the data, which the model was not trained on: its classes are 0..{num_classes - 1}",
        )
        return number
    if numbers:
        raise InputError(field, word, f"is the name of classes {', '.join(map(str, numbers))}; give one of them")
    allowed = f"must be class numbers in 0..{num_classes - 1}"
    if known:
        few = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
        allowed += f", or names of classes{nearest(_normalized(word), known)}; there are {few}"
    raise InputError(field, word, allowed)


def _normalized(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
