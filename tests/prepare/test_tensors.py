"""Released checkpoints are read whole and right."""

import argparse
import collections
import hashlib
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_format
from checkpoint_checks import assert_array_refused, assert_checkpoint_equals, assert_refused, state
from torch_format import Global, Parameter

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.prepare.tensors import open_checkpoint, sha256, write_safetensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def every_dtype():
    numbers = np.array([[0, 1, 2], [3, 100, 127]])
    arrays = {name: numbers.astype(BFLOAT16 if name == "bfloat16" else name) for name in torch_format.STORAGES}
    arrays["complex64"] = arrays["complex64"] * np.complex64(1 + 2j)
    return arrays | {"scalar": np.array(1.5, np.float32), "empty": np.empty((0, 3), np.float32)}


@BOTH
def test_every_dtype(tmp_path, legacy):
    torch_format.save(tmp_path / "c.pt", every_dtype(), legacy=legacy)
    with open_checkpoint(tmp_path / "c.pt") as checkpoint:
        assert_checkpoint_equals(checkpoint, every_dtype())


def test_big_endian(tmp_path):
    torch_format.save(tmp_path / "c.pt", every_dtype(), byteorder="big")
    assert_checkpoint_equals(open_checkpoint(tmp_path / "c.pt"), every_dtype())
    torch_format.save(tmp_path / "c.pt", every_dtype(), byteorder="little", folder="any name.v2")
    assert_checkpoint_equals(open_checkpoint(tmp_path / "c.pt"), every_dtype())


@BOTH
def test_views_and_shared_storage(tmp_path, legacy):
    memory = np.arange(60, dtype=np.float32)
    grid = memory.reshape(5, 12)
    arrays = {
        "all": memory,
        "transposed": grid.T,
        "columns": grid[1:4, 2:9:3],
        "one": grid[2, 3:4].reshape(()),
        "last": memory[59:],
        "none": memory[60:],
        "repeated": np.broadcast_to(memory[7:8], (3, 4)),
    }
    torch_format.save(tmp_path / "c.pt", arrays, legacy=legacy)
    assert_checkpoint_equals(open_checkpoint(tmp_path / "c.pt"), arrays)
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
        assert_checkpoint_equals(checkpoint, state(2))
        plain = dict(
            model="ACDiT-XL", lr=1e-4, sizes=[1, 2], nested={"a": [1, None]}, flags=["b"], dtype="torch.float16"
        )
        assert checkpoint.metadata == {"step": 3, "args": plain}
        assert type(checkpoint.metadata["args"]) is dict
    with open_checkpoint(path, "model") as checkpoint:
        assert_checkpoint_equals(checkpoint, state(1))


def test_one_set_of_weights_is_taken_for_either(tmp_path):
    path = tmp_path / "c.pt"
    for content in (state(), {"model": state(), "opt": {}}, {"state_dict": state(), "epoch": 4}):
        torch_format.save(path, content)
        for weights in ("ema", "model"):
            assert_checkpoint_equals(open_checkpoint(path, weights), state())


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
    error = assert_refused(tmp_path / "c.pt", weights)
    assert error.field == "--weights" and error.value == weights and named in str(error)


def test_unknown_weights(tmp_path):
    assert assert_refused(tmp_path / "c.pt", "emma").field == "--weights"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    wrapped = {prefix + name: array for name, array in state().items()}
    torch_format.save(tmp_path / "c.pt", {"ema": wrapped})
    assert_checkpoint_equals(open_checkpoint(tmp_path / "c.pt"), state())
    write_safetensors(tmp_path / "c.safetensors", wrapped, {})
    assert set(open_checkpoint(tmp_path / "c.safetensors").shapes) == set(state())
    partly = wrapped | {"other": np.ones(2, np.float32)}
    torch_format.save(tmp_path / "c.pt", {"ema": partly})
    assert_checkpoint_equals(open_checkpoint(tmp_path / "c.pt"), partly)


def test_names_are_a_mapping(tmp_path):
    torch_format.save(tmp_path / "c.pt", state())
    checkpoint = open_checkpoint(str(tmp_path / "c.pt"))
    assert "a.bias" in checkpoint and "b" not in checkpoint and 3 not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["b"]
    with checkpoint:
        kept = checkpoint["a.bias"]
    assert assert_array_refused(checkpoint, "a.bias").field == "--checkpoint"
    np.testing.assert_array_equal(kept, state()["a.bias"])


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
    assert assert_array_refused(checkpoint, "large").value == "large"


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
        assert_checkpoint_equals(checkpoint, arrays)


def test_npz_of_other_values(tmp_path):
    for array in (np.array([print]), np.zeros(2, BFLOAT16), np.array(["a", "b"])):
        np.savez(tmp_path / "c.npz", a=np.ones(3), odd=array)
        assert assert_refused(tmp_path / "c.npz").value == "odd"


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


def test_safetensors_whose_header_begins_like_a_pickle(tmp_path):
    """The first byte of the file is part of the header's length."""
    path = tmp_path / "c.safetensors"
    for padding in range(0, 256, 8):
        write_safetensors(path, state(), {"padding": " " * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    with open_checkpoint(path) as checkpoint:
        assert {name: array.tobytes() for name, array in checkpoint.items()} == {
            name: array.tobytes() for name, array in state().items()
        }


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


@BOTH
def test_against_pytorch(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    path = tmp_path / "c.pt"
    base = torch.arange(60, dtype=torch.float32)
    tensors = {
        "base": base,
        "view": base.view(5, 12)[1:4, 2:9:3],
        "transposed": base.view(5, 12).t(),
        "parameter": torch.nn.Parameter(base[:7]),
        "scalar": torch.tensor(2),
        "empty": torch.empty(0, 3),
        "expanded": base[3:4].expand(4),
        "bfloat16": base.bfloat16(),
        "bool": base > 4,
        "half": base.half(),
        "complex": torch.complex(base, -base),
        "bytes": base.to(torch.uint8),
        "double": base.double(),
    }
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = dict(
        model=module.state_dict(),
        ema=tensors,
        opt=optimizer.state_dict(),
        epoch=2,
        args=argparse.Namespace(lr=1e-3, size=torch.Size([2, 3]), dtype=torch.bfloat16, names={"a"}),
    )
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    plain = dict(lr=1e-3, size=[2, 3], dtype="torch.bfloat16", names=["a"])
    for weights, expected in (("ema", tensors), ("model", module.state_dict())):
        with open_checkpoint(path, weights) as found:
            assert found.metadata == {"epoch": 2, "args": plain}
            assert_checkpoint_equals(found, {name: to_numpy(torch, value) for name, value in expected.items()})
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
