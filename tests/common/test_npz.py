"""Arrays of .npz files, by rows."""

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.npz import NpzReader, NpzWriter

ARRAYS = {
    "arr_0": np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8),
    "mu": np.linspace(0, 1, 6),
    "empty": np.zeros((0, 2), np.float32),
}


def test_written_by_rows_it_is_what_numpy_writes(tmp_path):
    np.savez(tmp_path / "whole.npz", **ARRAYS)
    with NpzWriter(tmp_path / "parts.npz") as writer:
        with writer.rows("arr_0", (7, 4, 5, 3), np.uint8) as write:
            for start in (0, 3, 6):
                write(ARRAYS["arr_0"][start : start + 3])
            assert not (tmp_path / "parts.npz").exists()
        for name in ("mu", "empty"):
            writer.array(name, ARRAYS[name])
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("rows", [3, 9])
def test_too_few_or_many_rows_leave_nothing(tmp_path, rows):
    refused = pytest.raises(ValueError, match=f"{rows} rows of x instead of 4")
    with refused, NpzWriter(tmp_path / "x.npz") as writer, writer.rows("x", (4,), np.float64) as write:
        write(np.zeros(rows))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_read_by_rows(tmp_path, save, size):
    save(tmp_path / "x.npz", **ARRAYS)
    reader = NpzReader("--samples", tmp_path / "x.npz")
    parts = list(reader.batches("arr_0", size))
    assert [len(part) for part in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
    np.testing.assert_array_equal(np.concatenate(parts), ARRAYS["arr_0"])
    assert reader.shape("arr_0") == ((7, 4, 5, 3), np.uint8)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(reader.array(name), array)


def test_damage_is_one_clear_error(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(InputError, match="no such file"):
        NpzReader("--samples", path)
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a readable .npz"):
        NpzReader("--samples", path)
    np.savez(path, arr_0=ARRAYS["arr_0"])
    with pytest.raises(InputError, match="not an .npz with mu; it has arr_0"):
        NpzReader("--samples", path).array("mu")
    content = bytearray(path.read_bytes())
    content[300] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable .npz"):
        NpzReader("--samples", path).array("arr_0")
