"""Right and wrong answers apart, predictions and preferences: planted, by hand."""

import csv

import numpy as np
import pytest

from kdjax.survey import analyse, answer_tables, ratings
from kdjax.survey.answer_tables import Preference
from kdjax.survey.tables import Options

OPTIONS = Options(reference="a", points=5, permutations=499)


def write(file, *, people=20, predicted=True, right=(0, 1)):
    """Ratings of conditions a and b: b is better, and only where the answer is wrong.

    Of a the answer is predicted in a quarter of the questions, of b in three.
    """
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        names = ("participant", "question", "condition", "plausibility", "right")
        writer.writerow([*names, *(["predicted"] if predicted else [])])
        for person in range(people):
            mood = rng.normal()
            for question in range(16):
                condition = "ab"[question % 2]
                is_right = right[question // 8 % len(right)]
                better = 1.2 * (condition == "b") * (not is_right)
                value = np.clip(round(3 + mood + better + 0.4 * rng.normal()), 1, 5)
                row = [person, question, condition, int(value), is_right]
                guess = question // 2 % 4 < (3 if condition == "b" else 1)
                writer.writerow([*row, *([int(guess)] if predicted else [])])
    return ratings.read(file)


def test_conditions_differ_where_the_answer_is_wrong(tmp_path):
    table = write(tmp_path / "r.csv")
    means, tests = answer_tables.by_answer(table, OPTIONS)
    rows = {row["comparison"]: row for row in tests.rows}
    assert rows["conditions, answer wrong"]["p"] < 0.01
    assert rows["conditions, answer right"]["p"] > 0.05
    assert rows["right - wrong"]["difference"] < -0.3
    for row in means.rows:
        inside = [
            r == (row["answer"] == "right") and c == row["condition"]
            for r, c in zip(table.numbers["right"], table.conditions, strict=True)
        ]
        assert row["n"] == 80 and row["participants"] == 20
        assert row["mean"] == pytest.approx(table.values_NC[inside].mean())
        assert row["low"] < row["mean"] < row["high"]


def test_predictions_are_shares_of_people(tmp_path):
    table = write(tmp_path / "r.csv")
    shares, pairs = answer_tables.predictions(table, OPTIONS)
    assert [row["share"] for row in shares.rows] == [0.25, 0.75]
    assert [row["pair"] for row in pairs.rows] == ["all conditions", "a - b"]
    assert pairs.rows[1]["difference"] == -0.5
    assert all(row["p"] <= 0.01 for row in pairs.rows)


def test_without_the_columns_there_are_no_tables(tmp_path):
    table = write(tmp_path / "r.csv", predicted=False, right=(1,))
    assert answer_tables.by_answer(table, OPTIONS) == []
    assert answer_tables.predictions(table, OPTIONS) == []
    assert answer_tables.preferences([], (), OPTIONS) is None


def compared(choices):
    """Pairs of each person, shown in both orders: 1 = a, 2 = b, 0 = neither."""
    return [
        Preference(
            participant=str(person),
            first="ab"[place % 2],
            second="ba"[place % 2],
            preferred=("neither", "a", "b")[choice],
        )
        for person, of_person in enumerate(choices)
        for place, choice in enumerate(of_person)
    ]


def test_preferences_count_people_not_pairs(tmp_path):
    rows = compared([[1, 1], [1, 1], [1, 0], [2, 2]])
    table = answer_tables.preferences(rows, (), OPTIONS)
    (row,) = table.rows
    counts = (row["participants"], row["comparisons"], row["first"], row["second"])
    assert counts == (4, 8, 5, 2) and row["neither"] == 1
    assert row["share of first"] == pytest.approx((1 + 1 + 0.75 + 0) / 4)
    # Sums 2, 2, 1, -2: of 16 signs 6 are as far from zero as 3, by hand.
    assert row["p"] == 10 / 16
    (left,) = answer_tables.preferences(rows, {"3"}, OPTIONS).rows
    assert left["participants"] == 3 and left["p"] == 2 / 8


def test_preferences_of_a_file(tmp_path):
    file = tmp_path / answer_tables.PREFERENCES
    header = "participant,question,first,second,preferred"
    file.write_text(f"{header}\np,q1,a,b,b\np,q2,b,a,neither\np,q3,a,b,\n")
    rows = answer_tables.read_preferences(file)
    assert [row.preferred for row in rows] == ["b", "neither"]
    file.write_text(f"{header}\np,q1,a,b,c\n")
    with pytest.raises(ValueError, match="row 2: preferred='c'"):
        answer_tables.read_preferences(file)
    file.write_text("participant,first\n")
    with pytest.raises(ValueError, match="no column"):
        answer_tables.read_preferences(file)


def test_the_page_has_them_in_words(tmp_path):
    table = write(tmp_path / "r.csv")
    rows = compared([[1, 1]] * 12)
    results = analyse.analyse(table, preferences=rows, permutations=499, bootstraps=10)
    lines = " ".join(analyse.conclude(results))
    assert "conditions, answer wrong: conditions differ" in lines
    assert "predictions of the student's answer: conditions differ" in lines
    assert "Preferences that differ, share of the first: a - b 1.00" in lines
    page = analyse.render(results, title="t")
    for name in ("by_answer", "by_answer_tests", "predictions", "preferences"):
        assert f'id="{name}"' in page
