"""Parameters on disk, and converted checkpoints, which add settings and checksums."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require


def write_params(folder: pathlib.Path, params: Any) -> None:
    """Writes nested arrays to a new folder."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(params))


def read_params(folder: pathlib.Path, shapes: Any) -> Any:
    """Reads nested arrays as numpy arrays; not collective.

    Args:
      folder: written by `write_params` or an Orbax checkpointer.
      shapes: the arrays to read, as jax.ShapeDtypeStruct; the folder may have others.
    """
    on_host = jax.tree.map(lambda s: ocp.RestoreArgs(restore_type=np.ndarray, dtype=s.dtype), shapes)
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=on_host, partial_restore=True)
    process = jax.process_index()
    # By default Orbax waits for all processes, including those that do not read.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(folder.absolute(), args=args)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint: FOLDER/converted.json and FOLDER/params.

    Attributes:
      folder: the folder.
      kind: kind of the network: causalfusion, acdit, mar_vae, ...
      settings: settings of the network, as plain values.
      source: its origin: `file`, `sha256`, and if they are known `weights` and `step`.
      fingerprint: one checksum of settings and parameters.
      class_names: class names of a transformer; () if they are not known.
    """

    folder: pathlib.Path
    kind: str
    settings: dict[str, Any]
    source: dict[str, Any]
    fingerprint: str
    class_names: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """Origin of the weights, in one line."""
        return f"{describe_source(self.source)} in {self.folder}".strip()

    def params(self, shapes: Any) -> Any:
        """The parameters as host arrays, nested like `shapes`; see `read_params`."""
        return read_params(self.folder / "params", shapes)


def describe_source(source: Mapping[str, Any]) -> str:
    """`ema of step 1200 of FILE`, or what is known of it from the source of a converted checkpoint."""
    step = source.get("step")
    parts = (source.get("weights"), None if step is None else f"step {step}", source.get("file"))
    return " of ".join(part for part in parts if part)


def write_converted(
    folder: pathlib.Path,
    kind: str,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
    params: Any,
    class_names: Sequence[str] = (),
) -> None:
    """Writes a converted checkpoint (see `Converted`), whole or not at all.

    Raises InputError if FOLDER is not empty.
    """
    files.require_new("--out", folder)

    def fill(part: pathlib.Path) -> None:
        write_params(part / "params", params)
        content = {
            "kind": kind,
            "settings": settings,
            "source": source,
            "class_names": list(class_names),
            "files": files.describe(part / "params"),
        }
        files.write_json(part / "converted.json", content)

    files.write_folder(folder, fill)


def open_converted(field: str, folder: str, kinds: tuple[str, ...]) -> Converted:
    """Opens a converted checkpoint, and verifies all its files.

    Args:
      field: the option that names it, for errors.
      folder: its folder.
      kinds: the allowed kinds.

    Raises:
      InputError: it is not a converted checkpoint of these kinds, or is damaged.
    """
    path = pathlib.Path(folder) / "converted.json"
    require(
        path.is_file(), field, folder, "is not a converted checkpoint (it has no converted.json); see convert --help"
    )
    try:
        content = json.loads(path.read_text())
        kind, settings, source, described = (content[key] for key in ("kind", "settings", "source", "files"))
        # Older versions did not write class names.
        class_names = tuple(content.get("class_names", ()))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(field, str(path), f"cannot be read: {error}") from None
    require(kind in kinds, field, folder, f"is of kind {kind}; must be of kind {' or '.join(kinds)}")
    problem = files.difference(path.parent / "params", described)
    require(problem is None, field, folder, f"is damaged: {problem}; convert it again")
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    return Converted(path.parent, kind, settings, source, fingerprint, class_names)
