"""Costs of one call of a compiled program on one device, counted from its HLO.

- Collectives: their number and bytes. An asynchronous collective appears several times in the
  text (start and done, or in every fusion that it is spread over), always with the same channel,
  and counts once.
- FLOPs of matrix products and convolutions, in fusions too, and of kernels by their own cost
  estimate: that of attention in tiles counts every tile, and heads padded to lanes.
- Bytes read from and written to HBM: operands and results in HBM of every instruction. An operand
  of which a fusion reads slices only counts as these slices, a result that is updated in place as
  the update. Arrays in on-chip memory do not count.

The body of a loop counts once for each iteration (XLA's own `cost_analysis` counts it once); of a
conditional, the most expensive branch counts.
"""

import dataclasses
import math
import re
from collections import Counter

import numpy as np

from causalfusion_jax.compile_ahead.hlo import Array, Computation, Instruction, Module, trip_count

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_FREE = {
    # Instructions that move no data themselves.
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "iota",
    "add-dependency",
    "domain",
    "async-start",
}
_WINDOWS = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "convert")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sums over one call, for one device.

    Attributes:
      flops: of matrix products and convolutions; a multiply-add counts as two.
      hbm_bytes: read from and written to HBM.
      count: collectives of each kind.
      bytes: size of their unsharded arrays (the result of an all-gather, the operand of a
        reduce-scatter), by kind.
      sent: bytes that a device sends for them if the group is a ring, by kind.
      unknown: loops of unknown trip count, counted as one iteration, and kernels of unknown cost.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    count: Counter = dataclasses.field(default_factory=Counter)
    bytes: Counter = dataclasses.field(default_factory=Counter)
    sent: Counter = dataclasses.field(default_factory=Counter)
    unknown: Counter = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Costs") -> "Costs":
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self))
        return Costs(*sums)

    def times(self, n: int) -> "Costs":
        """Costs of n calls; `unknown` is not multiplied."""
        scaled = [Counter({k: n * v for k, v in c.items()}) for c in (self.count, self.bytes, self.sent)]
        return Costs(n * self.flops, n * self.hbm_bytes, *scaled, self.unknown)

    @property
    def sent_bytes(self) -> float:
        """Bytes sent to other devices, over all kinds."""
        return float(sum(self.sent.values()))


def program_costs(module: Module) -> Costs:
    """Costs of one call of a program on one device."""
    return _Counter(module).count(module.entry)


class _Counter:
    """Counts the costs of computations; each computation is read once, however often it is called."""

    def __init__(self, module: Module):
        self.module, self.known = module, {}

    def count(self, computation: Computation) -> Costs:
        """Costs of one execution of a computation."""
        if computation.name not in self.known:
            self.known[computation.name] = self._sum(computation)
        return self.known[computation.name]

    def _sum(self, computation: Computation) -> Costs:
        costs, channels, hbm_bytes = [], {}, 0.0
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in _FREE or opcode in ("async-done", "async-update"):
                if opcode == "while":
                    costs.append(self._loop(computation, instruction))
                elif opcode == "conditional":
                    branches = [self.count(self.module.computations[name]) for name in instruction.called]
                    costs.append(max(branches, key=lambda c: (c.flops, c.sent_bytes, c.hbm_bytes)))
                elif opcode in ("call", "async-start"):
                    costs += [self.count(self.module.computations[name]) for name in instruction.called]
                continue
            hbm_bytes += self._hbm_bytes(computation, instruction)
            costs += self._computed(computation, instruction, channels)
        return sum([*costs, *channels.values()], Costs(hbm_bytes=hbm_bytes))

    def _loop(self, computation: Computation, loop: Instruction) -> Costs:
        trips = trip_count(self.module, computation, loop)
        body = self.count(self.module.computations[loop.attribute("body").lstrip("%")])
        if trips is None:
            return body + Costs(unknown=Counter({f"loop {loop.name}": 1}))
        return body.times(trips)

    def _computed(self, computation: Computation, instruction: Instruction, channels: dict) -> list[Costs]:
        """Costs of one instruction without its memory; its collectives are added to `channels`."""
        opcode = instruction.opcode
        if opcode == "fusion":
            inner = self.module.computations[instruction.called[0]]
            inside = [self._computed(inner, i, channels) for i in inner.instructions.values()]
            return [costs for listed in inside for costs in listed]
        if opcode == "convolution":
            return [Costs(flops=convolution_flops(computation, instruction))]
        if opcode == "dot":
            return [Costs(flops=dot_flops(computation, instruction))]
        if opcode == "custom-call":
            return _custom_call(instruction)
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            channel = instruction.attribute("channel_id")
            key = (kind, channel) if channel else (computation.name, instruction.name)
            channels[key] = collective_costs(computation, instruction, self.module.partitions)
        return []

    # --- Memory -------------------------------------------------------------------

    def _hbm_bytes(self, computation: Computation, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode.endswith("-done") or instruction.attribute("custom_call_target") == '"AllocateBuffer"':
            return 0
        operands = computation.operand_shapes(instruction)
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        if opcode in ("copy-start", "slice-start", "dynamic-slice", "slice"):
            # The size of the result, once for the source and once for the target if they are in HBM.
            # The shape of a start is a tuple of operand, result and context.
            source = operands[0][0].in_hbm if operands and operands[0] else True
            shapes = instruction.shape
            target = shapes[min(1, len(shapes) - 1)] if opcode.endswith("-start") else shapes[0]
            if opcode == "copy-start":
                target = next((a for a in shapes[:2] if a.in_hbm != source), shapes[0])
            return target.bytes * (source + target.in_hbm)
        if opcode == "dynamic-update-slice":
            update = operands[1][0]
            return update.bytes * (update.in_hbm + instruction.shape[0].in_hbm)
        results = () if opcode.endswith("-start") else instruction.shape
        return sum(_in_hbm(shape) for shape in operands) + _in_hbm(results)

    def _fusion_bytes(self, fusion: Instruction, operands) -> float:
        inner = self.module.computations[fusion.called[0]]
        read = 0
        for parameter, shape in zip(inner.parameters, operands, strict=False):
            if _in_hbm(shape):
                read += min(_in_hbm(shape), self._used_bytes(inner, parameter))
        return read + self._written_bytes(inner, fusion)

    def _used_bytes(self, inner: Computation, instruction: Instruction) -> float:
        """Bytes of an argument that a fusion reads: those of slices if it reads slices only."""
        used = 0
        for user in inner.users[instruction.name]:
            if user.opcode in _WINDOWS and user.operands[0] == instruction.name:
                used += sum(array.bytes for array in user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == instruction.name:
                continue
            elif user.opcode == "tuple" or user.opcode.removesuffix("-start") in KINDS:
                # Returned as it is, or counted with the collective.
                continue
            elif user.opcode == "bitcast":
                used += self._used_bytes(inner, user)
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called[0]]
                numbers = [i for i, name in enumerate(user.operands) if name == instruction.name]
                used += sum(self._used_bytes(nested, nested.parameters[i]) for i in numbers)
            else:
                return math.inf
        return used

    def _written_bytes(self, inner: Computation, fusion: Instruction) -> float:
        """Bytes of the results of a fusion in HBM; of a result that is updated in place, those of the update."""
        root = inner.root
        sources = [inner.instructions.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
        written = 0
        for array, source in zip(fusion.shape, sources, strict=False):
            scope = inner
            while source is not None and (source.opcode in _VIEWS and source.operands or source.opcode == "fusion"):
                if source.opcode == "fusion":
                    scope = self.module.computations[source.called[0]]
                    source = scope.root
                else:
                    source = scope.instructions.get(source.operands[0])
            if not array.in_hbm or source is None or source.opcode == "parameter":
                continue
            if source.opcode == "dynamic-update-slice":
                written += min(array.bytes, sum(a.bytes for a in scope.operand_shapes(source)[1]))
            elif source.opcode.removesuffix("-start") not in KINDS:
                written += array.bytes
        return written


def _in_hbm(shape: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in shape if array.in_hbm)


# --- Collectives ------------------------------------------------------------------


def group_size(instruction: Instruction, partitions: int) -> int:
    """Number of devices in a group of a collective."""
    text = instruction.attributes
    if re.search(r"source_target_pairs=", text):
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota.group(2))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes.group(1)))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part or sizes[name]) for name, part in named)
    return partitions


def collective_costs(computation: Computation, instruction: Instruction, partitions: int) -> Costs:
    """Costs of one collective: its count, the size of its unsharded arrays, and the bytes that a device sends."""
    kind = instruction.opcode.removesuffix("-start")
    group = group_size(instruction, partitions)
    operand_bytes = sum(array.bytes for shape in computation.operand_shapes(instruction) for array in shape)
    if kind == "all-reduce" and _only_slices(computation, instruction):
        kind = "reduce-scatter"
    full_bytes = operand_bytes * group if kind == "all-gather" else operand_bytes
    share = (group - 1) / group
    if kind == "all-reduce":
        sent = 2 * share * full_bytes
    elif kind in ("collective-permute", "collective-broadcast"):
        sent = full_bytes
    else:
        sent = share * full_bytes
    return Costs(count=Counter({kind: 1}), bytes=Counter({kind: full_bytes}), sent=Counter({kind: sent}))


def _only_slices(computation: Computation, reduce: Instruction) -> bool:
    """Whether each device uses only its slice of an all-reduce: how the TPU compiler writes a reduce-scatter."""
    if computation.root is None or computation.root is reduce:
        return False
    users, ends = list(computation.users[reduce.name]), []
    while users:
        user = users.pop()
        if user.opcode in ("get-tuple-element", "bitcast"):
            users += computation.users[user.name]
        else:
            ends.append(user.opcode == "dynamic-slice")
    return bool(ends) and all(ends)


# --- FLOPs ------------------------------------------------------------------------


def dot_flops(computation: Computation, dot: Instruction) -> float:
    """FLOPs of a matrix product."""
    (left,), _ = computation.operand_shapes(dot)
    contracted = math.prod(left.dims[i] for i in dot.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(dot.shape[0].dims) * contracted


def convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """FLOPs of a convolution; the TPU compiler writes matrix products as convolutions too.

    Positions where the window covers padding, or a hole of a dilated operand, do not count: the
    compiler expresses batched products by them.
    """
    (left,), (right,) = computation.operand_shapes(convolution)
    out = convolution.shape[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes).groups()
    left_at, right_at, out_at = ({label: i for i, label in enumerate(text)} for text in labels)
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    window = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in left_at if label.isdigit())
    positions = 1
    for label in spatial:
        i = int(label)
        positions *= _valid_positions(
            left.dims[left_at[label]],
            right.dims[right_at[label]],
            out.dims[out_at[label]],
            {name: value.split("x")[i] for name, value in window.items()},
        )
    groups = int(convolution.attribute("batch_group_count") or 1)
    multiply_adds = left.dims[left_at["b"]] // groups * right.dims[right_at["i"]] * out.dims[out_at["f"]] * positions
    return 2.0 * multiply_adds


def _valid_positions(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel index along one dimension that meet a value of the input."""
    stride, hole = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    spread = int(window.get("rhs_dilate", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    index = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    return int(np.sum((index >= 0) & (index <= (size - 1) * hole) & (index % hole == 0)))


def _custom_call(instruction: Instruction) -> list[Costs]:
    """Costs of a kernel by its own estimate; none for calls of the compiler."""
    if instruction.attribute("custom_call_target") != '"tpu_custom_call"':
        return []
    flops = re.search(r'"flops"\s*:\s*"?(\d+)', instruction.attributes)
    if flops is None:
        return [Costs(unknown=Counter({f"kernel {re.sub('[.0-9]+$', '', instruction.name)}": 1}))]
    return [Costs(flops=float(flops.group(1)))]
