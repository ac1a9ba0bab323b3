"""Naming tables: names and layouts of the arrays of released checkpoints.

A table has an `Entry` for each array of a released checkpoint. An entry permutes axes and reshapes,
which is invertible, so one table serves import and export.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common.errors import InputError, nearest

Path = tuple[str | int, ...]


class Entry(NamedTuple):
    """A released array, and its path in our parameters.

    Attributes:
      name: its released name; "" for an array of ones that is not released.
      shape: its released shape.
      path: keys of the array in our nested parameters.
      permutation: the released axes in our order; the result is reshaped to our shape.
      layer: index along our leading axis, for parameters stacked over layers; else None.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    permutation: tuple[int, ...]
    layer: int | None = None


Table = list[Entry]


def array(name: str, shape: tuple[int, ...], path: Path, layer: int | None = None) -> Table:
    """An array that is reshaped only."""
    return [Entry(name, shape, path, tuple(range(len(shape))), layer)]


def ones(shape: tuple[int, ...], path: Path) -> Table:
    """An array of ones that the release leaves out."""
    return [Entry("", shape, path, tuple(range(len(shape))))]


def linear(
    name: str, path: Path, in_features: int, out_features: int, *, bias: bool = True, layer: int | None = None
) -> Table:
    """A PyTorch Linear layer: weight [out, in] to kernel [in, out]; both may be reshaped."""
    entries = [Entry(f"{name}.weight", (out_features, in_features), (*path, "kernel"), (1, 0), layer)]
    return entries + (array(f"{name}.bias", (out_features,), (*path, "bias"), layer) if bias else [])


def conv(
    name: str, path: Path, in_channels: int, out_channels: int, size: tuple[int, ...] = (3, 3), *, bias: bool = True
) -> Table:
    """A PyTorch convolution: weight [out, in, (frames,) height, width] to kernel [(frames,) height, width, in, out]."""
    permutation = (*range(2, 2 + len(size)), 1, 0)
    weight = Entry(f"{name}.weight", (out_channels, in_channels, *size), (*path, "kernel"), permutation)
    return [weight] + (array(f"{name}.bias", (out_channels,), (*path, "bias")) if bias else [])


def norm(name: str, path: Path, dim: int, *, bias: bool = True, layer: int | None = None) -> Table:
    """A normalization: weight and bias to scale and bias."""
    entries = array(f"{name}.weight", (dim,), (*path, "scale"), layer)
    return entries + (array(f"{name}.bias", (dim,), (*path, "bias"), layer) if bias else [])


def check_shapes(table: Table, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
    """Raises InputError unless the arrays of a checkpoint are those of a table.

    Args:
      table: the expected arrays.
      shapes: shape of each array of the checkpoint, by name.
      ignored: names that the checkpoint may have and that are not used.
    """
    expected = {entry.name: entry.shape for entry in table if entry.name}
    missing = sorted(set(expected) - set(shapes))
    extra = sorted(set(shapes) - set(expected) - set(ignored))
    if missing:
        hint = nearest(missing[0], extra) if extra else ""
        raise InputError("--checkpoint", missing[0], f"{len(missing)} parameters missing, this one first{hint}")
    if extra:
        raise InputError("--checkpoint", extra[0], f"{len(extra)} parameters of unknown use, this one first")
    for name, shape in expected.items():
        if tuple(shapes[name]) != tuple(shape):
            raise InputError("--checkpoint", name, f"has shape {list(shapes[name])}, must be {list(shape)}")


def _leaf(tree: Any, path: Path) -> Any:
    """The array at `path` of nested parameters."""
    for key in path:
        tree = tree[key]
    return tree


def from_released(table: Table, arrays: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """Converts released arrays to our nested parameters.

    Args:
      table: every released array; together they fill all our parameters.
      arrays: released arrays by name; they are taken one at a time, so they may be read lazily.
      shapes: our parameters as jax.ShapeDtypeStruct, nested.

    Returns:
      Nested parameters of numpy arrays, of the shapes and types of `shapes`.

    Raises:
      InputError: an array is not of a float type.
    """
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    for entry in table:
        ours = _leaf(params, entry.path)
        target = ours if entry.layer is None else ours[entry.layer]
        released = np.asarray(arrays[entry.name] if entry.name else np.ones(entry.shape, np.float32))
        if not jnp.issubdtype(released.dtype, jnp.floating):
            raise InputError("--checkpoint", entry.name, f"must be of a float type, not {released.dtype}")
        target[...] = released.transpose(entry.permutation).reshape(target.shape)
    return params


def to_released(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Converts our nested parameters to released arrays by name; the exact inverse of `from_released`."""
    arrays, params = {}, jax.device_get(params)
    for entry in table:
        if not entry.name:
            continue
        ours = _leaf(params, entry.path)
        ours = ours if entry.layer is None else ours[entry.layer]
        permuted = ours.reshape([entry.shape[axis] for axis in entry.permutation])
        arrays[entry.name] = np.ascontiguousarray(permuted.transpose(np.argsort(entry.permutation)))
    return arrays


def unfilled(table: Table, shapes: Any) -> list[str]:
    """Our parameters that the table does not fill exactly once; [] for a complete table."""
    filled: dict[Path, int] = {}
    for entry in table:
        filled[entry.path] = filled.get(entry.path, 0) + int(np.prod(entry.shape))
    problems = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = tuple(key.key for key in path)
        if filled.pop(keys, 0) != int(np.prod(leaf.shape)):
            problems.append(".".join(map(str, keys)))
    return problems + [".".join(map(str, keys)) for keys in filled]
