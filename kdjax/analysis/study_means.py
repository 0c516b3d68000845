"""Ratings by people beside the metrics of the students that they rated."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping

# What kdjax.study analyse writes.
STATISTICS, REPORT = "statistics.csv", "report.html"
QUALITY = "quality"  # mean of the constructs
MEANS = "linear_mixed_means"  # its table of means


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatedStudent:
    """A student as it is measured and as people rate it."""

    name: str
    metrics: Mapping[str, float | None]  # means over its runs
    rating: float  # mean, in points of the scale
    low: float  # its interval
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Ratings of the students of a comparison."""

    link: str  # to the study's page, seen from the comparison's
    students: tuple[RatedStudent, ...]


def read_means(workdir: pathlib.Path) -> dict[str, tuple[float, float, float]]:
    """Return condition -> mean Quality and its interval of an analysed study.

    Means are those of the linear mixed model with condition alone; of the only
    construct where there is one.

    Raises:
      ValueError: the study is not analysed, or its model was not estimable.
    """
    file = workdir / STATISTICS
    if not file.is_file():
        raise ValueError(
            f"study={str(workdir)!r} has no {STATISTICS}: run kdjax.study analyse first"
        )
    with file.open(newline="") as stream:
        rows = [
            row
            for row in csv.DictReader(stream)
            if row["table"] == MEANS and row["model"] == "condition"
        ]
    names = {row["outcome"] for row in rows}
    outcome = QUALITY if QUALITY in names else next(iter(sorted(names)), "")
    means = {
        row["condition"]: (float(row["mean"]), float(row["low"]), float(row["high"]))
        for row in rows
        if row["outcome"] == outcome
    }
    if not means:
        raise ValueError(
            f"study={str(workdir)!r} has no means of conditions: see its {REPORT}"
        )
    return means
