"""Arrays in .npz files, read and written a few rows at a time.

`numpy.load` and `numpy.savez` hold whole arrays in memory, too much for 50,000 images.
"""

import contextlib
import pathlib
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, require

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class NpzReader:
    """An .npz file whose arrays are read on demand.

    Args:
      field: the option that names it, for errors.
      path: the file.

    Raises:
      InputError: the file does not exist, or is not an .npz file.
    """

    def __init__(self, field: str, path: pathlib.Path):
        require(path.is_file(), field, str(path), "no such file")
        self.field, self.path = field, path
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        except _BROKEN as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(self.field, str(self.path), f"not a readable .npz file ({type(error).__name__})")

    @contextlib.contextmanager
    def _open(self, name: str):
        """The file of an array, positioned at its first value, with shape and type of the array."""
        allowed = f"not an .npz with {name}; it has {', '.join(self.names) or 'nothing'}"
        require(name in self.names, self.field, str(self.path), allowed)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                    version, np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read_header(file)
                if fortran_order and len(shape) > 1 or dtype.hasobject or not shape:
                    raise ValueError("an array that cannot be read by rows")
                yield file, shape, dtype
        except _BROKEN as error:
            if isinstance(error, InputError):
                raise
            raise self._unreadable(error) from None

    def shape(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array. Raises InputError if there is no array of this name."""
        with self._open(name) as (_, shape, dtype):
            return shape, dtype

    def batches(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array in parts of `size` rows, the last one shorter."""
        with self._open(name) as (file, shape, dtype):
            row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            for start in range(0, shape[0], size):
                rows = min(size, shape[0] - start)
                content = file.read(rows * row)
                if len(content) != rows * row:
                    raise EOFError
                yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])

    def array(self, name: str) -> np.ndarray:
        """A whole array."""
        shape, dtype = self.shape(name)
        return next(self.batches(name, max(shape[0], 1)), np.zeros(shape, dtype))


class NpzWriter:
    """Writes an .npz file, byte for byte what `numpy.savez` writes.

    A context manager; the file appears at `path` when it is complete.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._open = path, contextlib.ExitStack()

    def __enter__(self) -> "NpzWriter":
        part = self._open.enter_context(files.replacing(self._path))
        self._archive = self._open.enter_context(zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True))
        return self

    def __exit__(self, *raised) -> None:
        self._open.__exit__(*raised)

    @contextlib.contextmanager
    def rows(self, name: str, shape: tuple[int, ...], dtype):
        """A function that writes rows of an array, any number at a time. Raises ValueError unless all are written."""
        dtype, written = np.dtype(dtype), 0
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(file, header)

            def write(part: np.ndarray) -> None:
                nonlocal written
                if part.dtype != dtype or part.shape[1:] != tuple(shape[1:]):
                    raise ValueError(f"{part.dtype} {part.shape} does not fit {dtype} {tuple(shape)}")
                file.write(np.ascontiguousarray(part).tobytes())
                written += len(part)

            yield write
        if written != shape[0]:
            raise ValueError(f"{written} rows of {name} instead of {shape[0]}")

    def array(self, name: str, array: np.ndarray) -> None:
        """A whole array."""
        with self.rows(name, array.shape, array.dtype) as write:
            write(array)
