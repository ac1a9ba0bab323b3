"""Peak rates of accelerators, and shapes of TPU slices.

The figures are those that the vendors publish, for one jax device: a chip; of TPU v2 and v3 one of
its two cores, with half of its network.

- TPU v4, v5e, v5p, v6e: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: peak bfloat16
  compute, HBM capacity and bandwidth, interconnect. They state the interconnect (ICI) in
  both directions (v5e 400, v5p 1200, v6e 800 GB/s a chip) or in bits (v4 2400 Gb/s); in one
  direction it is 200, 600, 400 and 300 GB/s, over four ports (v5e, v6e) or six (v4, v5p).
- TPU v2, v3: Jouppi et al., A domain-specific supercomputer for training deep neural
  networks, CACM 2020.
- Rings: v5e and v6e only along an axis of 16 chips (the side of a pod), v4 and v5p on slices
  of whole cubes of 4x4x4; same pages, under the supported topologies.
- NVIDIA A100, H100 SXM and H200 SXM data sheets: dense bfloat16, without sparsity; NVLink is
  stated in both directions (600, 900, 900 GB/s), half of it in one direction.
"""

import dataclasses
import math

from causalfusion_jax.common.errors import InputError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of device.

    Attributes:
      name: short name; for a TPU the first part of the names of its slices.
      device_kinds: values of jax's `device_kind`.
      peak_flops: bfloat16 FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s to other devices in one direction, over all links.
      axes: dimensions of the network, each with two links a chip; 0: not a TPU that can be compiled
        for ahead of time.
      topologies: shapes of slices, for hints; larger slices follow the same pattern.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int = 0
    topologies: tuple[str, ...] = ()


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

_FIELDS = tuple(field.name for field in dataclasses.fields(Accelerator))
ACCELERATORS = tuple(
    Accelerator(**dict(zip(_FIELDS, row, strict=False)))
    for row in (
        ("v2", ("TPU v2",), 22.5e12, 8 * GIB, 0.35e12, 124e9),
        ("v3", ("TPU v3",), 61.5e12, 16 * GIB, 0.45e12, 164e9),
        ("v4", ("TPU v4",), 275e12, 32 * GIB, 1.228e12, 300e9, 3, _3D),
        ("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 0.819e12, 200e9, 2, _2D),
        ("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2.765e12, 600e9, 3, _3D),
        ("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1.638e12, 400e9, 2, _2D),
        ("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1.555e12, 300e9),
        ("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2.039e12, 300e9),
        ("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * 10**9, 3.35e12, 450e9),
        ("H200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4.8e12, 450e9),
    )
)
"""Each row has the fields of Accelerator in their order."""


def by_device_kind(kind: str) -> Accelerator | None:
    """The accelerator with this `device_kind`, or None."""
    return next((a for a in ACCELERATORS if kind in a.device_kinds), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
      accelerator: its chips.
      shape: chips along each axis of the network.
    """

    accelerator: Accelerator
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name on the command line."""
        return f"{self.accelerator.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def link_bandwidth(self) -> float:
        """Upper bound on the bytes/s that a chip sends in a collective over the whole slice.

        A chip uses both links of an axis that is a ring, and one of an axis that is a line, because
        the chips at its ends have one. An axis of one chip has no link.
        """
        cubes = all(n % 4 == 0 for n in self.shape)
        rings = [cubes if len(self.shape) == 3 else n % 16 == 0 for n in self.shape]
        links = sum((1 + ring) * (n > 1) for n, ring in zip(self.shape, rings, strict=True))
        return self.accelerator.link_bandwidth * links / (2 * self.accelerator.axes)


def topology(name: str) -> Topology:
    """Parses the name of a TPU slice, as in `v5e:16x16` or `v5p:2x2x4`. Raises InputError for another name."""
    tpus = {a.name: a for a in ACCELERATORS if a.axes}
    generation, _, dims = name.strip().lower().partition(":")
    known = [f"{a.name}:{shape}" for a in tpus.values() for shape in a.topologies]
    example = f"must be GENERATION:SHAPE, GENERATION one of {', '.join(tpus)}, as in v5e:16x16 or v5p:2x2x4"
    if generation not in tpus:
        raise InputError("--topology", name, example + (_by_size(name, tpus) or nearest(name, known)))
    parts = dims.split("x")
    accelerator = tpus[generation]
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) != accelerator.axes:
        shapes = ", ".join(accelerator.topologies)
        raise InputError("--topology", name, f"{generation} has {shapes}{nearest(name, known)}")
    return Topology(accelerator, tuple(map(int, parts)))


def _by_size(name: str, tpus: dict[str, Accelerator]) -> str:
    """A hint for names such as `v5litepod-256` or `v5p-32`, whose numbers count chips or, on v4 and v5p, cores."""
    generation, _, size = name.strip().lower().replace("litepod", "e").partition("-")
    if generation not in tpus or not size.isdigit():
        return ""
    chips = int(size) // (2 if tpus[generation].axes == 3 else 1)
    fitting = [s for s in tpus[generation].topologies if math.prod(map(int, s.split("x"))) == chips]
    return f" (did you mean {generation}:{fitting[0]}?)" if fitting else ""
