"""Released checkpoints, read without PyTorch and without executing anything they hold.

A PyTorch file is a pickle, a program that may call anything, beside the bytes of its tensors. Here the pickle is read
as data: an interpreter of our own knows the instructions and the few names that state dicts need, builds plain values
from them and refuses all others. It imports nothing and calls nothing by a name that the file gives.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from causalfusion_jax.errors import InputError, require, require_one_of

_STORAGES = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool,
        "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
    }.items()
}
# Every name that a pickle may hold.
_NAMES = {
    *_STORAGES, *(f"torch.{dtype}" for dtype in _STORAGES.values()), "torch.Size", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter", "collections.OrderedDict", "builtins.dict", "builtins.set",
    "builtins.frozenset", "argparse.Namespace",
}
_LITERALS = set(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}
# How many values an instruction takes off the stack; None: all since the last mark.
_TAKES = {
    "TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None,
    "ADDITEMS": None, "STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1,
}
_SCALARS = (str, int, float, bool, bytes, type(None))
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# A tensor may repeat its storage (`expand`), but not without end.
_MAX_EXPANDED, _MAX_DIMS = 2**24, 64
_PREFIXES = ("module.", "_orig_mod.")
# What .safetensors calls the types.
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}
# Shape and reader of each array, and metadata.
_Arrays = dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]
_Contents = tuple[_Arrays, dict[str, Any]]


class Checkpoint(Mapping[str, np.ndarray], contextlib.AbstractContextManager):
    """Named arrays of a file, each one read when it is asked for; as a context manager, closes the file.

    Attributes:
      shapes: shape of every array, by name.
      metadata: plain values found beside the arrays: training arguments, step counts and the like.
    """

    def __init__(self, arrays: _Arrays, metadata: dict[str, Any], resources: contextlib.ExitStack):
        prefix = ""
        while more := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in arrays)), ""):
            prefix += more
        self.shapes = {name[len(prefix):]: shape for name, (shape, _) in arrays.items()}
        self._readers = {name[len(prefix):]: read for name, (_, read) in arrays.items()}
        self.metadata, self._resources = metadata, resources

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
    """Opens a released checkpoint: a file of torch.save, of either format, a .safetensors or a .npz file.

    The format is told by content. Where the file holds several sets of weights, `weights` ("ema" or "model") chooses;
    where it holds one, under "model", "state_dict" or no name, that one is taken. Anything wrong is an InputError.
    """
    require_one_of("--weights", weights, ("ema", "model"))
    path = os.fspath(path)
    require(os.path.isfile(path), "--checkpoint", path, "must be an existing file")
    with contextlib.ExitStack() as resources:
        try:
            file = resources.enter_context(open(path, "rb"))
            arrays, metadata = _open_by_content(path, file, weights, resources)
        except InputError:
            raise
        except Exception as error:
            # A damaged or hostile file may make any reader underneath raise anything.
            raise InputError("--checkpoint", path, f"cannot be read as a checkpoint: {_one_line(error)}") from error
        require(bool(arrays), "--checkpoint", path, "holds no named tensors")
        return Checkpoint(arrays, metadata, resources.pop_all())


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all; the same contents always give the same bytes."""
    path = os.fspath(path)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # Widest types first, so that each array is aligned to its items.
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
    """What an error says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open_by_content(path: str, file: BinaryIO, weights: str, resources: contextlib.ExitStack) -> _Contents:
    """Arrays and metadata of a file whose format its first bytes tell."""
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
    if head.startswith(b"\x80"):
        return _open_torch_legacy(file, weights)
    if head[8:] == b"{":
        handle = resources.enter_context(safetensors.safe_open(path, framework="numpy"))
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
        arrays = {name: (shape, functools.partial(handle.get_tensor, name)) for name, shape in shapes.items()}
        return arrays, dict(handle.metadata() or {})
    raise ValueError(f"neither a PyTorch, a .safetensors nor a .npz file (starts with {head!r})")


def _open_npz(file: BinaryIO, archive: zipfile.ZipFile) -> _Contents:
    """Arrays and metadata (its text values) of a .npz file."""
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
            raise ValueError(f"{info.filename} has not the size that its header tells")
        if dtype.kind == "U":
            metadata[name] = str(values[name])
        else:
            native = dtype.newbyteorder("=")
            arrays[name] = shape, lambda name=name, native=native: values[name].astype(native, order="C", copy=False)
    return arrays, metadata


def _open_torch_zip(file: BinaryIO, archive: zipfile.ZipFile, folder: str, weights: str) -> _Contents:
    """Arrays and metadata of a file of torch.save, as it has been since PyTorch 1.6."""
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

    def check(storage: "_Storage") -> None:
        length = record(f"data/{storage.key}").file_size
        if length != storage.size * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} of {storage.size} {storage.dtype} has {length} bytes")

    def read(tensor: "_Tensor") -> np.ndarray:
        return _read_tensor(file, start(f"data/{tensor.storage.key}"), tensor, order)

    order = contents("byteorder").decode() if f"{folder}byteorder" in archive.NameToInfo else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byteorder {order[:20]!r} is neither little nor big")
    return _choose(_Pickle(check).load(io.BytesIO(contents("data.pkl"))), weights, read)


def _open_torch_legacy(file: BinaryIO, weights: str) -> _Contents:
    """Arrays and metadata of a file of torch.save before PyTorch 1.6: pickles, then the storages one by one."""
    storages: dict[str, _Storage] = {}

    def check(storage: "_Storage") -> None:
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key} is declared twice, differently")

    def read(tensor: "_Tensor") -> np.ndarray:
        return _read_tensor(file, starts[tensor.storage.key], tensor, "little")

    file.seek(0)
    if _Pickle(check).load(file) != _LEGACY_MAGIC or _Pickle(check).load(file) != _LEGACY_PROTOCOL:
        raise ValueError("a pickle, but not one of torch.save")
    _, root, keys = (_Pickle(check).load(file) for _ in range(3))
    starts, end = {}, file.tell()
    for key in _scalars(keys):
        storage = storages[key]
        file.seek(end)
        if struct.unpack("<q", file.read(8)) != (storage.size,):
            raise ValueError(f"storage {key} has not the declared size")
        starts[key] = end + 8
        end += 8 + storage.size * storage.dtype.itemsize
    if end > os.fstat(file.fileno()).st_size or set(starts) != set(storages):
        raise ValueError("some storages are missing: the file is cut short")
    return _choose(root, weights, read)


class _Global(str):
    """A name in a pickle; nothing is looked up behind it."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of `size` items in the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A view on a storage; offset and strides count items."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Items of the storage from the view's first to its last."""
        return 1 + sum((dim - 1) * stride for dim, stride in zip(self.shape, self.strides)) if all(self.shape) else 0


class _Namespace(dict):
    """What stands in for an argparse.Namespace."""


def _read_tensor(file: BinaryIO, start: int, tensor: _Tensor, order: str) -> np.ndarray:
    """A tensor's values, of a storage whose bytes start at `start`, as a contiguous array."""
    dtype = tensor.storage.dtype
    # Byte order is a matter of words; a complex number is two of them.
    word = np.dtype(f"u{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}").newbyteorder(order)
    file.seek(start + tensor.offset * dtype.itemsize)
    count = tensor.extent * dtype.itemsize // word.itemsize
    words = np.fromfile(file, word, count)
    if len(words) != count:
        raise ValueError("the file is cut short")
    words = words.astype(word.newbyteorder("="), copy=False)
    # Bytes other than 0 and 1 are no numpy booleans.
    words = words != 0 if dtype == np.bool else words
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.ndarray(tensor.shape, dtype, words, strides=strides) if count else np.empty(tensor.shape, dtype)
    return np.array(view, order="C", copy=None)


def _choose(root: Any, weights: str, read: Callable[[_Tensor], np.ndarray]) -> _Contents:
    """The chosen arrays of a PyTorch checkpoint and its metadata."""
    if type(root) is not dict:
        raise ValueError("its pickle must hold a dict")
    sets = {name: tensors for name, value in root.items() if type(name) is str and (tensors := _tensors_of(value))}
    found = ", ".join(sets)[:300]
    if weights in sets:
        chosen = sets[weights]
    elif list(sets) in (["model"], ["state_dict"]) and weights not in root:
        (chosen,) = sets.values()
    elif {"ema", "model", "state_dict"} & set(sets):
        raise InputError("--weights", weights, f"not in this checkpoint, which holds {found}")
    elif sets and not _tensors_of(root):
        raise ValueError(f"tensors are under {found}, must be under ema, model, state_dict or no name")
    else:
        chosen = _tensors_of(root)
    arrays = {name: (tensor.shape, functools.partial(read, tensor)) for name, tensor in chosen.items()}
    names, budget = [key for key in root if type(key) is str and not key.startswith("opt")], iter(range(100_000))
    metadata = {name: _plain(root[name], itertools.islice(budget, 10_000)) for name in names if name not in sets}
    return arrays, {name: value for name, value in metadata.items() if value is not ...}


def _tensors_of(value: Any) -> dict[str, _Tensor]:
    """Named tensors directly within a dict."""
    entries = value.items() if type(value) is dict else ()
    return {name: item for name, item in entries if type(name) is str and type(item) is _Tensor}


def _plain(value: Any, budget: Iterator[int], depth: int = 8) -> Any:
    """A value as dicts, lists and scalars, or `...` if it is more than that; a dict leaves out such entries."""
    # Containers may hold themselves, or one another many times over.
    if next(budget, None) is None or not depth:
        return ...
    if type(value) is _Global:
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


class _Pickle:
    """Interprets a pickle as data; `check` judges every storage that it names."""

    def __init__(self, check: Callable[[_Storage], None]):
        self.check, self.stack, self.marks, self.memo = check, [], [], {}

    def load(self, file: BinaryIO) -> Any:
        """The value of the pickle that starts here; leaves the file right behind it."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)

    def _step(self, instruction: str, argument: Any) -> None:
        """Carries out one instruction."""
        stack = self.stack
        taken = self._take(_TAKES[instruction]) if instruction in _TAKES else []
        match instruction:
            case _ if instruction in _LITERALS:
                stack.append(argument)
            case _ if instruction in _CONSTANTS:
                stack.append(_CONSTANTS[instruction]())
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "APPEND" | "APPENDS":
                list.extend(stack[-1], taken)
            case "SETITEM" | "SETITEMS":
                dict.update(stack[-1], zip(_scalars(taken[::2]), taken[1::2], strict=True))
            case "ADDITEMS":
                set.update(stack[-1], _scalars(taken))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL" | "INST":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(*taken))
            case "REDUCE" | "NEWOBJ":
                stack.append(_build(*taken))
            case "BUILD":
                self._set_state(*taken)
            case "BINPERSID":
                stack.append(self._storage(*taken))
            case "PROTO" | "FRAME":
                pass
            case _:
                raise ValueError(f"pickle instruction {instruction} is not one that torch.save writes")

    def _take(self, count: int | None) -> list[Any]:
        """Takes the topmost `count` values off the stack; None: all since the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            raise ValueError("its pickle is damaged")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _set_state(self, state: Any) -> None:
        """Fills a namespace. An OrderedDict's own attributes are left out."""
        if type(state) is not dict or type(self.stack[-1]) not in (dict, _Namespace):
            raise ValueError("its pickle sets the state of something other than a dict or namespace")
        if type(self.stack[-1]) is _Namespace:
            # Moved, not copied: otherwise a short pickle could fill the memory.
            self.stack[-1].update(state)
            state.clear()

    def _storage(self, identity: Any) -> _Storage:
        """The storage that a persistent id names."""
        match identity:
            case "storage", _Global() as kind, str() as key, _, int() as size, *view:
                if kind in _STORAGES and size >= 0 and view in ([], [None]):
                    storage = _Storage(_STORAGES[kind], key, size)
                    self.check(storage)
                    return storage
        raise ValueError("its pickle names a storage of unknown kind")


def _global(module: Any, name: Any) -> _Global:
    """The stand-in for `module.name`; an InputError unless it is one of the few allowed."""
    full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1) if type(module) is type(name) is str else "?"
    require(full in _NAMES, "--checkpoint", full[:100], "not allowed in a checkpoint; nothing was executed")
    return _Global(full)


def _build(function: Any, arguments: Any) -> Any:
    """What stands in for the result of an allowed function."""
    match type(function) is _Global and type(arguments) is tuple and function, arguments:
        case "torch._utils._rebuild_tensor_v2", (_Storage(), int(), tuple(), tuple(), _, _, *flags):
            return _tensor(*arguments[:4], flags)
        case "torch._utils._rebuild_parameter", (_Tensor() as tensor, _, _):
            return tensor
        case "torch.Size", (tuple() as shape,):
            return shape
        case ("collections.OrderedDict" | "builtins.dict"), ():
            return {}
        case "argparse.Namespace", ():
            return _Namespace()
        case ("builtins.set" | "builtins.frozenset"), (list() as items,):
            moved = set(_scalars(items))
            items.clear()
            return moved
    raise ValueError("its pickle calls something with arguments that torch.save never gives it")


def _scalars(items: list[Any]) -> list[Any]:
    """`items` to be hashed, which must be scalars: anything nested might exhaust the machine's stack."""
    if any(type(item) not in _SCALARS for item in items):
        raise ValueError("its pickle has a dict key or set item that is not a string or number")
    return items


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, flags: list) -> _Tensor:
    """A view, once it is known to lie within its storage."""
    numbers = (offset, *shape, *strides)
    if not len(shape) == len(strides) <= _MAX_DIMS or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor's shape and strides must be of one length, and whole numbers that are not negative")
    if any(flags):
        raise ValueError("a tensor that is conjugated or negated only on reading is not supported")
    tensor = _Tensor(storage, offset, shape, strides)
    if offset + tensor.extent > storage.size or math.prod(shape) > max(storage.size, _MAX_EXPANDED):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches beyond its storage")
    return tensor
