"""Columns that look like what a schema reads under another name."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.data.columns import Fields, is_missing
from kdjax.data.letters import letter_index
from kdjax.data.readers import Values

# Columns that may be choices, where there is no column `choices`.
_CHOICES = re.compile(
    r"(answer|possible|multiple)?_?"
    r"(options?|opts|candidates|endings|choices?|alternatives|answers)(_list)?",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"((options?|opt?|choices?|candidate|ending|answers?|ans|alternative|alt|sol)"
    r"[ _-]?)?([a-j]|\d\d?)",
    re.IGNORECASE,
)
_LETTER = re.compile(r"\(?([A-J])[).]?")  # an answer that names a choice

# Names that columns of some data have -> the name that schemas read; "" = none.
_OTHER_NAMES = {
    **dict.fromkeys(("passage", "article", "paragraph", "story"), "context"),
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
    **dict.fromkeys(("functions", "available_tools", "tool_definitions"), "tools"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio"), ""),
}


def check_no_choices(
    fields: Fields, others: Values, answer: str, question: str
) -> None:
    """Raise ValueError for choices that nobody would see beside a free answer.

    Args:
      fields: of the row.
      others: its columns that no schema reads.
      answer: of the row.
      question: of the row.
    """
    letter = _LETTER.fullmatch(answer.strip())
    if letter and re.search(rf"\b{letter[1]}\b[).:]", question):
        letter = None  # of a choice in the question
    place = letter_index(letter[1]) if letter else None
    lists = [
        name
        for name, value in others.items()
        if is_list(value)
        and (_CHOICES.fullmatch(name) or (place is not None and place < len(value)))
    ]
    columns = lists[:1]
    if not lists:
        named = [name for name, value in others.items() if _is_text(value)]
        columns = [name for name in named if _CHOICE.fullmatch(name)]
        first = columns[0].lower() if columns else ""
        if len(first) == 1 and first not in ("a", "f", "1", "0"):
            columns = []
        if place is not None and not columns:
            columns = [n for n in named if re.search(r"[ _-]?[a-jA-J1-9]$", n)]
            columns = columns if place < len(columns) else []
    if lists or len(columns) > 1:
        raise fields.error(
            f"it has no choices, but columns {columns}: say data.columns=choices="
            f"{'|'.join(columns)}, or name the data.schema to leave them out"
        )


def is_list(value: Any) -> bool:
    """Return True for several texts or objects, or the text of a JSON list."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and value.strip() != "[]"
    if isinstance(value, Mapping):
        return len(value) > 1
    is_list = isinstance(value, list | tuple) and len(value) > 1
    return is_list and all(isinstance(item, str | Mapping) for item in value)


def _is_text(value: Any) -> bool:
    """Return True for a text that is no number."""
    return isinstance(value, str) and re.fullmatch(r"\s*[-\d.,]*\s*", value) is None


def check_other_names(fields: Fields, columns: Sequence[str]) -> None:
    """Raise ValueError for a column that is read under another name alone."""
    for name, value in fields.values.items():
        other = _OTHER_NAMES.get(name.lower())
        if other is None or name in columns or is_missing(value):
            continue
        if not value or value in ("[]", "{}"):
            continue
        if other == "context" and not (isinstance(value, str) and " " in value.strip()):
            continue  # a number, or an address
        if other == "":
            raise fields.error(
                f"{name} is not read, texts alone are: name the data.schema to leave "
                "it out"
            )
        messages = fields.values.get("messages")
        if other == "system" and str(value) in str(messages):
            continue  # which begin with it
        if other in columns and not fields.has(other):
            raise fields.error(
                f"it has no {other}, but {name}: say data.columns={other}={name}, or "
                "name the data.schema to leave it out"
            )
