"""Reasoning between marks."""

import pytest

from kdjax.data import think


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("4", None, "4"),
        ("<think>\nSo.\n</think>\n\n4", "So.", "4"),
        ("So.\n</think>\n4", "So.", "4"),  # opened by the prompt
        ("<think>\n\n</think>\n\n4", "", "4"),
        ("<think>\nSo, and", None, ""),  # cut off
        ("Well. <think>a</think> 4", "a", "Well.\n4"),
        ("<think>a</think>b<think>c</think>d", "a", "b\nd"),
        ("", None, ""),
        ("<thinking>\nSo.\n</thinking>\n4", "So.", "4"),
        ("<|begin_of_thought|>\n\nSo.<|end_of_thought|>\n\n4", "So.", "4"),
        ("<thinking>a</thinking>b<think>c</think>d", "a", "b\nd"),
        ("<think>a <thinking> b</think>4", "a <thinking> b", "4"),
        ("<thinking>So, and", None, ""),
        ("I was thinking>4", None, "I was thinking>4"),
    ],
)
def test_a_text_is_reasoning_and_answer(text, reasoning, answer):
    assert think.split_think(text) == (reasoning, answer)
    assert think.strip_think(text) == answer
    assert think.has_think(text) == bool(reasoning)


@pytest.mark.parametrize(
    ("text", "is_cut_off", "has_open"),
    [
        ("4", False, False),
        ("<think>a</think>4", False, False),
        ("a</think>4", False, False),
        ("<think>a", True, True),
        (" \n<think>\na", True, True),
        ("<think>a</think>\n<think>c", True, True),
        ("The mark <think> opens it.", False, True),
        ("Write:\n<think>\nSo.", False, True),
    ],
)
def test_reasoning_without_an_end(text, is_cut_off, has_open):
    assert think.is_cut_off(text) == is_cut_off
    assert think.is_cut_off(text, anywhere=True) == has_open


@pytest.mark.parametrize(
    ("text", "after"),
    [("4", None), ("<think>\na</think>4", "a</think>4"), ("a</think>4", "a</think>4")],
)
def test_a_text_after_an_opening_mark(text, after):
    assert think.after_opening(text) == after


def test_many_marks():
    assert think.strip_think("<think>b</think>a" * 2000) == "\n".join("a" * 2000)


def test_what_is_joined_is_split_again():
    for reasoning in ("a\nb", "<think>\na\nb\n</think>"):
        text = think.join_think(reasoning, "\n4")
        assert think.split_think(text) == ("a\nb", "4")
