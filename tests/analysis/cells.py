"""Tables of runs for the tests: a dict of cells, or a grid with every kind of run."""

import dataclasses
import math
import random

from kdjax.analysis import runs

DESIGN = runs.Design(
    metrics=("score",),
    factors=("method", "size"),
    compare=("method",),
    within=("size",),
)


def table(cells, design=DESIGN, column="score"):
    """Runs of {(first level, second level): values}; no values: one failed run."""
    rows = []
    for (first, second), values in cells.items():
        common = {design.compare[0]: first, design.within[0]: second}
        name = f"{first}-{second}"
        if not len(values):
            failed = {"run": name, "status": "failed", "error": "lost", column: ""}
            rows.append(common | failed)
        for seed, value in enumerate(values):
            done = {"run": f"{name}-{seed}", "status": "done", "seed": str(seed)}
            rows.append(common | done | {column: repr(float(value))})
    return runs.parse(rows, design)


def groups(cells):
    return runs.groups(table(cells), "score", DESIGN)


def factorial(table, names):
    """Design and runs of {levels of the factors: values}; no values: one failed run."""
    design = runs.Design(metrics=("score",), factors=names, compare=names[:1])
    rows = []
    for levels, values in table.items():
        common = dict(zip(names, levels, strict=True)) | {"status": "done"}
        if not len(values):
            rows.append(common | {"status": "failed", "score": ""})
        rows += [common | {"score": repr(float(value))} for value in values]
    named = [{"run": f"run-{i}", **row} for i, row in enumerate(rows)]
    return design, runs.parse(named, design)


GRID = runs.Design(
    metrics=("accuracy", "nll"),
    factors=("method", "generation", "student", "temperature"),
    compare=("method", "generation"),
    within=("student",),
    chance={"accuracy": 0.2},
    cost="parameters",
)
HOSTILE = "<script>alert('x')</script>\"'&$x$"


def grid_rows():
    """36 runs: two failed, one collapsed, one hostile name."""
    rng = random.Random(0)
    rows = []
    for student, size in (("t5_base", 220_000_000), ("t5_large", 770_000_000)):
        for number, method in enumerate(("finetune", "multitask", HOSTILE)):
            for seed in range(6):
                accuracy = 0.5 + size / 1e10 + 0.03 * number + rng.gauss(0, 0.01)
                row = {
                    "run": f"{method}-{student}-{seed}",
                    "status": "done",
                    "error": "",
                    "method": method,
                    "generation": "" if method == "finetune" else "few_shot",
                    "student": student,
                    "temperature": "1.0",
                    "seed": str(seed),
                    "accuracy": repr(accuracy),
                    "nll": repr(1.2 - accuracy),
                    "parameters": str(size),
                }
                if (method, seed) == ("finetune", 5):
                    row |= {"status": "failed", "accuracy": "", "nll": ""}
                    row |= {"error": "step 7: <b>bad</b> \x1b[31m& gone"}
                if (method, student, seed) == ("multitask", "t5_base", 3):
                    row |= {"accuracy": "0.2", "nll": "nan"}
                rows.append(row)
    return rows


def numbers(result):
    """All floats anywhere within a result."""
    if dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            # What a run itself brought may be anything.
            if not isinstance(result, runs.Run):
                yield from numbers(getattr(result, field.name))
    elif isinstance(result, tuple | list):
        for part in result:
            yield from numbers(part)
    elif isinstance(result, float):
        yield result


def all_finite(result):
    return all(math.isfinite(number) for number in numbers(result))
