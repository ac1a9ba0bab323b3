"""The mesh, and where every logical axis lies on it.

Parameters and activations name their dimensions (`embed`, `heads`, `batch`, ...); one
table says which mesh axis each name is split over. Everything else, XLA derives.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from causalfusion_jax.errors import InputError, require, require_one_of

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "tokens": None,
    "token_dim": None,
    "timestep": None,
    "classes": None,
    "vocab": None,
}
"""Logical axis to mesh axis; None is replicated. `sequence` is that of activations, `tokens`
and `embed` are those of parameters."""

AXES = ("data", "fsdp", "tensor", "sequence")
"""Mesh axes, from the slowest link to the fastest."""

PRESETS = {
    "": {},
    "dp": dict(data=-1),
    "fsdp": dict(data=1, fsdp=-1),
    "fsdp+tp": dict(data=1, fsdp=-1, tensor=2),
    "fsdp+cp": dict(data=1, fsdp=-1, sequence=2),
}
"""Meshes by name: data parallel, parameters split too, and each with tensor or context parallel."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1, in at most one place, takes what is left.

    Attributes:
      preset: a mesh by name, of PRESETS; the axes below that are given change it.
      data: batch split, parameters replicated; 0 is as the preset says, or -1 without one.
      fsdp: batch and parameters split; 0 is as the preset says, or 1.
      tensor: attention heads and MLP split; likewise.
      sequence: the tokens of a sequence split (context parallel); likewise.
    """

    preset: str = ""
    data: int = 0
    fsdp: int = 0
    tensor: int = 0
    sequence: int = 0

    def __post_init__(self):
        require_one_of("preset", self.preset, PRESETS)
        for name in AXES:
            size = getattr(self, name)
            require(size >= -1, name, size, "must be >= 1, -1 for the devices that are left, or 0 for the preset's")
        require(
            list(self.sizes.values()).count(-1) <= 1, "data", self.sizes["data"],
            "only one mesh axis may be -1, the devices that are left",
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, by name, in the mesh's order."""
        preset = PRESETS[self.preset]
        # All devices go to data unless another axis takes what is left.
        taken = -1 in preset.values() or any(getattr(self, name) == -1 for name in AXES)
        default = {"data": 1 if taken else -1, "fsdp": 1, "tensor": 1, "sequence": 1}
        return {name: getattr(self, name) or preset.get(name, default[name]) for name in AXES}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). Raises InputError where they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        shape = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError("mesh", shape, f"must fit the {len(devices)} devices")
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    return Mesh(np.asarray(devices).reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def partition(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises InputError for an unknown logical axis, or two dimensions on one mesh axis.
    """
    spec, used = [], set()
    for axis in axes:
        if axis is not None:
            require_one_of("axis", axis, RULES)
        rule = None if axis is None else RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        require(not used & set(names), "axes", axes, f"two dimensions would lie on mesh axis {', '.join(names)}")
        used |= set(names)
        spec.append(rule)
    return PartitionSpec(*spec)


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
    """Where an array with these logical axes lies.

    Args:
      mesh: the mesh.
      axes: a logical axis, or None, for each dimension.
      shape: if given, checked to split evenly.

    Raises:
      InputError: an unknown logical axis, two dimensions on one mesh axis, or a dimension
        that does not split evenly.
    """
    spec = partition(axes)
    for axis, size, names in zip(axes, shape or (), spec, strict=False):
        parts = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        if size % parts:
            raise InputError("mesh", dict(mesh.shape), f"axis {axis} of size {size} does not split into {parts}")
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks XLA to keep an activation so; where no mesh is set (`jax.set_mesh`), nothing."""
    if not is_split():
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def platform() -> str:
    """Where a computation is to run (`tpu`, `gpu`, `cpu`): the mesh's devices (`jax.set_mesh`), else jax's own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def is_split(mesh_axis: str | None = None) -> bool:
    """Whether arrays are split for us over the mesh that is set (`jax.set_mesh`), along one axis or any.

    Inside `jax.shard_map` they are not: what each device has is whole there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 for name, size, kind in sizes if kind != AxisType.Manual and mesh_axis in (None, name))


def check_divides(mesh: Mesh, mesh_axis: str, **sizes: int) -> None:
    """Raises InputError unless every one of `sizes` (by name) splits over a mesh axis."""
    parts = mesh.shape[mesh_axis]
    for name, size in sizes.items():
        fits = [n for n in range(1, parts + 1) if size % n == 0]
        require(
            size % parts == 0, f"config.mesh.{mesh_axis}", parts,
            f"must divide {name}={size}; below it, {', '.join(map(str, fits))} do",
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the mesh, the rest of each array whole."""
    return sharding(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
