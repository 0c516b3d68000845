"""Letters of choices: a to z, then aa, ab, ... zz."""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_lowercase


def letter(index: int) -> str:
    """Return the letter, or the two letters, of a choice."""
    first, last = divmod(index, len(LETTERS))
    return (LETTERS[first - 1] if first else "") + LETTERS[last]


def letter_index(text: str) -> int | None:
    """Return the index of the choice with a letter, written b, B, (b), b) or b."""
    match = re.fullmatch(r"\(?([a-z]{1,2})[).]?", text.lower())
    if match is None:
        return None
    first, last = match[1][:-1], match[1][-1]
    start = LETTERS.index(first) + 1 if first else 0
    return start * len(LETTERS) + LETTERS.index(last)


def letter_choices(choices: Sequence[str]) -> str:
    """Join choices with their letters: "(a) oven (b) fridge"."""
    return " ".join(f"({letter(i)}) {text}" for i, text in enumerate(choices))


def bracketed(text: str, num_choices: int) -> list[str]:
    """Return the letters in brackets of a text, two together if there are so many."""
    length = 1 if num_choices <= len(LETTERS) else 2
    return re.findall(rf"\(([a-z]{{1,{length}}})\)", text.lower())
