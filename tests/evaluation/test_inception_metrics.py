"""Inception's metrics in one pass, sharded, against the functions on whole arrays; references in ADM's layout."""

import dataclasses
import time
import warnings

import jax
import numpy as np
import pytest
import scipy.linalg
from helpers import GOLDENS
from PIL import Image
from tiny_data import write_inception

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config.evaluation import EvaluationConfig
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.registry import make_source
from causalfusion_jax.data.scores import is_better, measurable, metrics
from causalfusion_jax.evaluation.images import images_of_source, open_images
from causalfusion_jax.evaluation.inception_metrics import (
    Collected,
    Inception,
    Reference,
    bias_warning,
    check_counts,
    compute,
    make_reference,
)
from causalfusion_jax.metrics import distribution
from causalfusion_jax.metrics.registry import FEATURE_METRICS, POOLED_FEATURES, POOLED_STATISTICS, Metric
from causalfusion_jax.models import i3d

INCEPTION_METRICS = [name for name, metric in FEATURE_METRICS.items() if metric.network == "inception"]
GOLDEN = np.load(GOLDENS / "inception_fid.npz")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The goldens' network on two devices, two images each."""
    folder = write_inception(tmp_path_factory.mktemp("inception") / "converted")
    return Inception("--inception", folder, jax.devices()[:2], batch_size=3)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two sets of grey gradients with noise, [num, 16, 16, 3]: `generated` and `real`."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("samples")
    for name, num in {"generated": 9, "real": 10}.items():
        slope = rng.uniform(0, 12, (num, 16, 1, 1)) * np.arange(16)[:, None]
        images = np.clip(slope + rng.normal(0, 30, (num, 16, 16, 3)), 0, 255).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images, np.zeros(num, np.int32))
    return folder


@pytest.fixture(scope="module")
def reference(samples, inception):
    make_reference(open_images("--samples", samples / "real.npz"), inception, samples / "reference.npz", 6)
    return samples / "reference.npz"


def features(inception, images, names=("2048", "spatial", "logits_unbiased")):
    batches = list(inception.of(images, names))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


def relative_error(ours, golden):
    return np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden)


def test_goldens_on_two_devices(inception):
    images = np.moveaxis(GOLDEN["noise/images_nchw_uint8"], 1, -1)
    # Five images in batches of four: what fills up the last one does not show.
    all_features = features(inception, images[[0, 1, 0, 1, 0]], ("192", "2048", "logits"))
    for name, values in all_features.items():
        assert relative_error(values, GOLDEN[f"noise/{name}"][[0, 1, 0, 1, 0]]) < 1e-4, name


def test_reference_has_adms_layout(samples, inception, reference):
    real = np.load(samples / "real.npz")["arr_0"]
    values = features(inception, real)
    with np.load(reference) as arrays:
        assert sorted(arrays) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        for name, (mean, cov) in {"2048": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
            np.testing.assert_allclose(arrays[mean], values[name].mean(axis=0, dtype=np.float64), rtol=1e-5)
            expected = np.cov(values[name].astype(np.float64), rowvar=False)
            assert relative_error(arrays[cov], expected) < 1e-6
        kept = arrays["arr_0"]
    assert kept.shape == (6, 16, 16, 3) and kept.dtype == np.uint8
    indices = [next(i for i in range(10) if (real[i] == image).all()) for image in kept]
    assert indices == sorted(set(indices))


def test_metrics_in_one_pass_are_those_of_whole_arrays(samples, inception, reference):
    images = open_images("--samples", samples / "generated.npz")
    collected = Collected(INCEPTION_METRICS)
    seen = []
    collected.add_all(inception.features(images.batches, collected.names), seen.append)
    assert seen == [4, 8, 9]
    opened = Reference("--reference", str(reference))
    opened.prepare(INCEPTION_METRICS, inception)
    scores = compute(INCEPTION_METRICS, collected, opened)

    with np.load(reference) as arrays:
        real = features(inception, arrays["arr_0"], ("2048",))["2048"]
        statistics = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    ours = features(inception, np.load(samples / "generated.npz")["arr_0"])
    score = distribution.inception_score(ours["logits_unbiased"], splits=1)
    expected = {"inception_score": score[0], "inception_score_std": 0.0, "kid_subset_size": 6}
    for metric, name, suffix in (("fid", "2048", ""), ("sfid", "spatial", "_s")):
        x = ours[name].astype(np.float64)
        expected[metric] = distribution.frechet_from_statistics(
            x.mean(axis=0), np.cov(x, rowvar=False), statistics[f"mu{suffix}"], statistics[f"sigma{suffix}"]
        )
    expected |= distribution.precision_recall(real, ours["2048"])
    expected["kid"], expected["kid_std"] = distribution.kernel_inception_distance(ours["2048"], real, subset_size=6)
    del expected["f_score"]
    assert set(scores) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    assert scores["fid"] > 1e-3 and scores["sfid"] > 1e-3 and scores["inception_score"] > 1


def test_reference_of_images_alone_and_of_statistics_alone(tmp_path, samples, inception, reference):
    with np.load(samples / "real.npz") as arrays:
        np.savez(tmp_path / "images.npz", arr_0=arrays["arr_0"])
    images = Reference("--reference", str(tmp_path / "images.npz"))
    images.prepare(["fid", "kid"], inception)
    with np.load(reference) as arrays:
        assert relative_error(images[POOLED_STATISTICS].cov, arrays["sigma"]) < 1e-6
        np.savez(tmp_path / "statistics.npz", **{name: arrays[name] for name in arrays if name != "arr_0"})
        np.savez(tmp_path / "half.npz", mu=arrays["mu"])
        np.savez(tmp_path / "wrong.npz", **{name: arrays[name][:5] for name in arrays if name != "arr_0"})
    assert images[POOLED_FEATURES].features.shape == (10, 2048)
    statistics = Reference("--reference", str(tmp_path / "statistics.npz"))
    assert statistics.supports("sfid") and not statistics.supports("kid")
    with pytest.raises(InputError, match="has no images .* which kid needs"):
        statistics.prepare(["kid"], inception)
    with pytest.raises(InputError, match="has neither sigma nor images"):
        Reference("--reference", str(tmp_path / "half.npz"))
    with pytest.raises(InputError, match=r"mu must be finite \[2048\]"):
        Reference("--reference", str(tmp_path / "wrong.npz")).prepare(["fid"], inception)
    small = Reference("--reference", str(tmp_path / "images.npz"))
    with pytest.raises(InputError, match="at least 4 images"):
        check_counts("--samples", ["precision"], 3, small)


def test_images_of_folders_and_data(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"class{i % 2}" / f"{i}.png")
    folder = open_images("--samples", str(tmp_path / "images"))
    assert (folder.num, folder.shape) == (5, (6, 6, 3))
    in_order = pixels[[0, 2, 4, 1, 3]]
    for size in (1, 2, 9):
        np.testing.assert_array_equal(np.concatenate(list(folder.batches(size))), in_order)
    data = DataConfig(source="image_folder", path=str(tmp_path / "images"), image_size=6, channels=3, num_classes=2)
    source = images_of_source("config.data", make_source(data))
    np.testing.assert_array_equal(np.concatenate(list(source.batches(3))), in_order)
    Image.fromarray(pixels[0, :3]).save(tmp_path / "images" / "class0" / "other.png")
    with pytest.raises(InputError, match="other.png.*crop them alike"):
        list(open_images("--samples", str(tmp_path / "images")).batches(9))
    np.savez(tmp_path / "latents.npz", np.zeros((3, 4, 4, 4), np.float32))
    with pytest.raises(InputError, match="latents; sample with --vae"):
        open_images("--samples", str(tmp_path / "latents.npz"))
    (tmp_path / "half" / "parts").mkdir(parents=True)
    with pytest.raises(InputError, match="not complete"):
        open_images("--samples", str(tmp_path / "half"))


def test_summaries_have_the_dimensions_of_the_networks_features(inception):
    images = np.zeros((1, 16, 16, 3), np.uint8)
    of_inception = {name: values.shape[1] for name, values in features(inception, images).items()}
    summaries = [metric.summary for metric in FEATURE_METRICS.values()]
    assert {summary.feature for summary in summaries} == {*of_inception, "i3d_logits"}
    dims = of_inception | {"i3d_logits": i3d.LOGITS}
    assert all(summary.dim == dims[summary.feature] for summary in summaries)


def test_a_metric_is_one_entry(monkeypatch, samples, inception, reference):
    """A mean of pooled features, and what it adds beside it; it needs a reference and its images."""
    closeness = Metric(
        "closeness",
        "correlation of mean features",
        higher_is_better=True,
        network="inception",
        reference="images",
        summary=POOLED_FEATURES,
        compute=lambda ours, real: {
            "closeness": float(np.corrcoef(ours.features.mean(0), real.features.mean(0))[0, 1]),
            "closeness_num": len(ours.features),
        },
        min_samples=8,
        published_samples=100,
    )
    monkeypatch.setitem(FEATURE_METRICS, "closeness", closeness)
    assert is_better("closeness", 0.2, 0.1) and "closeness" in measurable(DataConfig())
    settings = EvaluationConfig(eval_every=1, metric="closeness", inception="x", reference="y")
    assert settings.needs_inception
    with pytest.raises(InputError, match="metric closeness needs it"):
        dataclasses.replace(settings, reference="")
    images, opened = open_images("--samples", samples / "generated.npz"), Reference("--reference", str(reference))
    with pytest.raises(InputError, match="need at least 8 images"):
        check_counts("--samples", ["closeness"], 7, None)
    with pytest.raises(InputError, match="=6: need at least 8 images"):
        check_counts("--samples", ["closeness"], 9, opened)
    assert "closeness of 9 images is biased: published values are of 100" in bias_warning(["closeness"], 9)
    opened.prepare(["closeness"], inception)
    collected = Collected(["closeness"])
    collected.add_all(inception.features(images.batches, collected.names))
    scores = compute(["closeness"], collected, opened)
    assert list(scores) == ["closeness", "closeness_num"] and scores["closeness_num"] == 9
    assert 0.5 < scores["closeness"] < 1


def test_small_samples_are_called_biased():
    assert bias_warning(["kid"], 10) is None and bias_warning(metrics(), 50_000) is None
    assert "singular" in bias_warning(["fid"], 2048) and "singular" not in bias_warning(["fid"], 2049)
    assert "singular" not in bias_warning(["precision"], 100)


def test_settings():
    assert is_better("fid", 1.0, 2.0) and not is_better("fid", 2.0, 2.0) and is_better("accuracy", 0.9, 0.8)
    assert not is_better("fd", float("nan"), 1.0) and not is_better("recall", float("nan"), 0.0)
    with pytest.raises(InputError, match="did you mean precision"):
        EvaluationConfig(metric="precison")
    with pytest.raises(InputError, match="inception"):
        EvaluationConfig(eval_every=1, metric="fid")
    settings = EvaluationConfig(eval_every=1, metric="inception_score", inception="x")
    with pytest.raises(InputError, match="reference"):
        dataclasses.replace(settings, metric="kid")


def test_rank_deficient_covariances_give_real_numbers():
    """Few samples in many dimensions: the distance is that of the subspace they span."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)), 1 + rng.normal(size=(150, 12))
    axes = np.linalg.qr(rng.normal(size=(300, 300)))[0][:12]
    cross = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * cross)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = (distribution.FeatureStatistics.of(z @ axes) for z in (a, b))
        distance = distribution.frechet_from_statistics(x.mean, x.cov, y.mean, y.cov)
        assert abs(distribution.frechet_from_statistics(x.mean, x.cov, x.mean, x.cov)) < 1e-4
    assert isinstance(distance, float)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2048, 500])
def test_fid_of_5000_features(rank):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(rank, 2048)).astype(np.float32)
    a, b = (rng.normal(size=(5000, rank)).astype(np.float32) @ mix for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = time.perf_counter()
        x, y = distribution.FeatureStatistics.of(a), distribution.FeatureStatistics.of(b)
        distance = distribution.frechet_from_statistics(x.mean, x.cov, y.mean, y.cov)
        print(f"rank {rank}: {distance:.3f} in {time.perf_counter() - start:.1f} s")
    assert np.isfinite(distance) and distance > 0
