"""A job on a TPU slice that is only described (`jax.experimental.topologies`), and the programs it runs there."""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from causalfusion_jax.common import sharding
from causalfusion_jax.common.errors import InputError, require
from causalfusion_jax.common.hardware import Topology
from causalfusion_jax.config import experiment
from causalfusion_jax.config.experiment import ExperimentConfig

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
        importlib.util.find_spec("libtpu") is not None,
        "--topology",
        topology.name,
        "needs the TPU compiler: pip install 'causalfusion_jax[preflight]', or pip install libtpu",
    )
    large = {"v5e": 16, "v6e": 16}.get(topology.accelerator.name, 64)
    require(
        max(topology.shape) <= large and topology.devices <= 8192,
        "--topology",
        topology.name,
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


@dataclasses.dataclass(frozen=True)
class Program:
    """A device program of a run.

    Attributes:
      name: what it does.
      lower: traces it, in another process; see `compiler.compile_lowered`.
      resident: bytes of HBM on each device, by name, of what lies there meanwhile and is not its argument.
    """

    name: str
    lower: functools.partial
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def resident_bytes(self) -> int:
        """All of it."""
        return sum(self.resident.values())


@dataclasses.dataclass(frozen=True)
class Listing:
    """The programs of a job.

    Attributes:
      programs: in the order in which they first run.
      impossible: programs that these settings rule out, and why. No part of training is among them.
      notes: what was assumed of weights that are not there.
    """

    programs: tuple[Program, ...]
    impossible: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
