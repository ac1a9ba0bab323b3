"""What the commands share."""

import importlib.util
import os

import pytest

from causalfusion_jax import cli, sampling_flags
from causalfusion_jax.errors import InputError


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


@pytest.mark.parametrize(
    ("field", "named"), [("order", "--order"), ("--labels", "--labels"), ("data.path", "data.path")]
)
def test_errors_name_no_flag_that_a_command_does_not_have(field, named):
    with pytest.raises(InputError) as error, sampling_flags.as_flags():
        raise InputError(field, "x", "must be another")
    assert error.value.field == named
