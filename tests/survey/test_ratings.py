"""Tables of ratings: kdjax's own and what other groups' files look like."""

import math

import numpy as np
import pytest

from kdjax.survey import ratings

OTHERS = """\ufeffRater;Question ID;System;Plausible;Complete;Explanation
p1;q1;a;5;4;"short; and quoted"
p1;q2;b;n/a;3 - neutral;two words
p2;q1;a;Strongly agree;2,5;one
p2;q2;;4;4;lost
"""


def _file(tmp_path, text, name="ratings.csv", encoding="utf-8"):
    file = tmp_path / name
    file.write_text(text, encoding=encoding)
    return file


def test_another_group_s_table(tmp_path):
    columns = ratings.parse_columns(
        "participant=Rater, item=question id,constructs=Plausible+complete,"
        "length=Explanation"
    )
    table = ratings.read(_file(tmp_path, OTHERS), columns)
    assert table.participants == ("p1", "p1", "p2")
    assert table.items == ("q1", "q2", "q1")
    assert table.levels == ("a", "b")
    assert table.constructs == ("Plausible", "Complete")
    np.testing.assert_equal(table.values_NC, [[5, 4], [math.nan, 3], [5, 2.5]])
    # A text has as many words as it has.
    assert table.numbers["length"].tolist() == [3, 2, 1]
    np.testing.assert_equal(table.outcomes["quality"], [4.5, math.nan, 3.75])
    said = " ".join(table.statements)
    assert "condition is read from the column System" in said
    assert "1 rows without a condition" in said


def test_usual_names_need_no_columns(tmp_path):
    text = "pid,qid,method,plausibility,satisfaction,num_words\n1,1,a,5,4,10\n"
    table = ratings.read(_file(tmp_path, text))
    assert table.constructs == ("plausibility", "satisfaction")
    assert table.numbers["length"].tolist() == [10]
    latin = _file(tmp_path, "method,plausibility\nrévisé,4\n", encoding="latin-1")
    table = ratings.read(latin)
    assert table.conditions == ("révisé",)
    assert "no column of items" in " ".join(table.statements)


@pytest.mark.parametrize(
    "text, columns, words",
    [
        ("a,b\n1,2\n", "", "has no condition"),
        ("method,b\n1,2\n", "", "has none of"),
        ("method,plausibility\na,many\n", "", "plausibility='many' is no number"),
        ("method,plausibility\na,4\n", "item=nothing", "has no such column"),
        ("method,plausibility\na,4\n", "constructs=x+y", "there is no such column"),
        ("method,plausibility\na,4,5\n", "", "row 2: 3 cells under 2 names"),
        ("method,plausibility\n", "", "has no rating"),
        ("", "", "is empty"),
    ],
)
def test_refusals(tmp_path, text, columns, words):
    with pytest.raises(ValueError, match=words):
        ratings.read(_file(tmp_path, text), ratings.parse_columns(columns))


def test_columns_are_checked():
    with pytest.raises(ValueError, match="write name=column"):
        ratings.parse_columns("participant")
    with pytest.raises(ValueError, match="write name=column"):
        ratings.parse_columns("nobody=x")


def test_exclusions_are_of_whole_participants(tmp_path):
    text = (
        "participant,condition,plausibility,seconds,attention_failed,finished\n"
        "a,x,4,9,0,1\na,y,4,9,1,1\n"  # failed once
        "b,x,4,1,0,1\nb,y,4,2,0,1\n"  # fast
        "c,x,4,9,0,\nc,y,4,9,0,\n"  # left
        "d,x,4,9,0,1\nd,y,4,1,0,1\n"
    )
    table = ratings.read(_file(tmp_path, text))
    reasons = ratings.exclusions(table, min_seconds=3)
    assert {reason: mask.tolist() for reason, mask in reasons.items()} == {
        "attention checks failed": [True, True, *[False] * 6],
        "too fast": [False, False, True, True, *[False] * 4],
        "not finished": [*[False] * 4, True, True, False, False],
    }
