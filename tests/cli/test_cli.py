"""What the commands share."""

import dataclasses
import errno
import functools
import importlib.util
import os
import pathlib
import resource

import pytest
from absl import flags

from causalfusion_jax.cli import app, config_flags, machine, weights_flags
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.sampling import CaptionConfig, SamplerConfig
from causalfusion_jax.prepare.settings import EncodeConfig


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [(None, [], True), (None, ["/dev/accel0"], False), ("cpu", ["/dev/accel0"], True), ("tpu,cpu", [], False),
     ("cuda", [], False)],
)  # fmt: skip
def test_memory_settings_are_those_of_the_cpu_only_where_it_computes(platforms, devices, expected, monkeypatch):
    called = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: devices if pattern == "/dev/accel*" else [])
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(app.absl.app, "run", lambda *args, **kwargs: None)
    app.run(lambda argv: None)
    assert bool(called) == expected


def test_commands_may_open_as_many_files_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(hard if hard != resource.RLIM_INFINITY else machine.MAX_OPEN_FILES, machine.MAX_OPEN_FILES)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed // 2, hard))
        machine.allow_many_open_files()
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
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: found.get(pattern, []))
    monkeypatch.delenv("JAX_PLATFORMS")
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    machine.leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_full_or_failing_disk_is_one_line_that_names_the_file(number, capsys):
    with pytest.raises(SystemExit) as ended, app.errors_in_one_line():
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run/metrics.jsonl: {os.strerror(number)}; run the same command again")


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(FileNotFoundError), app.errors_in_one_line():
        pathlib.Path("no/such/file").read_text()


@pytest.mark.parametrize(
    ("field", "named"), [("verbosity", "--verbosity"), ("--labels", "--labels"), ("data.path", "data.path")]
)
def test_errors_name_no_flag_that_a_command_does_not_have(field, named):
    with pytest.raises(InputError) as error, app.as_flags():
        raise InputError(field, "x", "must be another")
    assert error.value.field == named


@dataclasses.dataclass(frozen=True)
class Base:
    """A base class.

    Attributes:
      cli_test_count, cli_test_ratio: two numbers,
        on two lines.
    """

    cli_test_count: int = 3
    cli_test_ratio: float = 0.5


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    """A class that extends it.

    Attributes:
      cli_test_sizes: `sizes` of parts.
    """

    cli_test_sizes: tuple[int, ...] = (4, 4)
    cli_test_on: bool = False

    def __post_init__(self):
        if self.cli_test_count < 1:
            raise InputError("cli_test_count", self.cli_test_count, "must be >= 1")


@pytest.fixture(scope="module")
def settings():
    yield config_flags.define(Settings)
    for field in dataclasses.fields(Settings):
        delattr(flags.FLAGS, field.name)


def parse(*args):
    flags.FLAGS.unparse_flags()
    for field in dataclasses.fields(Settings):
        flags.FLAGS[field.name].unparse()
    flags.FLAGS(["command", *args])


def test_flags_are_the_fields_of_a_dataclass(settings):
    parse()
    assert settings.given() == {} and settings.make() == Settings()
    parse("--cli_test_sizes=1,3,12", "--cli_test_ratio=2", "--cli_test_on")
    assert settings.given() == dict(cli_test_sizes=(1, 3, 12), cli_test_ratio=2.0, cli_test_on=True)
    assert settings.make() == Settings(3, 2.0, (1, 3, 12), True)
    assert flags.FLAGS["cli_test_ratio"].help == "Two numbers, on two lines [0.5]."
    assert flags.FLAGS["cli_test_sizes"].help == "`sizes` of parts [(4, 4)]."
    for wrong, words in {"--cli_test_sizes=1,x": "must be int values", "--cli_test_count=0": "must be >= 1"}.items():
        parse(wrong)
        with pytest.raises(InputError, match=f"{wrong.partition('=')[0]}=.*{words}"):
            settings.make()


@pytest.mark.parametrize("config_class", [SamplerConfig, CaptionConfig, EncodeConfig])
def test_every_setting_with_a_flag_is_described(config_class):
    assert config_flags.field_docs(config_class).keys() == {field.name for field in dataclasses.fields(config_class)}


@pytest.fixture
def chosen_weights(monkeypatch):
    """The flags of the weights as a command line gives them."""

    def parse(*args):
        values = flags.FlagValues()
        with monkeypatch.context() as patched:
            for name in ("DEFINE_string", "DEFINE_enum"):
                patched.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
            chosen = weights_flags.define()
        values(["command", *args])
        return chosen

    return parse


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), dict(weights=None, step=None)),
        (("--weights=model", "--step=12"), dict(weights="params", step=12)),
        (("--weights=params", "--step=best"), dict(weights="params", step="best")),
    ],
)
def test_weights_are_chosen_by_name_and_step(args, expected, chosen_weights):
    chosen = chosen_weights("--workdir=run", *args)
    assert chosen.values() == expected
    assert dataclasses.asdict(chosen.choice()) == {"workdir": "run", "checkpoint": None, **expected}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "workdir=None: give --workdir, or --checkpoint, and not both"),
        (("--workdir=a", "--checkpoint=b"), "workdir='a': give --workdir, or --checkpoint, and not both"),
        (("--checkpoint=b", "--weights=ema"), "weights='ema': a converted checkpoint has one set of weights"),
        (("--checkpoint=b", "--step=3"), "step=3: a converted checkpoint has one set of weights"),
        (("--workdir=a", "--step=newest"), "--step='newest': must be a step, or best"),
    ],
)
def test_weights_that_exclude_each_other_are_refused(args, words, chosen_weights):
    with pytest.raises(InputError) as error:
        chosen_weights(*args).choice()
    assert words in str(error.value)
