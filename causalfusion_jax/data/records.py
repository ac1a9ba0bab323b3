"""Records of a source: errors of reading them, and the files that identify them."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError


class CorruptRecord(InputError):
    """A record that was read and cannot be decoded; `value` is its name, `allowed` the reason."""


class SourceFiles(NamedTuple):
    """What identifies the examples of a source, see `data.fingerprint`.

    Attributes:
      root: the folder of the data.
      paths: their files below it, in the order of the examples.
      details: anything else that identifies them, as plain values.
    """

    root: pathlib.Path
    paths: Sequence[pathlib.Path]
    details: Sequence[Any] = ()


def record_error(field: str, name: str, error: Exception, kind: str = "record") -> InputError:
    """The error to raise for a record that could not be read.

    Args:
      field: the option that names the data.
      name: name of the record.
      error: what reading or decoding it raised.
      kind: what it should have been.

    Returns:
      InputError for an I/O error, which says nothing about the record; else CorruptRecord.
    """
    # Decoders name what they were given, which may be bytes in memory.
    reason = str(error).partition(" <_io.")[0].replace(name, pathlib.Path(name).name)
    reason = f"{type(error).__name__}: {' '.join(reason.split())}"
    if files.is_io_error(error):
        return InputError(field, name, f"could not be read ({reason}); I/O errors are not skipped as corrupt records")
    return CorruptRecord(field, name, f"not a readable {kind} ({reason}); mend or remove it")


def read_file(field: str, path: pathlib.Path) -> bytes:
    """The bytes of a file that is one record. Raises InputError if they cannot be read."""
    try:
        return files.retry_io(path.read_bytes)
    except OSError as error:
        raise record_error(field, str(path), error) from None
