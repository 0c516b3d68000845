"""Results of a comparison: results.csv, and the report made of it."""

import csv
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.analysis import report, study_means
from kdjax.analysis import runs as analysis_runs
from kdjax.comparison import runner
from kdjax.comparison.grid import LATENCY, SEED, Comparison, Task
from kdjax.runtime import files

RESULTS, REPORT = "results.csv", "report.html"
DONE, FAILED, MISSING = "done", "failed", "not run"
# Match and view of an answer; of views that give one, the one that gives nothing else
# comes first.
_ANSWERS = (
    ("exact_match", "label"),
    ("answer_match", "factual"),
    ("answer_match", "rationale_then_label"),
)


def numbers(folder: pathlib.Path) -> dict[str, float]:
    """Read the numbers of a finished run, by column.

    Those of the student in summary.json as they are, and

      answer_accuracy: share of greedy answers that are the right one, character by
        character but for white space at their ends: of the view that answers alone,
        else of the one that explains first;
      answer_accuracy_lenient: the same up to case, white space and a final full stop;
      teacher_accuracy: of the teacher, by likelihood of the choices;
      retention: accuracy / teacher_accuracy;
      parameters: of the student;

    with what was measured of its explanations (faithfulness.json), where it was.
    """
    summary = _read_summary(folder)
    student, teacher = _floats(summary["student"]), _floats(summary["teacher"])
    columns = dict(student)
    for column, suffix in (
        ("answer_accuracy", "_strict"),
        ("answer_accuracy_lenient", ""),
    ):
        names = (f"{match}{suffix}/{view}" for match, view in _ANSWERS)
        if name := next((name for name in names if name in student), None):
            columns[column] = student[name]
    if "accuracy" in teacher:
        columns["teacher_accuracy"] = teacher["accuracy"]
        if "accuracy" in student and teacher["accuracy"]:
            columns["retention"] = student["accuracy"] / teacher["accuracy"]
    columns["parameters"] = float(summary["parameters"]["student"])
    return columns | _read(folder / "faithfulness.json")


def rows(tasks: Sequence[Task], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return a row per run, in the grid's order, whatever became of it."""
    table = []
    for task in tasks:
        if not task.is_run:
            continue
        folder = workdir / task.name
        error = runner.error(folder)
        done = runner.finished(task, workdir)
        status = DONE if done else FAILED if error else MISSING
        row: dict[str, Any] = {"run": folder.name, "status": status, "error": error}
        row |= task.levels
        if done:
            row |= numbers(folder)
            for name in task.depends_on:
                if name.startswith(LATENCY):
                    row |= _read(workdir / name / "latency.json")
        table.append(row)
    return table


def _read(file: pathlib.Path) -> dict[str, float]:
    if not file.is_file():
        return {}
    return _floats(files.read_json(file, remedy="remove it; it is measured anew"))


def _read_summary(folder: pathlib.Path) -> dict[str, Any]:
    """Read the summary of a finished run."""
    remedy = f"remove it and {folder / runner.FINISHED}: the run is evaluated again"
    return files.read_json(folder / "summary.json", remedy=remedy)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers of a JSON object, NaN for null (a number that is not finite)."""
    return {k: math.nan if v is None else float(v) for k, v in values.items()}


def write(
    comparison: Comparison, tasks: Sequence[Task], workdir: pathlib.Path
) -> list[dict[str, Any]]:
    """Write results.csv and report.html; return the rows.

    Numbers are written so that they read back equal; the same runs give the same bytes.

    Raises:
      ValueError: all runs are done and none has a metric.
    """
    table = rows(tasks, workdir)
    names = dict.fromkeys(name for row in table for name in row)
    missing = [m for m in comparison.metrics if m not in names]
    # Those that are not there yet may still have it.
    if missing and all(row["status"] == DONE for row in table):
        known = sorted(set(names) - set(_fixed(comparison)))
        raise ValueError(f"metrics={missing}: no run has them; runs have {known}")
    fixed = _fixed(comparison)
    columns = dict.fromkeys([*fixed, *comparison.metrics, *sorted(names)])
    if comparison.cost:
        columns.setdefault(comparison.cost)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in table)
    files.write_atomically(workdir / RESULTS, text.getvalue())
    design = comparison.design()
    report.write(
        workdir / REPORT,
        analysis_runs.read(workdir / RESULTS, design),
        design,
        title=comparison.name,
        folder="runs",
        reliability=_reliability(comparison, table, workdir),
        facts=_facts(comparison),
        study=_study(comparison, table, workdir),
    )
    return table


def _study(
    comparison: Comparison, table: Sequence[Mapping[str, Any]], workdir: pathlib.Path
) -> study_means.Study | None:
    """Return what people say of the students of an analysed study.

    A student is a combination of levels, by the name that the study gives it.
    """
    if not comparison.study:
        return None
    folder = pathlib.Path(comparison.study)
    means = study_means.read_means(folder)
    students: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        name = "-".join(str(row[factor]) for factor in comparison.factors)
        students.setdefault(name, []).append(row)
    rows = []
    for condition, (mean, low, high) in means.items():
        members = students.get(condition, [])
        metrics = {}
        for metric in comparison.metrics:
            values = [row[metric] for row in members if metric in row]
            values = [value for value in values if math.isfinite(value)]
            metrics[metric] = math.fsum(values) / len(values) if values else None
        rows.append(
            study_means.RatedStudent(
                name=condition, metrics=metrics, rating=mean, low=low, high=high
            )
        )
    link = os.path.relpath(folder.resolve() / study_means.REPORT, workdir.resolve())
    return study_means.Study(
        link=pathlib.PurePath(link).as_posix(), students=tuple(rows)
    )


def _facts(comparison: Comparison) -> dict[str, str]:
    """Return what was run, as names and values; no path but its last component."""
    data, train = comparison.base.data, comparison.base.train
    name = (
        pathlib.PurePath(data.path).name if data.path else "the built-in task kinship"
    )
    trained = f"{data.num_train:,}" if data.num_train else "all"
    held_out = f"{data.num_eval:,}" if data.num_eval else "all"
    teacher = comparison.base.teacher.path
    facts = {
        "data": f"{name}: {trained} training rows, {held_out} held-out rows",
        "teacher": pathlib.PurePath(teacher).name or "trained for the comparison",
        "training": f"{train.steps:,} steps of {train.batch_size} packed rows",
    }
    for factor, levels in comparison.factors.items():
        facts[factor] = ", ".join(levels)
    facts["seeds"] = ", ".join(map(str, comparison.seeds))
    if comparison.overrides:
        facts["note"] = "some combinations change more (the comparison's overrides)"
    return facts


def means(
    comparison: Comparison, table: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Return mean and standard deviation of each metric over seeds, per group."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    factors = (*comparison.compare, *comparison.within)
    for row in table:
        groups.setdefault(tuple(row[f] for f in factors), []).append(row)
    lines = []
    for levels, members in groups.items():
        line = dict(zip(factors, levels, strict=True))
        for metric in comparison.metrics:
            values = [row[metric] for row in members if metric in row]
            line[metric] = _summary(values)
        done = sum(row["status"] == DONE for row in members)
        lines.append(line | {"runs": f"{done}/{len(members)}"})
    return lines


def _summary(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    squares = math.fsum((value - mean) ** 2 for value in values)
    return f"{mean:.4g} ± {math.sqrt(squares / (len(values) - 1)):.2g}"


def _fixed(comparison: Comparison) -> list[str]:
    return ["run", "status", "error", *comparison.factors, SEED]


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _reliability(
    comparison: Comparison, table: Sequence[Mapping[str, Any]], workdir: pathlib.Path
) -> report.Bins:
    """Sum the calibration bins of each group over its runs."""
    groups: dict[str, list[dict[str, list[float]]]] = {}
    for row in table:
        if row["status"] != DONE:
            continue
        folder = workdir / "runs" / row["run"]
        bins = _read_summary(folder).get("reliability")
        if bins:
            factors = (*comparison.compare, *comparison.within)
            of_group = groups.setdefault(", ".join(row[f] for f in factors), [])
            of_group.append(bins)

    def total(members: list[dict[str, list[float]]], name: str) -> list[float]:
        return [sum(values) for values in zip(*(m[name] for m in members), strict=True)]

    return {
        title: (
            total(members, "counts"),
            total(members, "confidences"),
            total(members, "corrects"),
        )
        for title, members in groups.items()
    }
