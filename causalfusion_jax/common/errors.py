"""InputError, the error for every invalid input, and checks that raise it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A setting or argument that cannot be used.

    The message is one line: the field, the given value, and what is allowed. The commands print it
    and exit with status 2, before they change anything.
    """

    def __init__(self, field: str, value: object, allowed: str):
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}={value!r}: {allowed}")

    def __reduce__(self):
        # For errors of worker processes, which are pickled.
        return type(self), (self.field, self.value, self.allowed)

    def under(self, prefix: str) -> "InputError":
        """The same error for the field `prefix.field`."""
        return InputError(f"{prefix}.{self.field}", self.value, self.allowed)


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises InputError(field, value, allowed) unless `condition` holds."""
    if not condition:
        raise InputError(field, value, allowed)


def require_one_of(field: str, value: object, choices: Iterable[object]) -> None:
    """Raises InputError unless `value` is one of `choices`; suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        raise InputError(field, value, f"must be one of {', '.join(map(str, choices))}{nearest(value, choices)}")


def require_number(
    field: str, value: object, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Raises InputError unless low <= value <= high (low < value with `open_low`)."""
    inside = low < value <= high if open_low else low <= value <= high
    sign = ">" if open_low else ">="
    upper = "" if high == float("inf") else f" and <= {high}"
    require(inside, field, value, f"must be {sign} {low}{upper}")


def nearest(name: object, known: Iterable[object]) -> str:
    """`' (did you mean X?)'` for the known name closest to `name`, else `''`."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
