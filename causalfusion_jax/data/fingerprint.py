"""A checksum that identifies the examples of a source, so that work is not resumed with others."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.data.batches import InThreads
from causalfusion_jax.data.records import CorruptRecord, SourceFiles, record_error

MAX_SIZES, MAX_EXAMPLES = 4096, 64
"""Maximum number of files whose sizes are compared (on a mounted bucket each is a request), and of examples that are
compared without a listing; both evenly spaced."""


def fingerprint(source: Any) -> str:
    """SHA-256 of a source's listing, independent of the folder of the data.

    Args:
      source: the examples; without `listing()`, a sample of them is compared.

    Raises:
      InputError: a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps([len(source), list(source.class_names)]).encode())
    for item in _listed(source.listing()) if hasattr(source, "listing") else _sample(source):
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def _listed(listing: SourceFiles) -> Iterable[Any]:
    """Details, the names of all files and the sizes of at most MAX_SIZES of them."""
    yield from listing.details
    yield from (path.relative_to(listing.root).as_posix() for path in listing.paths)
    yield from InThreads(file_sizes, 16)([listing.paths[i] for i in _spaced(len(listing.paths), MAX_SIZES)])


def file_sizes(path: pathlib.Path) -> list:
    """The size of a file, or the names and sizes of those of a folder."""
    try:
        if path.is_dir():
            return [[file.name, file.stat().st_size] for file in sorted(path.iterdir())]
        return [files.retry_io(path.stat).st_size]
    except OSError as error:
        raise record_error("data.path", str(path), error) from None


def _sample(source: Any) -> Iterable[list]:
    """Checksums of MAX_EXAMPLES examples."""
    for index in _spaced(len(source), MAX_EXAMPLES):
        try:
            example = source[index]
        except CorruptRecord as error:
            yield [error.allowed]
            continue
        arrays = {name: np.asarray(values) for name, values in example.items()}
        yield [[name, hashlib.sha256(values.tobytes()).hexdigest()] for name, values in sorted(arrays.items())]


def _spaced(num: int, most: int) -> list[int]:
    """At most `most` of 0..num-1, evenly spaced."""
    return sorted({i * num // most for i in range(most)}) if num > most else list(range(num))
