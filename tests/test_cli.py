"""What the commands share."""

import errno
import importlib.util
import os
import resource

import pytest

from causalfusion_jax.cli import command as cli
from causalfusion_jax.common.errors import InputError


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [(None, [], True), (None, ["/dev/accel0"], False), ("cpu", ["/dev/accel0"], True), ("tpu,cpu", [], False),
     ("cuda", [], False)],
)  # fmt: skip
def test_memory_settings_are_those_of_the_cpu_only_where_it_computes(platforms, devices, expected, monkeypatch):
    called = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: devices if pattern == "/dev/accel*" else [])
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(cli.app, "run", lambda *args, **kwargs: None)
    cli.run(lambda argv: None)
    assert bool(called) == expected


def test_commands_may_open_as_many_files_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(hard if hard != resource.RLIM_INFINITY else cli.MAX_OPEN_FILES, cli.MAX_OPEN_FILES)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed // 2, hard))
        cli.allow_many_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("installed", "files", "platforms", "expected"),
    [
        (True, {}, None, "cpu"),
        (False, {}, None, None),
        (True, {}, "tpu", "tpu"),
        (True, {"/dev/accel*": ["/dev/accel0"]}, None, None),
        (True, {"/dev/nvidia*": ["/dev/nvidia0"]}, None, None),
        (True, {"/sys/bus/pci/devices/*/vendor": ["0x8086", "0x1ae0"]}, None, None),
        (True, {"/sys/bus/pci/devices/*/vendor": ["0x8086"]}, None, "cpu"),
    ],
)
def test_a_tpu_is_left_out_only_where_there_is_none(installed, files, platforms, expected, monkeypatch, tmp_path):
    vendors = []
    for i, text in enumerate(files.get("/sys/bus/pci/devices/*/vendor", ())):
        vendors.append(tmp_path / str(i))
        vendors[-1].write_text(text + "\n")
    found = files | {"/sys/bus/pci/devices/*/vendor": vendors}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: found.get(pattern, []))
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    cli.leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_full_or_failing_disk_is_one_line_that_names_the_file(number, capsys):
    with pytest.raises(SystemExit) as ended, cli.errors_in_one_line():
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run/metrics.jsonl: {os.strerror(number)}; run the same command again")


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(FileNotFoundError), cli.errors_in_one_line():
        open("no/such/file")


@pytest.mark.parametrize(
    ("field", "named"), [("verbosity", "--verbosity"), ("--labels", "--labels"), ("data.path", "data.path")]
)
def test_errors_name_no_flag_that_a_command_does_not_have(field, named):
    with pytest.raises(InputError) as error, cli.as_flags():
        raise InputError(field, "x", "must be another")
    assert error.value.field == named
