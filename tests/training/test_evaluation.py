"""Evaluation during training: the metric on the mesh, and the best checkpoint kept."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from compiled_programs import compiled_modules, content, listed_modules
from helpers import random_params, tiny_config

from causalfusion_jax import experiment, hardware, sharding
from causalfusion_jax.compile_ahead.program import Spec
from causalfusion_jax.errors import InputError
from causalfusion_jax.evaluation import periodic
from causalfusion_jax.evaluation.scores import score
from causalfusion_jax.sampling.generation import generate_images, replicate
from causalfusion_jax.sampling.images import balanced_labels
from causalfusion_jax.sampling.trained import from_run
from causalfusion_jax.training import loop
from causalfusion_jax.training.checkpoint import CheckpointConfig, Checkpoints

TINY = dict(
    evaluation=dict(eval_every=4, num_images=18, sample_batch_size=8), checkpoint=dict(every=4, keep=1),
    logging=dict(every=50), sampling=dict(solver_steps=2), mesh=dict(data=2),
)
CONFIG = experiment.from_dict(tiny_config(**TINY))


@pytest.fixture
def two_devices(monkeypatch):
    """Only two devices to share a batch, which is enough and compiles faster."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh",
        lambda config, devices=None: make_mesh(config, jax.devices()[:2] if devices is None else devices),
    )


def train(workdir, monkeypatch, steps, values):
    """Trains to `steps`, evaluations giving `values` one after the other. Returns those that were not taken."""
    left = list(values)
    monkeypatch.setattr(periodic.scores, "score", lambda *args: {"accuracy": 0.5, "fd": left.pop(0)})
    changed = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps))
    loop.train(changed, str(workdir))
    return left


def kept(workdir):
    checkpoints = Checkpoints(workdir, CheckpointConfig(), read_only=True)
    return checkpoints.steps(), checkpoints.best()


def test_the_best_is_kept_beside_the_latest_across_restarts(
    tmp_path, tmp_path_factory, monkeypatch, two_devices, capsys
):
    with compiled_modules(tmp_path_factory.mktemp("modules")) as started:
        assert train(tmp_path, monkeypatch, 12, [3.0, 1.0, 2.0]) == []
    # Whatever multiplies matrices is a program that preflight compiles ahead, to the last instruction.
    spec = Spec(CONFIG, hardware.topology("v5e:2x2"))
    listed = listed_modules(spec, monkeypatch, jax.devices()[:2], "training", "evaluation")
    assert set(listed) == {"training step", "evaluation sampler"}
    assert content(listed["training step"]) in map(content, started)
    assert set(map(content, started)) <= set(map(content, listed.values()))
    steps, best = kept(tmp_path)
    assert steps == [12, 8] and (best["step"], best["value"]) == (8, 1.0)
    assert "evaluated step 8: accuracy 0.5  fd 1  (best so far)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["evaluation/fd"] for line in lines if "evaluation/fd" in line}
    assert scores == {4: 3.0, 8: 1.0, 12: 2.0}
    assert from_run(str(tmp_path), step="best").origin["step"] == 8
    assert from_run(str(tmp_path)).origin["step"] == 12

    train(tmp_path, monkeypatch, 16, [1.5])
    assert kept(tmp_path)[0] == [16, 8]
    assert from_run(str(tmp_path), step="best").origin["step"] == 8
    train(tmp_path, monkeypatch, 24, [0.5, 0.7])
    steps, best = kept(tmp_path)
    assert steps == [24, 20] and (best["step"], best["value"]) == (20, 0.5)


def test_going_back_to_an_older_checkpoint_finds_its_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    state = {"x": np.arange(3)}
    best = {1: 1, 2: 1, 3: 1, 4: 4, 5: 4}
    for step, of in best.items():
        checkpoints.save(step, state, position=0, best={"step": of, "value": 0.0, "of": {}})
    checkpoints.wait()
    assert checkpoints.steps() == [5, 4]
    checkpoints.close()
    again = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    assert again.best(5)["step"] == 4
    again.save(6, state, position=0, best={"step": 4, "value": 0.0, "of": {}})
    again.save(7, state, position=0, best={"step": 7, "value": -1.0, "of": {}})
    again.wait()
    # 6 was saved when 4 was the best.
    assert again.steps() == [7, 6, 4] and again.best(6)["step"] == 4 and again.best()["step"] == 7
    again.close()


def test_evaluator_scores_what_is_sampled(two_devices):
    mesh = sharding.make_mesh(CONFIG.mesh)
    params = random_params(CONFIG.transformer)
    labels = balanced_labels(18, 10)
    images = generate_images(CONFIG, CONFIG.sampling, params, labels, seed=0, batch_size=9)
    assert images.shape == (18, 8, 8, 1)
    evaluate = periodic.Evaluator(CONFIG, mesh)
    scores = evaluate(replicate(params, mesh.devices.ravel()))
    expected = score(CONFIG.data, images, labels)
    assert set(scores) == {"accuracy", "fd"}
    np.testing.assert_allclose(scores["fd"], expected["fd"], rtol=2e-2)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        (dict(evaluation=dict(metric="accuracy", eval_every=1), data=dict(source="arrays", path="x")), "metric"),
        (dict(evaluation=dict(metric="fid", inception="no", reference="no.npz", eval_every=1)), "reference"),
        (dict(evaluation=dict(metric="inception_score", inception="no", eval_every=1)), "inception"),
        (dict(evaluation=dict(eval_every=1), data=dict(source="arrays", latents=True, path="x")), "vae"),
        (dict(evaluation=dict(eval_every=1, vae="no")), "vae"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_first(sections, field):
    config = experiment.from_dict(tiny_config(**sections))
    with pytest.raises(InputError) as error:
        periodic.Evaluator(config, sharding.make_mesh(config.mesh))
    assert error.value.field == f"config.evaluation.{field}"
