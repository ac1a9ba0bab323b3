"""The settings of a run: one frozen tree, built from a config file and checked as a whole.

`configs/*.py` hold `get_config(arg)`, which starts from `default_config()` and changes some
settings. A run keeps its settings as `WORKDIR/config.json`; see config/workdir.py.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import ml_collections
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common.errors import InputError, nearest, require
from causalfusion_jax.common.sharding import MeshConfig, check_divides
from causalfusion_jax.config.evaluation import EvaluationConfig
from causalfusion_jax.config.probe import FinetuneConfig, ProbeConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.config.training import (
    CheckpointConfig,
    JointConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, static_steps
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.tokenizers import TextConfig, make_tokenizer
from causalfusion_jax.models.config import Architecture, TransformerConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run."""

    data: DataConfig = DataConfig()
    text: TextConfig = TextConfig()
    joint: JointConfig = JointConfig()
    model: ModelConfig = ModelConfig()
    factorization: FactorizationConfig = FactorizationConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sampling: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        size, patch, width = self.data.image_size, self.model.patch_size, self.data.image_width
        require(size % patch == 0, "model.patch_size", patch, f"must divide data.image_size={size}")
        require(width % patch == 0, "model.patch_size", patch, f"must divide data.image_width={width}")
        _under("model", lambda: self.transformer)
        _under("factorization", lambda: self.factorization.check_grid(self.transformer.grid))
        _under("sampling", lambda: self.check_sampler(self.sampling))
        has_drawn_steps = static_steps(self.factorization, self.transformer.num_tokens) is None
        require(
            self.train.length_buckets == 1 or (has_drawn_steps and self.factorization.steps_shared_by == "batch"),
            "train.length_buckets",
            self.train.length_buckets,
            "must be 1 unless AR steps are drawn (decay, uniform) with factorization.steps_shared_by=batch",
        )
        if self.text.is_on:
            self._check_joint()
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        allowed = f"must be < train.steps={steps} for schedule {self.optimizer.schedule}"
        require(self.optimizer.schedule == "constant" or warmup < steps, "optimizer.warmup_steps", warmup, allowed)

    def _check_joint(self) -> None:
        """Raises InputError for settings that exclude training on texts and images."""
        allowed = "must be 1 for a model of text, which attends to all clean tokens"
        require(self.train.length_buckets == 1, "train.length_buckets", self.train.length_buckets, allowed)
        one_step = self.factorization.steps == "fixed" and self.factorization.num_steps == 1
        allowed = "needs images of one AR step: factorization.steps=fixed, factorization.num_steps=1"
        require(self.joint.image_tokens != "noisy" or one_step, "joint.image_tokens", self.joint.image_tokens, allowed)

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises InputError if the model cannot be sampled with these settings."""
        sampler.check(self.transformer, self.diffusion)
        allowed = "must be 1: model.class_dropout=0 trains no unconditional model to guide away from"
        require(sampler.cfg_scale == 1.0 or self.model.class_dropout > 0, "cfg_scale", sampler.cfg_scale, allowed)
        if self.text.is_on:
            require(
                sampler.cfg_scale == 1.0 or self.joint.drops_text,
                "cfg_scale",
                sampler.cfg_scale,
                "must be 1: joint.image=0 and joint.prompt_dropout=0 train no unconditional model to guide away from",
            )
            require(
                self.joint.image_tokens != "noisy" or sampler.sizes(self.transformer.num_tokens)[1:] == (),
                "ar_steps",
                sampler.ar_steps,
                "must be 1: joint.image_tokens=noisy trains no clean tokens",
            )

    @property
    def knows_classes(self) -> bool:
        """Whether any example is trained with its class."""
        return self.model.class_dropout < 1 or (self.text.is_on and self.joint.class_dropout < 1)

    @property
    def drops_classes(self) -> bool:
        """Whether any example is trained without its class, that is with the label table's last row."""
        return self.model.class_dropout > 0 or (self.text.is_on and self.joint.class_dropout > 0)

    def check_classes(self, field: str, value) -> None:
        """Raises InputError if the model was trained without classes, but `field` gives them as `value`."""
        require(self.knows_classes, field, value, "the model was trained without classes; leave it out")

    @property
    def transformer(self) -> TransformerConfig:
        """The network's static shape."""
        patch_size = self.model.patch_size
        architecture = {field.name: getattr(self.model, field.name) for field in dataclasses.fields(Architecture)}
        *frames, height, width, channels = self.data.shape
        text = {}
        if self.text.is_on:
            vocab = make_tokenizer(self.text).vocab_size
            text = dict(text_vocab=vocab, text_tokens=self.text.max_tokens)
        return TransformerConfig(
            **architecture,
            grid=(*frames, height // patch_size, width // patch_size),
            token_dim=patch_size**2 * channels,
            num_classes=self.data.num_classes,
            **text,
        )

    @property
    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array of a global batch."""
        batch = self.train.batch_size
        text = {"text": ((batch, self.text.max_tokens), np.int32)} if self.text.is_on else {}
        return {"image": ((batch, *self.data.shape), np.float32), "label": ((batch,), np.int32), **text}

    @property
    def step(self) -> StepConfig:
        """Static settings of the training step."""
        objective = ObjectiveConfig(
            self.transformer,
            self.factorization,
            self.diffusion,
            self.model.patch_size,
            self.model.class_dropout,
            joint=self.joint if self.text.is_on else None,
        )
        return StepConfig(
            objective, self.optimizer, self.train.steps, self.train.grad_accum_steps, self.train.ema_decay
        )


def _under(section: str, make: Callable[[], Any]) -> Any:
    """`make()`; the fields of its InputErrors are prefixed with `section`."""
    try:
        return make()
    except InputError as error:
        raise error.under(section) from None


def check_mesh(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises InputError if the batch or the model does not split evenly over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.grad_accum_steps
    allowed = f"must be a multiple of {parts}, the devices that share a batch times grad_accum_steps"
    require(config.train.batch_size % parts == 0, "config.train.batch_size", config.train.batch_size, allowed)
    model = config.transformer
    tokens = model.num_condition_tokens + model.text_tokens + config.step.objective.num_clean + model.num_tokens
    check_model_mesh(model, mesh, tokens_in_training=tokens)


def check_model_mesh(model: TransformerConfig, mesh: Mesh, **tokens: int) -> None:
    """Raises InputError if the model, or a sequence of `tokens` tokens, does not split evenly over the mesh."""
    check_divides(mesh, "fsdp", hidden=model.hidden)
    check_divides(mesh, "tensor", heads=model.heads, mlp_hidden=model.mlp_hidden)
    check_divides(mesh, "sequence", **tokens)


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults, for `get_config` to start from."""
    return ml_collections.ConfigDict(to_dict(ExperimentConfig()))


def choose(arg: str, **options: tuple[str, ...]) -> tuple[str, ...]:
    """Parses a config file's argument: values of options separated by commas, in any order.

    Args:
      arg: for example "XL,512".
      **options: the values of each option, the default first.

    Returns:
      The value of each option, in the order of `options`.

    Raises:
      InputError: an unknown value, or two values of one option.
    """
    selected = {}
    for word in filter(None, (word.strip() for word in arg.split(","))):
        option = next((name for name, values in options.items() if word in values), None)
        known = [value for values in options.values() for value in values]
        if option is None:
            raise InputError("--config", word, f"must be one of {', '.join(known)}{nearest(word, known)}")
        require(option not in selected, "--config", word, f"{option} is {selected.get(option)} already")
        selected[option] = word
    return tuple(selected.get(name, values[0]) for name, values in options.items())


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """All settings as nested dicts."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds and checks all settings.

    Args:
      values: nested mapping (a ConfigDict, or parsed JSON); absent settings have their defaults.

    Raises:
      InputError: an unknown key, a value of the wrong type, or a value that is not allowed;
        its field is the path of the setting, config.SECTION.NAME.
    """
    sections = {field.name: field.type for field in dataclasses.fields(ExperimentConfig)}
    for name in values:
        if name not in sections:
            _under("config", lambda name=name: _unknown(name, "...", sections))
    built = {
        name: _under(f"config.{name}", lambda name=name, cls=cls: _build(cls, values[name]))
        for name, cls in sections.items()
        if name in values
    }
    return _under("config", lambda: ExperimentConfig(**built))


def _build(cls, values: Mapping[str, Any]):
    """A section from its mapping."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    section = {}
    for name, value in values.items():
        if name not in defaults:
            _unknown(name, value, defaults)
        section[name] = _typed(name, value, defaults[name])
    return cls(**section)


def _unknown(name: str, value: Any, known: Iterable[str]) -> NoReturn:
    """Raises InputError for a key that does not exist."""
    raise InputError(name, value, f"unknown key{nearest(name, known)}; there are {', '.join(known)}")


def _typed(name: str, value: Any, default: Any):
    """`value` with the type of `default`: lists become tuples, ints floats. Raises InputError for another type."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise InputError(name, value, f"must be of type {type(default).__name__}")
    return value
