"""Read the text of an optimised HLO module (`compiled.as_text()`) into computations and instructions."""

import dataclasses
import functools
import math
import re

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64,
}  # fmt: skip

_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array."""

    dtype: str
    dims: tuple[int, ...]
    main: bool
    """Whether it is in the chip's main memory, not in a scratch memory that the compiler manages."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        # Narrow floats such as f8e4m3fn take one byte; tokens and opaque values take none.
        return self.size * BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The leaves of its value."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    literal: str
    rest: str
    """The text after the operands."""
    root: bool

    def called(self, key: str) -> str | None:
        """Return the computation that an attribute such as calls=%name gives."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """Return where it came from: the path of scopes and functions in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    def operand_shapes(self, instruction: Instruction, index: int) -> tuple[Shape, ...]:
        return self.by_name[instruction.operands[index]].shapes


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


def read(text: str) -> Module:
    """Return the module in a text. Raises ValueError for a text without an entry computation."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            found = re.match(r"(ENTRY )?%?([\w.\-]+) .*->.*\{$", line)
            if found:
                name, lines = found.group(2), []
                entry = name if found.group(1) else entry
        elif line == "}" or line.startswith('}, execution_thread="'):  # of the chip's second kind of core
            computations[name] = Computation(name, tuple(_instruction(line) for line in lines))
            name = None
        elif line.startswith("  "):
            lines.append(line.strip())
        else:  # an attribute that continues on the next line
            lines[-1] += line
    if entry is None:
        raise ValueError("the text has no entry computation")
    return Module(computations, entry)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Return the arrays in the text of a type, in order."""
    return tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), _SPACE.search(layout) is None)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, value = line.removeprefix("ROOT ").partition(" = ")
    stop = _closing(value, 0) + 1 if value.startswith("(") else value.index(" ")
    type_text, value = value[:stop], value[stop:].lstrip()
    start = value.index("(")
    stop = _closing(value, start)
    inside = value[start + 1 : stop]
    return Instruction(
        name.lstrip("%"),
        value[:start],
        shapes_of(type_text),
        tuple(_NAME.findall(inside)),
        inside,
        value[stop + 1 :],
        root,
    )


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a bracket is not closed: {text[start : start + 80]}")
