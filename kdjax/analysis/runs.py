"""Runs of a comparison, the groups they fall into, and outliers of a group."""

import csv
import dataclasses
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from kdjax.analysis import extras

_LARGEST = 1e100  # beyond it a metric counts as infinite
_FENCE = 1.5  # interquartile ranges beyond the quartiles
LOWER_IS_BETTER = (
    "nll",
    "kl",
    "ece",
    "loss",
    "perplexity",
    "seconds",
    "memory",
    "latency",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """Columns of results.csv that are compared, and how."""

    metrics: tuple[str, ...]  # columns of numbers to compare
    factors: tuple[str, ...]  # columns that tell runs apart, the seed apart
    compare: tuple[str, ...]  # of them: their combinations are compared ...
    within: tuple[str, ...] = ()  # ... at each combination of these
    seed: str = "seed"  # column, where there is one
    lower_is_better: tuple[str, ...] = LOWER_IS_BETTER  # metrics
    chance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # metric -> value that a run must pass, else it counts as collapsed (chance)
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # metric -> column whose mean is shown beside it, where there is one (the teacher's)
    cost: str = ""  # column of numbers that the Pareto plot has on its axis
    confidence: float = 0.95  # of intervals of means, differences, g and A

    def __post_init__(self) -> None:
        unknown = [c for c in (*self.compare, *self.within) if c not in self.factors]
        if unknown or not self.compare or set(self.compare) & set(self.within):
            raise ValueError(
                f"compare={self.compare}, within={self.within}: each takes columns of "
                f"its own, at least one in compare, out of factors={self.factors}"
            )
        if not self.metrics:
            raise ValueError("metrics=() leaves nothing to compare: name columns")
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence={self.confidence} must be between 0 and 1: 0.95"
            )

    @property
    def numbers(self) -> tuple[str, ...]:
        """Return the columns of numbers."""
        return tuple(dict.fromkeys((*self.metrics, *filter(None, (self.cost,)))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One row of results.csv."""

    row: int  # from 1, the header apart
    name: str  # of its directory
    status: str  # "done", or whatever kept it from that
    error: str
    factors: Mapping[str, str]  # column -> level; the seed is one of them
    numbers: Mapping[str, float]  # column -> number, not finite ones too
    collapsed: str = ""  # why it counts as such, in words

    def value(self, column: str) -> float | None:
        """Return the number of a run that is done; None without one that is finite."""
        number = self.numbers.get(column, math.nan)
        return number if self.status == "done" and _usable(number) else None

    def absence(self, column: str) -> str:
        """Return why `value` is None, in words."""
        if self.status != "done":
            return self.status or "no status"
        if column not in self.numbers:
            return f"no {column}"
        return f"{column} is {_words(self.numbers[column])}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one level of the compared factors, within one level of the others."""

    level: str
    within: str  # "" without such others
    runs: tuple[Run, ...]  # those with a number
    values: tuple[float, ...]  # theirs
    absent: tuple[Run, ...]  # those without one
    mean: float | None
    sd: float | None  # of n - 1
    low: float | None  # interval of the mean, by Student's t
    high: float | None
    statement: str  # what is missing here, in words; may be ""

    @property
    def name(self) -> str:
        """Return the levels of both."""
        return ", ".join(level for level in (self.level, self.within) if level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlier:
    """A run that lies beyond the fences of its group."""

    run: Run
    group: str
    value: float
    low: float  # fences: 1.5 interquartile ranges beyond the quartiles
    high: float


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis(Generic[T]):
    """An analysis of one metric, with all runs and without outliers."""

    metric: str
    all_runs: T
    outliers: tuple[Outlier, ...]
    without_outliers: T | None  # None where there is none: it would be the same
    statement: str


def read(path: str | os.PathLike, design: Design) -> tuple[Run, ...]:
    """Read the runs of a results.csv.

    Args:
      path: CSV in UTF-8 with a header: run, status, error, factors, metrics.
      design: names the columns.

    Raises:
      ValueError: a column that is missing, a name that two runs have, or a text where
        a number belongs.
    """
    with pathlib.Path(path).open(encoding="utf-8", newline="") as file:
        return parse(csv.DictReader(file), design)


def parse(rows: Iterable[Mapping[str, Any]], design: Design) -> tuple[Run, ...]:
    """Parse the rows of a results.csv; `read` has the arguments and errors."""
    runs: list[Run] = []
    names: set[str] = set()
    for index, row in enumerate(rows, start=1):
        required = ("run", "status", *design.factors, *design.numbers)
        missing = [column for column in required if row.get(column) is None]
        if missing:
            raise ValueError(
                f"row {index}: columns={missing} are missing; it has {list(row)}"
            )
        name = str(row["run"])
        if name in names:
            raise ValueError(f"row {index}: run={name!r} is there twice: name it anew")
        names.add(name)
        columns = dict.fromkeys((*design.factors, design.seed))
        present = [c for c in design.references.values() if row.get(c) is not None]
        numbers = {
            column: number
            for column in dict.fromkeys((*design.numbers, *present))
            if (number := _number(row[column], column, index)) is not None
        }
        status = str(row["status"])
        runs.append(
            Run(
                row=index,
                name=name,
                status=status,
                error=str(row.get("error") or ""),
                factors={c: str(row[c]) for c in columns if row.get(c) is not None},
                numbers=numbers,
                collapsed=_collapse(numbers, design) if status == "done" else "",
            )
        )
    return tuple(runs)


def groups(runs: Sequence[Run], column: str, design: Design) -> tuple[Group, ...]:
    """Return all groups, in the order of their levels; some may have no run.

    Args:
      runs: of the comparison.
      column: of numbers.
      design: names the factors.
    """
    cells: dict[tuple[str, str], list[Run]] = {
        (name, within): []
        for within in dict.fromkeys(level_of(run, design.within) for run in runs)
        for name in dict.fromkeys(level_of(run, design.compare) for run in runs)
    }
    for run in runs:
        cells[level_of(run, design.compare), level_of(run, design.within)].append(run)
    return tuple(
        _group(name, within, members, column, design)
        for (name, within), members in cells.items()
    )


def without_outliers(
    groups: Sequence[Group], column: str, design: Design
) -> tuple[tuple[Group, ...], tuple[Outlier, ...]]:
    """Return the groups without their outliers, and the outliers.

    An outlier lies more than 1.5 interquartile ranges below the first or above the
    third quartile (linear interpolation). Of fewer than four values none can.

    Source: Tukey, Exploratory Data Analysis, 1977, chapter 2.
    """
    remaining, outliers = [], []
    for group in groups:
        members = []
        low, high = _fences(group.values)
        for run, value in zip(group.runs, group.values, strict=True):
            if low <= value <= high:
                members.append(run)
            else:
                outliers.append(
                    Outlier(run=run, group=group.name, value=value, low=low, high=high)
                )
        if len(members) == len(group.runs):
            remaining.append(group)
        else:
            members.extend(group.absent)
            remaining.append(_group(group.level, group.within, members, column, design))
    return tuple(remaining), tuple(outliers)


def _group(
    level: str, within: str, members: Sequence[Run], column: str, design: Design
) -> Group:
    pairs = [(run, run.value(column)) for run in members]
    runs = tuple(run for run, value in pairs if value is not None)
    values = tuple(value for _, value in pairs if value is not None)
    mean = statistics.fmean(values) if values else None
    sd = low = high = None
    if mean is not None and len(values) > 1:
        mean = values[0] if len(set(values)) == 1 else mean
        sd = statistics.stdev(values)
        t = extras.load("scipy.stats").t.ppf((1 + design.confidence) / 2, len(runs) - 1)
        half = float(t) * sd / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return Group(
        level=level,
        within=within,
        runs=runs,
        values=values,
        absent=tuple(run for run, value in pairs if value is None),
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        statement=_statement(runs, values, design) if members else "no run",
    )


def _statement(runs: Sequence[Run], values: Sequence[float], design: Design) -> str:
    """Return the remarks that mean and sd need, in words."""
    if not values:
        return "no run has a number"
    words = []
    seeds = {run.factors.get(design.seed, "") for run in runs}
    if len(values) == 1:
        words.append("one seed: no variance")
    elif len(set(values)) == 1:
        words.append("all values are the same: no variance")
    if len(values) > 1 and len(seeds) < len(values) and seeds != {""}:
        words.append(f"{len(values)} runs of {len(seeds)} seeds")
    others = [c for c in design.factors if c not in (*design.compare, *design.within)]
    mixed = [c for c in others if len({run.factors[c] for run in runs}) > 1]
    if mixed:
        words.append(f"runs differ in {', '.join(mixed)} too")
    return "; ".join(words)


def _fences(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 4:
        return -math.inf, math.inf
    lower, upper = np.quantile(values, (0.25, 0.75)).tolist()
    reach = _FENCE * (upper - lower)
    return lower - reach, upper + reach


def _collapse(numbers: Mapping[str, float], design: Design) -> str:
    """Return why a finished run counts as collapsed, in words; "" if it does not."""
    words = [
        f"{column} is {_words(number)}"
        for column, number in numbers.items()
        if column in design.metrics and not _usable(number)
    ]
    for column, floor in design.chance.items():
        number = numbers.get(column, math.nan)
        down = column in design.lower_is_better
        if number >= floor if down else number <= floor:
            words.append(f"{column} is {'not below' if down else 'not above'} {floor}")
    return "; ".join(words)


def level_of(run: Run, columns: Sequence[str]) -> str:
    """Return the levels of a run by some factors, as one name."""
    return " / ".join(run.factors[column] or "(none)" for column in columns)


def _usable(number: float) -> bool:
    """Return whether the square of a number is finite too."""
    return abs(number) <= _LARGEST


def _words(number: float) -> str:
    if math.isnan(number):
        return "not a number"
    return "infinite" if math.isinf(number) else f"beyond {_LARGEST:g}"


def _number(text: Any, column: str, row: int) -> float | None:
    if isinstance(text, str) and not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"row {row}: {column}={text!r} is not a number: leave it empty if there "
            "is none"
        ) from None
