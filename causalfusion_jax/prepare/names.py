"""Released parameter names and layouts, as tables that work in both directions.

A table holds one `Entry` for each array of a released checkpoint. What an entry does, a
permutation of axes and a reshape, is invertible, so importing and exporting are one table.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from causalfusion_jax.common.errors import InputError, nearest

Path = tuple[str | int, ...]


class Entry(NamedTuple):
    """One released array, and where it goes.

    Attributes:
      name: its released name; "" for ones, which are not released.
      shape: its released shape.
      path: keys of our nested parameters down to the array.
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
    """An array kept as it is, but for a reshape."""
    return [Entry(name, shape, path, tuple(range(len(shape))), layer)]


def ones(shape: tuple[int, ...], path: Path) -> Table:
    """An array that the release does without, as it would be all ones."""
    return [Entry("", shape, path, tuple(range(len(shape))))]


def linear(
    name: str, path: Path, in_features: int, out_features: int, *, bias: bool = True, layer: int | None = None
) -> Table:
    """PyTorch's Linear: weight [out, in] to kernel [in, out]; both may be reshaped."""
    entries = [Entry(f"{name}.weight", (out_features, in_features), (*path, "kernel"), (1, 0), layer)]
    return entries + (array(f"{name}.bias", (out_features,), (*path, "bias"), layer) if bias else [])


def conv(
    name: str, path: Path, in_channels: int, out_channels: int, size: tuple[int, ...] = (3, 3), *, bias: bool = True
) -> Table:
    """PyTorch's convolutions: weight [out, in, (frames,) height, width] to kernel [(frames,) ..., in, out]."""
    permutation = (*range(2, 2 + len(size)), 1, 0)
    weight = Entry(f"{name}.weight", (out_channels, in_channels, *size), (*path, "kernel"), permutation)
    return [weight] + (array(f"{name}.bias", (out_channels,), (*path, "bias")) if bias else [])


def norm(name: str, path: Path, dim: int, *, bias: bool = True, layer: int | None = None) -> Table:
    """A normalization's weight and bias to scale and bias."""
    entries = array(f"{name}.weight", (dim,), (*path, "scale"), layer)
    return entries + (array(f"{name}.bias", (dim,), (*path, "bias"), layer) if bias else [])


def check_shapes(table: Table, found: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
    """Raises InputError unless `found` (name to shape) is what the table expects.

    Args:
      table: what should be there.
      found: names and shapes of a checkpoint.
      ignored: names that may be there and are not used.
    """
    expected = {entry.name: entry.shape for entry in table if entry.name}
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected) - set(ignored))
    if missing:
        hint = nearest(missing[0], extra) if extra else ""
        raise InputError("--checkpoint", missing[0], f"{len(missing)} parameters missing, this one first{hint}")
    if extra:
        raise InputError("--checkpoint", extra[0], f"{len(extra)} parameters of unknown use, this one first")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise InputError("--checkpoint", name, f"has shape {list(found[name])}, must be {list(shape)}")


def _leaf(tree: Any, path: Path) -> Any:
    """The array at `path` of nested parameters."""
    for key in path:
        tree = tree[key]
    return tree


def from_released(table: Table, arrays: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """Released arrays as our nested parameters.

    Args:
      table: every released array, which together fill every one of ours.
      arrays: released arrays by name; taken one at a time, so they may be read lazily.
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
    """Our nested parameters as released arrays, by name; exact inverse of `from_released`."""
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
