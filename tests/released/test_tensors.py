"""Released checkpoints are read whole and right, and hostile or broken ones refused."""

import argparse
import collections
import functools
import hashlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_format
from torch_format import Global, Parameter, Pickler, Storage

from causalfusion_jax.errors import InputError
from causalfusion_jax.released.tensors import open_checkpoint, sha256, write_safetensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {"a.weight": rng.standard_normal((4, 3)).astype(np.float32), "a.bias": np.arange(4.0, dtype=np.float32)}


def check_equal(checkpoint, expected):
    assert checkpoint.shapes == {name: array.shape for name, array in expected.items()}
    assert list(checkpoint) == list(expected) and len(checkpoint) == len(expected)
    for name, array in expected.items():
        found = checkpoint[name]
        assert found.dtype == array.dtype and found.flags.c_contiguous and found.flags.writeable
        np.testing.assert_array_equal(found, array)


def error_of(path, weights="ema"):
    with pytest.raises(InputError) as caught:
        with open_checkpoint(path, weights) as checkpoint:
            dict(checkpoint)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return caught.value


def every_dtype():
    numbers = np.array([[0, 1, 2], [3, 100, 127]])
    arrays = {name: numbers.astype(BFLOAT16 if name == "bfloat16" else name) for name in torch_format.STORAGES}
    arrays["complex64"] = arrays["complex64"] * np.complex64(1 + 2j)
    return arrays | {"scalar": np.array(1.5, np.float32), "empty": np.empty((0, 3), np.float32)}


@BOTH
def test_every_dtype(tmp_path, legacy):
    torch_format.save(tmp_path / "c.pt", every_dtype(), legacy=legacy)
    with open_checkpoint(tmp_path / "c.pt") as checkpoint:
        check_equal(checkpoint, every_dtype())


def test_big_endian(tmp_path):
    torch_format.save(tmp_path / "c.pt", every_dtype(), byteorder="big")
    check_equal(open_checkpoint(tmp_path / "c.pt"), every_dtype())
    torch_format.save(tmp_path / "c.pt", every_dtype(), byteorder="little", folder="any name.v2")
    check_equal(open_checkpoint(tmp_path / "c.pt"), every_dtype())


@BOTH
def test_views_and_shared_storage(tmp_path, legacy):
    memory = np.arange(60, dtype=np.float32)
    grid = memory.reshape(5, 12)
    arrays = {
        "all": memory, "transposed": grid.T, "columns": grid[1:4, 2:9:3], "one": grid[2, 3:4].reshape(()),
        "last": memory[59:], "none": memory[60:], "repeated": np.broadcast_to(memory[7:8], (3, 4)),
    }
    torch_format.save(tmp_path / "c.pt", arrays, legacy=legacy)
    check_equal(open_checkpoint(tmp_path / "c.pt"), arrays)
    assert os.path.getsize(tmp_path / "c.pt") < 3000


@BOTH
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_released_layout(tmp_path, legacy, protocol):
    path = tmp_path / "c.pt"
    args = dict(model="ACDiT-XL", lr=1e-4, sizes=[1, 2], nested={"a": (1, None)}, flags={"b"})
    args["dtype"] = Global("torch", "float16")
    model = collections.OrderedDict(state(1))
    model._metadata = collections.OrderedDict({"": {"version": 1}})
    wrapped = {name: Parameter(array) for name, array in state(2).items()}
    torch_format.save(path, torch_format.released(model, wrapped, args), legacy=legacy, protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        check_equal(checkpoint, state(2))
        plain = dict(
            model="ACDiT-XL", lr=1e-4, sizes=[1, 2], nested={"a": [1, None]}, flags=["b"], dtype="torch.float16"
        )
        assert checkpoint.metadata == {"step": 3, "args": plain}
        assert type(checkpoint.metadata["args"]) is dict
    with open_checkpoint(path, "model") as checkpoint:
        check_equal(checkpoint, state(1))


def test_one_set_of_weights_is_taken_for_either(tmp_path):
    path = tmp_path / "c.pt"
    for content in (state(), {"model": state(), "opt": {}}, {"state_dict": state(), "epoch": 4}):
        torch_format.save(path, content)
        for weights in ("ema", "model"):
            check_equal(open_checkpoint(path, weights), state())


@pytest.mark.parametrize(
    "content, weights, named",
    [
        ({"ema": state()}, "model", "ema"),
        ({"model": state(), "model_ema": state()}, "ema", "model, model_ema"),
        ({"model": state(), "ema": None}, "ema", "holds model"),
        ({"state_dict": state(), "ema": state()}, "model", "state_dict, ema"),
    ],
)
def test_weights_that_are_not_there(tmp_path, content, weights, named):
    torch_format.save(tmp_path / "c.pt", content)
    error = error_of(tmp_path / "c.pt", weights)
    assert error.field == "--weights" and error.value == weights and named in str(error)


def test_unknown_weights(tmp_path):
    assert error_of(tmp_path / "c.pt", "emma").field == "--weights"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    wrapped = {prefix + name: array for name, array in state().items()}
    torch_format.save(tmp_path / "c.pt", {"ema": wrapped})
    check_equal(open_checkpoint(tmp_path / "c.pt"), state())
    write_safetensors(tmp_path / "c.safetensors", wrapped, {})
    assert set(open_checkpoint(tmp_path / "c.safetensors").shapes) == set(state())
    partly = wrapped | {"other": np.ones(2, np.float32)}
    torch_format.save(tmp_path / "c.pt", {"ema": partly})
    check_equal(open_checkpoint(tmp_path / "c.pt"), partly)


def test_names_are_a_mapping(tmp_path):
    torch_format.save(tmp_path / "c.pt", state())
    checkpoint = open_checkpoint(str(tmp_path / "c.pt"))
    assert "a.bias" in checkpoint and "b" not in checkpoint and 3 not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["b"]
    with checkpoint:
        kept = checkpoint["a.bias"]
    assert error_of_reading(checkpoint, "a.bias").field == "--checkpoint"
    np.testing.assert_array_equal(kept, state()["a.bias"])


def error_of_reading(checkpoint, name):
    with pytest.raises(InputError) as caught:
        checkpoint[name]
    return caught.value


@BOTH
def test_values_are_read_only_on_demand(tmp_path, legacy):
    path = tmp_path / "c.pt"
    arrays = {"large": np.zeros(2**22, np.float32), "small": np.full(1000, 7.0, np.float32)}
    torch_format.save(path, {"ema": arrays, "opt": {"m": np.zeros(2**22, np.float32)}}, legacy=legacy)
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes == {"large": (2**22,), "small": (1000,)}
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    content = path.read_bytes()
    path.write_bytes(content.replace(arrays["small"].tobytes(), (2 * arrays["small"]).tobytes()))
    np.testing.assert_array_equal(checkpoint["small"], 14.0)
    os.truncate(path, 4096)
    assert error_of_reading(checkpoint, "large").value == "large"


def test_safetensors(tmp_path):
    names = ("float32", "float16", "bfloat16", "int64", "bool", "scalar", "empty")
    arrays = {name: every_dtype()[name] for name in names}
    safetensors.numpy.save_file(arrays, tmp_path / "c.bin", metadata={"step": "3"})
    with open_checkpoint(tmp_path / "c.bin") as checkpoint:
        assert checkpoint.metadata == {"step": "3"}
        assert checkpoint.shapes == {name: array.shape for name, array in arrays.items()}
        for name, array in arrays.items():
            assert checkpoint[name].dtype == array.dtype
            np.testing.assert_array_equal(checkpoint[name], array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {name: array for name, array in every_dtype().items() if name != "bfloat16"}
    swapped = arrays | {"float32": arrays["float32"].astype(">f4"), "int16": np.asfortranarray(arrays["int16"])}
    save(tmp_path / "c.npz", note="a text", **swapped)
    with open_checkpoint(tmp_path / "c.npz") as checkpoint:
        assert checkpoint.metadata == {"note": "a text"}
        check_equal(checkpoint, arrays)


def test_npz_of_other_values(tmp_path):
    for array in (np.array([print]), np.zeros(2, BFLOAT16), np.array(["a", "b"])):
        np.savez(tmp_path / "c.npz", a=np.ones(3), odd=array)
        assert error_of(tmp_path / "c.npz").value == "odd"


def test_write_safetensors(tmp_path):
    path = tmp_path / "c.safetensors"
    strided = np.arange(24.0).reshape(4, 6)[::2, ::3]
    arrays = {name: array for name, array in every_dtype().items() if array.dtype.kind != "c"} | {"strided": strided}
    arrays |= {"é": np.arange(3, dtype=">i4")}
    metadata = {"b": "2", "a": "1", "c": "ü\n"}
    write_safetensors(path, arrays, metadata)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == metadata
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint[name], array)
            assert checkpoint[name].dtype == array.dtype.newbyteorder("=")
    first = sha256(path)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    write_safetensors(path, dict(reversed(arrays.items())), dict(reversed(metadata.items())))
    assert sha256(path) == first and os.listdir(tmp_path) == [path.name]
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_write_safetensors_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    write_safetensors(path, state(), {})
    before = path.read_bytes()

    with pytest.raises(InputError):
        write_safetensors(path, {"a": np.ones(3), "b": np.array(["text"])}, {})
    for function in ("fsync", "replace"):
        monkeypatch.setattr(os, function, no_space)
        with pytest.raises(OSError, match="no space"):
            write_safetensors(path, {"a": np.ones(3)}, {})
        monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def no_space(*args):
    raise OSError("no space left")


class Calls:
    """An object whose pickle calls `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class State:
    """An object whose pickle makes `function(*args)` and then sets its state."""

    def __init__(self, function, args, state):
        self.parts = function, args, state

    def __reduce__(self):
        return self.parts


SIX = Storage("0", np.zeros(6, np.float32))


def tensor(offset=0, shape=(2, 3), strides=(3, 1), storage=SIX, rest=(False, {})):
    return Calls(Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, *rest)


def hostile(marker):
    """Objects to be pickled: what they are called, what the error must name, the object."""
    touch, write = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    namespace, ordered = Global("argparse", "Namespace"), Global("collections", "OrderedDict")
    nested = functools.reduce(lambda inner, _: (inner,), range(100), ())
    return {
        "os.system": ("posix.system", Calls(os.system, touch)),
        "eval": ("builtins.eval", Calls(eval, write)),
        "exec": ("builtins.exec", Calls(exec, write)),
        "getattr": ("builtins.getattr", Calls(getattr, {}, "update")),
        "partial": ("functools.partial", Calls(functools.partial, os.system, touch)),
        "torch.load": ("torch.load", Calls(Global("torch", "load"), str(marker))),
        "dotted name": ("torch._utils.os.system", Calls(Global("torch._utils", "os.system"), touch)),
        "name alone": ("os.system", Global("os", "system")),
        "in the optimizer": ("os.system", {"opt": Calls(Global("os", "system"), touch)}),
        "as an argument": ("builtins.eval", Calls(ordered, [("a", Calls(eval, write))])),
        "OrderedDict of a namespace": ("calls", Calls(ordered, Calls(namespace))),
        "Namespace with arguments": ("calls", Calls(namespace, 1)),
        "storage type called": ("calls", Calls(Global("torch", "FloatStorage"), 2**40)),
        "dtype called": ("calls", Calls(Global("torch", "float32"), 1)),
        "state of a Namespace": ("state", State(namespace, (), (None, {"__class__": dict}))),
        "state with a function": ("builtins.eval", State(namespace, (), {"__setstate__": eval})),
        "state of a tensor": ("state", State(*tensor().__reduce__(), {"a": 1})),
        "tensor without a storage": ("calls", tensor(storage="0")),
        "tensor of too few arguments": ("calls", tensor(rest=())),
        "conjugated": ("conjugated", tensor(rest=(False, {}, {"conj": True}))),
        "shape beyond": ("beyond", tensor(shape=(2, 4))),
        "strides beyond": ("beyond", tensor(strides=(4, 1))),
        "offset beyond": ("beyond", tensor(offset=1)),
        "empty beyond": ("beyond", tensor(offset=7, shape=(0,), strides=(1,))),
        "negative offset": ("negative", tensor(offset=-1)),
        "negative stride": ("negative", tensor(offset=5, strides=(-3, -1))),
        "negative shape": ("negative", tensor(shape=(-2, -3))),
        "absurd offset": ("negative", tensor(offset=2**64)),
        "absurd shape": ("beyond", tensor(shape=(2**40, 2**40), strides=(0, 0))),
        "fractional shape": ("whole", tensor(shape=(2.0, 3))),
        "too many dimensions": ("length", tensor(shape=(1,) * 65, strides=(1,) * 65)),
        "strides missing": ("length", tensor(strides=(1,))),
        "storage too large": ("bytes", tensor(storage=Storage("0", np.zeros(7, np.float32)))),
        "storage too small": ("bytes", tensor(storage=Storage("0", np.zeros(6, np.float16)))),
        "storage that is not there": ("data/1", tensor(storage=Storage("1", np.zeros(6, np.float32)))),
        "storage outside of data": ("data/../0", tensor(storage=Storage("../0", np.zeros(6, np.float32)))),
        "no storage's id": ("storage of unknown kind", Opaque()),
        "parameter of a number": ("calls", Calls(Global("torch._utils", "_rebuild_parameter"), 3, True, {})),
        "size of a number": ("calls", Calls(Global("torch", "Size"), 3)),
        "key of nested tuples": ("key", {nested: 1}),
        "set of tuples": ("key", {(1, 2)}),
    }


class Opaque:
    """Pickled as a persistent id that is no storage's."""


class HostilePickler(Pickler):
    def persistent_id(self, obj):
        return ("module", "os", "system", "x", 0) if isinstance(obj, Opaque) else super().persistent_id(obj)


def write_pickle(path, content):
    torch_format.zip_file(path, {"data.pkl": content, "data/0": SIX.memory.tobytes()})


def write_object(path, obj, protocol=2):
    buffer = io.BytesIO()
    HostilePickler(buffer, protocol=protocol).dump(obj)
    write_pickle(path, buffer.getvalue())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", hostile(""))
def test_hostile_pickles(tmp_path, case, protocol):
    marker, path = tmp_path / "marker", tmp_path / "c.pt"
    named, obj = hostile(marker)[case]
    write_object(path, {"good": tensor(), "odd": obj}, protocol)
    error = error_of(path)
    assert error.field == "--checkpoint" and named in str(error)
    assert ("nothing was executed" in str(error)) == (error.value != str(path))
    assert not marker.exists()


def test_the_hostile_are_refused_for_what_is_odd(tmp_path):
    write_object(tmp_path / "c.pt", {"good": tensor(), "odd": State(Global("argparse", "Namespace"), (), {"a": 1})})
    checkpoint = open_checkpoint(tmp_path / "c.pt")
    assert checkpoint.shapes == {"good": (2, 3)} and checkpoint.metadata == {"odd": {"a": 1}}


TEXT = struct.pack("<I", 18) + b"argparse.Namespace"


@pytest.mark.parametrize(
    "content, named",
    [
        (b"cos\nsystem\n(S'touch marker'\ntR.", "os.system"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04K\x01K\x02\x93.", "?"),
        (b"\x80\x04\x8c\x02os)\x93.", "?"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02(cargparse\nNamespace\no.", "OBJ"),
        (b"\x80\x04cargparse\nNamespace\n)}\x92.", "NEWOBJ_EX"),
        (b"Pid\n.", "PERSID"),
        (b"\x80\x02X" + TEXT + b")R.", "calls"),
        (b"\x80\x02cargparse\nNamespace\n]R.", "calls"),
        (b"\x80\x02cargparse\nNamespace\n}b.", "state"),
        (b"\x80\x02}K\x01K\x02K\x03u.", "cannot be read"),
        (b"\x80\x02}(K\x01u.", "cannot be read"),
        (b"\x80\x02K\x01K\x02a.", "cannot be read"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02h\x07.", "cannot be read"),
        (b"\x80\x02t.", "cannot be read"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02}", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "cannot be read"),
        (b"\x80\x02\x8b" + struct.pack("<i", -1) + b".", "cannot be read"),
        (b"\x80\x02]q\x00h\x00a.", "must hold a dict"),
        (b"\x80\x02" + 10**4 * b"]" + 10**4 * b"a", "cannot be read"),
    ],
)
def test_hostile_instructions(tmp_path, monkeypatch, content, named):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "c.pt", content)
    assert named in str(error_of(tmp_path / "c.pt"))
    # The same where a legacy file starts.
    if content.startswith(b"\x80"):
        (tmp_path / "c.pkl").write_bytes(content)
        error_of(tmp_path / "c.pkl")
    assert not (tmp_path / "marker").exists()


def test_short_pickles_stay_small(tmp_path):
    itself = []
    itself.append(itself)
    doubled = functools.reduce(lambda inner, _: [inner, inner], range(60), [1])
    wide = [list(range(1000))] * 1000
    deep = functools.reduce(lambda inner, _: [inner], range(300), 1)
    path = tmp_path / "c.pt"
    content = dict(good=tensor(), itself=itself, doubled=doubled, wide=wide, deep=deep, long=2**100, kept=[1, 2.5])
    write_object(path, content)
    tracemalloc.start()
    assert open_checkpoint(path).metadata == {"kept": [1, 2.5]}
    write_pickle(path, b"\x80\x02}r\xff\xff\xff\x7f.")
    assert "no named tensors" in str(error_of(path))
    # One list made into a set again and again.
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in range(1000))
    write_pickle(path, b"\x80\x02]q\x01(" + numbers + b"e" + 1000 * b"c__builtin__\nset\nh\x01\x85R" + b".")
    error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_legacy_storage_names(tmp_path):
    # The hash of a tuple within a tuple and so on would exhaust the machine's stack.
    nested = b"\x80\x02](" + b")" + 10**5 * b"\x85" + b"e."
    for names in (nested, b"\x80\x02]X\x01\x00\x00\x001a.", b"\x80\x02]."):
        torch_format.save(tmp_path / "c.pt", {"good": SIX.memory}, legacy=True)
        content = (tmp_path / "c.pt").read_bytes()
        (tmp_path / "c.pt").write_bytes(content.replace(pickle.dumps(["0"], 2), names))
        assert (tmp_path / "c.pt").read_bytes() != content
        error_of(tmp_path / "c.pt")


def records(**changes):
    buffer = io.BytesIO()
    HostilePickler(buffer).dump({"good": tensor()})
    return {"data.pkl": buffer.getvalue(), "data/0": SIX.memory.tobytes()} | changes


def test_damaged_zip_files(tmp_path):
    path = tmp_path / "c.pt"
    torch_format.zip_file(path, records())
    assert open_checkpoint(path).shapes == {"good": (2, 3)}
    torch_format.zip_file(path, records(byteorder=b"middle"))
    assert "byteorder" in str(error_of(path))
    torch_format.zip_file(path, records(), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in str(error_of(path))
    torch_format.zip_file(path, {"data/0": b"1"})
    assert "data.pkl" in str(error_of(path))
    torch_format.zip_file(path, records())
    content = path.read_bytes()
    # A header in the middle overwritten: found when the tensor is read.
    path.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1))
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes == {"good": (2, 3)}
    assert "damaged" in str(error_of_reading(checkpoint, "good"))


def file_of(kind, path):
    arrays = {name: np.tile(array, 50) for name, array in state().items()}
    if kind == "safetensors":
        write_safetensors(path, arrays, {"a": "b"})
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    else:
        torch_format.save(path, torch_format.released(arrays, arrays, {"lr": 1}), legacy=kind == "legacy")


@pytest.mark.parametrize("kept", [0.0005, 0.003, 0.05, 0.3, 0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_truncated_files(tmp_path, kind, kept):
    file_of(kind, path := tmp_path / "c")
    content = path.read_bytes()
    path.write_bytes(content[:min(int(kept * len(content)), len(content) - 1)])
    assert error_of(path).value == str(path)


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "is empty"),
        (b"a", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "version"),
        (b"<!DOCTYPE html>\n<html></html>", "DOCTYPE"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "PNG"),
        (b"12345678{}", "cannot be read"),
        (struct.pack("<Q", 2) + b"{}", "no named tensors"),
        (pickle.dumps({"a": 1}), "not one of torch.save"),
    ],
)
def test_other_files(tmp_path, content, named):
    (tmp_path / "c.pt").write_bytes(content)
    error = error_of(tmp_path / "c.pt")
    assert error.value == str(tmp_path / "c.pt") and named in str(error)


def test_other_contents(tmp_path):
    path = tmp_path / "c.pt"
    for content in (np.ones(3), [np.ones(3)], argparse.Namespace(a=1), 3):
        torch_format.save(path, content)
        assert "must hold a dict" in str(error_of(path))
    for content in ({}, {"epoch": 3}, {3: np.ones(3)}, {"model": {}, "opt": {"state": {0: {"m": np.ones(3)}}}}):
        torch_format.save(path, content)
        assert "no named tensors" in str(error_of(path))
    torch_format.save(path, {"generator": state(), "discriminator": state()})
    assert "generator, discriminator" in str(error_of(path))
    torch_format.zip_file(path, {"readme.txt": b"text"})
    assert "data.pkl" in str(error_of(path))
    for place in (tmp_path, tmp_path / "none.pt"):
        assert error_of(place).value == str(place)


@BOTH
def test_against_pytorch(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "c.pt"
    base = torch.arange(60, dtype=torch.float32)
    tensors = {
        "base": base, "view": base.view(5, 12)[1:4, 2:9:3], "transposed": base.view(5, 12).t(),
        "parameter": torch.nn.Parameter(base[:7]), "scalar": torch.tensor(2), "empty": torch.empty(0, 3),
        "expanded": base[3:4].expand(4), "bfloat16": base.bfloat16(), "bool": base > 4, "half": base.half(),
        "complex": torch.complex(base, -base), "bytes": base.to(torch.uint8), "double": base.double(),
    }
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = dict(
        model=module.state_dict(), ema=tensors, opt=optimizer.state_dict(), epoch=2,
        args=argparse.Namespace(lr=1e-3, size=torch.Size([2, 3]), dtype=torch.bfloat16, names={"a"}),
    )
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    plain = dict(lr=1e-3, size=[2, 3], dtype="torch.bfloat16", names=["a"])
    for weights, expected in (("ema", tensors), ("model", module.state_dict())):
        with open_checkpoint(path, weights) as found:
            assert found.metadata == {"epoch": 2, "args": plain}
            check_equal(found, {name: to_numpy(torch, value) for name, value in expected.items()})
    ours = every_dtype()
    torch_format.save(path, {"ema": ours, "first": Parameter(ours["float32"][:, 1])}, legacy=legacy)
    loaded = torch.load(path, weights_only=True)
    for name, array in ours.items():
        np.testing.assert_array_equal(to_numpy(torch, loaded["ema"][name]), array)
    np.testing.assert_array_equal(loaded["first"].detach().numpy(), ours["float32"][:, 1])


def to_numpy(torch, value):
    value = value.detach().contiguous()
    return value.view(torch.int16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy().copy()


def test_torchscript_is_read_as_its_state_dict(tmp_path):
    rng = np.random.default_rng(0)
    weights = {f"block.{i}.conv.weight": rng.normal(size=(2, 3)).astype(np.float32) for i in range(3)}
    weights |= {"count": np.array(7), "block.1.running": np.arange(4, dtype=np.float32)}
    torch_format.save_script(tmp_path / "net.pt", weights)
    with open_checkpoint(tmp_path / "net.pt") as checkpoint:
        assert set(checkpoint) == set(weights) and checkpoint.metadata == {}
        for name, array in weights.items():
            np.testing.assert_array_equal(checkpoint[name], array)


def test_torchscript_of_objects_without_end_is_refused(tmp_path):
    """Objects that hold themselves, and objects that hold one another twice, thirty times over."""
    for name, pickled in {
        "loop": b"\x80\x02c__torch__.a\nLoop\n)\x81q\x00}(X\x04\x00\x00\x00selfh\x00ub.",
        "bomb": b"\x80\x02c__torch__.a\nA\n)\x81}bq\x00" + b"".join(
            b"c__torch__.a\nA\n)\x81}(X\x01\x00\x00\x00ah%bX\x01\x00\x00\x00bh%bubq%b"
            % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(30)
        ) + b".",
    }.items():
        torch_format.zip_file(tmp_path / f"{name}.pt", {"data.pkl": pickled})
        with pytest.raises(InputError, match="nested too deeply"):
            open_checkpoint(tmp_path / f"{name}.pt")
    # Its state is a dict, and nothing else is one.
    torch_format.zip_file(tmp_path / "state.pt", {"data.pkl": b"\x80\x02c__torch__.a\nA\n)\x81K\x01b."})
    with pytest.raises(InputError, match="sets the state of"):
        open_checkpoint(tmp_path / "state.pt")
