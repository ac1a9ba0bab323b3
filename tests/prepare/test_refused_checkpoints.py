"""Hostile, damaged and foreign files are refused with one line; nothing in them is executed."""

import argparse
import functools
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch_format
from checkpoint_checks import assert_array_refused, assert_refused, state
from torch_format import Global, Pickler, Storage

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.prepare.tensors import open_checkpoint, write_safetensors


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
    error = assert_refused(path)
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
    assert named in str(assert_refused(tmp_path / "c.pt"))
    # The same where a legacy file starts.
    if content.startswith(b"\x80"):
        (tmp_path / "c.pkl").write_bytes(content)
        assert_refused(tmp_path / "c.pkl")
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
    assert "no named tensors" in str(assert_refused(path))
    # One list made into a set again and again.
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in range(1000))
    write_pickle(path, b"\x80\x02]q\x01(" + numbers + b"e" + 1000 * b"c__builtin__\nset\nh\x01\x85R" + b".")
    assert_refused(path)
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
        assert_refused(tmp_path / "c.pt")


def records(**changes):
    buffer = io.BytesIO()
    HostilePickler(buffer).dump({"good": tensor()})
    return {"data.pkl": buffer.getvalue(), "data/0": SIX.memory.tobytes()} | changes


def test_damaged_zip_files(tmp_path):
    path = tmp_path / "c.pt"
    torch_format.zip_file(path, records())
    assert open_checkpoint(path).shapes == {"good": (2, 3)}
    torch_format.zip_file(path, records(byteorder=b"middle"))
    assert "byteorder" in str(assert_refused(path))
    torch_format.zip_file(path, records(), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in str(assert_refused(path))
    torch_format.zip_file(path, {"data/0": b"1"})
    assert "data.pkl" in str(assert_refused(path))
    torch_format.zip_file(path, records())
    content = path.read_bytes()
    # A header in the middle overwritten: found when the tensor is read.
    path.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1))
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes == {"good": (2, 3)}
    assert "damaged" in str(assert_array_refused(checkpoint, "good"))


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
    path.write_bytes(content[: min(int(kept * len(content)), len(content) - 1)])
    assert assert_refused(path).value == str(path)


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
    error = assert_refused(tmp_path / "c.pt")
    assert error.value == str(tmp_path / "c.pt") and named in str(error)


def test_other_contents(tmp_path):
    path = tmp_path / "c.pt"
    for content in (np.ones(3), [np.ones(3)], argparse.Namespace(a=1), 3):
        torch_format.save(path, content)
        assert "must hold a dict" in str(assert_refused(path))
    for content in ({}, {"epoch": 3}, {3: np.ones(3)}, {"model": {}, "opt": {"state": {0: {"m": np.ones(3)}}}}):
        torch_format.save(path, content)
        assert "no named tensors" in str(assert_refused(path))
    torch_format.save(path, {"generator": state(), "discriminator": state()})
    assert "generator, discriminator" in str(assert_refused(path))
    torch_format.zip_file(path, {"readme.txt": b"text"})
    assert "data.pkl" in str(assert_refused(path))
    for place in (tmp_path, tmp_path / "none.pt"):
        assert assert_refused(place).value == str(place)


def test_torchscript_of_objects_without_end_is_refused(tmp_path):
    """Objects that hold themselves, and objects that hold one another twice, thirty times over."""
    for name, pickled in {
        "loop": b"\x80\x02c__torch__.a\nLoop\n)\x81q\x00}(X\x04\x00\x00\x00selfh\x00ub.",
        "bomb": b"\x80\x02c__torch__.a\nA\n)\x81}bq\x00"
        + b"".join(
            b"c__torch__.a\nA\n)\x81}(X\x01\x00\x00\x00ah%bX\x01\x00\x00\x00bh%bubq%b"
            % (bytes([i]), bytes([i]), bytes([i + 1]))
            for i in range(30)
        )
        + b".",
    }.items():
        torch_format.zip_file(tmp_path / f"{name}.pt", {"data.pkl": pickled})
        with pytest.raises(InputError, match="nested too deeply"):
            open_checkpoint(tmp_path / f"{name}.pt")
    # Its state is a dict, and nothing else is one.
    torch_format.zip_file(tmp_path / "state.pt", {"data.pkl": b"\x80\x02c__torch__.a\nA\n)\x81K\x01b."})
    with pytest.raises(InputError, match="sets the state of"):
        open_checkpoint(tmp_path / "state.pt")
