"""The evaluations of a run by step, and the best of them.

`evaluations.json` is written after each evaluation. A checkpoint is saved before it is evaluated, so
if a step at which an evaluation is due is not listed, its evaluation was interrupted; it is repeated
when the run resumes from that step.
"""

import math
import pathlib
from collections.abc import Collection
from typing import Any

from causalfusion_jax.common import files
from causalfusion_jax.data.scores import is_better

Record = dict[str, Any]
"""An evaluation: `step`, `value` (None if it is not finite), and `of`, the settings under which values can be
compared, with the name of the `metric`."""


def record(step: int, value: float, settings: dict[str, Any]) -> Record:
    """The record of an evaluation."""
    return {"step": step, "value": value if math.isfinite(value) else None, "of": settings}


def _path(workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir) / "evaluations.json"


def read(workdir: pathlib.Path) -> list[Record]:
    """All evaluations of a run, in the order of steps; none if there is no file."""
    return files.read_json(_path(workdir)) or []


def write(workdir: pathlib.Path, records: list[Record]) -> None:
    """Writes the evaluations of a run, whole or not at all."""
    files.write_json(_path(workdir), sorted(records, key=lambda record: record["step"]))


def best(records: list[Record], steps: Collection[int]) -> Record | None:
    """The best evaluation of `steps`; None if none of them has a value.

    Values under different settings cannot be compared: the first evaluation after a change is the best so far.
    """
    best_record = None
    for record in records:
        if record["step"] not in steps or record["value"] is None:
            continue
        comparable = best_record is not None and best_record["of"] == record["of"]
        if not comparable or is_better(record["of"].get("metric", ""), record["value"], best_record["value"]):
            best_record = record
    return best_record
