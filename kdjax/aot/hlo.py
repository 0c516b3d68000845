"""Parser of optimised HLO text: collectives, loops and bytes written.

The text is that of `compiled.as_text()`: optimised HLO of one device, where a shape is
the part that this device holds. A loop's body appears once, so whatever is counted here
is multiplied by the trips of the loops around it where they can be known.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

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
# Outputs that are no new array in memory.
_NO_WRITE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
)


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
    group_size: int  # devices that take part, 0 if the text does not say
    loops: tuple[Loop, ...]  # outermost first

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
        if self.kind in ("collective-permute", "collective-broadcast"):
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
            for group in _CALLED.findall(instruction.text):
                for called in re.findall(r"[\w.-]+", group):
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


def collectives(module: Module) -> list[Collective]:
    """List all collectives, each once however often it runs.

    An asynchronous one is listed where it starts. A TPU may spread one over several
    fusions that share its channel: it is listed once.
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
        shapes, group = instruction.shapes, _group_size(instruction.text)
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            shapes = _results_of_start(shapes)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's fusion of all-reduce and slice
        elif kind == "reduce-scatter":
            shapes = _before_scattering(instruction.text, shapes, group)
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


def _results_of_start(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
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


def _group_size(text: str) -> int:
    """Parse the devices per replica group, in the three notations of the text."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # 'a' is a whole axis, 'a':(2)4 a part of 4 of it.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


def written_bytes(module: Module, *, unknown_trips: int = 1) -> int:
    """Return the bytes written to main memory in one run, loops multiplied.

    What is updated in place counts as the part that is updated; what stays in a core's
    own memory, and what is inside a fusion, does not count.

    Args:
      module: from `parse`.
      unknown_trips: of loops whose number of trips depends on data.
    """
    total, fused = 0, _fused(module)
    for computation, instruction, loops in walk(module):
        opcode = instruction.opcode
        if computation in fused or opcode in _NO_WRITE or opcode.endswith("-done"):
            continue
        trips = math.prod(unknown_trips if x.trips is None else x.trips for x in loops)
        total += trips * _output_bytes(module, computation, instruction)
    return total


def _fused(module: Module) -> set[str]:
    """Return the computations whose instructions are not run one by one."""
    return {
        called
        for instructions in module.computations.values()
        for i in instructions.values()
        if i.opcode not in ("while", "conditional", "call", "async-start")
        for group in _CALLED.findall(i.text)
        for called in re.findall(r"[\w.-]+", group)
    }


def _output_bytes(module: Module, computation: str, instruction: Instruction) -> int:
    root, made = instruction, module.computations[computation]
    while root.opcode == "fusion":
        made = module.computations[root.attribute("calls")]
        root = next(i for i in made.values() if i.is_root)
        while root.opcode == "bitcast" and root.operands[0] in made:
            root = made[root.operands[0]]
    arrays = list(zip(instruction.shapes, instruction.in_hbm, strict=True))
    if root.opcode == "dynamic-update-slice":
        update = made[root.operands[1]]
        arrays = [(shape, arrays[0][1]) for shape in update.shapes]
    elif root.opcode == "tuple" and len(root.operands) == len(arrays):
        # Operands that pass through, and collectives that are under way, are not new.
        makers = [made[name].opcode for name in root.operands]
        passed = ("parameter", *KINDS)
        arrays = [
            a for a, maker in zip(arrays, makers, strict=True) if maker not in passed
        ]
    elif root.opcode == "copy-start":  # (copy, original, context)
        arrays = arrays[:1]
    elif root.opcode.endswith("-start"):
        results = _results_of_start(instruction.shapes)
        arrays = [a for a in arrays if a[0] in results][-len(results) :]
    return size(tuple(shape for shape, hbm in arrays if hbm))
