"""Parser of optimised HLO text: instructions, loops and collectives.

The text is that of `compiled.as_text()`: optimised HLO of one device, where a shape is
the part that this device holds. A loop's body appears once, so whatever is counted here
is multiplied by the trips of the loops around it where they can be known.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

Shape = tuple[str, tuple[int, ...]]  # dtype, dimensions

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SENT_WHOLE = ("collective-permute", "collective-broadcast")  # by the one that has it
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others end in their number of bits

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)')


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several if it is a tuple
    in_hbm: tuple[bool, ...]  # whether each lies in the device's main memory
    text: str  # opcode, operands and attributes
    is_root: bool

    @property
    def op_name(self) -> str:
        """The JAX operation that it was lowered from."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        inside = self.text[len(self.opcode) + 1 :].split(")", 1)[0]
        return re.findall(r"%([\w.-]+)", inside)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs or applies."""
        groups = _CALLED.findall(self.text)
        return [name for group in groups for name in re.findall(r"[\w.-]+", group)]

    def attribute(self, name: str) -> str:
        """Return the computation that an attribute names, "" if there is none."""
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        return match[1] if match else ""


@dataclass(slots=True)
class Module:
    """Computations of a program by name."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""


@dataclass(frozen=True, slots=True)
class Loop:
    """A while loop around an instruction."""

    name: str
    op_name: str
    trips: int | None  # None: depends on data


@dataclass(frozen=True, slots=True)
class Collective:
    """Communication of this device with others."""

    kind: str
    name: str
    op_name: str
    shapes: tuple[Shape, ...]  # the whole arrays: gathered, or before scattering
    num_bytes: int  # of `shapes`, each time it runs
    group: tuple[int, ...]  # a group of devices that take part; () = not known
    loops: tuple[Loop, ...]  # outermost first

    @property
    def group_size(self) -> int:
        """Devices that take part, 0 if that is not known."""
        return len(self.group)

    @property
    def trips(self) -> int | None:
        """Runs per step; None if that depends on data."""
        return _product(self.loops)

    @property
    def wire_bytes(self) -> float:
        """Bytes that this device sends each time, with the ring algorithm.

        (n - 1) / n of the array for gathers, scatters and exchanges among n devices,
        twice that for an all-reduce, the whole array for a permutation.

        Source: Patarasuk and Yuan, 2009, doi 10.1016/j.jpdc.2008.09.002, section 4.
        """
        if self.kind in SENT_WHOLE:
            return float(self.num_bytes)
        share = 1 - 1 / self.group_size if self.group_size else 1.0
        return (2 if self.kind == "all-reduce" else 1) * share * self.num_bytes


def parse(text: str) -> Module:
    """Parse the computations of a program's text.

    Raises:
      ValueError: the text has no entry computation.
    """
    module, current = Module(), None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = module.computations.setdefault(head[2], {})
            if head[1]:
                module.entry = head[2]
        elif line.rstrip() == "}":  # an attribute may end a line of its own with "}}"
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], is_root=bool(match[1]))
            current[instruction.name] = instruction
    if not module.entry:
        raise ValueError("the text has no ENTRY computation: is it optimised HLO?")
    return module


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(_without_layouts(rest))
    if opcode is None:
        raise ValueError(f"cannot read the instruction {name} = {rest[:80]}")
    start = rest.index(opcode[1] + "(")
    arrays = _SHAPE.findall(rest[:start])
    shapes = tuple(
        (t, tuple(int(d) for d in dims.split(",") if d)) for t, dims, _ in arrays
    )
    # S(n) in a layout is a memory of the core: vector memory, scalars, semaphores.
    in_hbm = tuple(not re.search(r"S\((?!0\))\d+\)", layout) for *_, layout in arrays)
    return Instruction(name, opcode[1], shapes, in_hbm, rest[start:], is_root)


def _without_layouts(text: str) -> str:
    """Blank the layouts, which hold words with parentheses, as "{1,0:T(8,128)}"."""
    return re.sub(r"\{[^{}]*\}", lambda m: " " * len(m[0]), text)


def size(shapes: tuple[Shape, ...]) -> int:
    """Return the bytes of some arrays."""
    return sum(math.ceil(_bits(dtype) * math.prod(dims) / 8) for dtype, dims in shapes)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.findall(r"\d+", dtype)[0])


def _product(loops: tuple[Loop, ...]) -> int | None:
    trips = [loop.trips for loop in loops]
    return None if None in trips else math.prod(t for t in trips if t is not None)


def walk(module: Module) -> Iterator[tuple[str, Instruction, tuple[Loop, ...]]]:
    """Yield every instruction that runs, between its computation and its loops."""

    def visit(name: str, loops: tuple[Loop, ...]):
        for instruction in module.computations[name].values():
            yield name, instruction, loops
            if instruction.opcode == "while":
                loop = Loop(
                    instruction.name,
                    instruction.op_name,
                    _trips(module, name, instruction),
                )
                yield from visit(instruction.attribute("body"), (*loops, loop))
                continue
            for called in instruction.called:
                if called in module.computations:
                    yield from visit(called, loops)

    yield from visit(module.entry, ())


def _trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """Return the compiler's trip count, or n of a condition i < n with i from 0."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.text:
        return None
    index, limit = (condition.get(name) for name in root.operands)
    if index is None or limit is None or index.opcode != "get-tuple-element":
        return None
    number = re.match(r"constant\((\d+)\)", limit.text)
    position = re.search(r"index=(\d+)", index.text)
    if number is None or position is None:
        return None
    start = _operand(module, computation, loop.operands[0], int(position[1]))
    return int(number[1]) if start == 0 else None


def _operand(module: Module, computation: str, name: str, index: int) -> int | None:
    """Return the constant that is element `index` of a tuple, through copies."""
    instructions = module.computations[computation]
    made = instructions.get(name)
    if made is None or made.opcode != "tuple":
        return None
    value = instructions.get(made.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast"):
        value = instructions.get(value.operands[0])
    number = re.match(r"constant\((-?\d+)\)", value.text) if value else None
    return int(number[1]) if number else None


def collectives(module: Module, *, num_devices: int = 0) -> list[Collective]:
    """List all collectives, each once however often it runs.

    An asynchronous one is listed where it starts. A TPU may spread one over several
    fusions that share its channel: it is listed once.

    Args:
      module: from `parse`.
      num_devices: that take part where the text names none.
    """
    results: list[Collective] = []
    channels: dict[tuple, str] = {}  # where each was seen first
    for computation, instruction, loops in walk(module):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        if channel:
            key = (kind, channel[1], loops)
            if channels.setdefault(key, computation) != computation:
                continue
        shapes = instruction.shapes
        group = _group(instruction.text) or tuple(range(num_devices))
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            shapes = results_of_start(shapes)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's fusion of all-reduce and slice
        elif kind == "reduce-scatter":
            shapes = _before_scattering(instruction.text, shapes, len(group))
        results.append(
            Collective(
                kind,
                instruction.name,
                instruction.op_name,
                shapes,
                size(shapes),
                group,
                loops,
            )
        )
    return results


def results_of_start(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return the results of a start, which is (operands, results, contexts)."""
    arrays = tuple(s for s in shapes if not (s[0] == "u32" and s[1] in ((), (1,))))
    return arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays


def _before_scattering(
    text: str, shapes: tuple[Shape, ...], group: int
) -> tuple[Shape, ...]:
    dim = re.search(r"dimensions=\{(\d+)\}", text)
    if dim is None:
        return shapes
    axis, n = int(dim[1]), max(group, 1)
    return tuple(
        (dtype, tuple(d * n if i == axis else d for i, d in enumerate(dims)))
        for dtype, dims in shapes
    )


def _group(text: str) -> tuple[int, ...]:
    """Parse the first replica group, in the notations of the text.

    Of a permutation, the devices of all its pairs.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{", text):
        inside = text[match.end() :].split("}}", 1)[0]
        if text[match.start()] == "s":
            return tuple(sorted({int(n) for n in re.findall(r"\d+", inside)}))
        return tuple(int(n) for n in inside.split("}")[0].split(","))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", text):
        groups = _iota(match[2]).reshape(_integers(match[1]))
        return tuple(groups[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _group_of_mesh(match[1], match[2], match[3])
    return ()


def _group_of_mesh(mesh: str, devices: str, axes: str) -> tuple[int, ...]:
    """Return the devices along some axes, or parts of axes, from the first device on.

    Args:
      mesh: "'a'=2,'b'=16".
      devices: ", device_ids=([16,2]T(1,0)) ", or nothing where they are in order.
      axes: "'b'", or "'b':(2)4" for a part of 4 of it, with 2 before it.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts = {
        name: (int(before), int(part)) if part else (1, sizes[name])
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    dims: list[int] = []
    chosen: list[slice | int] = []
    for name, n in sizes.items():
        before, part = parts.get(name, (1, 1))
        dims += [before, part, n // before // part]
        chosen += [0, slice(None), 0]
    listed = re.search(r"device_ids=\((\S+)\)", devices)
    ids = _iota(listed[1]) if listed else np.arange(math.prod(dims))
    return tuple(ids.reshape(dims)[tuple(chosen)].ravel().tolist())


def _iota(text: str) -> np.ndarray:
    """Return the numbers of "[4,2]T(1,0)": 0 to 7 in this shape, transposed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None
    dims = _integers(match[1])
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_integers(match[2])) if match[2] else ids


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
