"""Parses the text of a compiled program (HLO): computations, instructions, shapes, loops.

The text is that of `jax.stages.Compiled.as_text()`, the optimized program of one device. Only what
the costs need is parsed; the rest of an instruction stays text.
"""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CLOSED = re.compile(r"^ +ROOT .*\n(?:.*\n)*?\}$", re.M)
_INTEGER = re.compile(r"^-?\d+$")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and size of an array.

    Attributes:
      dtype: its name in HLO: bf16, f32, s32, ...
      dims: its shape.
      in_hbm: whether it is in HBM, not in on-chip or host memory.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            width = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(width.group(1)) if width else 8
        return math.ceil(math.prod(self.dims) * bits / 8)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape: one, or those of a tuple."""
    parsed = []
    for dtype, dims, layout in _ARRAY.findall(text):
        dims = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        parsed.append(Array(dtype, dims, "S(" not in layout))
    return tuple(parsed)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without %.
      shape_text: its type, as text.
      opcode: its operation.
      operands: names of its operands.
      literal: the text in parentheses, for constants and parameters.
      attributes: the rest of the line.
      is_root: whether it is the result of the computation.
    """

    name: str
    shape_text: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def shape(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        return arrays(self.shape_text)

    def attribute(self, name: str) -> str | None:
        """VALUE of `name=VALUE`, up to the next comma or space; None if it is absent."""
        match = re.search(rf"(?:^|[\s,]){name}=([^\s,]+)", self.attributes)
        return match.group(1) if match else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The numbers of `name={1,2}`; () if it is absent."""
        match = re.search(rf"(?:^|[\s,]){name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in match.group(1).split(",") if n) if match else ()

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs (without those that combine two numbers)."""
        names = re.findall(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names += [name.strip().lstrip("%") for name in branches.group(1).split(",")] if branches else []
        if self.opcode == "call":
            names += re.findall(r"to_apply=%?([\w.\-]+)", self.attributes)
        return tuple(names)


@dataclasses.dataclass
class Computation:
    """A function of the program.

    Attributes:
      name: without %.
      instructions: by name, in order.
      root: its result.
    """

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have each instruction as an operand, by its name."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its arguments, in order."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.literal))

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """The arrays of each operand."""
        known = self.instructions
        return [known[name].shape if name in known else () for name in instruction.operands]


@dataclasses.dataclass
class Module:
    """A whole program.

    Attributes:
      computations: by name.
      entry: the main computation.
      partitions: number of devices.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


def is_complete(text: str) -> bool:
    """Whether the text of a module is complete: its ENTRY computation, the last one, has a ROOT and is closed."""
    entry = text.rfind("\nENTRY ")
    return entry >= 0 and _CLOSED.search(text, entry) is not None


def parse(text: str) -> Module:
    """Parses a module. Raises ValueError if the text is not a complete module."""
    if not is_complete(text):
        raise ValueError("not the complete text of an HLO module: it has no closed ENTRY computation with a ROOT")
    computations, entry, current = {}, None, None
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), Computation(header.group(2)))
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := parse_instruction(line)):
            current.instructions[instruction.name] = instruction
            current.root = instruction if instruction.is_root else current.root
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line; None if it is not an instruction."""
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        shape_text=shape,
        opcode=rest[:opening],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=rest[closing:].lstrip(", "),
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text[start:]):
        depth += 1 if parenthesis.group() == "(" else -1
        if depth == 0:
            return start + parenthesis.end()
    return len(text)


# --- Loops ------------------------------------------------------------------------


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Number of iterations of a `while`; None if it is unknown.

    Taken from the annotation of the compiler if there is one, else from the bound in the condition,
    the first value of the counter and its increment.
    """
    known = re.search(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations.get(loop.attribute("condition").lstrip("%"))
    bound = _bound(module, condition)
    if bound is None:
        return None
    index, limit, direction = bound
    start = _integer(computation, _element(computation, loop.operands[0], index)) or 0
    step = _increment(module, module.computations.get(loop.attribute("body").lstrip("%")), index) or 1
    trips = (limit - start) / step + (direction in ("LE", "GE"))
    return max(math.ceil(trips), 0)


def _source(computation: Computation, name: str | None, views: tuple[str, ...]) -> Instruction | None:
    """The instruction of a name; for an opcode of `views` that of its operand, and so on. None if it is unknown."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in views and instruction.operands:
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _element(computation: Computation, name: str, index: int) -> str | None:
    """Name of the element of a tuple at `index`."""
    instruction = _source(computation, name, ("copy", "opt-barrier"))
    if instruction is None or instruction.opcode != "tuple" or index >= len(instruction.operands):
        return None
    return instruction.operands[index]


def _integer(computation: Computation, name: str | None) -> int | None:
    """Value of an integer constant, or of a copy or a broadcast of one."""
    instruction = _source(computation, name, ("copy", "bitcast", "convert", "reshape", "broadcast"))
    if instruction is None or instruction.opcode != "constant" or not _INTEGER.match(instruction.literal):
        return None
    return int(instruction.literal)


def _inlined(module: Module, computation: Computation, name: str) -> tuple[Computation, Instruction, dict] | None:
    """An instruction, or for a fusion the root of its computation; with the arguments of the fusion."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode != "fusion":
        return computation, instruction, {}
    inner = module.computations[instruction.called[0]]
    arguments = dict(zip((p.name for p in inner.parameters), instruction.operands, strict=False))
    return inner, inner.root, arguments


def _bound(module: Module, condition: Computation | None) -> tuple[int, int, str] | None:
    """(index of the counter, limit, direction) of the condition of a loop."""
    if condition is None or condition.root is None:
        return None
    inner, root, arguments = _inlined(module, condition, condition.root.name)
    if root.opcode != "compare" or len(root.operands) != 2:
        return None
    sides = [arguments.get(name, name) for name in root.operands]
    scopes = [condition if name in arguments else inner for name in root.operands]
    limit = _integer(scopes[1], sides[1])
    index = _counter_index(scopes[0], sides[0])
    direction = root.attribute("direction")
    if limit is None or index is None or direction not in ("LT", "LE", "NE", "GT", "GE"):
        return None
    return index, limit, direction


def _counter_index(computation: Computation, name: str) -> int | None:
    """Index of the element of the tuple of a loop that an instruction reads."""
    instruction = _source(computation, name, ("copy", "bitcast", "convert"))
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute("index"))


def _increment(module: Module, body: Computation | None, index: int) -> int | None:
    """Increment of the counter of a loop."""
    if body is None or body.root is None:
        return None
    name = _element(body, body.root.name, index)
    inlined = _inlined(module, body, name) if name else None
    if inlined is None or inlined[1].opcode != "add":
        return None
    inner, add, arguments = inlined
    for operand in add.operands:
        scope = body if operand in arguments else inner
        value = _integer(scope, arguments.get(operand, operand))
        if value is not None:
            return value
    return None
