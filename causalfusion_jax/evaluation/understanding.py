"""Probes of the representations of a generative network: which network, which images, which classifiers."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import require
from causalfusion_jax.config.experiment import ExperimentConfig, check_model_mesh
from causalfusion_jax.config.probe import ProbeConfig
from causalfusion_jax.data.pipeline import DataConfig, make_held_out_source, make_source
from causalfusion_jax.evaluation.features import (
    first_layers,
    has_clean_tokens,
    images_in_order,
    layer_to_read,
    make_reading,
    over_images,
    place_params,
    pooled,
    random_subset,
)
from causalfusion_jax.evaluation.probe import Classified
from causalfusion_jax.models.params import Params
from causalfusion_jax.models.transformer import init_params

SAME_WEIGHTS = ("attention", "dtype", "remat", "scan_unroll")
"""Settings of the model that do not change the meaning of its weights."""


def combined(trained: ExperimentConfig, probing: ExperimentConfig) -> ExperimentConfig:
    """The settings of a trained network, with the probe and the devices of `probing`.

    Args:
      trained: settings of the network.
      probing: settings of the probe. Of its model, SAME_WEIGHTS are used only.

    Raises:
      InputError: the images are not of the shape that the network takes.
    """
    for name in ("shape", "latents"):
        given, expected = getattr(probing.data, name), getattr(trained.data, name)
        require(given == expected, "config.data", given, f"must be as the network's data are, {name} {expected}")
    model = {name: getattr(probing.model, name) for name in SAME_WEIGHTS}
    return dataclasses.replace(
        trained,
        model=dataclasses.replace(trained.model, **model),
        probe=probing.probe,
        finetune=probing.finetune,
        mesh=probing.mesh,
    )


class Study:
    """Probes of networks of one architecture on one data set.

    Args:
      config: settings of the network and of the probe (`combined`).
      data: the images to train classifiers on; their classes may differ from those of the network.
      progress: called with a line of text as the probe proceeds.

    Raises:
      InputError: the settings do not fit each other, the data or the devices.
    """

    def __init__(self, config: ExperimentConfig, data: DataConfig, progress: Callable[[str], None] = lambda line: None):
        self.config, self.probe, self.data, self.progress = config, config.probe, data, progress
        self.reading = make_reading(config, config.probe)
        self.layer = layer_to_read(config.transformer, config.probe.layer)
        self.mesh = sharding.make_mesh(config.mesh)
        model = config.transformer
        check_model_mesh(model, self.mesh, tokens=model.num_condition_tokens + model.num_tokens)
        self.source = make_source(data)
        self.held_out = make_held_out_source(data, self.probe.held_out_path, self.probe.held_out_split)

    def untrained(self) -> Params:
        """The initial weights of the run."""
        init_key, _ = jax.random.split(jax.random.key(self.config.train.seed))
        return jax.jit(init_params, static_argnums=0)(self.config.transformer, init_key)

    def _features(self, params: Params, reading, every_layer: bool, name: str) -> list[Classified]:
        """Features of the training and held-out images, at the probed layer or at every layer."""
        if not every_layer:
            reading, params = first_layers(reading, params, self.layer)
        placed, s, parts = place_params(params, reading.model, self.mesh), self.probe, []
        for i, (part, source) in enumerate({"training": self.source, "held-out": self.held_out}.items()):
            indices = random_subset(len(source), s.max_images, s.seed)
            images = images_in_order(source, self.data, s.read_batch_size, indices)
            total = len(indices)

            def show(done, part=part, total=total):
                self.progress(f"{name}: {done}/{total} {part} images read")

            compute = functools.partial(pooled, reading, every_layer, placed)
            # Different seeds, so that the two parts have independent noise.
            parts.append(
                over_images(
                    compute,
                    self.mesh,
                    images,
                    batch_size=s.read_batch_size,
                    seed=s.seed + i,
                    batch_axis=1,
                    progress=show,
                )
            )
        (features, labels), (held_out, held_out_labels) = parts
        return [
            Classified(of_training, labels, of_held_out, held_out_labels, self.data.num_classes)
            for of_training, of_held_out in zip(features, held_out, strict=True)
        ]

    @property
    def described(self) -> dict[str, Any]:
        """How the network reads images, for the report."""
        read = {"tokens": self.reading.tokens}
        if self.reading.tokens == "noisy":
            return read | {"noise_level": self.reading.noise_level}
        return read | {"ar_steps": self.reading.ar_steps}

    def classify(self, kind: str, params: Params, name: str) -> dict[str, Any]:
        """Accuracies of the `linear` or `knn` probe of one layer."""
        (features,) = self._features(params, self.reading, False, name)
        self.progress(f"{name}: classifying")
        return {
            **getattr(features, kind)(self.probe),
            "num": len(features.held_out_labels),
            "trained_on": len(features.labels),
        }

    def finetuning(self, name: str, folder: pathlib.Path):
        """A `finetune.Finetuning` with its checkpoints in `folder`. Raises InputError; nothing is written."""
        # Imported here because the imports of training take seconds.
        from causalfusion_jax.evaluation.finetune import Finetuning

        return Finetuning(
            reading=self.reading,
            settings=self.config.finetune,
            data=self.data,
            source=self.source,
            mesh=self.mesh,
            folder=folder,
            progress=lambda line: self.progress(f"{name}: {line}"),
        )

    def finetune(self, tuning, params: Callable[[], Params]) -> dict[str, Any]:
        """Accuracies after fine-tuning. Raises `stopping.Stopped`."""
        weights = tuning.train(lambda: place_params(params(), self.reading.model, self.mesh))
        accuracies = tuning.test(weights, self.held_out, self.probe)
        return accuracies | {"num": len(self.held_out), "trained_on": len(self.source)}

    def columns(self) -> dict[str, ProbeConfig]:
        """Settings of each column of the map: clean tokens, if the network has them, and noisy ones by noise level."""
        clean = {"clean": dataclasses.replace(self.probe, tokens="clean")} if has_clean_tokens(self.config) else {}
        return clean | {
            f"{level:g}": dataclasses.replace(self.probe, tokens="noisy", noise_level=float(level))
            for level in self.probe.map_noise_levels
        }

    def map(self, params: Params, name: str) -> np.ndarray:
        """`top1` of the linear probe, [layers, columns]."""
        accuracies = []
        for column, settings in self.columns().items():
            layers = self._features(params, make_reading(self.config, settings), True, f"{name}, {column}")
            accuracies.append([])
            for layer, features in enumerate(layers, 1):
                self.progress(f"{name}, {column}: layer {layer}/{len(layers)}")
                accuracies[-1].append(features.linear(self.probe)["top1"])
        return np.array(accuracies).T
