"""Choices of a row, and the one that its answer names."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdjax.data.columns import Fields, is_missing, show
from kdjax.data.letters import letter, letter_index
from kdjax.data.readers import ClassName, kind_of

MAX_CHOICES = 100
_LABELS = ("id", "key", "letter")  # members that may be a choice's label, too
_ONE_LETTER = re.compile("[A-Za-z]")
_OWN_LETTER = re.compile(r"\s*\(?([A-Za-z])[.):]")


class Choices(NamedTuple):
    """Choices of a question."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # of the data, one for each; () = none


def parse_choices(fields: Fields, value: Any, name: str = "choices") -> Choices:
    """Parse the choices of a row.

    They are a list, lists {label, text}, a list of {label, text}, or {label: text}.

    Args:
      fields: of the row, for errors.
      value: of the column.
      name: of the column.

    Raises:
      ValueError: not 2 to 100, or one that is no text, or labels that are not different
        from each other.
    """
    if is_missing(value):
        return Choices()
    labels: list[Any] = []
    if isinstance(value, dict) and not value.keys().isdisjoint(("text", "label")):
        texts = fields.as_list(value.get("text"), f"{name}.text")
        if label := _label_name(fields, value, name):
            labels = fields.as_list(value[label], f"{name}.{label}")
        if labels and len(labels) != len(texts):
            raise fields.error(
                f"{name} has {len(labels)} labels for {len(texts)} texts: give each one"
            )
    elif isinstance(value, dict):
        # Columns have a null for the labels of other rows.
        items = {label: text for label, text in value.items() if text is not None}
        labels, texts = list(items), list(items.values())
    else:
        texts = fields.as_list(value, name)
        if texts and all(isinstance(item, dict) for item in texts):
            if any("text" not in item for item in texts):
                raise fields.error(
                    f"{name}={show(value)}: an object of it has no 'text': give each "
                    "choice as {'label': ..., 'text': ...}"
                )
            if label := _label_name(fields, texts[0], name):
                labels = [item.get(label) for item in texts]
            texts = [item["text"] for item in texts]
    for number, text in enumerate(texts):
        if is_missing(text):
            raise fields.error(
                f"{name}[{number}]={show(text)} is missing: give each choice"
            )
    return Choices(
        tuple(
            fields.as_text(text, f"{name}[{number}]", number=True)
            for number, text in enumerate(texts)
        ),
        _parse_labels(fields, labels, name),
    )


def _label_name(fields: Fields, value: dict[str, Any], name: str) -> str:
    """Return the member that is the label of a choice; "" where there is none.

    Other members than `label` are one if they are letters.
    """
    if not is_missing(value.get("label")):
        return "label"
    for member, label in value.items():
        labels = label if isinstance(label, list) else [label]
        texts = [item.strip() for item in labels if isinstance(item, str)]
        if member != "text" and texts and all(map(_ONE_LETTER.fullmatch, texts)):
            if member in _LABELS:
                return member
            raise fields.error(
                f"{name} has the member {member!r} with letters: name it 'label', or "
                "give a list of texts"
            )
    return ""


def _parse_labels(fields: Fields, labels: list[Any], name: str) -> tuple[str, ...]:
    texts = []
    for label in labels:
        if is_missing(label) or isinstance(label, bool):
            raise fields.error(f"{name} has the label {show(label)}: give each one")
        texts.append(fields.as_text(label, f"a label of {name}", number=True).strip())
    if len(set(texts)) < len(texts):
        raise fields.error(f"{name} has labels {texts}, two alike: make them differ")
    return tuple(texts)


def check_count(fields: Fields, texts: Sequence[str]) -> None:
    """Raise ValueError for 1 choice, or more than 100."""
    if len(texts) == 1 or len(texts) > MAX_CHOICES:
        raise fields.error(
            f"it has {len(texts)} choices: use 2 to {MAX_CHOICES}, or none for a free "
            "answer"
        )


class AnswerReader:
    """What answers of a file name their choice by."""

    def __init__(self, kind: str) -> None:
        """Read answers of one kind.

        Args:
          kind: of `data.answer_kind`; "auto" is what a row's own answer tells, the same
            in all rows.
        """
        self._kind = kind
        self._kinds: set[str] = set()  # what the rows so far may be; empty = not known
        self._where = ""

    @property
    def by_text(self) -> bool:
        """True if the answers so far may be texts of choices."""
        return self._kind == "text" or (
            self._kind == "auto" and (not self._kinds or "text" in self._kinds)
        )

    def choose(self, fields: Fields, name: str, value: Any, choices: Choices) -> str:
        """Return the text of the choice that an answer names.

        Args:
          fields: of the row.
          name: of the column.
          value: of the answer; not missing.
          choices: of the row.

        Raises:
          ValueError: the answer names no choice, or may name several.
        """
        if self._kind in ("index", "number"):
            choices = choices._replace(labels=())
            if isinstance(value, str):
                value = re.sub(r"^\s*(\d+)\.0+\s*$", r"\1", value)  # of pandas
        texts = choices.texts
        kinds = _readings(fields, name, value, choices)
        if self._kind != "auto":
            index = kinds.get(self._kind)
            if index is None:
                raise self._no_choice(fields, name, value, choices)
            return texts[index]
        if not kinds:
            raise self._no_choice(fields, name, value, choices)
        meanings = {texts[index] for index in kinds.values()}
        is_sure = isinstance(value, ClassName) or not kinds.keys() <= {
            "index",
            "number",
        }
        if len(meanings) > 1 or not is_sure:
            readings = ", ".join(
                f"{kind!r} {texts[index]!r}" for kind, index in kinds.items()
            )
            raise fields.error(
                f"{name}={show(value)} of choices {show(list(texts))} is ambiguous: it "
                f"may be {readings}: say by data.answer_kind what answers are: the "
                "'text' of a choice, its 'label' (a letter), its 'index' from 0, or "
                "its 'number' from 1"
            )
        if self._kinds and not self._kinds & kinds.keys():
            now, before = (" or ".join(sorted(k)) for k in (kinds, self._kinds))
            raise fields.error(
                f"{name}={show(value)} is the {now} of a choice, but {self._where} "
                f"answers by {before}: answer alike in all rows, or say "
                "data.answer_kind"
            )
        self._kinds = self._kinds & kinds.keys() or set(kinds)
        self._where = self._where or fields.where
        return texts[next(iter(kinds.values()))]

    def _no_choice(
        self, fields: Fields, name: str, value: Any, choices: Choices
    ) -> ValueError:
        options = list(choices.labels or choices.texts)
        remedy = "give the text of the right one, or its letter"
        if choices.labels:
            remedy = "give the label of the right one"
        if self._kind != "auto":
            remedy = f"data.answer_kind={self._kind!r}: give the {self._kind} of one"
        return fields.error(
            f"{name}={show(value)} is none of its choices {show(options)}: {remedy}"
        )


def _readings(
    fields: Fields, name: str, value: Any, choices: Choices
) -> dict[str, int]:
    """Return the index of the choice that an answer names, by kind of answer.

    That of a class is its own index, if there are as many classes as choices, or
    classes are letters, which then are no texts.

    Raises:
      ValueError: it is neither a text nor a whole number.
    """
    texts, labels = choices
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise fields.error(
            f"{name}={show(value)} is {kind_of(value)}: give the text of a choice, its "
            "letter, or its index"
        )
    text = fields.as_text(value, name, number=True)
    stripped = text.strip()
    # Two small letters are rather a word, such as "at".
    is_word = re.fullmatch("[a-z]{2}", stripped)
    label = None if is_word else letter_index(stripped)
    is_number = re.fullmatch("[0-9]{1,9}", stripped)
    number = int(stripped) if is_number else None
    readings: dict[str, int | None] = {
        "text": _index(texts, text, stripped),
        "label": _index(labels, text, stripped) if labels else label,
    }
    if not labels and readings["text"] is None and readings["label"] is not None:
        _check_own_letters(fields, name, value, texts, readings["label"])
    if readings["text"] is None and readings["label"] is not None:
        # "A" may also be a choice "a".
        folded = [item.strip().casefold() for item in texts]
        readings["text"] = _index(folded, stripped.casefold(), "")
    if not labels:
        readings |= {"index": number, "number": None if number is None else number - 1}
    if isinstance(value, ClassName) and not labels:
        letters = [letter(index) for index in range(len(value.names))]
        is_letters = [class_name.lower() for class_name in value.names] == letters
        own = is_letters or len(value.names) == len(texts)
        readings |= {"index": value.class_index if own else None, "number": None}
        if is_letters:
            readings["text"] = None
    return {
        kind: index
        for kind, index in readings.items()
        if index is not None and 0 <= index < len(texts)
    }


def _check_own_letters(
    fields: Fields, name: str, value: Any, texts: Sequence[str], index: int
) -> None:
    """Raise ValueError if choices such as "B) milk" have the letters of others."""
    own = [match and letter_index(match[1]) for match in map(_OWN_LETTER.match, texts)]
    if None not in own and index < len(texts) and own[index] != index:
        raise fields.error(
            f"{name}={show(value)} is ambiguous: the choices {show(list(texts))} have "
            "letters of their own, in another order: give them as {label: text}"
        )


def _index(items: Sequence[str], text: str, stripped: str) -> int | None:
    """Return the index of an item that is the text, if need be but for its ends."""
    if text in items:
        return items.index(text)
    ends = [item.strip() for item in items]
    return ends.index(stripped) if stripped and stripped in ends else None
