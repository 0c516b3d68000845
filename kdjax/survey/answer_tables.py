"""Tables of right and wrong answers apart, of predictions and of preferences.

Shapes: N ratings, P participants.
"""

import csv
import dataclasses
import itertools
import pathlib
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from kdjax.analysis import mixed_models, permutation
from kdjax.survey import tables
from kdjax.survey.ratings import Ratings
from kdjax.survey.tables import Options, Row, Table

PREFERENCES = "preferences.csv"
NEITHER = "neither"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """A pair of explanations that a participant compared."""

    participant: str
    first: str  # condition
    second: str  # condition
    preferred: str  # one of them, or "neither"


def read_preferences(file: pathlib.Path) -> list[Preference]:
    """Read preferences.csv of a study; pairs that were not answered are left out.

    Raises:
      ValueError: a column is missing, or what is preferred is not of the pair.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        names = [field.name for field in dataclasses.fields(Preference)]
        if missing := set(names) - set(reader.fieldnames or ()):
            raise ValueError(
                f"{file} has no column {sorted(missing)}: write it by kdjax.study "
                "export"
            )
        rows = [
            Preference(**{name: row[name] or "" for name in names}) for row in reader
        ]
    for place, row in enumerate(rows, start=2):
        if row.preferred not in ("", NEITHER, row.first, row.second):
            raise ValueError(
                f"{file}, row {place}: preferred={row.preferred!r}: use "
                f"{row.first!r}, {row.second!r} or {NEITHER!r}"
            )
    return [row for row in rows if row.preferred]


def by_answer(ratings: Ratings, options: Options) -> list[Table]:
    """Compare conditions where the student's answer is right, and where it is wrong.

    Returns:
      Means and tests; nothing where the table does not have both kinds of answers.
    """
    right_N = ratings.numbers.get("right")
    if right_N is None or len(set(right_N[np.isfinite(right_N)].tolist())) < 2:
        return []
    outcome, values_N = tables.main_outcome(ratings)
    known_N = np.isfinite(right_N) & np.isfinite(values_N)
    means: list[Row] = []
    tests: list[Row] = []
    for answer, mask_N in (("right", right_N > 0), ("wrong", right_N <= 0)):
        part = ratings.select(known_N & mask_N)
        part_N = values_N[known_N & mask_N]
        means += [
            {"answer": answer, **row}
            for row in _means_by_condition(part, part_N, "mean", options)
        ]
        tests.append(
            {
                "comparison": f"conditions, answer {answer}",
                **_test(part, part_N, options),
            }
        )
    answers = tuple("right" if value > 0 else "wrong" for value in right_N[known_N])
    known = dataclasses.replace(ratings.select(known_N), conditions=answers)
    paired = tables.paired(known, values_N[known_N], "right", "wrong", options)
    paired.pop("participants")
    test = _test(known, values_N[known_N], options)
    tests.append({"comparison": "right - wrong", **paired, **test})
    return [
        Table(
            name="by_answer",
            title="Right and wrong answers apart",
            words=(
                f"{outcome[0].upper()}{outcome[1:]} of explanations of right and of "
                "wrong answers: means over participants of their mean ratings, with "
                "intervals by t. An explanation that convinces of a wrong answer is no "
                "good one: conditions are to be compared within a row of answers."
            ),
            rows=means,
        ),
        Table(
            name="by_answer_tests",
            title="Tests of right and wrong answers",
            words=(
                "By permutation within participants, as the headline tests, of the "
                "explanations of right and of wrong answers alone; and of right "
                "against wrong ones over all conditions, which mixes the difference "
                "of answers with that of the questions that students get right."
            ),
            rows=tests,
        ),
    ]


def predictions(ratings: Ratings, options: Options) -> list[Table]:
    """Compare how often people predict the student's answer; nothing without them."""
    values_N = ratings.numbers.get("predicted")
    if values_N is None or not np.isfinite(values_N).any():
        return []
    known_N = np.isfinite(values_N)
    part, values_N = ratings.select(known_N), values_N[known_N]
    tests: list[Row] = []
    for first, second in itertools.combinations(part.levels, 2):
        inside_N = np.isin(part.conditions, [first, second])
        row = tables.paired(part, values_N, first, second, options)
        row.pop("participants")
        tests.append(
            {
                "pair": f"{first} - {second}",
                **row,
                **_test(part.select(inside_N), values_N[inside_N], options),
            }
        )
    tables.adjust(tests)
    overall = {"pair": "all conditions", **_test(part, values_N, options)}
    return [
        Table(
            name="predictions",
            title="Predictions of the student's answer",
            words=(
                "Share of questions whose answer by the student people predicted "
                "(forward simulation): means over participants, with intervals by t. "
                "A share above that of no explanation says that explanations tell what "
                "the student does, whether it is right or not."
            ),
            rows=_means_by_condition(part, values_N, "share", options),
        ),
        Table(
            name="predictions_pairs",
            title="Pairs of conditions by predictions",
            words=(
                "Differences of these shares within participants with intervals by t, "
                "p by permutation within participants; corrections are over the pairs."
            ),
            rows=[overall, *tests],
        ),
    ]


def preferences(
    compared: Sequence[Preference], excluded: Collection[str], options: Options
) -> Table | None:
    """Compare pairs of conditions by which explanation people prefer.

    Args:
      compared: pairs, in whichever order they were shown.
      excluded: participants that are left out.
      options: of the analysis.

    Returns:
      None where nothing was compared.
    """
    rows: list[Row] = []
    kept = [row for row in compared if row.participant not in excluded]
    pairs = sorted({tuple(sorted((row.first, row.second))) for row in kept})
    for first, second in pairs:
        of_pair = [row for row in kept if {row.first, row.second} == {first, second}]
        counts = Counter(row.preferred for row in of_pair)
        scores: dict[str, list[float]] = {}
        for row in of_pair:
            score = (row.preferred == first) - (row.preferred == second)
            scores.setdefault(row.participant, []).append(float(score))
        means_P = np.array([np.mean(of_person) for of_person in scores.values()])
        rows.append(
            {
                "pair": f"{first} - {second}",
                "participants": len(scores),
                "comparisons": len(of_pair),
                "first": counts[first],
                "second": counts[second],
                NEITHER: counts[NEITHER],
                **_interval((1 + means_P) / 2, "share of first", options),
                "p": permutation.sign_flip(
                    np.array([sum(of_person) for of_person in scores.values()]),
                    num=options.permutations,
                    seed=options.seed,
                ),
            }
        )
    if not rows:
        return None
    return Table(
        name="preferences",
        title="Pairs of explanations compared",
        words=(
            "How often the explanation of the first condition was preferred to that of "
            "the second for the same question. Share of the first: neither counts "
            "half; mean over participants, with its interval by t. p by exchanging all "
            "of a participant's preferences at once, which needs no independence of "
            "them; corrections are over the pairs."
        ),
        rows=tables.adjust(rows),
    )


def _test(ratings: Ratings, values_N: np.ndarray, options: Options) -> Row:
    """Return the permutation test of the conditions of some ratings."""
    every_N = np.ones(len(values_N), bool)
    one = tables.permute(ratings, values_N[:, None], every_N, options)
    test = one.get("test")
    return {
        "participants": None if test is None else test.participants,
        "ratings": None if test is None else test.ratings,
        "p": None if test is None else test.p_values[0],
        "remark": one["remark"],
    }


def _means_by_condition(
    ratings: Ratings, values_N: np.ndarray, name: str, options: Options
) -> list[Row]:
    """Return each condition's mean over participants, and its interval."""
    people, conditions = np.array(ratings.participants), np.array(ratings.conditions)
    rows: list[Row] = []
    for level in ratings.levels:
        inside_N = conditions == level
        of = [values_N[inside_N & (people == p)] for p in np.unique(people[inside_N])]
        means_P = np.array([values.mean() for values in of])
        row: Row = {"condition": level, "n": int(inside_N.sum())}
        row |= {"participants": len(means_P), **_interval(means_P, name, options)}
        rows.append(row)
    return rows


def _interval(values_P: np.ndarray, name: str, options: Options) -> Row:
    """Return a mean over participants and its interval by t."""
    row: Row = {name: float(values_P.mean()), "low": None, "high": None}
    if len(values_P) > 1 and values_P.std() > 0:
        error = float(values_P.std(ddof=1)) / len(values_P) ** 0.5
        effect = mixed_models.make_effect(
            "", row[name], error, len(values_P) - 1.0, options.confidence
        )
        row |= {"low": effect.low, "high": effect.high}
    return row
