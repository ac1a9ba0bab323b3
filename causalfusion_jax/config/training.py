"""Settings of training: its length, objective, optimizer, checkpoints and logging."""

import dataclasses
import math

from causalfusion_jax.common.errors import require, require_number, require_one_of
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, num_visible_clean, places_per_t
from causalfusion_jax.core.layouts import TASKS, Task
from causalfusion_jax.models.flops import training_flops
from causalfusion_jax.models.transformer import TransformerConfig

SCHEDULES = ("constant", "cosine", "wsd")
IMAGE_TOKENS = ("clean_and_noisy", "noisy")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The course of training.

    Attributes:
      steps: optimizer steps in all.
      batch_size: images in a step, over all devices.
      seed: of initialization, data order and all noise.
      grad_accum_steps: parts in which a batch is computed, to save memory.
      length_buckets: where the batch shares drawn AR steps, so many programs of different
        length leave out clean tokens that nobody looks at; 1: all are kept.
      ema_decay: of the averaged weights that sampling uses.
      max_nonfinite_steps: give up after so many steps in a row without a finite gradient.
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
        require(
            self.batch_size % self.grad_accum_steps == 0,
            "grad_accum_steps",
            self.grad_accum_steps,
            f"must divide batch_size={self.batch_size}",
        )
        require_number("length_buckets", self.length_buckets, 1)
        require_number("ema_decay", self.ema_decay, 0.0, 1.0)
        require_number("max_nonfinite_steps", self.max_nonfinite_steps, 1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: peak.
      schedule: after the warm-up `constant` (CausalFusion), `cosine` to
        `final_ratio`, or `wsd` (ACDiT): constant, then over the last
        `decay_fraction` of training a fall by 0.5^(6 r), r in 0..1.
      warmup_steps: linear warm-up from 0.
      decay_fraction: part of training in which wsd decays.
      final_ratio: last learning rate of cosine, as a part of the peak.
      b1, b2, eps, weight_decay: AdamW.
      clip_norm: bound on the global norm of the gradient; 0 is none.
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
    """What is learned of texts and images together; without a tokenizer nothing here counts.

    Attributes:
      text_to_image, image_to_text, text, image: parts of the examples in which the image is
        generated given the text, the text given the image, and either alone; sum to 1.
      text_weight: of the cross-entropy (nats a token, averaged over each text) beside the
        diffusion loss.
      prompt_dropout: probability that text_to_image does without the text, for guidance.
      word_dropout: probability that a token of a text that is generated is blanked where the
        next ones look at it (Bowman et al. 2016, arXiv 1511.06349), so that they look at the
        image more and at phrases that were learned by heart less.
      class_dropout: probability that an example with a text goes without its class (1: a text
        is never accompanied by one); `model.class_dropout` is that of an image alone.
      image_tokens: `clean_and_noisy`, as CausalFusion; or `noisy` alone, as Transfusion, whose
        images are one AR step.
      read_in_one_step: an image that a text is generated from is one AR step, all tokens of
        which see each other; False: it has drawn AR steps too.
      read_noise: such an image has noise of a level drawn from 0..read_noise of the whole
        schedule (Transfusion: 0.5); 0: none.
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
        require(
            math.isclose(total, 1.0, abs_tol=1e-6),
            "text_to_image",
            self.text_to_image,
            f"{', '.join(TASKS)} must sum to 1; they sum to {total:g}",
        )
        require_number("text_weight", self.text_weight, 0.0)
        require_number("prompt_dropout", self.prompt_dropout, 0.0, 1.0)
        require_number("word_dropout", self.word_dropout, 0.0, 1.0)
        require_number("class_dropout", self.class_dropout, 0.0, 1.0)
        require_one_of("image_tokens", self.image_tokens, IMAGE_TOKENS)
        require_number("read_noise", self.read_noise, 0.0, 1.0)

    @property
    def mixture(self) -> tuple[float, ...]:
        """Part of each task, in the order of `layouts.Task`."""
        return tuple(getattr(self, name) for name in TASKS)

    def part(self, tasks: tuple[Task, ...]) -> float:
        """Part of the examples whose task is one of `tasks`."""
        return sum(self.mixture[task] for task in tasks)

    @property
    def drops_text(self) -> bool:
        """Whether images are also generated without text, which guidance needs."""
        return self.image > 0 or self.text_to_image * self.prompt_dropout > 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step, and every step that is evaluated, is always saved.
      keep: newest checkpoints kept.
      keep_every: also keep every checkpoint at a multiple of this step; 0 is none.
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
    """What a person watches.

    Attributes:
      every: steps between metrics.
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
    """What is learned, statically.

    Attributes:
      model, factorization, diffusion: the network and the two axes.
      patch_size: side of a token in pixels (or latents).
      class_dropout: probability that an image is trained without its class.
      most_clean: the batch is known to look at no more than so many clean tokens, the
        first; 0: it is not.
      joint: what is learned of texts, where the model knows text; else None.
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
        """Places with a clean token in the training sequence."""
        if self.joint is not None:
            # Texts look at whole images.
            return self.model.num_tokens if self.joint.image_tokens == "clean_and_noisy" else 0
        return self.most_clean or num_visible_clean(self.factorization, self.model.num_tokens)

    @property
    def places_per_t(self) -> int:
        """Consecutive places for which one t is drawn, where AR steps or tokens have their own."""
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
      objective, optimizer: what is learned, and how.
      total_steps: length of training, for the learning rate.
      grad_accum_steps: parts in which a batch is computed, one after the other.
      ema_decay: of the weights' exponential moving average; warmed up as
        min(ema_decay, (1 + step) / (10 + step)) so that short runs are usable.
    """

    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    total_steps: int
    grad_accum_steps: int
    ema_decay: float
