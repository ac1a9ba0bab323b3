"""A data source is one entry: pipeline, training, scores and settings follow from it."""

import json

import numpy as np
import pytest
from helpers import tiny_config, train_run

from causalfusion_jax.common.errors import InputError
from causalfusion_jax.config import experiment
from causalfusion_jax.data import registry, scores
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.pipeline import BatchIterator, host_batches
from causalfusion_jax.data.source import DataSettings, HeldOutCaptions, PixelScores, SourceKind
from causalfusion_jax.data.tokenizers import TextConfig, from_slots
from causalfusion_jax.metrics.registry import Metric


class Stripes:
    """Rows (class 0) or columns (class 1) of light on dark."""

    num_classes, class_names = 2, ("rows", "columns")

    def __init__(self, num: int, captions: bool = False):
        self._num, self._captions = num, captions

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> dict:
        label = index % 2
        image = np.full((4, 4, 1), -1.0, np.float32)
        image.swapaxes(0, label)[index // 2 % 4] = 1.0
        example = {"image": image, "label": np.int32(label)}
        return example | {"caption": self.class_names[label]} if self._captions else example


def count_stripes(settings: DataSettings, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How many images of each class have stripes of that class."""
    light = images.astype(float) > 127
    striped = [bool((image.std(axis=1 - label) == 0).all()) for image, label in zip(light, labels % 2, strict=True)]
    return {"striped": float(np.mean(striped)), "light": float(light.mean())}


STRIPED = Metric("striped", "share of images with stripes", higher_is_better=True, needs_classes=True)
LIGHT = Metric("light", "share of light pixels")
STRIPES = SourceKind(
    name="stripes",
    summary="bright stripes",
    open=lambda settings, captions: Stripes(64, captions),
    fixed={"channels": 1, "num_classes": 2},
    own=("image_key",),
    class_names=lambda settings: Stripes.class_names,
    open_held_out=lambda settings: Stripes(16),
    reading_threads=0,
    has_captions=True,
    scores=PixelScores((STRIPED, LIGHT), count_stripes),
    held_out_captions=HeldOutCaptions(
        open=lambda split: Stripes(16, captions=True),
        splits=("new_stripes",),
        prompts=lambda num: ["rows"] * num,
        labels=lambda prompts: np.array([Stripes.class_names.index(prompt) for prompt in prompts]),
    ),
)
DATA = dict(source="stripes", image_size=4, num_classes=2)


@pytest.fixture
def stripes(monkeypatch):
    """The source, listed as any other; not listed after the test."""
    monkeypatch.setitem(registry.SOURCES, STRIPES.name, STRIPES)


def test_an_entry_is_all_that_reading_a_source_needs(stripes):
    config = DataConfig(**DATA)
    source = registry.make_source(config, captions=True)
    iterator = BatchIterator(host_batches(source, config, 8, 0, text=TextConfig("bytes", max_tokens=9)))
    batch = next(iterator)
    iterator.close()
    assert batch["image"].shape == (8, 4, 4, 1)
    for text, label in zip(batch["text"], batch["label"], strict=True):
        assert from_slots(TextConfig("bytes", max_tokens=9), text) == Stripes.class_names[label]
    assert registry.class_names(config) == ("rows", "columns")
    assert "stripes: 64 images of 4x4x1" in registry.describe(source, config)
    assert len(registry.make_held_out_source(config)) == 16
    assert registry.held_out_captions("--images", "new_stripes", config) is STRIPES.held_out_captions
    with pytest.raises(InputError, match="is for models of data.source=stripes"):
        registry.held_out_captions("--images", "new_stripes", DataConfig())
    assert registry.held_out_captions("--images", "folder", config) is None


def test_an_entry_is_all_that_settings_need(stripes):
    assert DataConfig(**DATA, image_key="x").image_key == "x"
    for changes, field, words in (
        (dict(num_classes=3), "num_classes", "must be 2 for source stripes"),
        (dict(split="test"), "split", "is a setting of source tfds only"),
        (
            dict(source="digits", image_size=8, num_classes=10, image_key="x"),
            "image_key",
            "source tfds or stripes only",
        ),
    ):
        with pytest.raises(InputError, match=words) as error:
            DataConfig(**DATA | changes)
        assert error.value.field == field


def test_an_entry_is_all_that_scores_need(stripes):
    config = DataConfig(**DATA)
    assert list(scores.measurable(config))[:3] == ["striped", "light", "fid"]
    assert scores.is_better("striped", 0.9, 0.8) and scores.is_better("light", 0.1, 0.2)
    images = np.stack([127.5 * Stripes(8)[i]["image"] + 128 for i in range(8)]).clip(0, 255).astype(np.uint8)
    labels = np.arange(8) % 2
    assert scores.score(config, images, labels) == {"striped": 1.0, "light": 0.25}
    assert scores.score(config, images, 1 - labels)["striped"] == 0.0
    assert scores.score(config, images, np.full(8, 2)) == {"light": 0.25}


def test_a_run_of_the_source_trains_and_is_evaluated(stripes, tmp_path):
    sections = dict(evaluation=dict(metric="striped", eval_every=12, num_images=8), data=DATA)
    train_run(experiment.from_dict(tiny_config(**sections)), tmp_path)
    measured = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"evaluation/striped", "evaluation/light"} <= set().union(*measured)
    assert json.loads((tmp_path / "classes.json").read_text()) == ["rows", "columns"]


def test_sources_of_other_tests_are_not_listed():
    assert "stripes" not in registry.SOURCES and "striped" not in scores.metrics()
    with pytest.raises(InputError, match="must be one of digits"):
        DataConfig(source="stripes")


@pytest.mark.parametrize("kind", registry.SOURCES.values(), ids=lambda kind: kind.name)
def test_entries_name_settings_and_metrics_that_exist(kind):
    assert registry.SOURCES[kind.name] is kind and kind.summary
    assert set(kind.fixed) | set(kind.own) <= set(DataSettings.__dataclass_fields__)
    assert not set(kind.fixed) & set(kind.own)
    for metric in kind.scores.metrics if kind.scores else ():
        assert scores.metrics()[metric.name] == metric and metric.meaning and not metric.network
