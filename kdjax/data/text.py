"""Normal forms in which texts are compared."""

import re


def normalize_text(text: str) -> str:
    """Return a text in lower case, with single spaces and no final full stop.

    Two answers are equal if their normal forms are: punctuation within them counts, so
    "U.S." is not "US".
    """
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def normalize_words(text: str) -> str:
    """Return the words of a text in lower case, single spaces between them.

    Unlike `normalize_text` it has no punctuation at all: it is for finding one text
    within another, not for the equality of answers.
    """
    return " ".join(re.findall(r"\w+", text.lower()))
