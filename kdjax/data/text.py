"""Normal forms in which texts are compared, and statements of an answer in them."""

import re

CONCLUSION = "So the answer is"  # ends a rationale that concludes with its answer
_STATEMENT = re.compile(
    r"\b(?:the|my)\s+(?:[\w-]+\s+)?(?:answer|choice|option)(?:\s+(?:is|would be)\b|:)"
    r"|\b(?:answer|choice|option):|\b(?:is|be)\s+\([a-z]{1,2}\)",
    re.IGNORECASE,
)


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


def states_answer(text: str) -> bool:
    """Return True if a text says what the answer is.

    That is "the answer is", "the best choice is", "Answer:" and the like, whatever
    follows, or a verb before a choice's letter, as "is (b)". The words of a choice
    alone state nothing.
    """
    return _STATEMENT.search(text) is not None
