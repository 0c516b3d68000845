"""Quality filters for rationales, and the parser of answers."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from kdjax.annotation.prompts import QUESTION
from kdjax.config import GATES
from kdjax.data.example import Example, contradicts
from kdjax.data.letters import LETTERS, bracketed, letter, letter_index
from kdjax.data.templates import CHOICES
from kdjax.data.text import normalize_words, states_answer

_MARKS = re.compile(rf"^\s*({re.escape(QUESTION)}|{re.escape(CHOICES)})", re.MULTILINE)


class QualityFilters:
    """Checks of a rationale; the names of those that it fails.

    empty          there is no text
    cut_off        it did not end by itself: the limit of tokens came first
    no_choice      it names none of the choices, neither by its letter nor by its text
    contradicts    it concludes with the letter of another choice than the explained one
    leaks          it goes on to another turn, or has another question's words
    states_answer  it says which choice is the answer: an explanation need not

    Args:
      questions: of the data and of the prompts' worked examples, which must not leak.
    """

    names = GATES

    def __init__(self, questions: Iterable[str]) -> None:
        self._by_start: dict[str, set[str]] = {}
        for question in questions:
            words = normalize_words(question)
            for start in _sentences(question)[:1]:
                self._by_start.setdefault(start, set()).add(words)

    def __call__(self, row: dict[str, Any], example: Example, answer: str) -> list[str]:
        """Return the names of the filters that a row fails.

        Args:
          row: its text and finish_reason.
          example: what it is about.
          answer: the text of the choice that it explains.
        """
        text = row["text"]
        explained = replace(example, answer=answer, rationale=text)
        checks = {
            "empty": not text,
            "cut_off": row["finish_reason"] != "stop",
            "no_choice": bool(example.choices) and not _names_choice(text, example),
            "contradicts": contradicts(explained),
            "leaks": self._leaks(text, example),
            "states_answer": states_answer(text),
        }
        return [name for name, failed in checks.items() if failed]

    def _leaks(self, text: str, example: Example) -> bool:
        if _MARKS.search(text):
            return True
        words, own_words = normalize_words(text), normalize_words(example.question)
        return any(
            question in words and question not in own_words
            for sentence in _sentences(text)
            for question in self._by_start.get(sentence, ())
        )


def parse_choice(text: str, example: Example) -> str:
    """Return the choice that a text answers with; "" if it names none, or two.

    By its first letter in brackets, by a letter alone, or by the words of one choice.
    Without choices, the text's first line.
    """
    if not example.choices:
        return text.strip().partition("\n")[0].rstrip()
    letters = bracketed(text, len(example.choices))
    length = 1 if len(example.choices) <= len(LETTERS) else 2
    if alone := re.fullmatch(rf"\s*([a-z]{{1,{length}}})[).:]*\s*", text.lower()):
        letters = [alone[1]]
    if letters:
        index = letter_index(letters[0]) or 0
        return example.choices[index] if index < len(example.choices) else ""
    words = f" {normalize_words(text)} "
    named = {
        c
        for c in example.choices
        if normalize_words(c) and f" {normalize_words(c)} " in words
    }
    exact = {c for c in named if normalize_words(c) == words.strip()}
    return named.pop() if len(named) == 1 else exact.pop() if len(exact) == 1 else ""


def _names_choice(text: str, example: Example) -> bool:
    words = f" {normalize_words(text)} "
    letters = (f"({letter(index)})" for index in range(len(example.choices)))
    named = any(mark in text.lower() for mark in letters)
    return named or any(
        f" {normalize_words(c)} " in words for c in example.choices if c
    )


def _sentences(text: str) -> list[str]:
    return list(filter(None, map(normalize_words, re.split(r"(?<=[.?!])\s+|\n", text))))
