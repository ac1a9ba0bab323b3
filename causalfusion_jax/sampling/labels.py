"""Classes by name or number."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from causalfusion_jax.errors import InputError, nearest, require

IMAGENET_CLASSES = 1000


def parse_labels(text: str, num_classes: int, names: Sequence[str] = ()) -> np.ndarray:
    """Classes, one an image, of a list like `golden retriever,otter,207`.

    Names count regardless of case, `_` and `-`; where a class has several, separated by commas,
    each of them does.

    Args:
      text: names or numbers, separated by commas.
      num_classes: numbers are in 0..num_classes-1.
      names: of the classes, in order; empty where they have none.

    Returns:
      int32 [num].

    Raises:
      InputError: an unknown or ambiguous class; its field is `--labels`.
    """
    known: dict[str, set[int]] = {}
    spelled: dict[str, str] = {}
    for number, name in enumerate(names):
        for synonym in name.split(","):
            known.setdefault(_plain(synonym), set()).add(number)
            spelled.setdefault(_plain(synonym), synonym.strip())
    words = [word.strip() for word in text.split(",") if word.strip()]
    require(bool(words), "--labels", text, "must name at least one class")
    return np.array([_class_of(word, num_classes, known, spelled) for word in words], np.int32)


def _class_of(word: str, num_classes: int, known: dict[str, set[int]], spelled: dict[str, str]) -> int:
    """The number of one class. Raises InputError."""
    # A class may itself be named by digits, as those of some folders of images are.
    numbers = known.get(_plain(word), set())
    if len(numbers) > 1:
        raise InputError("--labels", word, f"is the name of classes {', '.join(map(str, sorted(numbers)))}; give one")
    if numbers:
        return next(iter(numbers))
    if word.lstrip("-").isdigit():
        require(0 <= int(word) < num_classes, "--labels", int(word), f"must be in 0..{num_classes - 1}")
        return int(word)
    allowed = f"must be class numbers in 0..{num_classes - 1}"
    if known:
        allowed += f", or names of classes{nearest(_plain(word), known)}"
        few = list(spelled.values())
        allowed += f"; there are {', '.join(few[:10])}{', ...' if len(few) > 10 else ''}"
    raise InputError("--labels", word, allowed)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def imagenet_class_names() -> tuple[str, ...]:
    """ImageNet's 1,000 class names in the order of their numbers, where an installed library has them.

    torchvision keeps them beside its weights; nothing is downloaded. Empty without it.
    """
    if importlib.util.find_spec("torchvision") is None:
        return ()
    from torchvision.models import ResNet50_Weights

    names = tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    return names if len(names) == IMAGENET_CLASSES else ()
