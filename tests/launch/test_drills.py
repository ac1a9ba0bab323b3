"""The drills: how they judge, when their moments come, and what damage is detected."""

import json
import os
import random
import sys

import jax.numpy as jnp
import pytest
from helpers import ROOT, run_python

from causalfusion_jax.checkpoints.checkpoint import Checkpoints

sys.path.insert(0, str(ROOT / "launch" / "drills"))
import damage
import disk
import drill
import kill
import moments


@pytest.mark.parametrize(("reached", "resumed", "lost"), [(7, 4, 0), (8, 0, 4), (8, 4, 0), (9, 4, 4), (0, 0, 0)])
def test_lost_are_the_steps_up_to_the_newest_checkpoint_that_was_begun(reached, resumed, lost):
    assert drill.lost_steps(reached, resumed, every=4) == lost


def test_the_last_line_of_a_step_counts_without_its_times():
    lines = [
        '{"step": 1, "loss": 2.0, "steps_per_second": 5.0}',
        '{"step": 1, "evaluation/fd": 3.0}',
        '{"step": 1, "loss": 1.0, "steps_per_second": 9.0}',
        '{"step": 2, "lo',
    ]
    metrics = drill.metrics_of(lines)
    assert metrics["training of step 1"] == {"step": 1, "loss": 1.0}
    assert metrics["evaluation of step 1"] == {"step": 1, "evaluation/fd": 3.0}
    assert "broken line 4 of the metrics" in metrics


def test_ends_differ_in_what_one_lacks_or_has_otherwise():
    assert drill.differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 3}) == ["b", "c", "d"]
    assert drill.differences({"a": 1}, {"a": 1}) == []


def test_where_a_process_started_is_read_from_its_first_line():
    assert drill.started_at("warning\nresuming runs/at step 3 at step 12: 5 parameters\n") == 12
    assert drill.started_at("training in runs/a: 5 parameters\n") == 0
    assert drill.started_at("runs/a is already trained to step 24\n") == 24
    assert drill.started_at("error: nothing\n") is None


def test_every_moment_is_tried_with_both_signals_and_numbers_of_checkpoints():
    kills = kill.all_kills(4 * len(kill.MOMENTS))
    assert len({(k.moment, k.signal, k.keep) for k in kills}) == len(kills) == 4 * len(kill.MOMENTS)


def outcome(**changes):
    kill_of_run = dict(run=1, moment="in a grid", signal="SIGTERM", keep=1, status=75)
    return kill_of_run | dict(survived=True, error="", lost=0, repeated=0, identical=True, differs=[]) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None), ({"status": -15}, None), ({"signal": "SIGKILL", "status": -9, "lost": 4, "repeated": 7}, None),
        ({"survived": False, "error": "x\nno checkpoint\n"}, "not continued: no checkpoint"),
        ({"status": -15, "lost": 5, "repeated": 5}, "5 steps lost"), ({"repeated": 1}, "said it was saved"),
        ({"identical": False, "differs": ["array.ema"]}, "array.ema"), ({"status": 1}, "status 1"),
    ],
)  # fmt: skip
def test_a_kill_misses_the_goal_by_each_of_its_conditions(changes, words):
    failures = kill.failures_of([outcome(**changes)])
    assert (words is None and not failures) or words in failures[0]


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("error: /d/train/x: No space left on device; run again\n", ""),
        ("Traceback (most recent call last):\n", "a traceback"), ("step 4\n", "no line of error"),
        ("error: /d/train/x: it failed\n", "the reason is not said"),
        ("error: No space left on device\n", "the file is not named"),
    ],
)  # fmt: skip
def test_a_failed_command_must_name_file_and_reason_in_one_line(output, wrong):
    assert disk.judged(output, "no space left", "/d/train") == wrong


def test_a_moment_comes_at_its_event_and_count():
    fired = []
    hook = moments.audit_hook(moments.COMMIT, 2, lambda *_: fired.append(1))
    rename = lambda target: hook("os.rename", ("from", target, -1, -1))
    for target in ("/run/checkpoints/4/state", "/run/checkpoints/4", "/run/manifests/4"):
        rename(target)
        assert not fired
    hook("open", ("/run/checkpoints/8", "w", os.O_WRONLY))
    assert not fired
    rename("/run/checkpoints/8")
    rename("/run/checkpoints/12")
    assert fired == [1]


def test_reading_a_file_is_no_moment_of_writing_it():
    fired = []
    hook = moments.audit_hook(moments.MANIFEST, 1, lambda *_: fired.append(1))
    hook("open", ("/run/manifests/4/0.json", "r", os.O_RDONLY))
    assert not fired
    hook("open", ("/run/manifests/4/.0.json.part", "w", os.O_WRONLY))
    assert fired


def test_only_the_file_that_is_written_at_the_moment_is_cut_to_half(tmp_path, capfd):
    begin = moments.at(moments.HALF_MANIFEST, 2, lambda: None)
    parts = [tmp_path / "manifests" / str(step) / ".0.json.part" for step in (4, 8)]
    with pytest.MonkeyPatch.context() as patched:
        hooks = []
        patched.setattr(sys, "addaudithook", hooks.append)
        begin()
    for part in parts:
        part.parent.mkdir(parents=True)
        part.write_bytes(b"12345678")
        hooks[0]("os.rename", (str(part), str(part.with_name("0.json")), -1, -1))
    assert [part.read_bytes() for part in parts] == [b"12345678", b"1234"]
    assert moments.FIRED in capfd.readouterr().out


def test_deletion_is_interrupted_after_some_files():
    fired = []
    hook = moments.audit_hook(moments.DELETION, 1, lambda *_: fired.append(1))
    hook("os.remove", ("before", -1))
    hook("shutil.rmtree", ("/run/checkpoints/4", None))
    for i in range(moments.DELETION.files_removed):
        assert not fired
        hook("os.remove", (str(i), 7))
    assert fired == [1]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with two small checkpoints, and the cases of damage to the newer one."""
    workdir = tmp_path_factory.mktemp("damage")
    checkpoints = Checkpoints(workdir)
    for step in (4, 8):
        checkpoints.save(step, {"a": jnp.arange(8.0) + step, "b": jnp.zeros(3)}, position=step)
    checkpoints.close()
    return workdir, damage.cases(workdir)


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_damage_to_any_file_of_a_step_is_detected(two_steps, name):
    workdir, cases = two_steps
    mine = [case for case in cases if case[0] == name]
    assert any(case[1].parts[0] == "manifests" for case in mine) and len(mine) >= 5
    for _, path, older, other in mine:
        before = {changed: (workdir / changed).read_bytes() for changed in (path, other)}
        damage.DAMAGES[name](workdir / path, workdir / older, workdir / other, random.Random(0))
        assert not drill.is_intact(workdir, 8), path
        for changed, content in before.items():
            (workdir / changed).write_bytes(content)
    assert drill.is_intact(workdir, 8) and drill.is_intact(workdir, 4)


def test_no_flipped_bit_of_a_manifest_goes_undetected(two_steps):
    workdir, _ = two_steps
    assert damage.undetected_bits(workdir, 8, 300, random.Random(0)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("kill.py", "--kills=4"), ("damage.py", "--files=3", "--manifest_bits=20"),
        ("disk.py", "--errors=file too large", "--commands=sample"),
    ],
    ids=lambda args: args[0],
)  # fmt: skip
def test_a_small_drill_meets_its_goal(tmp_path, args):
    script, *flags = args
    done = run_python(f"launch/drills/{script}", f"--out={tmp_path / 'out'}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["met"]
