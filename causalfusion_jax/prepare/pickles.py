"""Reads the pickles of PyTorch files as data.

The interpreter here supports only the instructions and names that state dicts need, builds plain values
from them, and rejects all others. It never imports or calls anything by a name from the file.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from causalfusion_jax.common.errors import require

_STORAGES = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool,
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}
# Every name that a pickle may contain.
_NAMES = {
    *_STORAGES,
    *(f"torch.{dtype}" for dtype in _STORAGES.values()),
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "builtins.dict",
    "builtins.set",
    "builtins.frozenset",
    "argparse.Namespace",
    *(_LISTS := {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}),
    "torch.jit._pickle.restore_type_tag",
}
# Classes of a TorchScript file, whose code is outside the pickle and is not read.
_SCRIPTED = "__torch__."
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
}
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
# Number of values that an instruction takes from the stack; None: all since the last mark.
_TAKES = {
    "TUPLE": None,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "APPENDS": None,
    "SETITEM": 2,
    "SETITEMS": None,
    "ADDITEMS": None,
    "STACK_GLOBAL": 2,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BUILD": 1,
    "BINPERSID": 1,
}
_SCALARS = (str, int, float, bool, bytes, type(None))
# Limits of tensors that repeat their storage (`expand`).
_MAX_EXPANDED, _MAX_DIMS = 2**24, 64


class Global(str):
    """A name in a pickle, which is never looked up."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """`size` consecutive items in the file."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides are in items."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Items of the storage from the view's first to its last."""
        return (
            1 + sum((dim - 1) * stride for dim, stride in zip(self.shape, self.strides, strict=True))
            if all(self.shape)
            else 0
        )


class _Namespace(dict):
    """Substitute for an argparse.Namespace."""


class Script(dict):
    """Substitute for an object of a TorchScript file: its attributes by name."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the tree of objects, named as in a state dict. Raises ValueError if it is not a tree."""
        tensors, stack, budget = {}, [("", self, 0)], 100_000
        while stack:
            prefix, script, depth = stack.pop()
            budget -= 1
            # Objects may contain themselves, or the same object many times.
            if depth > 64 or len(prefix) > 1000 or budget < 0:
                raise ValueError("its objects are nested too deeply")
            tensors |= {prefix + name: value for name, value in script.items() if type(value) is Tensor}
            inner = [(f"{prefix}{name}.", value, depth + 1) for name, value in script.items() if type(value) is Script]
            stack += reversed(inner)
        return tensors


class Pickle:
    """Interprets a pickle as data. `check` is called with every storage that it names, and may raise an error."""

    def __init__(self, check: Callable[[Storage], None]):
        self.check, self.stack, self.marks, self.memo = check, [], [], {}

    def load(self, file: BinaryIO) -> Any:
        """Reads the pickle at the position of the file; returns its value."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("a pickle without an end")

    def _step(self, instruction: str, argument: Any) -> None:
        """Executes one instruction."""
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
                dict.update(stack[-1], zip(scalars(taken[::2]), taken[1::2], strict=True))
            case "ADDITEMS":
                set.update(stack[-1], scalars(taken))
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
        """Removes the topmost `count` values from the stack, or all since the last mark, and returns them."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack):
            raise ValueError("its pickle is damaged")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _set_state(self, state: Any) -> None:
        """Fills a namespace or scripted object. The attributes of an OrderedDict itself are ignored."""
        if type(state) is not dict or type(self.stack[-1]) not in (dict, _Namespace, Script):
            raise ValueError("its pickle sets the state of something other than a dict or namespace")
        if type(self.stack[-1]) in (_Namespace, Script):
            # Moved, not copied, so that a short pickle cannot fill the memory.
            self.stack[-1].update(state)
            state.clear()

    def _storage(self, identity: Any) -> Storage:
        """The storage that a persistent id names."""
        match identity:
            case "storage", Global() as kind, str() as key, _, int() as size, *view:
                if kind in _STORAGES and size >= 0 and view in ([], [None]):
                    storage = Storage(_STORAGES[kind], key, size)
                    self.check(storage)
                    return storage
        raise ValueError("its pickle names a storage of unknown kind")


def _global(module: Any, name: Any) -> Global:
    """The substitute for `module.name`. Raises InputError unless it is one of the allowed names."""
    full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1) if type(module) is type(name) is str else "?"
    allowed = full in _NAMES or full.startswith(_SCRIPTED)
    require(allowed, "--checkpoint", full[:100], "not allowed in a checkpoint; nothing was executed")
    return Global(full)


def _build(function: Any, arguments: Any) -> Any:
    """The substitute for the result of an allowed function."""
    match type(function) is Global and type(arguments) is tuple and function, arguments:
        case "torch._utils._rebuild_tensor_v2", (Storage(), int(), tuple(), tuple(), _, _, *flags):
            return _tensor(*arguments[:4], flags)
        case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
            return tensor
        case "torch.Size", (tuple() as shape,):
            return shape
        case (("collections.OrderedDict" | "builtins.dict"), ()):
            return {}
        case "argparse.Namespace", ():
            return _Namespace()
        case Global() as name, () if name.startswith(_SCRIPTED):
            return Script()
        case Global() as name, (list() as items,) if name in _LISTS:
            return items
        case "torch.jit._pickle.restore_type_tag", (value, str()):
            return value
        case (("builtins.set" | "builtins.frozenset"), (list() as items,)):
            moved = set(scalars(items))
            items.clear()
            return moved
    raise ValueError("its pickle calls something with arguments that torch.save never gives it")


def scalars(items: list[Any]) -> list[Any]:
    """Returns `items`, to be hashed. Raises ValueError unless all are scalars: nested ones could overflow the stack."""
    if any(type(item) not in _SCALARS for item in items):
        raise ValueError("its pickle has a dict key or set item that is not a string or number")
    return items


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, flags: list) -> Tensor:
    """A view of a storage. Raises ValueError unless it is within the storage."""
    numbers = (offset, *shape, *strides)
    if not len(shape) == len(strides) <= _MAX_DIMS or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor's shape and strides must be of one length, and whole numbers that are not negative")
    if any(flags):
        raise ValueError("a tensor that is conjugated or negated only on reading is not supported")
    tensor = Tensor(storage, offset, shape, strides)
    if offset + tensor.extent > storage.size or math.prod(shape) > max(storage.size, _MAX_EXPANDED):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset} reaches beyond its storage")
    return tensor
