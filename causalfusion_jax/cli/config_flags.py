"""Flags derived from a dataclass of settings: one flag for each field, its help from the class docstring."""

import dataclasses
import inspect
import re
from typing import Any

from absl import flags

from causalfusion_jax.common.errors import InputError

# Flags belong to the module that calls `define`.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class ConfigFlags:
    """The flags of a dataclass.

    Attributes:
      config_class: the dataclass.
      holders: the flag of each field, by name.
    """

    config_class: type
    holders: dict[str, flags.FlagHolder]

    def given(self) -> dict[str, Any]:
        """Values of the flags that were given, by field. Raises InputError for a malformed list of numbers."""
        fields = {field.name: field for field in dataclasses.fields(self.config_class)}
        values = {}
        for name, holder in self.holders.items():
            if holder.value is not None:
                value, default = holder.value, fields[name].default
                values[name] = (
                    numbers(name, value, fields[name].type.__args__[0]) if isinstance(default, tuple) else value
                )
        return values

    def make(self) -> Any:
        """The dataclass with the given values, else its defaults. Raises InputError naming the flag."""
        try:
            return self.config_class(**self.given())
        except InputError as error:
            raise InputError(f"--{error.field.removeprefix('--')}", error.value, error.allowed) from None


def define(config_class: type, unset: str | None = None) -> ConfigFlags:
    """Defines a flag for each field of a dataclass; a flag that is not given is None.

    Args:
      config_class: a frozen dataclass whose fields have defaults of type bool, int, float, str or
        tuple of numbers, described under `Attributes:` in its docstring or those of its bases.
      unset: what applies if a flag is not given, for its help; None: the field's default.
    """
    define_by_type = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    texts, holders = field_docs(config_class), {}
    for field in dataclasses.fields(config_class):
        text = texts.get(field.name, "")
        text = f"{text[:1].upper()}{text[1:].rstrip('.')} [{field.default if unset is None else unset}]."
        define_flag = define_by_type.get(type(field.default), flags.DEFINE_string)
        holders[field.name] = define_flag(field.name, None, text)
    return ConfigFlags(config_class, holders)


def field_docs(config_class: type) -> dict[str, str]:
    """The description of each field in the `Attributes:` of the docstrings of a dataclass and its bases."""
    texts = {}
    for base in reversed(config_class.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", section, re.MULTILINE):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def numbers(flag: str, text: str | None, kind: type) -> tuple | None:
    """The value of a comma-separated flag as a tuple of `kind`, or None if not given. Raises InputError."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--{flag}", text, f"must be {kind.__name__} values separated by commas") from None
