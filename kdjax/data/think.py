"""Reasoning of a model between <think> and </think>, before its answer."""

import re

OPEN, CLOSE = "<think>", "</think>"


def split_think(text: str) -> tuple[str | None, str]:
    """Split a text into its reasoning and what follows.

    The opening mark may be missing, where a chat template has written it before. A
    text that opens its reasoning and never closes it is reasoning alone.

    Returns:
      The reasoning, without its marks, None where there is none or it has no end; and
      the text without any reasoning.
    """
    before, close, after = text.partition(CLOSE)
    if not close:
        head, opening, _ = text.partition(OPEN)
        return None, head.rstrip() if opening else text
    head, _, reasoning = before.rpartition(OPEN)
    _, rest = split_think(after)
    answer = rest.lstrip()
    if head.strip():
        answer = f"{head.rstrip()}\n{answer}"
    return reasoning.strip(), answer


def has_think(text: str) -> bool:
    """Return True if a text has reasoning, of at least a word, that is closed."""
    reasoning, _ = split_think(text)
    return bool(reasoning)


def strip_think(text: str) -> str:
    """Return a text without its reasoning and its marks."""
    return split_think(text)[1]


def join_think(reasoning: str, answer: str) -> str:
    """Write reasoning and answer as one text, as `split_think` reads it."""
    reasoning = re.sub(rf"^\s*{OPEN}|{CLOSE}\s*$", "", reasoning).strip()
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer.lstrip()}"
