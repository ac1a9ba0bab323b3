"""Evaluation during training: the metric on the mesh, and the best checkpoint kept."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from compiled_programs import compiled_modules, content, listed_modules
from helpers import random_params, tiny_config, train_run
from host_reads import no_implicit_reads

from causalfusion_jax.checkpoints.checkpoint import Checkpoints
from causalfusion_jax.common import hardware, sharding
from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.pictures import to_uint8
from causalfusion_jax.config import experiment
from causalfusion_jax.config.slices import SliceJob
from causalfusion_jax.core.conditions import Condition
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.digit_pairs import digit_pairs
from causalfusion_jax.data.digits import digits
from causalfusion_jax.data.scores import is_better, metrics, pixel_metrics, score
from causalfusion_jax.data.tokenizers import END, make_tokenizer
from causalfusion_jax.evaluation import periodic
from causalfusion_jax.sampling.conditions import balanced_labels
from causalfusion_jax.sampling.generation import SamplingJob, generate_images, replicate
from causalfusion_jax.sampling.trained import from_run

TINY = dict(
    evaluation=dict(eval_every=4, num_images=18, sample_batch_size=8),
    checkpoint=dict(every=4, keep=1),
    logging=dict(every=50),
    sampling=dict(solver_steps=2),
    mesh=dict(data=2),
)
CONFIG = experiment.from_dict(tiny_config(**TINY))


@pytest.fixture
def two_devices(monkeypatch):
    """Two devices, which are enough for a split batch and compile faster."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding,
        "make_mesh",
        lambda config, devices=None: make_mesh(config, jax.devices()[:2] if devices is None else devices),
    )


def train(workdir, monkeypatch, steps, values):
    """Trains to `steps`; the evaluations give `values` one after the other. Returns the values that are left.

    Implicit host reads fail, as on an accelerator.
    """
    left = list(values)
    monkeypatch.setattr(periodic.scores, "score", lambda *args: {"accuracy": 0.5, "fd": left.pop(0)})
    changed = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps))
    with no_implicit_reads():
        train_run(changed, str(workdir))
    return left


def kept(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.steps(), checkpoints.best()


def test_the_best_and_the_latest_are_kept_across_restarts(tmp_path, tmp_path_factory, monkeypatch, two_devices, capsys):
    with compiled_modules(tmp_path_factory.mktemp("modules")) as started:
        assert train(tmp_path, monkeypatch, 12, [3.0, 1.0, 2.0]) == []
    # Every program with a matrix product is one that preflight compiles, instruction by instruction.
    job = SliceJob(CONFIG, hardware.topology("v5e:2x2"))
    listed = listed_modules(job, monkeypatch, jax.devices()[:2], "training", "evaluation")
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


def save(checkpoints, step, value=None, **settings):
    checkpoints.save(step, {"x": np.arange(3)}, position=0)
    if value is not None:
        checkpoints.record_evaluation(step, value, {"metric": "fd"} | settings)


def test_going_back_to_an_older_checkpoint_finds_its_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, value in {1: 5.0, 2: 6.0, 3: 7.0, 4: 2.0, 5: 3.0}.items():
        save(checkpoints, step, value)
    checkpoints.close()
    assert checkpoints.steps() == [5, 4]
    again = Checkpoints(tmp_path, keep=2)
    assert again.best(5)["step"] == 4
    save(again, 6)
    save(again, 7, -1.0)
    again.close()
    # The best one up to 6 is 4.
    assert again.steps() == [7, 6, 4] and again.best(6)["step"] == 4 and again.best()["step"] == 7
    shutil.rmtree(tmp_path / "checkpoints" / "7")
    again = Checkpoints(tmp_path, keep=2)
    again.go_back(6)
    assert again.best()["step"] == 4 and not again.is_evaluated(7, dict(metric="fd"))
    # Values under different settings are not compared.
    save(again, 8, 9.0, num_images=2)
    again.close()
    assert again.best()["step"] == 8


@pytest.mark.parametrize("metric", ["fd", "accuracy"])
def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path, metric):
    checkpoints, settings = Checkpoints(tmp_path), dict(metric=metric)
    assert not checkpoints.is_best(1, np.nan, settings)
    checkpoints.record_evaluation(1, np.nan, settings)
    for step, value in {2: 0.5, 3: np.nan}.items():
        assert checkpoints.is_best(step, value, settings) == (step == 2)
        save(checkpoints, step, value, metric=metric)
    checkpoints.close()
    assert checkpoints.best()["step"] == 2
    assert is_better(metric, 0.5, np.nan) and not is_better(metric, np.nan, 0.5)


def test_the_best_of_an_older_version_is_found_and_kept(tmp_path):
    """Older versions saved it in the checkpoint."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (4, 8):
        save(checkpoints, step, 1.0 * step)
    checkpoints.close()
    (tmp_path / "evaluations.json").unlink()
    data = tmp_path / "checkpoints" / "8" / "data" / "metadata"
    data.write_text(json.dumps({"position": 0, "best": {"step": 4, "value": 4.0, "of": dict(metric="fd")}}))
    assert Checkpoints(tmp_path, read_only=True).best(8)["step"] == 4
    again = Checkpoints(tmp_path, keep=1)
    again.go_back(8)
    save(again, 12, 5.0)
    again.close()
    assert again.steps() == [12, 4]


def test_the_evaluator_scores_the_samples(two_devices):
    mesh = sharding.make_mesh(CONFIG.mesh)
    params = random_params(CONFIG.transformer)
    labels = balanced_labels(18, 10)
    images = generate_images(SamplingJob(CONFIG, CONFIG.sampling, Condition(labels), batch_size=9), params)
    assert images.shape == (18, 8, 8, 1)
    evaluate = periodic.Evaluator(CONFIG, mesh)
    scores = evaluate(replicate(params, mesh.devices.ravel()))
    expected = score(CONFIG.data, images, labels)
    assert set(scores) == {"accuracy", "fd"}
    np.testing.assert_allclose(scores["fd"], expected["fd"], rtol=2e-2)


PAIRS = tiny_config(
    data=dict(source="digit_pairs", image_width=16, num_classes=100),
    text=dict(tokenizer="bytes", max_tokens=13),
    model=dict(class_dropout=1.0),
    evaluation=dict(eval_every=1, num_images=40, metric="accuracy"),
)


def evaluate_with(config, draw, monkeypatch):
    """The scores of an Evaluator whose images are `draw(labels, text)`."""
    monkeypatch.setattr(periodic, "generate_images", lambda job, params, progress: draw(*job.condition))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return periodic.Evaluator(config, mesh)({"w": np.zeros(1, np.float32)})


def test_models_of_text_are_evaluated_by_captions_and_no_class(monkeypatch):
    config = experiment.from_dict(PAIRS)
    held_out, decode = digit_pairs("held_out_digits"), make_tokenizer(config.text).decode
    of_caption = {held_out[i]["caption"]: held_out[i]["image"] for i in range(0, len(held_out), 50)}
    prompts = []

    def draw(labels, text):
        assert labels.tolist() == [100] * 40, "the class of training images without a class"
        prompts.extend(decode([int(token) for token in slots if token > END]) for slots in text)
        return np.stack([to_uint8(of_caption[prompt]) for prompt in prompts])

    scores = evaluate_with(config, draw, monkeypatch)
    assert set(scores) == {"accuracy", "left", "right"} and scores["accuracy"] > 0.9
    assert len(set(prompts)) > 20


def test_models_trained_without_classes_are_sampled_without(monkeypatch):
    values = tiny_config(model=dict(class_dropout=1.0), evaluation=dict(eval_every=1, num_images=30))
    seen = []

    def draw(labels, text):
        seen.append((labels, text))
        return to_uint8(digits("train").images[:30])

    scores = evaluate_with(experiment.from_dict(values), draw, monkeypatch)
    ((labels, text),) = seen
    assert labels.tolist() == [10] * 30 and text is None and set(scores) == {"fd"}


@pytest.mark.parametrize("data", [{}, PAIRS["data"], dict(source="moving_digits", image_size=16, frames=2)])
def test_every_declared_pixel_metric_is_measured_and_has_a_direction(data):
    data = DataConfig(**dict(source="digits") | data)
    longer = (2 * data.frames,) if data.frames > 1 else ()
    samples = np.zeros((4, *longer, *data.shape[-3:]), np.uint8)
    assert set(score(data, samples, np.zeros(4, int))) == set(pixel_metrics(data)) <= set(metrics())
    # Of no class in particular, what compares samples with their classes is left out.
    of_classes = {"accuracy", "accuracy_beyond", "left", "right"}
    assert all(metrics()[name].higher_is_better for name in of_classes)
    without = set(pixel_metrics(data)) - of_classes
    if without:
        assert set(score(data, samples, np.full(4, data.num_classes))) == without
    else:
        with pytest.raises(InputError, match="scored by their classes or prompts"):
            score(data, samples, np.full(4, data.num_classes))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        (dict(evaluation=dict(metric="fd"), **{k: PAIRS[k] for k in ("data", "text", "model")}), "metric"),
        (dict(evaluation=dict(metric="left", eval_every=1)), "metric"),
        (dict(evaluation=dict(metric="accuracy", eval_every=1), model=dict(class_dropout=1.0)), "metric"),
        (dict(evaluation=dict(metric="accuracy", eval_every=1), data=dict(source="arrays", path="x")), "metric"),
        (dict(evaluation=dict(metric="fid", inception="no", reference="no.npz", eval_every=1)), "reference"),
        (dict(evaluation=dict(metric="inception_score", inception="no", eval_every=1)), "inception"),
        (dict(evaluation=dict(eval_every=1), data=dict(source="arrays", latents=True, path="x")), "vae"),
        (dict(evaluation=dict(eval_every=1, vae="no")), "vae"),
    ],
)  # fmt: skip
def test_evaluations_that_cannot_run_are_refused_first(sections, field):
    config = experiment.from_dict(tiny_config(**sections))
    with pytest.raises(InputError) as error:
        periodic.Evaluator(config, sharding.make_mesh(config.mesh))
    assert error.value.field == f"config.evaluation.{field}"
