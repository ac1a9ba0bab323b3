"""The mesh, and where every logical axis lies on it.

Parameters and activations name their dimensions (`embed`, `heads`, `batch`, ...); one
table says which mesh axis each name is split over. Everything else, XLA derives.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causalfusion_jax.errors import InputError, require

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "tokens": None,
    "token_dim": None,
    "timestep": None,
    "classes": None,
}
"""Logical axis to mesh axis; None is replicated."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, in at most one place, takes what is left.

    Attributes:
      data: batch split, parameters replicated.
      fsdp: batch and parameters split.
      tensor: attention heads and MLP split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, name, size, "must be >= 1, or -1 for the devices that are left")
        require(list(sizes.values()).count(-1) <= 1, "data", self.data, "only one mesh axis may be -1")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). Raises InputError where they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        shape = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError("mesh", shape, f"must fit the {len(devices)} devices")
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(np.asarray(devices).reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Where an array with these logical axes lies.

    Args:
      mesh: the mesh.
      axes: a logical axis, or None, for each dimension.
      shape: if given, dimensions that do not divide evenly stay whole.

    Raises:
      InputError: an unknown logical axis, or two dimensions on one mesh axis.
    """
    spec, used = [], set()
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise InputError("axis", axis, f"must be one of {', '.join(RULES)}")
        rule = None if axis is None else RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        if used & set(names):
            raise InputError("axes", axes, f"two dimensions would lie on mesh axis {names[0]}")
        used |= set(names)
        parts = math.prod(mesh.shape[name] for name in names)
        even = shape is None or shape[i] % parts == 0
        spec.append((names if len(names) > 1 else names[0]) if names and even else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the mesh, the rest of each array whole."""
    return sharding(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
