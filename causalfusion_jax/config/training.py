"""Settings of training: network, length, objective, optimizer, checkpoints and logging."""

import dataclasses
import math

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, num_visible_clean, places_per_t
from causalfusion_jax.core.layouts import TASKS, Task
from causalfusion_jax.models.config import Architecture, TransformerConfig
from causalfusion_jax.models.flops import training_flops

SCHEDULES = ("constant", "cosine", "wsd")
IMAGE_TOKENS = ("clean_and_noisy", "noisy")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Architecture):
    """The network: its architecture, and how images become tokens.

    Attributes:
      patch_size: side of a token in pixels (or latents).
      class_dropout: probability of training an image without its class, for classifier-free guidance.
    """

    patch_size: int = 2
    class_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_number("patch_size", self.patch_size, 1)
        require_number("class_dropout", self.class_dropout, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and seed of training.

    Attributes:
      steps: number of optimizer steps.
      batch_size: images in a step, over all devices.
      seed: of initialization, data order and all noise.
      grad_accum_steps: parts in which the gradient of a batch is accumulated, to save memory.
      length_buckets: number of sequence-length buckets, if the batch shares drawn AR steps: each
        bucket has a compiled program without the unattended clean tokens; 1: all clean tokens are kept.
      ema_decay: decay of the averaged weights that sampling uses.
      max_nonfinite_steps: training fails after this number of consecutive steps without a finite gradient.
    """

    steps: int = 1000
    batch_size: int = 64
    seed: int = 0
    grad_accum_steps: int = 1
    length_buckets: int = 1
    ema_decay: float = 0.9999
    max_nonfinite_steps: int = 20

    def __post_init__(self):
        require_number("steps", self.steps, 1)
        require_number("batch_size", self.batch_size, 1)
        require_number("seed", self.seed, 0, 2**32 - 1)
        require_number("grad_accum_steps", self.grad_accum_steps, 1)
        allowed = f"must divide batch_size={self.batch_size}"
        require(self.batch_size % self.grad_accum_steps == 0, "grad_accum_steps", self.grad_accum_steps, allowed)
        require_number("length_buckets", self.length_buckets, 1)
        require_number("ema_decay", self.ema_decay, 0.0, 1.0)
        require_number("max_nonfinite_steps", self.max_nonfinite_steps, 1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: peak.
      schedule: after the warm-up `constant` (CausalFusion), `cosine` to
        `final_ratio`, or `wsd` (ACDiT): constant, then decayed over the last
        `decay_fraction` of training by 0.5^(6 r), r in 0..1.
      warmup_steps: steps of linear warm-up from 0.
      decay_fraction: fraction of training in which wsd decays.
      final_ratio: last learning rate of cosine, as a fraction of the peak.
      b1, b2, eps, weight_decay: AdamW.
      clip_norm: upper bound on the global norm of the gradient; 0 is none.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_fraction: float = 0.15
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        require_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        require_one_of("schedule", self.schedule, SCHEDULES)
        require_number("warmup_steps", self.warmup_steps, 0)
        require_number("decay_fraction", self.decay_fraction, 0.0, 1.0, open_low=True)
        require_number("final_ratio", self.final_ratio, 0.0, 1.0)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, name, value, "must be >= 0 and < 1")
        require_number("eps", self.eps, 0.0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0.0)
        require_number("clip_norm", self.clip_norm, 0.0)


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """Joint training on texts and images; has no effect without a tokenizer.

    Attributes:
      text_to_image, image_to_text, text, image: fractions of the examples in which the image is
        generated given the text, the text given the image, and either alone; sum to 1.
      text_weight: weight of the cross-entropy (nats per token, averaged over each text) relative
        to the diffusion loss.
      prompt_dropout: probability of dropping the text of text_to_image, for classifier-free guidance.
      word_dropout: probability of blanking a token of a generated text in the input of the
        following tokens (Bowman et al. 2016, arXiv 1511.06349), so that they depend more on the
        image and less on memorized phrases.
      class_dropout: probability of dropping the class of an example with a text (1: texts are
        never trained with a class); `model.class_dropout` is that of an image alone.
      image_tokens: `clean_and_noisy` as in CausalFusion, or only `noisy` as in Transfusion, whose
        images are one AR step.
      read_in_one_step: an image that a text is conditioned on is one AR step, whose tokens all
        attend to each other; False: its AR steps are drawn as in training of images.
      read_noise: upper bound of the noise level drawn for such an image, as a fraction of the
        schedule (Transfusion: 0.5); 0: no noise.
    """

    text_to_image: float = 0.5
    image_to_text: float = 0.4
    text: float = 0.05
    image: float = 0.05
    text_weight: float = 1.0
    prompt_dropout: float = 0.1
    word_dropout: float = 0.0
    class_dropout: float = 1.0
    image_tokens: str = "clean_and_noisy"
    read_in_one_step: bool = True
    read_noise: float = 0.0

    def __post_init__(self):
        for name in TASKS:
            require_number(name, getattr(self, name), 0.0, 1.0)
        total = sum(self.mixture)
        allowed = f"{', '.join(TASKS)} must sum to 1; they sum to {total:g}"
        require(math.isclose(total, 1.0, abs_tol=1e-6), "text_to_image", self.text_to_image, allowed)
        require_number("text_weight", self.text_weight, 0.0)
        require_number("prompt_dropout", self.prompt_dropout, 0.0, 1.0)
        require_number("word_dropout", self.word_dropout, 0.0, 1.0)
        require_number("class_dropout", self.class_dropout, 0.0, 1.0)
        require_one_of("image_tokens", self.image_tokens, IMAGE_TOKENS)
        require_number("read_noise", self.read_noise, 0.0, 1.0)

    @property
    def mixture(self) -> tuple[float, ...]:
        """Fraction of each task, in the order of `layouts.Task`."""
        return tuple(getattr(self, name) for name in TASKS)

    def part(self, tasks: tuple[Task, ...]) -> float:
        """Fraction of the examples whose task is one of `tasks`."""
        return sum(self.mixture[task] for task in tasks)

    @property
    def drops_text(self) -> bool:
        """Whether images are also trained without text, which classifier-free guidance needs."""
        return self.image > 0 or self.text_to_image * self.prompt_dropout > 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are kept.

    Attributes:
      every: steps between checkpoints; the last step and every evaluated step are always saved.
      keep: number of newest checkpoints that are kept.
      keep_every: checkpoints at multiples of this step are kept too; 0 is none.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        require_number("every", self.every, 1)
        require_number("keep", self.keep, 1)
        require_number("keep_every", self.keep_every, 0)


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Metric logging and sample grids.

    Attributes:
      every: steps between logged metrics.
      sample_every: steps between sample grids; 0 is none.
      num_samples: images in a grid.
    """

    every: int = 100
    sample_every: int = 0
    num_samples: int = 40

    def __post_init__(self):
        require_number("every", self.every, 1)
        require_number("sample_every", self.sample_every, 0)
        require_number("num_samples", self.num_samples, 1)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Static settings of the training objective.

    Attributes:
      model, factorization, diffusion: the network and the two axes.
      patch_size: side of a token in pixels (or latents).
      class_dropout: probability of training an image without its class.
      most_clean: upper bound on the number of attended clean tokens in the batch, the first ones;
        0: no bound is known.
      joint: settings of a text-conditioned model; else None.
    """

    model: TransformerConfig
    factorization: FactorizationConfig
    diffusion: DiffusionConfig
    patch_size: int
    class_dropout: float
    most_clean: int = 0
    joint: JointConfig | None = None

    @property
    def num_clean(self) -> int:
        """Number of clean tokens in the training sequence."""
        if self.joint is not None:
            # Texts attend to whole images.
            return self.model.num_tokens if self.joint.image_tokens == "clean_and_noisy" else 0
        return self.most_clean or num_visible_clean(self.factorization, self.model.num_tokens)

    @property
    def places_per_t(self) -> int:
        """Number of consecutive positions that share one t, if AR steps or tokens have their own."""
        shared = self.diffusion.t_shared_by == "step"
        return places_per_t(self.factorization, self.model.num_tokens) if shared else 1

    @property
    def flops(self) -> int:
        """Model FLOPs of one image in a training step."""
        own_t = self.diffusion.t_shared_by != "image"
        levels = self.model.num_tokens // self.places_per_t if own_t else 1
        return training_flops(self.model, self.num_clean, levels)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the training step.

    Attributes:
      objective, optimizer: the objective and its optimizer.
      total_steps: length of training, for the learning rate.
      grad_accum_steps: parts in which the gradient of a batch is accumulated.
      ema_decay: decay of the weights' exponential moving average; warmed up as
        min(ema_decay, (1 + step) / (10 + step)), for short runs.
    """

    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    total_steps: int
    grad_accum_steps: int
    ema_decay: float
