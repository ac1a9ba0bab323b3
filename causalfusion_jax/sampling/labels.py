"""Classes by name or number."""

from collections.abc import Callable, Sequence

import numpy as np

from causalfusion_jax.common.errors import InputError, nearest, require


def parse_labels(
    text: str, num_classes: int, names: Callable[[], Sequence[str]] = tuple, field: str = "--labels"
) -> np.ndarray:
    """Classes, one an image, of a list like `golden retriever,otter,207`.

    Names count regardless of case, `_` and `-`; where a class has several, separated by commas,
    each of them does.

    Args:
      text: names or numbers, separated by commas.
      num_classes: numbers are in 0..num_classes-1, those of named classes too.
      names: reads those of the classes, in order, where one is needed; empty where they have none.
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
        for number, name in enumerate(_read(names, num_classes, field, text)):
            for synonym in name.split(","):
                known.setdefault(_plain(synonym), set()).add(number)
    return np.array([_class_of(word, num_classes, known, field) for word in words], np.int32)


def _read(names, num_classes: int, field: str, text: str) -> Sequence[str]:
    """`names()`; raises InputError about `field`, as the command has no setting for the data."""
    try:
        return names()
    except InputError as error:
        raise InputError(
            field,
            text,
            f"the run keeps no class names, and its data do not tell them ({error.value!r} {error.allowed});"
            f" give class numbers in 0..{num_classes - 1}",
        ) from None


def _is_number(word: str) -> bool:
    return word.removeprefix("-").isdigit()


def _class_of(word: str, num_classes: int, known: dict[str, set[int]], field: str) -> int:
    """The number of one class. Raises InputError."""
    if _is_number(word):
        require(0 <= int(word) < num_classes, field, int(word), f"must be class numbers in 0..{num_classes - 1}")
        return int(word)
    numbers = sorted(known.get(_plain(word), ()))
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
        allowed += f", or names of classes{nearest(_plain(word), known)}; there are {few}"
    raise InputError(field, word, allowed)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
