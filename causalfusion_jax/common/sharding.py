"""The mesh, and the shardings of logical axes.

Parameters and activations name their dimensions by logical axes (`embed`, `heads`, `batch`, ...). RULES
maps each logical axis to mesh axes; XLA derives all other shardings.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from causalfusion_jax.common.errors import InputError, require, require_one_of

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
"""Logical axis to mesh axes; None: replicated. `sequence` is an axis of activations, `tokens` and `embed`
are axes of parameters."""

AXES = ("data", "fsdp", "tensor", "sequence")
"""Mesh axes, in the order of link speed: the fastest is last."""

PRESETS = {
    "": {},
    "dp": dict(data=-1),
    "fsdp": dict(data=1, fsdp=-1),
    "fsdp+tp": dict(data=1, fsdp=-1, tensor=2),
    "fsdp+cp": dict(data=1, fsdp=-1, sequence=2),
}
"""Meshes by name: data parallel, fully sharded, and fully sharded with tensor or context parallelism."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; -1, for at most one axis, takes the remaining devices.

    Attributes:
      preset: name of a mesh in PRESETS, which the axes below override.
      data: batch split, parameters replicated; 0: from the preset, or -1 without one.
      fsdp: batch and parameters split; 0: from the preset, or 1.
      tensor: attention heads and MLP split; likewise.
      sequence: tokens of a sequence split (context parallelism); likewise.
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
        allowed = "only one mesh axis may be -1, the devices that are left"
        require(list(self.sizes.values()).count(-1) <= 1, "data", self.sizes["data"], allowed)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, by name, in the mesh's order."""
        preset = PRESETS[self.preset]
        # data takes the remaining devices unless another axis does.
        taken = -1 in preset.values() or any(getattr(self, name) == -1 for name in AXES)
        default = {"data": 1 if taken else -1, "fsdp": 1, "tensor": 1, "sequence": 1}
        return {name: getattr(self, name) or preset.get(name, default[name]) for name in AXES}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). Raises InputError if the axes do not fit their number.

    Devices are in the order of jax, grouped by process, so that `tensor` and `sequence` axes of up to
    four are on the chips of one host. On a TPU these chips are a square, and so a ring of neighbours;
    `mesh_utils.create_device_mesh` would take a row of chips across hosts.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
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
        require(not used & set(names), "axes", axes, f"two dimensions would be split over mesh axis {', '.join(names)}")
        used |= set(names)
        spec.append(rule)
    return PartitionSpec(*spec)


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Args:
      mesh: the mesh.
      axes: a logical axis, or None, for each dimension.
      shape: shape of the array, to check that it splits evenly; None: not checked.

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
    """Constrains the sharding of an activation on the mesh that is set (`jax.set_mesh`), if any."""
    if not is_split():
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def platform() -> str:
    """Platform of the computation (`tpu`, `gpu`, `cpu`): of the mesh that is set (`jax.set_mesh`), or the default."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def is_split(mesh_axis: str | None = None) -> bool:
    """Whether the compiler splits arrays over the mesh that is set (`jax.set_mesh`), along one axis or any.

    It does not inside `jax.shard_map`, where each device has its own arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 for name, size, kind in sizes if kind != AxisType.Manual and mesh_axis in (None, name))


def check_divides(mesh: Mesh, mesh_axis: str, **sizes: int) -> None:
    """Raises InputError unless each of `sizes` (by name) splits evenly over a mesh axis."""
    parts = mesh.shape[mesh_axis]
    for name, size in sizes.items():
        fits = [n for n in range(1, parts + 1) if size % n == 0]
        allowed = f"must divide {name}={size}; below it, {', '.join(map(str, fits))} do"
        require(size % parts == 0, f"config.mesh.{mesh_axis}", parts, allowed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis, of examples, over the mesh."""
    return sharding(mesh, ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding with all of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


# --- Placement on a mesh, which may span processes --------------------------------


def place(tree, where):
    """Places arrays on a mesh, which may span processes.

    Args:
      tree: host arrays, or arrays on devices of this process, the same on every process; or
        global arrays on the devices of `where`.
      where: a sharding of all arrays, or a tree of shardings like `tree`.

    Returns:
      Global arrays. Each process copies only the parts of host arrays that its devices hold.
    """
    # An explicit transfer, as `device_put` is one.
    with jax.transfer_guard("allow"):
        if isinstance(where, Sharding):
            return jax.tree.map(lambda array: _place(array, where), tree)
        return jax.tree.map(_place, tree, where)


def _place(array, where: Sharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding.device_set == where.device_set:
        return jax.device_put(array, where)
    # `device_put` would refuse arrays of one process, and compare host arrays over the network.
    values = np.asarray(jax.device_get(array))
    return _from_host(values.shape, where, lambda index: values[index])


def _from_host(shape: tuple[int, ...], where: Sharding, part_at: Callable) -> jax.Array:
    # This transfer is intentional; jax treats it as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, where, part_at)


def rows_of_process(where: NamedSharding, num: int, process: int | None = None) -> np.ndarray:
    """The rows of a global batch that are on the devices of a process.

    Args:
      where: a sharding like that of `batch_sharding`.
      num: number of rows of the global batch.
      process: index of the process; default: this process.

    Returns:
      Indices of the rows in ascending order, int [rows]. They may not be consecutive, and several
      processes have the same rows if a mesh axis over which the batch is not split spans processes.
    """
    process = jax.process_index() if process is None else process
    mine = np.zeros(num, bool)
    for device, index in where.devices_indices_map((num,)).items():
        if device.process_index == process:
            mine[index] = True
    return np.flatnonzero(mine)


WHOLE_SLICE_ONLY = {"TPU v5 lite": 32, "TPU v5e": 32}
"""Least chips of a slice whose compiler refuses programs of a part of several devices ("limited ICI routing")."""


def own_meshes(devices, slice_devices: int | None = None) -> list[Mesh]:
    """Meshes of the devices of a host, for programs without communication: one of all, or if necessary one of each.

    Args:
      devices: devices of one host.
      slice_devices: number of devices on all hosts; default: `jax.device_count()`.
    """
    slice_devices = slice_devices or jax.device_count()
    least = WHOLE_SLICE_ONLY.get(devices[0].device_kind, math.inf)
    groups = [[device] for device in devices] if len(devices) < slice_devices >= least else [devices]
    return [make_mesh(MeshConfig(), group) for group in groups]


class OwnDevices:
    """The devices of a host, each with all parameters, which share batches of this host.

    Args:
      params: host arrays.
      devices: devices of this process.
    """

    def __init__(self, params, devices):
        self._meshes = own_meshes(devices)
        self._params = [place(params, replicated(mesh)) for mesh in self._meshes]

    @property
    def count(self) -> int:
        """Number of parts of a batch that are computed by separate programs."""
        return len(self._meshes)

    def run(self, compute: Callable, batch: np.ndarray) -> list:
        """Results of `compute(params, part)` for the parts of a batch that splits evenly over the devices.

        They are on the devices, and may still be computed; see `joined`.
        """
        parts = np.split(batch, len(self._meshes))
        return [
            compute(params, place(part, batch_sharding(mesh)))
            for params, part, mesh in zip(self._params, parts, self._meshes, strict=True)
        ]


def joined(parts: list):
    """Results of `OwnDevices.run` as host arrays of all rows."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *jax.device_get(parts))


class BatchShare:
    """The rows of global batches that this process loads.

    Args:
      mesh: mesh over which the batches are split.
      batch_size: number of rows of a global batch.

    Attributes:
      rows: indices of the rows of this process; see `rows_of_process`.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._where, self._batch_size = batch_sharding(mesh), batch_size
        self.rows = rows_of_process(self._where, batch_size)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays [batch_size, ...] from the rows of this process, [len(rows), ...]."""
        # This transfer is intentional; with several processes jax treats it as implicit.
        with jax.transfer_guard("allow"):
            return {name: self._place(values) for name, values in batch.items()}

    def _place(self, values: np.ndarray) -> jax.Array:
        def part(index):
            first, end, _ = index[0].indices(self._batch_size)
            # The rows of a device are consecutive, and all of them are among the rows of this process.
            start = int(np.searchsorted(self.rows, first))
            return values[start : start + end - first]

        return _from_host((self._batch_size, *values.shape[1:]), self._where, part)
