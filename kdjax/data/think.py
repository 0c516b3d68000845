"""Reasoning of a model between marks, <think> and </think>, before its answer."""

import re

OPEN, CLOSE = "<think>", "</think>"
# Closing mark -> opening mark; those of other models are read, and never written.
_MARKS = {
    CLOSE: OPEN,
    "</thinking>": "<thinking>",
    "<|end_of_thought|>": "<|begin_of_thought|>",
}
_CLOSING = re.compile("|".join(map(re.escape, _MARKS)))
_OPENING = re.compile("|".join(map(re.escape, _MARKS.values())))


def split_think(text: str) -> tuple[str | None, str]:
    """Split a text into its reasoning and what follows.

    The opening mark may be missing, where a chat template has written it before. A
    text that opens its reasoning and never closes it is reasoning alone.

    Returns:
      The reasoning, without its marks, None where there is none or it has no end; and
      the text without any reasoning.
    """
    reasoning, parts, start = None, [], 0
    for close in _CLOSING.finditer(text):
        head, _, thought = text[start : close.start()].rpartition(_MARKS[close[0]])
        if head.strip():
            parts.append(head.strip() if start else head.rstrip())
        reasoning = thought.strip() if reasoning is None else reasoning
        start = close.end()
    rest = text[start:]
    if opening := _OPENING.search(rest):
        rest = rest[: opening.start()].rstrip()
    return reasoning, "\n".join([*parts, rest.lstrip() if start else rest])


def has_think(text: str) -> bool:
    """Return True if a text has reasoning, of at least a word, that is closed."""
    reasoning, _ = split_think(text)
    return bool(reasoning)


def is_cut_off(text: str, *, anywhere: bool = False) -> bool:
    """Return True if a text opens reasoning that it never closes.

    Args:
      text: of a model.
      anywhere: also where it does not begin with the mark, as a text about it.
    """
    last = _CLOSING.split(text)[-1].lstrip()
    return bool(_OPENING.search(last) if anywhere else _OPENING.match(last))


def strip_think(text: str) -> str:
    """Return a text without its reasoning and its marks."""
    return split_think(text)[1]


def after_opening(text: str) -> str | None:
    """Return a text as it follows <think>; None if it does not close it."""
    text = text.lstrip().removeprefix(OPEN).lstrip()
    return text if CLOSE in text else None


def join_think(reasoning: str, answer: str) -> str:
    """Write reasoning and answer as one text, as `split_think` reads it."""
    reasoning = re.sub(rf"^\s*{OPEN}|{CLOSE}\s*$", "", reasoning).strip()
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer.lstrip()}"
