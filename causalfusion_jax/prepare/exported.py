"""What an exported file says of itself in its metadata, so that it can be imported again without loss."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.data.class_names import as_class_names

TRANSFORMERS = ("causalfusion", "acdit")
"""Kinds whose settings are the sections of a config."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported checkpoint beside its arrays.

    Attributes:
      kind: causalfusion, acdit, mar_vae, ...
      settings: all settings: of a transformer the sections of its config, else those of the network.
      class_names: of a transformer's classes; () where they are not known.
      weights: `ema` or `model`; None where it is not known.
      step: of training; None where it is not known.
    """

    kind: str
    settings: dict[str, Any]
    class_names: tuple[str, ...] = ()
    weights: str | None = None
    step: int | None = None

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a .safetensors file, which are strings."""
        metadata = {"kind": self.kind, "settings": json.dumps(self.settings)}
        if self.class_names:
            metadata["class_names"] = json.dumps(self.class_names)
        if self.weights is not None:
            metadata["weights"] = self.weights
        if self.step is not None:
            metadata["step"] = str(self.step)
        return metadata


def from_metadata(metadata: Mapping[str, Any]) -> Exported | None:
    """Reads what `Exported.to_metadata` wrote; None of a file that was not exported by this package.

    Raises:
      InputError: it was, and its metadata are damaged.
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
