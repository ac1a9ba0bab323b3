"""Reads the text of a compiled program (HLO): computations, instructions, shapes, loops.

`jax.stages.Compiled.as_text()` prints the optimized program of one device. Only what the
costs need is understood; everything else of an instruction stays text.
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
      dtype: as HLO calls it: bf16, f32, s32, ...
      dims: its shape.
      in_hbm: whether it lies in HBM, not in on-chip or host memory.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(found.group(1)) if found else 8
        return math.ceil(math.prod(self.dims) * bits / 8)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape: one, or those of a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        dims = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(dtype, dims, "S(" not in layout))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without %.
      shape_text: its type.
      opcode: what it does.
      operands: names of what it takes.
      literal: what stands between the parentheses, for constants and parameters.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
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
        """The arrays it makes."""
        return arrays(self.shape_text)

    def attribute(self, name: str) -> str | None:
        """`name=VALUE` up to the next comma or space, or None."""
        found = re.search(rf"(?:^|[\s,]){name}=([^\s,]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """`name={1,2}` as numbers; () where it is absent."""
        found = re.search(rf"(?:^|[\s,]){name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs (not those that combine two numbers)."""
        found = re.findall(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", self.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        found += [name.strip().lstrip("%") for name in branches.group(1).split(",")] if branches else []
        if self.opcode == "call":
            found += re.findall(r"to_apply=%?([\w.\-]+)", self.attributes)
        return tuple(found)


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
        """Who takes each instruction."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its arguments, in order."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """The arrays of each operand."""
        known = self.instructions
        return [known[name].shape if name in known else () for name in instruction.operands]


@dataclasses.dataclass
class Module:
    """A whole program.

    Attributes:
      computations: by name.
      entry: where it begins.
      partitions: devices it runs on.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


def is_complete(text: str) -> bool:
    """Whether the text of a module is whole: its ENTRY computation, the last one, has a ROOT and is closed."""
    entry = text.rfind("\nENTRY ")
    return entry >= 0 and _CLOSED.search(text, entry) is not None


def parse(text: str) -> Module:
    """Reads a module. Raises ValueError where the text is none, or is cut off."""
    if not is_complete(text):
        raise ValueError("not the whole text of an HLO module: it has no closed ENTRY computation with a ROOT")
    computations, entry, current = {}, None, None
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), Computation(header.group(2)))
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
            current.root = instruction if instruction.is_root else current.root
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    """One line, or None where it is no instruction."""
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
    """Just past the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.end()
    return len(text)


# --- Loops ------------------------------------------------------------------------


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, or None where that cannot be told.

    The compiler's own note where there is one; else the condition's bound, the counter's
    first value and its increment.
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


def _element(computation: Computation, name: str, index: int) -> str | None:
    """The name of what a tuple holds at `index`."""
    made = computation.instructions.get(name)
    while made is not None and made.opcode in ("copy", "opt-barrier") and made.operands:
        made = computation.instructions.get(made.operands[0])
    if made is None or made.opcode != "tuple" or index >= len(made.operands):
        return None
    return made.operands[index]


def _integer(computation: Computation, name: str | None) -> int | None:
    """The value of an integer constant, also of a copy or a broadcast of one."""
    made = computation.instructions.get(name)
    while made is not None and made.opcode in ("copy", "bitcast", "convert", "reshape", "broadcast") and made.operands:
        made = computation.instructions.get(made.operands[0])
    if made is None or made.opcode != "constant" or not _INTEGER.match(made.literal):
        return None
    return int(made.literal)


def _inlined(module: Module, computation: Computation, name: str) -> tuple[Computation, Instruction, dict] | None:
    """An instruction, or the result of the fusion that it is, with the fusion's arguments."""
    made = computation.instructions.get(name)
    if made is None:
        return None
    if made.opcode != "fusion":
        return computation, made, {}
    inner = module.computations[made.called[0]]
    arguments = dict(zip((p.name for p in inner.parameters), made.operands, strict=False))
    return inner, inner.root, arguments


def _bound(module: Module, condition: Computation | None) -> tuple[int, int, str] | None:
    """(index of the counter, limit, direction) of a loop's condition."""
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
    """Which element of the loop's tuple an instruction reads."""
    made = computation.instructions.get(name)
    while made is not None and made.opcode in ("copy", "bitcast", "convert") and made.operands:
        made = computation.instructions.get(made.operands[0])
    if made is None or made.opcode != "get-tuple-element":
        return None
    return int(made.attribute("index"))


def _increment(module: Module, body: Computation | None, index: int) -> int | None:
    """What a loop adds to its counter."""
    if body is None or body.root is None:
        return None
    name = _element(body, body.root.name, index)
    found = _inlined(module, body, name) if name else None
    if found is None or found[1].opcode != "add":
        return None
    inner, add, arguments = found
    for operand in add.operands:
        scope = body if operand in arguments else inner
        value = _integer(scope, arguments.get(operand, operand))
        if value is not None:
            return value
    return None
