"""Classifiers of features: that they learn, and nearest neighbours against a loop."""

import dataclasses

import numpy as np
import pytest

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.common.heat_map import Panel, color, heat_map
from causalfusion_jax.config.probe import FinetuneConfig, ProbeConfig
from causalfusion_jax.evaluation import probe


def clusters(num, seed, dim=12, classes=7, noise=1.0):
    """Features around one centre a class, far from the origin, of scales that differ a thousandfold."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim)) * 1.5
    labels = rng.integers(0, classes, num).astype(np.int32)
    values = centres[labels] + noise * rng.standard_normal((num, dim))
    scales = np.logspace(-2, 1, dim)
    return (scales * (values + 5.0)).astype(np.float32), labels


@pytest.mark.parametrize("optimizer", [
    dict(optimizer="adamw", learning_rate=1e-2), dict(optimizer="lars", learning_rate=8.0),
    dict(optimizer="adamw", learning_rate=1e-2, weight_decay=0.1),
])  # fmt: skip
def test_linear_probe_learns(optimizer):
    settings = ProbeConfig(epochs=25, batch_size=64, warmup_epochs=2.0, **optimizer)
    data = probe.Classified(*clusters(500, 0), *clusters(400, 1), 7)
    accuracies = data.linear(settings)
    assert set(accuracies) == {"top1", "top5"} and accuracies["top5"] >= accuracies["top1"] > 0.85
    # Labels that have nothing to do with the features cannot be learned.
    shuffled = dataclasses.replace(data, labels=np.random.default_rng(5).permutation(data.labels))
    assert shuffled.linear(settings)["top1"] < 0.45


def test_weight_decay_makes_weights_smaller_and_seeds_repeat():
    features, labels = clusters(300, 0)
    fit = lambda **changes: probe.fit_linear(
        ProbeConfig(epochs=20, batch_size=100, warmup_epochs=0.0, **changes), features, labels, 7
    ).weights["kernel"]
    size = lambda kernel: float(np.linalg.norm(kernel))
    assert size(fit(weight_decay=10.0)) < 0.5 * size(fit())
    np.testing.assert_array_equal(fit(), fit(neighbours=3))
    assert not np.array_equal(fit(), fit(seed=1))


def test_neighbours_against_a_loop(monkeypatch):
    monkeypatch.setattr(probe, "NEIGHBOUR_CHUNK", 37)
    monkeypatch.setattr(probe, "QUERY_CHUNK", 11)
    settings = ProbeConfig(neighbours=5, temperature=0.2)
    (known, labels), (queries, _) = clusters(120, 0), clusters(30, 1)
    votes = probe.vote(settings, known, labels, queries, 7)
    for query, vote in zip(queries.astype(np.float64), votes, strict=True):
        similar = [float(k @ query / np.linalg.norm(k) / np.linalg.norm(query)) for k in known.astype(np.float64)]
        expected = np.zeros(7)
        for i in sorted(range(120), key=lambda i: -similar[i])[:5]:
            expected[labels[i]] += np.exp(similar[i] / 0.2)
        np.testing.assert_allclose(vote, expected / expected.sum(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="config.probe.neighbours=121"):
        probe.vote(dataclasses.replace(settings, neighbours=121), known, labels, queries, 7)


def test_neighbours_classify_clusters():
    data = probe.Classified(*clusters(500, 0), *clusters(400, 1), 7)
    assert data.knn(ProbeConfig())["top1"] > 0.85


def test_top_accuracies():
    scores = np.array([[5, 4, 3, 2, 1, 0.0]] * 6)
    assert probe.top_accuracies(scores, np.arange(6)) == {"top1": 1 / 6, "top5": 5 / 6}
    assert probe.top_accuracies(scores[:, :5], np.array([0, 0, 0, 1, 2, 3])) == {"top1": 0.5}
    for nothing in (np.zeros((6, 6)), np.full((6, 6), np.nan)):
        assert probe.top_accuracies(nothing, np.arange(6)) == {"top1": 0.0, "top5": 0.0}


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (ProbeConfig, dict(tokens="clear"), "tokens"), (ProbeConfig, dict(noise_level=1.5), "noise_level"),
        (ProbeConfig, dict(optimizer="larz"), "optimizer"), (ProbeConfig, dict(warmup_epochs=100.0), "warmup_epochs"),
        (ProbeConfig, dict(temperature=0.0), "temperature"), (ProbeConfig, dict(layer=-1), "layer"),
        (ProbeConfig, dict(map_noise_levels=(0.1, "a")), "map_noise_levels"),
        (FinetuneConfig, dict(drop_path=1.0), "drop_path"), (FinetuneConfig, dict(layer_decay=0.0), "layer_decay"),
        (FinetuneConfig, dict(crop_area=0.0), "crop_area"), (FinetuneConfig, dict(mixup=-1.0), "mixup"),
        (FinetuneConfig, dict(batch_size=1), "batch_size"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(cls, values, field):
    with pytest.raises(InputError) as error:
        cls(**values)
    assert error.value.field == field


def test_heat_map_shows_the_values():
    values = np.linspace(0.2, 0.9, 6).reshape(2, 3)
    picture = heat_map([Panel("a", values), Panel("b", values[::-1])], ["1", "2"], ["x", "y", "z"], "layer", "noise")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    shown = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert {color(value, 0.2, 0.9) for value in values.ravel()} <= shown
    brightness = [sum(color(value, 0.0, 1.0)) for value in np.linspace(0, 1, 11)]
    assert brightness == sorted(brightness) and color(0.5, 0.5, 0.5) == color(0.0, 0.0, 1.0)
