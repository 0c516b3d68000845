"""Bytes that the kernels of a compiled program read from and write to main memory.

A kernel is an instruction that runs by itself: a fusion, a library call, a copy, a
collective. It writes its results and reads its operands, each once; what is between
the instructions of a fusion stays in the core. Of an array that is updated in place
only the update counts, of one that is sliced or gathered from only what is taken.

Not counted: what a kernel reads or writes more than once (operands of a product that do
not fit the caches, scratch memory of library calls), and what a cache saves.
"""

import functools
import math
import re
from dataclasses import dataclass

from kdjax.aot.hlo import (
    KINDS,
    Instruction,
    Loop,
    Module,
    Shape,
    results_of_start,
    size,
    walk,
)

# Results that are no new array in memory.
_NO_KERNEL = (
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
    "async-start",  # what it runs is counted in its place
    "async-update",
)
_VIEWS = ("bitcast", "reshape", "tuple", "get-tuple-element")  # the same bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one instruction moves, each time it runs."""

    name: str
    opcode: str
    op_name: str  # the JAX operation that it was lowered from
    shapes: tuple[Shape, ...]  # of its results
    written: int  # bytes
    read: int  # bytes
    loops: tuple[Loop, ...]  # around it, outermost first
    trips: int  # runs in one run of the program


def kernels(module: Module, *, unknown_trips: int = 1) -> list[Kernel]:
    """List the kernels of a program.

    Args:
      module: from `hlo.parse`.
      unknown_trips: of loops whose number of trips depends on data.
    """
    reader, inside = _Reader(module), _fused(module)
    results = []
    for computation, instruction, loops in walk(module):
        opcode = instruction.opcode
        if computation in inside or opcode in _NO_KERNEL or opcode.endswith("-done"):
            continue
        trips = math.prod(unknown_trips if x.trips is None else x.trips for x in loops)
        results.append(
            Kernel(
                instruction.name,
                opcode,
                instruction.op_name,
                instruction.shapes,
                sum(reader.written(computation, instruction)),
                reader.read(computation, instruction),
                loops,
                trips,
            )
        )
    return results


def written_bytes(listed: list[Kernel]) -> int:
    """Return the bytes written in one run of the program."""
    return sum(kernel.trips * kernel.written for kernel in listed)


def read_bytes(listed: list[Kernel]) -> int:
    """Return the bytes read in one run of the program."""
    return sum(kernel.trips * kernel.read for kernel in listed)


def part(kernel: Kernel) -> str:
    """Return the part of a training step that a kernel belongs to.

    One of "forward", "backward", "head", "update" and "other".
    """
    path = re.split(r"[/()]", kernel.op_name)
    if "head_loss" in path or "update" in path:
        return "head" if "head_loss" in path else "update"
    if "student" in path:
        return "backward" if "transpose" in path else "forward"
    return "other"


def _fused(module: Module) -> set[str]:
    """Return the computations whose instructions are not run one by one."""
    return {
        called
        for instructions in module.computations.values()
        for i in instructions.values()
        if i.opcode not in ("while", "conditional", "call", "async-start")
        for called in i.called
    }


class _Reader:
    """Follows arrays through the fusions of a module."""

    def __init__(self, module: Module):
        self._computations = module.computations
        self._users = functools.cache(self._make_users)

    def written(self, computation: str, instruction: Instruction) -> list[int]:
        """Return the bytes written to main memory of each result of an instruction."""
        made, opcode = self._computations[computation], instruction.opcode
        operands = [made[name] for name in instruction.operands if name in made]
        whole = [
            size((shape,)) if hbm else 0
            for shape, hbm in zip(instruction.shapes, instruction.in_hbm, strict=True)
        ]
        if opcode in ("fusion", "fusion-start"):
            fused = instruction.attribute("calls")
            inner = self.written(fused, self._root(fused))
            if opcode == "fusion-start":
                return inner
            if len(inner) == len(whole):  # what is not in main memory does not count
                return [min(pair) for pair in zip(inner, whole, strict=True)]
            return whole
        if opcode == "tuple" and len(operands) == len(whole):
            # Collectives that are under way are not new.
            return [
                0 if x.opcode in KINDS else sum(self.written(computation, x))
                for x in operands
            ]
        if opcode == "bitcast" and operands:
            return self.written(computation, operands[0])
        if opcode == "parameter":  # of a fusion that hands it on
            return [0] * len(whole)
        if opcode.removesuffix("-start") == "dynamic-update-slice":
            return [size(operands[1].shapes) if any(whole) else 0]
        if opcode == "scatter":
            updates = operands[len(operands) - len(whole) :]
            return [
                min(n, size(update.shapes))
                for n, update in zip(whole, updates, strict=True)
            ]
        if opcode == "copy-start":  # (copy, original, context)
            return whole[:1]
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            results = results_of_start(instruction.shapes)
            pairs = zip(instruction.shapes, whole, strict=True)
            return [n for shape, n in pairs if shape in results][-len(results) :]
        if opcode == "custom-call" and len(whole) > 1:
            scratch = [dtype in ("s8", "u8") for dtype, _ in instruction.shapes]
            return [0 if s else n for s, n in zip(scratch, whole, strict=True)]
        return whole

    def read(self, computation: str, instruction: Instruction) -> int:
        """Return the bytes of its operands that an instruction reads."""
        names = dict.fromkeys(instruction.operands)
        return sum(self._read_by(computation, name, instruction) for name in names)

    def _read_by(self, computation: str, name: str, user: Instruction) -> int:
        """Return the bytes of one array that one instruction reads."""
        made = self._computations[computation]
        if name not in made:
            return 0
        array, opcode = made[name], user.opcode.removesuffix("-start")
        whole = size(
            tuple(s for s, hbm in zip(array.shapes, array.in_hbm, strict=True) if hbm)
        )
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        if opcode == "fusion":
            fused = user.attribute("calls")
            return min(whole, sum(self._read_of(fused, place) for place in places))
        if places == [0] and opcode in ("dynamic-slice", "slice", "gather"):
            return min(whole, size(user.shapes))
        if places == [0] and opcode == "dynamic-update-slice":
            return 0
        if opcode == "scatter" and places[0] < len(user.shapes):
            updates = user.operands[len(user.operands) - len(user.shapes) :]
            return min(whole, size(made[updates[places[0]]].shapes))
        return whole

    def _read_of(self, computation: str, number: int) -> int:
        """Return the bytes that a fused computation reads of a parameter."""
        parameter = next(
            i
            for i in self._computations[computation].values()
            if i.opcode == "parameter" and i.text.startswith(f"parameter({number})")
        )
        return self._used(computation, parameter)

    def _used(self, computation: str, array: Instruction) -> int:
        total = 0
        for user in self._users(computation).get(array.name, ()):
            if user.opcode in _VIEWS:
                total += self._used(computation, user)
            else:
                total += self._read_by(computation, array.name, user)
        return min(total, size(array.shapes))

    def _make_users(self, computation: str) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self._computations[computation].values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    def _root(self, computation: str) -> Instruction:
        return next(i for i in self._computations[computation].values() if i.is_root)
