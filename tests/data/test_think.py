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
    ],
)
def test_a_text_is_reasoning_and_answer(text, reasoning, answer):
    assert think.split_think(text) == (reasoning, answer)
    assert think.strip_think(text) == answer
    assert think.has_think(text) == bool(reasoning)


def test_what_is_joined_is_split_again():
    for reasoning in ("a\nb", "<think>\na\nb\n</think>"):
        text = think.join_think(reasoning, "\n4")
        assert think.split_think(text) == ("a\nb", "4")
