"""Atomic writes of files, and disk errors."""

import errno
import io
import os

import pytest

from causalfusion_jax.common import files


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "grid.png"
    with files.replacing(path) as part:
        part.write_bytes(b"old")
        assert not path.exists()
    with pytest.raises(ValueError), files.replacing(path) as part:
        part.write_bytes(b"ne")
        raise ValueError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_error_of_writing_names_the_file_that_was_to_be(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(OSError) as raised, files.replacing(path) as part:
        part.write_bytes(b"")
        with open("/dev/full", "wb") as full:
            full.write(b"x" * io.DEFAULT_BUFFER_SIZE)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [
    RuntimeError("write() failed: No space left on device; at byte 0"),
    ValueError("RESOURCE_EXHAUSTED: Failed to write 8 bytes: No space left on device [os_error_code='28']"),
])  # fmt: skip
def test_a_librarys_error_of_a_full_disk_becomes_one_of_the_system(error):
    with pytest.raises(OSError) as raised, files.writing("latents/shard"):
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == "latents/shard"


def test_other_errors_of_writing_are_not_changed():
    with pytest.raises(ValueError, match="shapes differ"), files.writing("latents/shard"):
        raise ValueError("shapes differ")
