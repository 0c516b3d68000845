"""The difference that a design detects, by simulated studies.

A rating is mean + person + question + difference + rest, each of the three normal,
rounded to the scale. A study sees the difference of two conditions where a paired t
test of people's means says so, with Bonferroni's correction for all pairs. That is
close to the permutation test within people that `analyse` puts first.
"""

import csv
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from kdjax.analysis import plots
from kdjax.survey import design
from kdjax.survey.config import StudyConfig

ALPHA = 0.05
_NUM_STUDIES = 500
_DIFFERENCES = np.arange(0, 1.501, 0.1)
_TIMES = (1, 2, 3)  # as many people as planned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
    """Mean and standard deviations of ratings, in points of the scale."""

    mean: float
    participant: float
    question: float
    residual: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Power by difference and number of people."""

    components: Components
    powers: dict[int, list[float]]  # people -> share of studies, per difference
    detectable: dict[int, float | None]  # people -> points; None: beyond the largest
    svg: str

    @property
    def sentence(self) -> str:
        """Return the detectable differences in words."""
        return "; ".join(
            f"{people} people: {_points(value)}"
            for people, value in self.detectable.items()
        )


def simulate(config: StudyConfig, layout: design.Layout) -> Curve:
    """Simulate studies of a design with differences of 0 to 1.5 points.

    Args:
      config: assumed components, or a pilot's file.
      layout: of the design.
    """
    components = Components(
        mean=config.mean_rating,
        participant=config.sd_participant,
        question=config.sd_question,
        residual=config.sd_residual,
    )
    if config.pilot:
        components = estimate(pathlib.Path(config.pilot), config.constructs)
    powers = {}
    for times in _TIMES:
        larger = dataclasses.replace(layout, participants=times * layout.participants)
        powers[larger.participants] = _powers(larger, components, config.points)
    x = _DIFFERENCES.tolist()
    figure = plots.curves(
        {f"{people} people": (x, values) for people, values in powers.items()},
        "difference of two conditions, points of the scale",
        f"share of {_NUM_STUDIES} simulated studies that see it",
        references={f"{config.power:g}": config.power},
        name="power",
    )
    return Curve(
        components=components,
        powers=powers,
        detectable={p: _crossing(values, config.power) for p, values in powers.items()},
        svg=figure,
    )


def estimate(file: pathlib.Path, constructs: Sequence[str]) -> Components:
    """Estimate the components from the ratings of a pilot.

    With r a rating's distance from its condition's mean, the variance between people is
    the mean product of two r of one person, that between questions of two people's r of
    one question, and the rest is what is left of the mean square.

    Raises:
      ValueError: a column is missing, or too few ratings repeat.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    needed = ["participant", "question", "condition", *constructs]
    if missing := [name for name in needed if not rows or name not in rows[0]]:
        raise ValueError(f"pilot={str(file)!r}: columns {missing} are missing")
    rows = [row for row in rows if all(row[name] for name in needed)]
    values = np.array([np.mean([float(row[c]) for c in constructs]) for row in rows])
    residuals = np.empty(len(rows))
    for condition in {row["condition"] for row in rows}:
        members = [i for i, row in enumerate(rows) if row["condition"] == condition]
        residuals[members] = values[members] - values[members].mean()
    person = _covariance(rows, residuals, "participant", "question")
    question = _covariance(rows, residuals, "question", "participant")
    if person is None or question is None:
        raise ValueError(
            f"pilot={str(file)!r}: no person, or no question, has two ratings: give "
            "sd_participant, sd_question and sd_residual instead"
        )
    rest = float(np.mean(residuals**2)) - person - question
    return Components(
        mean=float(values.mean()),
        participant=math.sqrt(max(person, 0.0)),
        question=math.sqrt(max(question, 0.0)),
        residual=math.sqrt(max(rest, 1e-6)),
    )


def _covariance(
    rows: Sequence[dict[str, str]], residuals: np.ndarray, same: str, other: str
) -> float | None:
    """Return the mean product of residuals with one level in common."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row[same], []).append(index)
    products = [
        residuals[i] * residuals[j]
        for members in groups.values()
        for i, j in itertools.combinations(members, 2)
        if rows[i][other] != rows[j][other]
    ]
    return float(np.mean(products)) if products else None


def _powers(layout: design.Layout, components: Components, points: int) -> list[float]:
    """Return the share of studies that see a difference, per difference."""
    from scipy import special

    people, num_conditions = layout.participants, layout.num_conditions
    items = np.array([design.schedule(layout, n) for n in range(people)])
    questions, conditions = items[..., 0], items[..., 1]
    rng = np.random.default_rng([layout.seed, 200, people])
    shape = (_NUM_STUDIES, *questions.shape)
    noise = components.residual * rng.standard_normal(shape)
    noise += components.participant * rng.standard_normal((_NUM_STUDIES, people, 1))
    effects = rng.standard_normal((_NUM_STUDIES, layout.num_questions))
    noise += components.question * effects[:, questions]
    pairs = num_conditions * (num_conditions - 1) / 2
    limit = special.stdtrit(people - 1, 1 - ALPHA / pairs / 2)
    shares = []
    for difference in _DIFFERENCES:
        # Half up, half down, so that neither meets the end of the scale first.
        shift = np.where(conditions == 0, difference / 2, 0.0)
        shift = np.where(conditions == 1, -difference / 2, shift)
        ratings = np.clip(np.rint(components.mean + noise + shift), 1, points)
        means = [
            np.where(conditions == c, ratings, 0).sum(-1) / layout.num_blocks
            for c in (0, 1)
        ]
        gaps = means[0] - means[1]
        spread = gaps.std(-1, ddof=1) / math.sqrt(people)
        statistic = np.abs(gaps.mean(-1)) / np.maximum(spread, 1e-12)
        shares.append(float(np.mean(statistic > limit)))
    return shares


def _crossing(powers: Sequence[float], level: float) -> float | None:
    """Return the difference from which on power has a level, interpolated."""
    for index, value in enumerate(powers):
        if value >= level:
            if index == 0:
                return float(_DIFFERENCES[0])
            before = powers[index - 1]
            part = (level - before) / (value - before)
            step = _DIFFERENCES[index] - _DIFFERENCES[index - 1]
            return float(_DIFFERENCES[index - 1] + part * step)
    return None


def _points(value: float | None) -> str:
    return f"above {_DIFFERENCES[-1]:g}" if value is None else f"{value:.2f} points"
