"""The table of a sweep: which scores are gathered, sorted and marked."""

import pytest
from helpers import expanded, finish_run

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.workdir import measured_settings
from causalfusion_jax.sweeps import results as sweep_results
from causalfusion_jax.sweeps.results import Result
from causalfusion_jax.sweeps.sweep import Sweep, grid, with_metric

GAMMA, SEED = "factorization.gamma", "train.seed"


def test_results():
    sweep = Sweep("configs/digits.py", grid({GAMMA: [1.0, 0.9, 0.8]}), ar_steps=(1, 4), metric="fd")
    one, two, three = expanded(sweep.overrides)
    scores = {one: {1: (0.5, 2.0), 4: (0.9, 3.0)}, two: {1: (0.75, 1.5)}}
    named = {run: {s: dict(accuracy=a, fd=fd) for s, (a, fd) in at.items()} for run, at in scores.items()}
    results = sweep_results.sort(
        sweep, [Result(three, "failed", {}), *(Result(r, "finished", named[r]) for r in named)]
    )
    assert [result.run.name for result in results] == ["gamma=0.9", "gamma=1.0", "gamma=0.8"]
    header, *_, first, second, third = sweep_results.markdown(sweep, results).splitlines()
    assert header == "| gamma | fd S=1 | fd S=4 | accuracy S=1 | accuracy S=4 | state |"
    assert first == "| 0.9 | **1.500** |  | **0.750** |  | finished |"
    assert second == "| 1.0 | 2.000 | **3.000** | 0.500 | **0.900** | finished |"
    assert third == "| 0.8 |  |  |  |  | failed |"
    assert sweep_results.csv_text(sweep, results).splitlines()[1] == "gamma=0.9,0.9,1.5,,0.75,,finished"
    figure = sweep_results.chart(sweep, results)
    assert [axes.get_title() for axes in figure.axes] == ["fd", "accuracy"]
    assert [list(line.get_ydata()[:1]) for line in figure.axes[0].get_lines()] == [[1.5], [2.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gamma=0.9", "gamma=1.0"]
    same = [Result(one, "finished", {1: dict(fd=2.0)})]
    (axes,) = sweep_results.chart(Sweep("", grid({GAMMA: [1.0]})), same).axes
    assert axes.get_title() == "fd" and axes.get_xlabel() == "AR steps S"


def test_the_best_of_every_score_is_marked_by_its_own_direction():
    sweep = Sweep("", grid({SEED: [0, 1]}), metric="left")
    higher = dict(left=0.9, right=0.8, accuracy_beyond=0.7, motion_error_beyond=2.0)
    lower = dict(left=0.5, right=0.4, accuracy_beyond=0.3, motion_error_beyond=1.0)
    low, high = (
        Result(run, "finished", {1: s}) for run, s in zip(expanded(sweep.overrides), (lower, higher), strict=True)
    )
    results = sweep_results.sort(sweep, [low, high])
    assert results == [high, low]
    table = sweep_results.markdown(sweep, results)
    for best in ("**0.900**", "**0.800**", "**0.700**", "**1.000**"):
        assert best in table
    assert table.count("**") == 8


def test_only_scores_are_gathered(tmp_path):
    sweep = Sweep("", ({},), metric="fvd")
    (run,) = expanded(sweep.overrides)
    finish_run(tmp_path, sweep, run, num=2048, frames=16, resize="tf1", fvd=99.5)
    (result,) = sweep_results.gather(sweep, [run], tmp_path, {})
    assert result.scores == {1: {"fvd": 99.5}} and result.state == "finished"


def test_scores_of_other_settings_are_not_gathered(tmp_path):
    sweep = Sweep("", ({},))
    (run,) = expanded(sweep.overrides)
    finish_run(tmp_path, sweep, run, fd=1.0)
    # What scores do not depend on may differ.
    (same,) = expanded(sweep.overrides, fixed={"data.workers": 2, "logging.every": 7, "model.remat": "full"})
    assert sweep_results.gather(sweep, [same], tmp_path, {})[0].score("fd", 1) == 1.0
    assert "text.checksum" not in measured_settings(run.config)
    for path, value in {"train.batch_size": 16, "sampling.solver_steps": 9}.items():
        (other,) = expanded(sweep.overrides, fixed={path: value})
        with pytest.raises(InputError, match=rf"trained by other settings \({path} \d+, now {value}\)"):
            sweep_results.gather(sweep, [other], tmp_path, {})
    (tmp_path / run.name / "config.json").unlink()
    with pytest.raises(InputError, match="has scores and no config.json"):
        sweep_results.gather(sweep, [run], tmp_path, {})


def test_a_metric_that_the_data_do_not_have_is_refused():
    with pytest.raises(InputError, match="metric='fvd'.*must be one of fd, accuracy, fid"):
        with_metric(Sweep("", ({},), metric="fvd"), expanded(({},)))
