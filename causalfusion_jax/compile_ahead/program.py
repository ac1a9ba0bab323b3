"""The main programs that a TPU slice would run, the training step and the sampler; `programs` has them all.

The very functions that `train` and `sample` jit are lowered for the devices of a slice that
is only described (`jax.experimental.topologies`), to be compiled by the TPU compiler, which
comes with `libtpu` and needs no TPU.
"""

import dataclasses
import functools
import importlib.util
import re

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from causalfusion_jax import experiment, sharding
from causalfusion_jax.errors import InputError, require
from causalfusion_jax.experiment import ExperimentConfig
from causalfusion_jax.hardware import Topology
from causalfusion_jax.sampling.generation import lower_sampler
from causalfusion_jax.sampling.sampler import sampling_flops
from causalfusion_jax.training.state import abstract_key, lower_train_step
from causalfusion_jax.training.trimming import program_lengths, with_length

JOBS = ("train", "sample")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A program on a slice.

    Attributes:
      config: all settings.
      topology: the slice.
      job: `train`, the training step; or `sample`, the sampler, with `config.sampling`, the
        parameters whole on every device and the images split over all of them.
      num: images of a batch that is sampled.
    """

    config: ExperimentConfig
    topology: Topology
    job: str = "train"
    num: int = 0

    @property
    def batch(self) -> int:
        """Images in one call of the program, over all devices."""
        return self.config.train.batch_size if self.job == "train" else self.num

    def with_batch(self, batch: int) -> "Spec":
        """The same for another number of images."""
        if self.job == "sample":
            return dataclasses.replace(self, num=batch)
        return self.with_settings("train", batch_size=batch)

    def with_settings(self, section: str, **changes) -> "Spec":
        """The same with some settings of a section changed."""
        changed = dataclasses.replace(getattr(self.config, section), **changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **{section: changed}))

    @property
    def batch_devices(self) -> int:
        """Devices that the images are split over."""
        if self.job == "sample":
            return self.topology.devices
        mesh = self.mesh()
        return mesh.shape["data"] * mesh.shape["fsdp"]

    @property
    def quantum(self) -> int:
        """What a batch must be a multiple of."""
        return self.batch_devices * (self.config.train.grad_accum_steps if self.job == "train" else 1)

    def mesh(self) -> Mesh:
        """The mesh on the slice. Raises InputError where it does not fit."""
        return sharding.make_mesh(self.config.mesh, devices(self.topology))


@functools.cache
def devices(topology: Topology) -> tuple:
    """The devices of a slice that is not there. Raises InputError where there can be none."""
    require(
        importlib.util.find_spec("libtpu") is not None, "--topology", topology.name,
        "needs the TPU compiler: pip install 'causalfusion_jax[preflight]', or pip install libtpu",
    )
    large = {"v5e": 16, "v6e": 16}.get(topology.accelerator.name, 64)
    require(
        max(topology.shape) <= large and topology.devices <= 8192, "--topology", topology.name,
        f"is larger than a pod of {topology.accelerator.name}; at most {large} chips along an axis",
    )
    options = {}
    if topology.accelerator.axes == 3:
        options["chip_config_name"] = "megacore"
    if topology.devices == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return tuple(topologies.get_topology_desc(topology.name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        shapes = ", ".join(topology.accelerator.topologies)
        raise InputError(
            "--topology", topology.name, f"is no slice, as {_reason(error)}; there are {shapes} and larger ones"
        ) from None


def _reason(error: Exception) -> str:
    """The first line of an error, without its code."""
    return re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0])


def check(spec: Spec) -> None:
    """Raises InputError where batch or model do not split over the slice; nothing is compiled."""
    field = "config.train.batch_size" if spec.job == "train" else "--num"
    if spec.batch % spec.quantum:
        below = spec.batch // spec.quantum * spec.quantum
        fits = " or ".join(str(n) for n in (below, below + spec.quantum) if n)
        what = f"{spec.batch_devices} devices of the batch on {spec.topology.name}"
        accum = spec.config.train.grad_accum_steps if spec.job == "train" else 1
        what += f" times grad_accum_steps={accum}" if accum > 1 else ""
        raise InputError(field, spec.batch, f"must be a multiple of {spec.quantum}, the {what}: give {fits}")
    if spec.job == "train":
        experiment.check_mesh(spec.config, spec.mesh())


# --- FLOPs ------------------------------------------------------------------------


def model_flops(spec: Spec) -> int:
    """FLOPs of one image that the model's shapes ask for, however it is computed."""
    config = spec.config
    if spec.job == "train":
        return config.step.objective.flops
    return sampling_flops(config.transformer, config.diffusion, config.sampling)


# --- Lowering ---------------------------------------------------------------------


def lower(spec: Spec) -> jax.stages.Lowered:
    """The program, traced for its slice."""
    return lower_sample(spec, spec.num) if spec.job == "sample" else lower_training_step(spec)


def lower_training_step(spec: Spec, length: int | None = None) -> jax.stages.Lowered:
    """The training step of a length in clean tokens; by default of the longest."""
    config, mesh = spec.config, spec.mesh()
    length = length or program_lengths(config.step.objective, config.train.length_buckets)[-1]
    return lower_train_step(with_length(config.step, length), mesh, config.batch_shapes, abstract_key(mesh))


def lower_sample(spec: Spec, num: int) -> jax.stages.Lowered:
    """The sampler of `config.sampling` for batches of `num` images, which all devices of the slice share."""
    config = spec.config
    text_tokens = config.text.max_tokens if config.text.is_on else 0
    return lower_sampler(config, config.sampling, spec.mesh().devices.ravel(), num, text_tokens)
