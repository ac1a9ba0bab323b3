"""Reads released checkpoint files without PyTorch, and without executing anything in them.

A PyTorch file has the bytes of its tensors and a pickle, a program that can call anything. Here the
pickle is read as data, by `pickles`.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors

from causalfusion_jax.common.errors import InputError, require, require_one_of
from causalfusion_jax.prepare.pickles import Global, Pickle, Script, Storage, Tensor, scalars

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_PREFIXES = ("module.", "_orig_mod.")
# Names of the types in .safetensors files.
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
# Shape and reader of each array, and metadata.
_Arrays = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
# Arrays, metadata, and the name of this set of weights in the file, or None.
_Contents = tuple[_Arrays, dict[str, Any], str | None]


class Checkpoint(Mapping[str, np.ndarray], contextlib.AbstractContextManager):
    """Named arrays of a file, each of which is read on demand; a context manager that closes the file.

    Attributes:
      shapes: shape of every array, by name.
      metadata: other plain values of the file, such as training arguments and step counts.
      weights: name of this set of weights in the file: ema, model or state_dict; None if it has no name.
    """

    def __init__(self, arrays: _Arrays, metadata: dict[str, Any], weights: str | None, resources: contextlib.ExitStack):
        prefix = ""
        while more := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in arrays)), ""):
            prefix += more
        self.shapes = {name[len(prefix) :]: shape for name, (shape, _) in arrays.items()}
        self._readers = {name[len(prefix) :]: read for name, (_, read) in arrays.items()}
        self.metadata, self.weights, self._resources = metadata, weights, resources

    def __getitem__(self, name: str) -> np.ndarray:
        read = self._readers[name]
        try:
            return read()
        except Exception as error:
            raise InputError("--checkpoint", name, f"cannot be read: {_one_line(error)}") from error

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __exit__(self, *exception: object) -> None:
        self._resources.close()


def open_checkpoint(path: str | os.PathLike, weights: str = "ema") -> Checkpoint:
    """Opens a released checkpoint: a file of torch.save (either format) or torch.jit.save, a .safetensors or a .npz.

    The format is recognised by the content.

    Args:
      path: the file.
      weights: `ema` or `model`, to choose between several sets of weights. A single set, under "model",
        "state_dict" or no name, is always taken.

    Raises:
      InputError: the file cannot be read as such a checkpoint.
    """
    require_one_of("--weights", weights, ("ema", "model"))
    path = os.fspath(path)
    require(os.path.isfile(path), "--checkpoint", path, "must be an existing file")
    with contextlib.ExitStack() as resources:
        try:
            file = resources.enter_context(open(path, "rb"))
            arrays, metadata, name = _open_by_content(path, file, weights, resources)
        except InputError:
            raise
        except Exception as error:
            # A damaged or malicious file can make the readers raise any error.
            raise InputError("--checkpoint", path, f"cannot be read as a checkpoint: {_one_line(error)}") from error
        require(bool(arrays), "--checkpoint", path, "holds no named tensors")
        return Checkpoint(arrays, metadata, name, resources.pop_all())


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all; the same content always gives the same bytes."""
    path = os.fspath(path)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # The widest types first, so that each array is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in names:
        dtype = str(arrays[name].dtype.newbyteorder("="))
        require_one_of(f"dtype of {name}", dtype, _CODES)
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": _CODES[dtype], "shape": arrays[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                little = np.asarray(arrays[name]).astype(arrays[name].dtype.newbyteorder("<"), copy=False)
                file.write(little.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _one_line(error: BaseException) -> str:
    """The message of an error, as one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open_by_content(path: str, file: BinaryIO, weights: str, resources: contextlib.ExitStack) -> _Contents:
    """Reads a file whose format is recognised by its first bytes."""
    head = file.read(9)
    require(bool(head), "--checkpoint", path, "is empty")
    if head.startswith(b"PK\x03\x04"):
        archive = resources.enter_context(zipfile.ZipFile(file))
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) == 1:
            return _open_torch_zip(file, archive, pickles[0].removesuffix("data.pkl"), weights)
        if any(name.endswith(".npy") for name in archive.namelist()):
            return _open_npz(file, archive)
        raise ValueError("a zip file with neither the data.pkl of torch.save nor .npy arrays")
    # Checked before pickles: the length of a .safetensors header may start with the byte of a pickle too.
    if head[8:] == b"{":
        handle = resources.enter_context(safetensors.safe_open(path, framework="numpy"))
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        arrays = {name: (shape, functools.partial(handle.get_tensor, name)) for name, shape in shapes.items()}
        return arrays, dict(handle.metadata() or {}), None
    if head.startswith(b"\x80"):
        return _open_torch_legacy(file, weights)
    raise ValueError(f"neither a PyTorch, a .safetensors nor a .npz file (starts with {head!r})")


def _open_npz(file: BinaryIO, archive: zipfile.ZipFile) -> _Contents:
    """Reads a .npz file; its text values are the metadata."""
    arrays, metadata = {}, {}
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    file.seek(0)
    values = np.load(file, allow_pickle=False)
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        with archive.open(info) as member:
            shape, _, dtype = versions[np.lib.format.read_magic(member)](member)
            length = member.tell() + math.prod(shape) * dtype.itemsize
        if dtype.kind not in ("biufc" if shape else "biufcU"):
            raise InputError("--checkpoint", name, f"an array of {dtype} is not allowed, only numbers and text")
        if length != info.file_size:
            raise ValueError(f"the size of {info.filename} differs from its header")
        if dtype.kind == "U":
            metadata[name] = str(values[name])
        else:
            native = dtype.newbyteorder("=")
            arrays[name] = shape, lambda name=name, native=native: values[name].astype(native, order="C", copy=False)
    return arrays, metadata, None


def _open_torch_zip(file: BinaryIO, archive: zipfile.ZipFile, folder: str, weights: str) -> _Contents:
    """Reads a file of torch.save since PyTorch 1.6."""
    end = os.fstat(file.fileno()).st_size

    def record(name: str) -> zipfile.ZipInfo:
        info = archive.getinfo(folder + name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"{name} is compressed or encrypted, which torch.save never does")
        if not 0 <= info.header_offset <= end - 30 - info.file_size:
            raise ValueError(f"{name} reaches beyond the end of the file")
        return info

    def start(name: str) -> int:
        file.seek(record(name).header_offset)
        header = file.read(30)
        if not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"{name} is damaged")
        return record(name).header_offset + 30 + sum(struct.unpack("<HH", header[26:]))

    def contents(name: str) -> bytes:
        file.seek(start(name))
        return file.read(record(name).file_size)

    def check(storage: Storage) -> None:
        length = record(f"data/{storage.key}").file_size
        if length != storage.size * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} of {storage.size} {storage.dtype} has {length} bytes")

    def read(tensor: Tensor) -> np.ndarray:
        return _read_tensor(file, start(f"data/{tensor.storage.key}"), tensor, order)

    order = contents("byteorder").decode() if f"{folder}byteorder" in archive.NameToInfo else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byteorder {order[:20]!r} is neither little nor big")
    return _choose(Pickle(check).load(io.BytesIO(contents("data.pkl"))), weights, read)


def _open_torch_legacy(file: BinaryIO, weights: str) -> _Contents:
    """Reads a file of torch.save before PyTorch 1.6: pickles, then the storages one after the other."""
    storages: dict[str, Storage] = {}

    def check(storage: Storage) -> None:
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} is declared twice, differently")

    def read(tensor: Tensor) -> np.ndarray:
        return _read_tensor(file, starts[tensor.storage.key], tensor, "little")

    file.seek(0)
    if Pickle(check).load(file) != _LEGACY_MAGIC or Pickle(check).load(file) != _LEGACY_PROTOCOL:
        raise ValueError("a pickle, but not one of torch.save")
    _, root, keys = (Pickle(check).load(file) for _ in range(3))
    starts, end = {}, file.tell()
    for key in scalars(keys):
        storage = storages[key]
        file.seek(end)
        if struct.unpack("<q", file.read(8)) != (storage.size,):
            raise ValueError(f"the size of storage {key} differs from its declaration")
        starts[key] = end + 8
        end += 8 + storage.size * storage.dtype.itemsize
    if end > os.fstat(file.fileno()).st_size or set(starts) != set(storages):
        raise ValueError("some storages are missing: the file is cut short")
    return _choose(root, weights, read)


def _read_tensor(file: BinaryIO, start: int, tensor: Tensor, order: str) -> np.ndarray:
    """The values of a tensor as a contiguous array; the bytes of its storage start at `start`."""
    dtype = tensor.storage.dtype
    # Byte order applies to words; a complex number has two words.
    word = np.dtype(f"u{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}").newbyteorder(order)
    file.seek(start + tensor.offset * dtype.itemsize)
    count = tensor.extent * dtype.itemsize // word.itemsize
    words = np.fromfile(file, word, count)
    if len(words) != count:
        raise ValueError("the file is cut short")
    words = words.astype(word.newbyteorder("="), copy=False)
    # Bytes other than 0 and 1 are not numpy booleans.
    words = words != 0 if dtype == np.bool else words
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.ndarray(tensor.shape, dtype, words, strides=strides) if count else np.empty(tensor.shape, dtype)
    return np.array(view, order="C", copy=None)


def _choose(root: Any, weights: str, read: Callable[[Tensor], np.ndarray]) -> _Contents:
    """The chosen set of weights of a PyTorch checkpoint, and its metadata."""
    if type(root) is Script:
        arrays = {name: (tensor.shape, functools.partial(read, tensor)) for name, tensor in root.tensors().items()}
        return arrays, {}, None
    if type(root) is not dict:
        raise ValueError("its pickle must hold a dict")
    sets = {name: entries for name, value in root.items() if type(name) is str and (entries := _tensors_of(value))}
    available = ", ".join(sets)[:300]
    name = None
    if weights in sets:
        name, tensors = weights, sets[weights]
    elif list(sets) in (["model"], ["state_dict"]) and weights not in root:
        ((name, tensors),) = sets.items()
    elif {"ema", "model", "state_dict"} & set(sets):
        raise InputError("--weights", weights, f"not in this checkpoint, which has {available}")
    elif sets and not _tensors_of(root):
        raise ValueError(f"tensors are under {available}, must be under ema, model, state_dict or no name")
    else:
        tensors = _tensors_of(root)
    arrays = {key: (tensor.shape, functools.partial(read, tensor)) for key, tensor in tensors.items()}
    names, budget = [key for key in root if type(key) is str and not key.startswith("opt")], iter(range(100_000))
    metadata = {key: _plain(root[key], itertools.islice(budget, 10_000)) for key in names if key not in sets}
    return arrays, {key: value for key, value in metadata.items() if value is not ...}, name


def _tensors_of(value: Any) -> dict[str, Tensor]:
    """Named tensors directly within a dict."""
    entries = value.items() if type(value) is dict else ()
    return {name: item for name, item in entries if type(name) is str and type(item) is Tensor}


def _plain(value: Any, budget: Iterator[int], depth: int = 8) -> Any:
    """A value as dicts, lists and scalars; `...` if it has other types or is too large. Dicts omit such entries."""
    # Containers may contain themselves, or the same container many times.
    if next(budget, None) is None or not depth:
        return ...
    if type(value) is Global:
        return str(value)
    if isinstance(value, dict):
        entries = ((key, _plain(item, budget, depth - 1)) for key, item in value.items() if type(key) is str)
        return {key: item for key, item in entries if item is not ...}
    if type(value) in (list, tuple, set, frozenset):
        items = [_plain(item, budget, depth - 1) for item in value]
        ordered = items if type(value) in (list, tuple) else sorted(items, key=repr)
        return ... if any(item is ... for item in items) else ordered
    simple = type(value) in (str, bool, float, type(None)) or type(value) is int and value.bit_length() < 64
    return value if simple else ...
