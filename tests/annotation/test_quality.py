"""What is said to be wrong with a rationale."""

import pytest

from kdjax.annotation.quality import QualityFilters, parse_choice
from kdjax.data.example import Example

EXAMPLE = Example(
    id="milk",
    question="She was thirsty. Where is milk kept?",
    choices=("the fridge", "shed", "attic"),
    answer="the fridge",
)
OTHER = "Tom went out. What did he forget at home?"
FILTERS = QualityFilters([EXAMPLE.question, OTHER, "Why?"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Milk turns sour when warm, so it is kept in the fridge.", []),
        ("It is cold there. So the answer is (a).", ["states_answer"]),
        ("It is cold there, unlike in (b) or the attic; the fridge.", ["contradicts"]),
        ("My final choice: the fridge", ["states_answer"]),
        ("The answer must be cold, as the fridge is.", []),
        ("", ["empty", "no_choice"]),
        ("Milk is white.", ["no_choice"]),
        ("A watershed is large.", ["no_choice"]),
        ("The Fridge!", []),
        ("Not (a), so the answer is (b) shed.", ["contradicts", "states_answer"]),
        ("The fridge.\nQuestion: What is it?", ["leaks"]),
        ("The fridge.\nChoices: (a)", ["leaks"]),
        (f"The fridge. {OTHER} He forgot it.", ["leaks"]),
        ("The fridge. Tom went out.", []),
        (f"{EXAMPLE.question} In the fridge.", []),
    ],
)
def test_texts(text, found):
    row = {"text": text, "finish_reason": "stop"}
    assert FILTERS(row, EXAMPLE, EXAMPLE.answer) == found


def test_a_text_that_met_its_limit_is_cut_off():
    row = {"text": "It is in the fridge, because", "finish_reason": "length"}
    assert FILTERS(row, EXAMPLE, EXAMPLE.answer) == ["cut_off"]


def test_a_counterfactual_is_held_to_its_own_choice():
    row = {"text": "So the answer is (b).", "finish_reason": "stop"}
    assert FILTERS(row, EXAMPLE, "shed") == ["states_answer"]
    assert FILTERS(row, EXAMPLE, "attic") == ["contradicts", "states_answer"]


def test_a_free_answer_names_no_choice():
    example = Example(id="sum", question="What is 2 + 2?", answer="4")
    row = {"text": "Two and two.", "finish_reason": "stop"}
    assert FILTERS(row, example, "4") == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(b) shed", "shed"),
        ("It is (a), not (b).", "the fridge"),
        ("B", "shed"),
        ("c).", "attic"),
        ("The Fridge.", "the fridge"),
        ("It is kept in the fridge", "the fridge"),
        ("the fridge or the shed", ""),
        ("a watershed", ""),
        ("(e) cellar", ""),
        ("", ""),
    ],
)
def test_the_choice_that_an_answer_names(text, answer):
    assert parse_choice(text, EXAMPLE) == answer


def test_a_choice_within_another_one():
    example = Example(id="y", choices=("yard", "back yard"), answer="yard")
    assert parse_choice("Back yard.", example) == "back yard"
    assert parse_choice("yard", example) == "yard"
    assert parse_choice("in the back yard", example) == ""


def test_a_free_answer_is_the_first_line():
    assert (
        parse_choice("\n4 apples \nQuestion: no", Example(id="s", answer="4"))
        == "4 apples"
    )
