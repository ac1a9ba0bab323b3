"""Metadata of an exported file, from which it can be imported again without loss."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.class_names import as_class_names

TRANSFORMERS = ("causalfusion", "acdit")
"""Kinds of checkpoints whose settings are the sections of a config."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exported file holds besides its arrays.

    Attributes:
      kind: causalfusion, acdit, mar_vae, ...
      settings: of a transformer the sections of its config, else the settings of the network.
      class_names: of a transformer's classes; () if they are not known.
      weights: `ema` or `model` (those of the last step); None if it is not known.
      step: of training; None if it is not known.
    """

    kind: str
    settings: dict[str, Any]
    class_names: tuple[str, ...] = ()
    weights: str | None = None
    step: int | None = None

    def to_metadata(self) -> dict[str, str]:
        """As metadata of a .safetensors file, whose values are strings."""
        metadata = {"kind": self.kind, "settings": json.dumps(self.settings)}
        if self.class_names:
            metadata["class_names"] = json.dumps(self.class_names)
        if self.weights is not None:
            metadata["weights"] = self.weights
        if self.step is not None:
            metadata["step"] = str(self.step)
        return metadata


def from_metadata(metadata: Mapping[str, Any]) -> Exported | None:
    """Reads the metadata that `Exported.to_metadata` made; None for a file that this package did not export.

    Raises:
      InputError: this package exported the file, and its metadata are damaged.
    """
    if not all(isinstance(metadata.get(name), str) for name in ("kind", "settings")):
        return None
    try:
        settings = json.loads(metadata["settings"])
        if not isinstance(settings, dict):
            raise ValueError("settings must be a mapping")
        class_names = as_class_names(json.loads(metadata.get("class_names", "[]")))
        step = int(metadata["step"]) if "step" in metadata else None
    except (ValueError, TypeError) as error:
        raise InputError("--checkpoint", "__metadata__", f"of the file cannot be read: {error}") from None
    return Exported(metadata["kind"], settings, class_names, metadata.get("weights"), step)
