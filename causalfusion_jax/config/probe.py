"""Settings of probes and of fine-tuning, which measure what a network has learned about images."""

import dataclasses

from causalfusion_jax.common.errors import require, require_number, require_one_of

PROBES = ("linear", "knn", "finetune", "map")
TOKENS = ("auto", "clean", "noisy")
AR_STEPS = ("one", "trained")
OPTIMIZERS = ("adamw", "lars")
IMAGENET_LINEAR = dict(optimizer="lars", epochs=90, batch_size=16_384, learning_rate=6.4, warmup_epochs=10.0)
"""The linear classifier of ImageNet as MAE trains it (He et al. 2021, table 10)."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Features of a network with frozen weights, and classifiers trained on them.

    Attributes:
      tokens: features of `clean` tokens, of `noisy` tokens of one AR step, or `auto`:
        of clean tokens if the network was trained with them.
      noise_level: of noisy tokens, t / num_timesteps.
      ar_steps: attention among clean tokens: as `one` AR step, all to all, or with order and AR
        steps as `trained`.
      layer: layer whose output is used, from 1; 0: the one at half of the depth.
      held_out_path: folder of the test images, for sources that are a folder.
      held_out_split: split of the test images, for source tfds.
      read_batch_size: images whose features are computed at a time, over all devices.
      max_images: maximum number of training images and of test images, drawn at random; 0: all.
      seed: of noise, drawn AR steps, initial weights and order of the examples.
      optimizer: of the linear classifier, `adamw` or `lars` (You et al. 2017).
      epochs, batch_size, learning_rate, weight_decay: of the linear classifier; the learning rate
        has a cosine decay.
      warmup_epochs: linear warm-up of the learning rate.
      neighbours: nearest images that vote (k).
      temperature: of their votes, exp(cosine similarity / temperature).
      map_noise_levels: noise levels of noisy tokens in the map of layers and noise levels.
    """

    tokens: str = "auto"
    noise_level: float = 0.0
    ar_steps: str = "one"
    layer: int = 0
    held_out_path: str = ""
    held_out_split: str = "validation"
    read_batch_size: int = 256
    max_images: int = 0
    seed: int = 0
    optimizer: str = "adamw"
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    warmup_epochs: float = 10.0
    neighbours: int = 20
    temperature: float = 0.07
    map_noise_levels: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)

    def __post_init__(self):
        require_one_of("tokens", self.tokens, TOKENS)
        require_number("noise_level", self.noise_level, 0.0, 1.0)
        require_one_of("ar_steps", self.ar_steps, AR_STEPS)
        require_number("layer", self.layer, 0)
        require_number("read_batch_size", self.read_batch_size, 1)
        require_number("max_images", self.max_images, 0)
        require_number("seed", self.seed, 0, 2**32 - 1)
        require_one_of("optimizer", self.optimizer, OPTIMIZERS)
        require_number("epochs", self.epochs, 1)
        require_number("batch_size", self.batch_size, 1)
        require_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0.0)
        _require_warmup(self)
        require_number("neighbours", self.neighbours, 1)
        require_number("temperature", self.temperature, 0.0, open_low=True)
        for level in self.map_noise_levels:
            numeric = isinstance(level, (int, float))
            require(numeric and 0.0 <= level <= 1.0, "map_noise_levels", level, "each must be >= 0 and <= 1")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of all weights, with a linear classifier on the mean of the last layer's tokens.

    The defaults are for ImageNet: ACDiT's 100 epochs, the rest as MAE fine-tunes its larger models.
    Features and test images are those of `config.probe`.

    Attributes:
      epochs, batch_size: of fine-tuning.
      learning_rate: peak, of the classifier; with a cosine decay.
      warmup_epochs: linear warm-up of the learning rate.
      layer_decay: learning rate of a layer relative to that of the next one; the embeddings are below
        the first layer, the classifier above the last.
      weight_decay, b1, b2: AdamW.
      clip_norm: upper bound on the global norm of the gradient; 0 is none.
      drop_path: probability of dropping a residual branch of the last layer; it increases linearly over the layers.
      label_smoothing: fraction of the target spread over all classes.
      mixup, cutmix: parameters of the Beta distribution of the mixture's weight (Zhang et al. 2018;
        Yun et al. 2019); 0 is none; with both, each example uses either with probability 1/2.
      shift: images are shifted by at most this number of pixels (latents) on either axis, edges repeated.
      crop_area: images are cropped at random to at least this fraction of their area, with an aspect
        ratio of 3/4 to 4/3, and resized back; 1 is none. Flips are `config.data.flip`.
      ema_decay: decay of the averaged weights that are tested; 0: the last weights are tested.
      seed: of the order of the examples and all random numbers.
      checkpoint_epochs: epochs between checkpoints, from which the same command continues.
    """

    epochs: int = 100
    batch_size: int = 1024
    learning_rate: float = 4e-3
    warmup_epochs: float = 5.0
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 0.0
    drop_path: float = 0.2
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    shift: int = 0
    crop_area: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0
    checkpoint_epochs: int = 5

    def __post_init__(self):
        require_number("epochs", self.epochs, 1)
        require_number("batch_size", self.batch_size, 2)
        require_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        _require_warmup(self)
        require_number("layer_decay", self.layer_decay, 0.0, 1.0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0.0)
        for name in ("b1", "b2", "drop_path", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, name, value, "must be >= 0 and < 1")
        for name in ("clip_norm", "mixup", "cutmix", "shift"):
            require_number(name, getattr(self, name), 0.0)
        require_number("crop_area", self.crop_area, 0.0, 1.0, open_low=True)
        require_number("seed", self.seed, 0, 2**32 - 1)
        require_number("checkpoint_epochs", self.checkpoint_epochs, 1)


def _require_warmup(config: ProbeConfig | FinetuneConfig) -> None:
    """Raises InputError if the warm-up is not shorter than training."""
    allowed = f"must be >= 0 and < epochs={config.epochs}"
    require(0.0 <= config.warmup_epochs < config.epochs, "warmup_epochs", config.warmup_epochs, allowed)
