"""Files as torch.save writes them, written without PyTorch."""

import argparse
import collections
import io
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


class Global:
    """A name that the pickle refers to, whether it exists here or not."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *args):
        raise AssertionError("only ever pickled")


class Parameter:
    """An array to be written as a torch.nn.Parameter."""

    def __init__(self, array: np.ndarray):
        self.array = array


class Storage:
    """The memory that one or more arrays are views on."""

    def __init__(self, key: str, memory: np.ndarray):
        self.key, self.memory = key, memory


class Reduced:
    """A value that the pickle has a function make."""

    def __init__(self, function: Global, arguments: tuple):
        self.function, self.arguments = function, arguments


class Script:
    """An object of a TorchScript file: its class and attributes."""

    def __init__(self, name: str, attributes: dict[str, Any]):
        self.name, self.attributes = name, attributes


class Pickler(pickle._Pickler):
    """Pickles arrays as PyTorch pickles tensors: views on storages, which are kept aside."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file, legacy: bool = False, protocol: int = 2):
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, {}

    def save_named(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch[Global] = save_named

    def save_script(self, obj: Script) -> None:
        self.save(Global(*f"__torch__.{obj.name}".rsplit(".", 1)))
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.save(obj.attributes)
        self.write(pickle.BUILD)

    dispatch[Script] = save_script

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            kind = Global("torch", STORAGES[obj.memory.dtype.name])
            identity = ("storage", kind, obj.key, "cpu", obj.memory.size)
            return identity + ((None,) if self.legacy else ())
        return None

    def reducer_override(self, obj: Any) -> Any:
        hooks = collections.OrderedDict()
        if isinstance(obj, Reduced):
            return obj.function, obj.arguments
        if isinstance(obj, Parameter):
            return Global("torch._utils", "_rebuild_parameter"), (obj.array, True, hooks)
        if isinstance(obj, np.ndarray):
            array, root = with_root(obj)
            storage = self.storages.setdefault(id(root), Storage(str(len(self.storages)), root))
            start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
            strides = tuple(stride // array.itemsize for stride in array.strides)
            view = storage, start // array.itemsize, array.shape, strides, False, hooks
            return Global("torch._utils", "_rebuild_tensor_v2"), view
        return NotImplemented


def with_root(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An array and the contiguous one it is a view on; a copy where that cannot be."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    native = array.dtype == array.dtype.newbyteorder("=")
    if not native or root.dtype != array.dtype or not root.flags.c_contiguous or min(array.strides, default=0) < 0:
        return (copy := array.astype(array.dtype.newbyteorder("="), order="C")), copy
    return array, root


def raw(memory: np.ndarray, byteorder: str = "little") -> bytes:
    """An array's bytes in the given order."""
    words = memory.view(f"u{memory.itemsize // (2 if memory.dtype.kind == 'c' else 1)}") if memory.size else memory
    return words.astype(words.dtype.newbyteorder(byteorder)).tobytes() if memory.size else b""


def zip_file(path, records: dict[str, bytes], folder: str = "archive", **options) -> None:
    """A zip file of uncompressed records."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), data, options.get("compression"))


def save(
    path, obj: Any, *, legacy: bool = False, folder: str = "archive", byteorder: str = "little", protocol: int = 2
) -> None:
    """What torch.save(obj, path) writes, arrays standing for tensors.

    Args:
      path: the file.
      obj: nested dicts, lists, argparse.Namespace, numbers, strings; arrays and Parameters among them. Arrays that
        are views on one array share its storage.
      legacy: the format before PyTorch 1.6 instead of the zip file.
      folder: name of the folder within the zip file.
      byteorder: "little" or "big", of the zip file's numbers.
      protocol: of the pickle.
    """
    buffer = io.BytesIO()
    pickler = Pickler(buffer, legacy, protocol)
    pickler.dump(obj)
    storages = list(pickler.storages.values())
    if legacy:
        with open(path, "wb") as file:
            sizes = dict(short=2, int=4, long=4)
            system = dict(protocol_version=1001, little_endian=True, type_sizes=sizes)
            for value in (0x1950A86A20F9469CFC6C, 1001, system):
                pickle.dump(value, file, protocol)
            file.write(buffer.getvalue())
            pickle.dump([storage.key for storage in storages], file, protocol)
            for storage in storages:
                file.write(struct.pack("<q", storage.memory.size) + raw(storage.memory))
        return
    records = {"data.pkl": buffer.getvalue(), "byteorder": byteorder.encode()}
    records |= {f"data/{storage.key}": raw(storage.memory, byteorder) for storage in storages}
    zip_file(path, records | {"version": b"3\n"}, folder)


def save_script(path, weights: dict[str, np.ndarray]) -> None:
    """What torch.jit.save writes of a scripted module with these parameters: its objects, and code beside them."""
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array

    def scripted(attributes: dict[str, Any], name: str) -> Script:
        own = {key: scripted(value, key) if isinstance(value, dict) else value for key, value in attributes.items()}
        sizes = Reduced(Global("torch.jit._pickle", "build_intlist"), ([1, 2],))
        return Script(f"src.model.{name}", {"training": False, "_is_full_backward_hook": None, "sizes": sizes} | own)

    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(scripted(tree, "Net"))
    records = {"data.pkl": buffer.getvalue(), "code/__torch__/src/model.py": b"class Net(Module): ...\n"}
    records |= {f"data/{storage.key}": raw(storage.memory) for storage in pickler.storages.values()}
    zip_file(path, records | {"constants.pkl": b"\x80\x02).", "version": b"3\n"}, "i3d_torchscript")


def released(model: dict, ema: dict | None = None, args: dict | None = None) -> dict:
    """The layout of a released training checkpoint, with an optimizer's state that readers must skip."""
    moments = {0: {"step": 3.0, "exp_avg": np.ones((2, 3), np.float32)}}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]
    checkpoint = {"model": model, "opt": {"state": moments, "param_groups": groups}, "step": 3}
    return checkpoint | ({"ema": ema} if ema else {}) | ({"args": argparse.Namespace(**args)} if args else {})
