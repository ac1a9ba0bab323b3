"""A folder has one writer, and a dead one does not hold it."""

import json
import subprocess
import sys
import threading
import time

import pytest

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.lock import FolderLock


def lock(folder, **seconds):
    return FolderLock(folder, "--workdir", **{"renew_seconds": 0.02, "stale_seconds": 0.3} | seconds)


def write_lease(folder, **changes):
    """Writes the lease of another machine, with `changes`."""
    lease = {"token": "other", "host": "elsewhere", "machine": "other boot", "pid": 1, "process_start": "5"}
    (folder / files.LEASE).write_text(json.dumps(lease | changes))


def test_second_holder_is_refused_until_the_first_has_left(tmp_path):
    refused = pytest.raises(InputError, match="--workdir=.*in use by process")
    with lock(tmp_path / "run"), refused, lock(tmp_path / "run"):
        pass
    with lock(tmp_path / "run"):
        assert files.is_new(tmp_path / "run")
    assert not (tmp_path / "run" / files.LEASE).exists()


def test_killed_process_of_this_machine_loses_the_folder_at_once(tmp_path):
    hold = (
        "import os, signal, sys; from causalfusion_jax.common.lock import FolderLock;"
        "FolderLock(sys.argv[1], '--workdir').__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", hold, str(tmp_path)], check=False)
    assert (tmp_path / files.LEASE).exists()
    before = time.monotonic()
    with lock(tmp_path, stale_seconds=60.0):
        assert time.monotonic() - before < 5.0


def test_lease_of_another_machine_is_taken_over_when_it_is_not_renewed(tmp_path):
    write_lease(tmp_path)
    with lock(tmp_path) as held:
        assert files.read_json(tmp_path / files.LEASE)["token"] != "other"
        held.require_held()


def test_lease_of_another_machine_is_respected_while_it_is_renewed(tmp_path):
    write_lease(tmp_path)
    ended = threading.Event()

    def renew():
        count = 0
        while not ended.wait(0.02):
            count += 1
            files.write_json(tmp_path / files.LEASE, {"token": "other", "renewals": count})

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(InputError, match="in use"), lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".config.json.0.part").write_text("{")
    assert files.is_new(tmp_path)
    with lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [files.LEASE]


def test_broken_lease_is_taken_over(tmp_path):
    (tmp_path / files.LEASE).write_text("{")
    with lock(tmp_path):
        assert files.read_json(tmp_path / files.LEASE) is not None


def test_holder_learns_that_it_was_taken_over_and_leaves_the_new_lease_alone(tmp_path):
    with lock(tmp_path) as held:
        write_lease(tmp_path)
        end = time.monotonic() + 10.0
        with pytest.raises(RuntimeError, match="taken over by process 1 on elsewhere"):
            while time.monotonic() < end:
                held.require_held()
                time.sleep(0.02)
    assert files.read_json(tmp_path / files.LEASE)["token"] == "other"
