"""Whether a folder or file already holds the result of this request, told by the request stored in it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from causalfusion_jax.common.errors import InputError

NEW_FOLDER = "give a new or empty folder"
_SHOWN = 60
"""Characters up to which values are shown in an error."""
_ABSENT = object()
"""Stands for a value that a request does not have."""


def plain(request: Any) -> Any:
    """`request` as it is read back from JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(request))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two requests.

    Args:
      stored: values of the stored request, which may be nested mappings.
      wanted: values of this request.

    Returns:
      `["sampler.solver_steps 8, now 9"]`, or the name alone if a value is too long to show.
    """
    before, now = dict(_leaves(plain(stored))), dict(_leaves(plain(wanted)))
    changes = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if old is _ABSENT or new is _ABSENT or old != new:
            change = f"{name} {_text(old)}, now {_text(new)}"
            changes.append(change if len(change) <= len(name) + _SHOWN else name)
    return changes


def require_same(
    field: str, location: object, stored: Any, wanted: Mapping[str, Any], problem: str, remedy: str = NEW_FOLDER
) -> None:
    """Raises InputError(field, location) unless the stored request is the wanted one.

    Args:
      field: the option that names the folder or file.
      location: the folder or file.
      stored: the request stored there; anything but a mapping means that there is none.
      wanted: this request.
      problem: what it means for the location to hold another request; the differences follow it.
      remedy: what to do about it.
    """
    if not isinstance(stored, Mapping):
        raise InputError(field, str(location), f"exists with other content; {remedy}")
    changes = differences(stored, wanted)
    if changes:
        raise InputError(field, str(location), f"{problem} ({'; '.join(changes)}); {remedy}")


def _leaves(request: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below nested mappings, by its path."""
    for name, value in request.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    """A value in an error."""
    return "not set" if value is _ABSENT else repr(value)
