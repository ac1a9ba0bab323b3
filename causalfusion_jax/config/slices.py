"""Jobs on TPU slices that are only described (`jax.experimental.topologies`), and the programs of a job."""

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


@dataclasses.dataclass(frozen=True)
class SliceJob:
    """A training step or a sampler on a slice.

    Attributes:
      config: all settings.
      topology: the slice.
      kind: `train`, the training step; or `sample`, the sampler of `config.sampling`, with all
        parameters on every device and the images split over the devices.
      num: batch size of the sampler.
    """

    config: ExperimentConfig
    topology: Topology
    kind: str = "train"
    num: int = 0

    @property
    def batch(self) -> int:
        """Images in one call of the program, over all devices."""
        return self.config.train.batch_size if self.kind == "train" else self.num

    def with_batch(self, batch: int) -> "SliceJob":
        """The same job with another batch size."""
        if self.kind == "sample":
            return dataclasses.replace(self, num=batch)
        return self.with_settings("train", batch_size=batch)

    def with_settings(self, section: str, **changes) -> "SliceJob":
        """The same job with some settings of a section changed."""
        changed = dataclasses.replace(getattr(self.config, section), **changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **{section: changed}))

    @property
    def batch_devices(self) -> int:
        """Number of devices that the images are split over."""
        if self.kind == "sample":
            return self.topology.devices
        mesh = self.mesh()
        return mesh.shape["data"] * mesh.shape["fsdp"]

    @property
    def quantum(self) -> int:
        """The batch size must be a multiple of this."""
        return self.batch_devices * (self.config.train.grad_accum_steps if self.kind == "train" else 1)

    def mesh(self) -> Mesh:
        """The mesh on the slice. Raises InputError if it does not fit."""
        return sharding.make_mesh(self.config.mesh, devices(self.topology))


@functools.cache
def devices(topology: Topology) -> tuple:
    """The devices of a described slice. Raises InputError if there is no such slice."""
    allowed = "needs the TPU compiler: pip install 'causalfusion_jax[preflight]', or pip install libtpu"
    require(importlib.util.find_spec("libtpu") is not None, "--topology", topology.name, allowed)
    large = {"v5e": 16, "v6e": 16}.get(topology.accelerator.name, 64)
    allowed = f"is larger than a pod of {topology.accelerator.name}; at most {large} chips along an axis"
    require(max(topology.shape) <= large and topology.devices <= 8192, "--topology", topology.name, allowed)
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


def check(job: SliceJob) -> None:
    """Raises InputError if the batch or the model cannot be split over the slice; compiles nothing."""
    field = "config.train.batch_size" if job.kind == "train" else "--num"
    if job.batch % job.quantum:
        below = job.batch // job.quantum * job.quantum
        fits = " or ".join(str(n) for n in (below, below + job.quantum) if n)
        what = f"{job.batch_devices} devices of the batch on {job.topology.name}"
        accum = job.config.train.grad_accum_steps if job.kind == "train" else 1
        what += f" times grad_accum_steps={accum}" if accum > 1 else ""
        raise InputError(field, job.batch, f"must be a multiple of {job.quantum}, the {what}: give {fits}")
    if job.kind == "train":
        experiment.check_mesh(job.config, job.mesh())


@dataclasses.dataclass(frozen=True)
class Program:
    """A device program of a run.

    Attributes:
      name: for reports.
      lower: traces it, in another process; see `compiler.compile_lowered`.
      resident: HBM in bytes on each device, by name, of arrays that are there while it runs and are
        not among its arguments.
    """

    name: str
    lower: functools.partial
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def resident_bytes(self) -> int:
        """Sum of `resident`."""
        return sum(self.resident.values())


@dataclasses.dataclass(frozen=True)
class Listing:
    """The programs of a run.

    Attributes:
      programs: in the order in which they first run.
      impossible: programs that these settings exclude, and the reason; none of training.
      notes: assumptions about weights that are missing.
    """

    programs: tuple[Program, ...]
    impossible: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
