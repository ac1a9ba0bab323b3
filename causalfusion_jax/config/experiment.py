"""The settings of a run: one frozen tree, built from a config file and checked whole.

`configs/*.py` hold `get_config(arg)`, which starts from `default_config()` and changes
what differs. A run keeps its settings as `WORKDIR/config.json`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from causalfusion_jax.common import files
from causalfusion_jax.common.errors import InputError, nearest, require, require_number
from causalfusion_jax.common.sharding import MeshConfig, check_divides
from causalfusion_jax.config.evaluation import EvaluationConfig
from causalfusion_jax.config.probe import FinetuneConfig, ProbeConfig
from causalfusion_jax.config.sampling import SamplerConfig
from causalfusion_jax.config.training import (
    CheckpointConfig,
    JointConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from causalfusion_jax.core.diffusion import DiffusionConfig
from causalfusion_jax.core.factorization import FactorizationConfig, static_steps
from causalfusion_jax.data.config import DataConfig
from causalfusion_jax.data.tokenizers import TextConfig, make_tokenizer, with_checksum
from causalfusion_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network, as far as the data do not fix it; see TransformerConfig.

    Attributes:
      patch_size: side of a token in pixels (or latents).
      class_dropout: probability of training an image without its class.
    """

    hidden: int = 96
    heads: int = 3
    layers: int = 4
    mlp_ratio: float = 4.0
    patch_size: int = 2
    conditioning: str = "in_context"
    num_condition_tokens: int = 4
    condition_repeats: int = 1
    norm: str = "layer"
    positions: str = "learned"
    qk_norm: bool = True
    qkv_bias: bool = False
    token_bias: bool = True
    attention: str = "auto"
    class_dropout: float = 0.1
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    text_head: str = "tied"

    def __post_init__(self):
        require_number("patch_size", self.patch_size, 1)
        require_number("class_dropout", self.class_dropout, 0.0, 1.0)


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
        drawn = static_steps(self.factorization, self.transformer.num_tokens) is None
        require(
            self.train.length_buckets == 1 or (drawn and self.factorization.steps_shared_by == "batch"),
            "train.length_buckets",
            self.train.length_buckets,
            "must be 1 unless AR steps are drawn (decay, uniform) with factorization.steps_shared_by=batch",
        )
        if self.text.is_on:
            self._check_joint()
        warmup, steps = self.optimizer.warmup_steps, self.train.steps
        require(
            self.optimizer.schedule == "constant" or warmup < steps,
            "optimizer.warmup_steps",
            warmup,
            f"must be < train.steps={steps} for schedule {self.optimizer.schedule}",
        )

    def _check_joint(self) -> None:
        """Raises InputError where texts and images cannot be learned together so."""
        require(
            self.train.length_buckets == 1,
            "train.length_buckets",
            self.train.length_buckets,
            "must be 1 for a model of text, which looks at all clean tokens",
        )
        one_step = self.factorization.steps == "fixed" and self.factorization.num_steps == 1
        require(
            self.joint.image_tokens != "noisy" or one_step,
            "joint.image_tokens",
            self.joint.image_tokens,
            "needs images of one AR step: factorization.steps=fixed, factorization.num_steps=1",
        )

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises InputError where the model cannot be sampled so."""
        sampler.check(self.transformer, self.diffusion)
        require(
            sampler.cfg_scale == 1.0 or self.model.class_dropout > 0,
            "cfg_scale",
            sampler.cfg_scale,
            "must be 1: model.class_dropout=0 trains nothing to guide away from",
        )
        if self.text.is_on:
            require(
                sampler.cfg_scale == 1.0 or self.joint.drops_text,
                "cfg_scale",
                sampler.cfg_scale,
                "must be 1: joint.image=0 and joint.prompt_dropout=0 train nothing to guide away from",
            )
            require(
                self.joint.image_tokens != "noisy" or sampler.sizes(self.transformer.num_tokens)[1:] == (),
                "ar_steps",
                sampler.ar_steps,
                "must be 1: joint.image_tokens=noisy trains no clean tokens",
            )

    @property
    def knows_classes(self) -> bool:
        """Whether anything was trained with its class."""
        return self.model.class_dropout < 1 or (self.text.is_on and self.joint.class_dropout < 1)

    @property
    def drops_classes(self) -> bool:
        """Whether anything was trained without its class, by the label table's last row."""
        return self.model.class_dropout > 0 or (self.text.is_on and self.joint.class_dropout > 0)

    def check_classes(self, field: str, value) -> None:
        """Raises InputError where classes `value`, given as `field`, mean nothing to the model."""
        require(
            self.knows_classes, field, value, "the model has never seen a class (model.class_dropout=1); leave it out"
        )

    @property
    def transformer(self) -> TransformerConfig:
        """The network's static shape."""
        model = dataclasses.asdict(self.model)
        patch_size, _ = model.pop("patch_size"), model.pop("class_dropout")
        *frames, height, width, channels = self.data.shape
        text = {}
        if self.text.is_on:
            vocab = make_tokenizer(self.text).vocab_size
            text = dict(text_vocab=vocab, text_tokens=self.text.max_tokens)
        return TransformerConfig(
            **model,
            grid=(*frames, height // patch_size, width // patch_size),
            token_dim=patch_size**2 * channels,
            num_classes=self.data.num_classes,
            **text,
        )

    @property
    def batch_shapes(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of each array of a global batch."""
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


def _under(section, make):
    """`make()`, its InputErrors placed below `section`."""
    try:
        return make()
    except InputError as error:
        raise error.under(section) from None


def check_mesh(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises InputError where batch or model do not split over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.grad_accum_steps
    require(
        config.train.batch_size % parts == 0,
        "config.train.batch_size",
        config.train.batch_size,
        f"must be a multiple of {parts}, the devices of the batch times grad_accum_steps",
    )
    model = config.transformer
    tokens = model.num_condition_tokens + model.text_tokens + config.step.objective.num_clean + model.num_tokens
    check_model_mesh(model, mesh, tokens_in_training=tokens)


def check_model_mesh(model: TransformerConfig, mesh: Mesh, **tokens: int) -> None:
    """Raises InputError where the model, or a sequence of so many `tokens`, does not split over the mesh."""
    check_divides(mesh, "fsdp", hidden=model.hidden)
    check_divides(mesh, "tensor", heads=model.heads, mlp_hidden=model.mlp_hidden)
    check_divides(mesh, "sequence", **tokens)


def default_config() -> ml_collections.ConfigDict:
    """Every setting at its default, for `get_config` to start from."""
    return ml_collections.ConfigDict(to_dict(ExperimentConfig()))


def choose(arg: str, **options: tuple[str, ...]) -> tuple[str, ...]:
    """Reads a config file's argument: words separated by commas, in any order.

    Args:
      arg: for example "XL,512".
      **options: what there is to choose, and its values, the default first.

    Returns:
      The value of each option, in their order.

    Raises:
      InputError: a word that is no value, or two values of one option.
    """
    chosen = {}
    for word in filter(None, (word.strip() for word in arg.split(","))):
        option = next((name for name, values in options.items() if word in values), None)
        known = [value for values in options.values() for value in values]
        if option is None:
            raise InputError("--config", word, f"must be of {', '.join(known)}{nearest(word, known)}")
        require(option not in chosen, "--config", word, f"{option} is {chosen.get(option)} already")
        chosen[option] = word
    return tuple(chosen.get(name, values[0]) for name, values in options.items())


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain dict of all settings."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds and checks all settings.

    Args:
      values: nested mapping (a ConfigDict, or parsed JSON); what is absent is default.

    Raises:
      InputError: an unknown key, a value of the wrong type, or one that is not allowed;
        its field is the path of the setting, below `config`.
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
    """One section from its mapping."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    section = {}
    for name, value in values.items():
        if name not in defaults:
            _unknown(name, value, defaults)
        section[name] = _typed(name, value, defaults[name])
    return cls(**section)


def _unknown(name: str, value: Any, known):
    raise InputError(name, value, f"unknown key{nearest(name, known)}; there are {', '.join(known)}")


def _typed(name: str, value: Any, default: Any):
    """`value` as the type of `default`: lists become tuples, ints floats."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise InputError(name, value, f"must be of type {type(default).__name__}")
    return value


# --- The run's own copy -----------------------------------------------------------

FREE_SECTIONS = ("checkpoint", "logging", "sampling", "evaluation", "probe", "finetune", "mesh")
"""May change between starts of one run: they do not change what is learned."""

FREE_SETTINGS = frozenset({
    # Where files are and how they are read. Data that moved, or the tokenizer's file, must be the same data.
    "data.path", "data.workers", "data.verify", "data.max_corrupt", "text.path",
    # How a step is computed: results differ by rounding alone. No example's randomness depends on the parts of a batch.
    "model.attention", "model.remat", "model.scan_unroll", "train.grad_accum_steps",
    # What a run that diverged needs.
    "optimizer.learning_rate", "optimizer.clip_norm", "train.max_nonfinite_steps",
})  # fmt: skip
"""Settings of other sections that may change too."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value of each setting that changed, by its path: `optimizer.learning_rate`."""


def load(workdir: str) -> ExperimentConfig:
    """The settings of an existing run. Raises InputError where there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError("workdir", workdir, "is not the folder of a training run (it has no config.json)")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InputError("workdir", workdir, f"its config.json cannot be read: {error}") from None
    return from_dict(values)


def claim_workdir(workdir: str, config: ExperimentConfig) -> Changes:
    """Makes `workdir` this run's, or checks that it already is.

    Returns:
      What differs from the run's own settings, which `record_changes` replaces.

    Raises:
      InputError: it holds something else, or a run that learns something else.
    """
    folder = pathlib.Path(workdir)
    config = _with_checksums(config)
    if (folder / "config.json").is_file():
        changes = _changes(load(workdir), config)
        _check_allowed(workdir, changes, config)
        return changes
    if not files.is_new(folder):
        raise InputError("workdir", workdir, "must be a new or empty folder, or that of a run to continue")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "config.json", to_dict(config))
    return {}


def record_changes(workdir: str, config: ExperimentConfig, changes: Changes, step: int) -> None:
    """Keeps changed settings as the run's own, and a line of `config_history.jsonl` that says from which step on."""
    if not changes:
        return
    folder = pathlib.Path(workdir)
    files.drop_torn_line(folder / "config_history.jsonl")
    line = {"step": step, "changed": {name: {"old": old, "new": new} for name, (old, new) in changes.items()}}
    with (folder / "config_history.jsonl").open("a") as history:
        history.write(json.dumps(line) + "\n")
    files.write_json(folder / "config.json", to_dict(_with_checksums(config)))


def _with_checksums(config: ExperimentConfig) -> ExperimentConfig:
    """The settings as a run keeps them: with the checksum of the tokenizer's file."""
    return dataclasses.replace(config, text=with_checksum(config.text))


def _changes(saved: ExperimentConfig, config: ExperimentConfig) -> Changes:
    """Every setting that differs."""
    ours, theirs = to_dict(config), to_dict(saved)
    return {
        f"{section}.{name}": (theirs[section][name], value)
        for section, values in ours.items()
        for name, value in values.items()
        if value != theirs[section][name]
    }


def _check_allowed(workdir: str, changes: Changes, config: ExperimentConfig) -> None:
    """Raises InputError naming the changes after which something else would be learned."""
    free = FREE_SETTINGS | ({"train.steps"} if config.optimizer.schedule == "constant" else frozenset())
    if not changes.get("text.checksum", ("kept",))[0]:
        # The run is from before checksums were kept.
        free |= {"text.checksum"}
    changed = [
        f"{path}={new!r} (the run has {old!r})"
        for path, (old, new) in changes.items()
        if path.partition(".")[0] not in FREE_SECTIONS and path not in free
    ]
    if changed:
        raise InputError("workdir", workdir, f"belongs to another config: {', '.join(changed)}; use another workdir")
