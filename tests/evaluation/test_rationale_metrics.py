"""Measures of rationales, by hand."""

import pytest

from kdjax.evaluation import rationale_metrics
from kdjax.evaluation.rationale_metrics import Record, leakage_adjusted_simulatability

KIN = ("mother", "grandmother", "great-grandmother", "aunt")
PLACES = ("bank", "river bank", "the U.S.", "new york")


@pytest.mark.parametrize(
    ("text", "choices", "mentions"),
    [
        ("She is the mother of Ben .", KIN, ["mother"]),
        ("MOTHER, Aunt; (mother).", KIN, ["mother", "aunt", "mother"]),
        # Names within names.
        ("She is the grandmother .", KIN, ["grandmother"]),
        ("a great-grandmother, not a grandmother", KIN, [KIN[2], KIN[1]]),
        ("a step-mother, a mother-in-law, motherhood, mothers", KIN, []),
        ("her mother's aunt", KIN, ["mother", "aunt"]),
        ("mother--or aunt-", KIN, ["mother", "aunt"]),
        ("at the river bank", PLACES, ["river bank"]),
        ("at the bank of a river", PLACES, ["bank"]),
        ("the  bank\nor River\n Bank.", PLACES, ["bank", "river bank"]),
        ("in the U.S. or New York", PLACES, ["the U.S.", "new york"]),
        ("in the uxs or new yorker", PLACES, []),
        ("in New York, so new", ("new", "New York"), ["New York", "new"]),
        # Letters, as the prompt has them.
        ("The answer is (b).", KIN, ["grandmother"]),
        ("Of (A) and (d), d; (e)", KIN, ["mother", "aunt"]),
        ("mother mother", ("mother", "Mother", ""), ["mother", "mother"]),
        ("(b)", ("mother", "Mother"), ["Mother"]),
        ("", KIN, []),
        ("mother", (), []),
        ("mother", ("", " "), []),
    ],
)
def test_whole_words_and_letters_name_choices(text, choices, mentions):
    assert rationale_metrics.find_mentions(text, choices) == mentions
    assert rationale_metrics.last_mention(text, choices) == (
        mentions[-1] if mentions else ""
    )


def test_others_are_named_without_a_letter():
    mentions = rationale_metrics.find_mentions(
        "(a) (b) her uncle's aunt", ("aunt",), "uncle", ""
    )
    assert mentions == ["aunt", "uncle", "aunt"]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("Her  aunt. ", "her aunt", True),
        ("aunt", "aunt uncle", False),
        ("", ".", True),
    ],
)
def test_answers_are_the_same_up_to_spelling(first, second, equal):
    assert rationale_metrics.answers_match(first, second) is equal


def record(rationale, answer="aunt", gold="mother", stated=None, choices=KIN):
    return Record(
        id=rationale,
        question="Who ?",
        choices=choices,
        gold=gold,
        rationale=rationale,
        answer=answer,
        stated=stated,
    )


def test_rationales_are_described_by_hand():
    metrics = rationale_metrics.describe_rationales(
        [
            record("She is the mother .", answer="Mother.", stated="mother"),
            record("A grandmother or aunt , so (a) .", stated="mother"),
            record("aunt aunt\tAUNT", stated="Aunt"),
            record("", stated=""),
        ]
    )
    assert metrics == pytest.approx(
        {
            "num_records": 4,
            "words": (5 + 8 + 3 + 0) / 4,
            "names_gold": 2 / 4,
            "names_answer": 3 / 4,
            "states_answer": 0,
            "names_distractor": 2 / 4,
            "num_distractors": (0 + 2 + 1 + 0) / 4,
            "self_consistency": 2 / 4,
        }
    )


def test_what_cannot_be_measured_has_no_key():
    assert rationale_metrics.describe_rationales([]) == {}
    free = record("So it is 12 , not (a) .", answer="12", gold="13", choices=())
    assert rationale_metrics.describe_rationales([free]) == {
        "num_records": 1,
        "words": 8,
        "names_gold": 0,
        "names_answer": 1,
        "states_answer": 0,
    }
    some = [free, record("an aunt"), record("a mother", stated="mother")]
    metrics = rationale_metrics.describe_rationales(some)
    assert (metrics["names_distractor"], metrics["self_consistency"]) == (1 / 2, 0)


def test_an_answer_that_is_no_choice_can_be_named():
    assert (
        rationale_metrics.describe_rationales([record("her uncle", "uncle")])[
            "names_answer"
        ]
        == 1
    )
    # Not by the letter that it would have as a further choice.
    assert (
        rationale_metrics.describe_rationales([record("so (e)", "uncle")])[
            "names_answer"
        ]
        == 0
    )
    longer = record("her grandmother-in-law", "in-law")
    assert rationale_metrics.describe_rationales([longer])["names_answer"] == 0


def test_las_by_hand():
    """Leaking items gain 1, 0; the others 1, -1, 0, 0."""
    metrics = leakage_adjusted_simulatability(
        both=[True, True, True, False, True, False],
        question=[False, True, False, True, True, False],
        rationale=[True, True, False, False, False, False],
    )
    assert metrics == pytest.approx(
        {
            "las": (1 / 2 + 0) / 2,
            "las_leaking": 1 / 2,
            "las_hidden": 0,
            "num_leaking": 2,
            "num_hidden": 4,
            "simulated": 4 / 6,
            "simulated_question": 3 / 6,
            "simulated_rationale": 2 / 6,
            "gain": 1 / 6,
        }
    )
    # Not the mean over items, which is the gain.
    assert metrics["las"] != pytest.approx(metrics["gain"])


@pytest.mark.parametrize(
    ("leaks", "there", "empty"),
    [(True, "leaking", "hidden"), (False, "hidden", "leaking")],
)
def test_las_of_one_group_is_its_mean(leaks, there, empty):
    metrics = leakage_adjusted_simulatability(
        [True, True, False], [False, True, False], rationale=[leaks] * 3
    )
    assert metrics["las"] == metrics[f"las_{there}"] == pytest.approx(1 / 3)
    assert (metrics[f"num_{there}"], metrics[f"num_{empty}"]) == (3, 0)
    assert f"las_{empty}" not in metrics


def test_las_needs_all_three_of_each_item():
    assert leakage_adjusted_simulatability([], [], []) == {}
    with pytest.raises(ValueError, match="rationale=1 items"):
        leakage_adjusted_simulatability([True, True], [True, False], [True])
