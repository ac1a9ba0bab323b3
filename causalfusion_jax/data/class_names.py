"""The class names that a run stores, because the folders that they come from may change or move."""

import json
import pathlib
from collections.abc import Sequence

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

_FILE = "classes.json"


def stored_class_names(workdir: str | pathlib.Path) -> tuple[str, ...]:
    """The names stored in a run, class 0 first; () if there are none.

    Raises InputError if its classes.json cannot be read.
    """
    path = pathlib.Path(workdir) / _FILE
    if not path.exists():
        return ()
    try:
        return as_class_names(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InputError("workdir", str(workdir), f"its {_FILE} cannot be read: {error}") from None


def as_class_names(values: object) -> tuple[str, ...]:
    """Class names of parsed JSON. Raises ValueError unless it is a list of strings."""
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError("class names must be a list of strings")
    return tuple(values)


def check_class_names(workdir: str | pathlib.Path, names: Sequence[str]) -> None:
    """Raises InputError if a run stores other names than those of its data; either may have none."""
    problem = names_difference(stored_class_names(workdir), names)
    allowed = f"{problem}; continue it on the classes it was trained on, or use another workdir"
    require(problem is None, "workdir", str(workdir), allowed)


def store_class_names(workdir: str | pathlib.Path, names: Sequence[str]) -> None:
    """Stores the names of a run's classes, if they have any."""
    if names and stored_class_names(workdir) != tuple(names):
        files.write_json(pathlib.Path(workdir) / _FILE, list(names))


def names_difference(stored: Sequence[str], names: Sequence[str]) -> str | None:
    """The first difference between a run's names and those of data; None if equal or if one has no names."""
    if not stored or not names:
        return None
    for label, (ours, theirs) in enumerate(zip(stored, names, strict=False)):
        if ours != theirs:
            return f"class {label} is {ours!r} in the run and {theirs!r} in the data"
    if len(stored) != len(names):
        return f"the run has {len(stored)} classes and the data {len(names)}"
    return None
