"""The scores of a run's evaluations by step, and which checkpoint is the best.

`evaluations.json` is written after each evaluation. A checkpoint is saved before it is
evaluated, so a step that should have been evaluated and is not listed here was interrupted,
and is evaluated when the run resumes from it.
"""

import math
import pathlib
from collections.abc import Collection
from typing import Any

from causalfusion_jax.common import files
from causalfusion_jax.data.scores import is_better

Record = dict[str, Any]
"""An evaluation: `step`, `value` (None where it is not a finite number), and `of`, the settings that values are
compared under, with the name of the `metric`."""


def record(step: int, value: float, of: dict[str, Any]) -> Record:
    """The record of an evaluation."""
    return {"step": step, "value": value if math.isfinite(value) else None, "of": of}


def _path(workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir) / "evaluations.json"


def read(workdir: pathlib.Path) -> list[Record]:
    """All evaluations of a run, by step; none where there is no file."""
    return files.read_json(_path(workdir)) or []


def write(workdir: pathlib.Path, records: list[Record]) -> None:
    """Writes the evaluations of a run, whole or not at all."""
    files.write_json(_path(workdir), sorted(records, key=lambda record: record["step"]))


def best(records: list[Record], steps: Collection[int]) -> Record | None:
    """The best evaluation of `steps`; None where none has a score.

    Scores under other settings cannot be compared: the first evaluation after a change is the best so far.
    """
    found = None
    for record in records:
        if record["step"] not in steps or record["value"] is None:
            continue
        comparable = found is not None and found["of"] == record["of"]
        if not comparable or is_better(record["of"].get("metric", ""), record["value"], found["value"]):
            found = record
    return found
