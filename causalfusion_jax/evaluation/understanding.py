"""What a network that was trained to generate images understands of them."""

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
"""Of the model's settings, those that do not change what its weights are."""


def combined(model_of: ExperimentConfig, probing: ExperimentConfig) -> ExperimentConfig:
    """The settings of a network, with those of `probing` for how to probe it and on which devices.

    Args:
      model_of: what the weights were trained as.
      probing: of its model, only how it computes counts (SAME_WEIGHTS).

    Raises:
      InputError: the data are not of the network's shape.
    """
    ours, theirs = probing.data, model_of.data
    for name in ("shape", "latents"):
        require(
            getattr(ours, name) == getattr(theirs, name),
            "config.data",
            getattr(ours, name),
            f"must be as the network's data are, {name} {getattr(theirs, name)}",
        )
    model = {name: getattr(probing.model, name) for name in SAME_WEIGHTS}
    return dataclasses.replace(
        model_of,
        model=dataclasses.replace(model_of.model, **model),
        probe=probing.probe,
        finetune=probing.finetune,
        mesh=probing.mesh,
    )


class Study:
    """Probes of networks of one kind on one data set.

    Args:
      config: what the network is, and how to probe it (`combined`).
      data: the images to learn from, whose classes may be others than the network's.
      progress: called with a line of text now and then.

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
        """The weights that the run began with."""
        init_key, _ = jax.random.split(jax.random.key(self.config.train.seed))
        return jax.jit(init_params, static_argnums=0)(self.config.transformer, init_key)

    def _features(self, params: Params, reading, every_layer: bool, name: str) -> list[Classified]:
        """Features of both parts, of the layer to be read or of all layers."""
        if not every_layer:
            reading, params = first_layers(reading, params, self.layer)
        placed, s, parts = place_params(params, reading.model, self.mesh), self.probe, []
        for i, (part, source) in enumerate({"training": self.source, "held-out": self.held_out}.items()):
            indices = random_subset(len(source), s.max_images, s.seed)
            images = images_in_order(source, self.data, s.read_batch_size, indices)

            def show(done, part=part, total=len(indices)):
                self.progress(f"{name}: {done}/{total} {part} images read")

            compute = functools.partial(pooled, reading, every_layer, placed)
            # Noise of the two parts has nothing in common.
            parts.append(over_images(compute, self.mesh, images, s.read_batch_size, s.seed + i, 1, show))
        (features, labels), (held_out, held_out_labels) = parts
        classes = self.data.num_classes
        return [
            Classified(*of_layer, classes)
            for of_layer in ((a, labels, b, held_out_labels) for a, b in zip(features, held_out, strict=True))
        ]

    @property
    def described(self) -> dict[str, Any]:
        """How images are read, for a report."""
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
        """A `finetune.Finetuning` whose checkpoints are in `folder`. Raises InputError; nothing is touched."""
        # Imported late: the training loop takes seconds.
        from causalfusion_jax.evaluation.finetune import Finetuning

        return Finetuning(
            self.reading,
            self.config.finetune,
            self.data,
            self.source,
            self.mesh,
            folder,
            lambda line: self.progress(f"{name}: {line}"),
        )

    def finetune(self, tuning, params: Callable[[], Params]) -> dict[str, Any]:
        """Accuracies after fine-tuning. Raises `stopping.Stopped`."""
        weights = tuning.train(lambda: place_params(params(), self.reading.model, self.mesh))
        found = tuning.test(weights, self.held_out, self.probe)
        return found | {"num": len(self.held_out), "trained_on": len(self.source)}

    def ways(self) -> dict[str, ProbeConfig]:
        """The columns of the map: clean tokens, where there are any, and noisy ones by noise level."""
        clean = {"clean": dataclasses.replace(self.probe, tokens="clean")} if has_clean_tokens(self.config) else {}
        return clean | {
            f"{level:g}": dataclasses.replace(self.probe, tokens="noisy", noise_level=float(level))
            for level in self.probe.map_noise_levels
        }

    def map(self, params: Params, name: str) -> np.ndarray:
        """`top1` of the linear probe, [layers, ways]."""
        columns = []
        for way, settings in self.ways().items():
            every = self._features(params, make_reading(self.config, settings), True, f"{name}, {way}")
            columns.append([])
            for layer, features in enumerate(every, 1):
                self.progress(f"{name}, {way}: layer {layer}/{len(every)}")
                columns[-1].append(features.linear(self.probe)["top1"])
        return np.array(columns).T
