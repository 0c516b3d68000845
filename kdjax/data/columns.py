"""Columns of a row under the names of the schemas, and their typed values."""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kdjax.data.readers import Row, Values, kind_of, parse_json

# Names that `data.columns` may map others to; a schema reads some of them.
NAMES = (
    "id",
    "question",
    "choices",
    "answer",
    "rationale",
    "counterfactuals",
    "text",
    "question_stem",
    "answerKey",
    "subject",
    "context",
    "answers",
    "instruction",
    "input",
    "output",
    "system",
    "conversations",
    "messages",
    "tools",
    "prompt",
    "chosen",
    "completion",
    "rejected",
)
_ABSENT = object()
_MAX_WHOLE = 2.0**53  # floats from here on are no exact integers


def parse_mapping(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `data.columns`: "question=stem, choices=A|B|C, answer=answers.text.0".

    Returns:
      Name -> columns of the data; several make a list, none leaves out its own.

    Raises:
      ValueError: no such name, one that occurs twice, or no column for it.
    """
    mapping: dict[str, tuple[str, ...]] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, paths = (part.strip() for part in item.partition("="))
        columns = tuple(path.strip() for path in paths.split("|")) if paths else ()
        if name not in NAMES or "=" not in item or not all(columns):
            raise ValueError(
                f"data.columns={text!r}: {item!r} is not NAME=COLUMN, with a NAME of "
                f"{list(NAMES)} and a COLUMN of the data such as question.stem"
            )
        if name in mapping:
            raise ValueError(f"data.columns={text!r} maps {name!r} twice")
        mapping[name] = columns
    return mapping


class ColumnMap:
    """The columns of rows, renamed as `data.columns` says."""

    def __init__(self, text: str) -> None:
        """Parse the mapping; "" leaves rows as they are."""
        self._text = text
        self._mapping = parse_mapping(text)
        self._is_first = True

    def __call__(self, row: Row) -> Row:
        """Return a row with the mapped columns under their new names.

        A column that is missing in the first row is an error, in a later one None.
        """
        if not self._mapping:
            return row
        values = dict(row.values)
        for column in {c for paths in self._mapping.values() for c in paths}:
            values.pop(column if column in row.values else column.split(".")[0], None)
        for name, paths in self._mapping.items():
            if not paths:
                values.pop(name, None)
                continue
            cells = [self._look_up(row, path) for path in paths]
            while len(cells) > 1 and is_missing(cells[-1]):
                cells.pop()  # of a question with fewer choices
            values[name] = cells if len(paths) > 1 else cells[0]
        self._is_first = False
        return row._replace(values=values)

    def _look_up(self, row: Row, path: str) -> Any:
        value: Any = row.values
        if path in value:
            return value[path]
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal():
                value = value[int(part)] if int(part) < len(value) else None
            elif value is None or not self._is_first:
                return None
            else:
                is_mapping = isinstance(value, Mapping)
                has = describe_names(value) if is_mapping else kind_of(value)
                raise ValueError(
                    f"{row.where}: data.columns={self._text!r}: there is no "
                    f"{part!r} of {path!r}: it has {has}"
                )
        return value


def is_missing(value: Any) -> bool:
    """Return True for None, NaN and texts without a character that is seen."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def show(value: Any) -> str:
    """Return a value as one short line."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_NAMES = reprlib.Repr()
_NAMES.maxlist, _NAMES.maxstring = 10, 30


def describe_names(names: Iterable[str]) -> str:
    """Return column names in order, for an error: 10 of them, each of 30 characters."""
    return _NAMES.repr(sorted(names))


def id_text(value: Any, error: Callable[[str], ValueError], name: str = "id") -> str:
    """Return an id as text: whole numbers as integers, texts as they are; "" = none.

    Args:
      value: of the column.
      error: makes an error of a sentence about the row.
      name: of the column.
    """
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise error(
            f"{name}={show(value)} is {kind_of(value)}: use texts or whole numbers"
        )
    return check_text(str(value), error, name)


def check_text(text: str, error: Callable[[str], ValueError], name: str) -> str:
    """Return a text that is Unicode.

    Raises:
      ValueError: it holds half a character: a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise error(
            f"{name} holds the lone surrogate {text[problem.start]!a} at character "
            f"{problem.start}, which is half of a character: remove or repair it"
        ) from None
    return text


class Fields:
    """The values of a row, with their types checked."""

    def __init__(self, row: Row, default_id: str, *, drop: bool) -> None:
        """Wrap a row.

        Args:
          row: with the schema's names.
          default_id: where it has none.
          drop: a missing value is "" instead of an error: who needs it leaves it out.
        """
        self.values: Values = row.values
        self.where = row.where
        self.is_padded = row.is_padded
        self._drop = drop
        self._name = default_id
        self.id = self._name = id_text(row.values.get("id"), self.error) or default_id

    def error(self, problem: str) -> ValueError:
        """Make an error of what is wrong with the row."""
        return ValueError(f"{self.where}: row {self._name!r}: {problem}")

    def has(self, name: str) -> bool:
        """Return True if there is a value that is not missing."""
        return not is_missing(self.values.get(name))

    def get(self, name: str, remedy: str = "fill it in") -> Any:
        """Return a value that the schema needs; None where it is missing.

        Raises:
          ValueError: it is missing, and is not to be left out.
        """
        value = self.values.get(name, _ABSENT)
        if value is _ABSENT and not self._drop:
            raise ValueError(
                f"{self.where}: row {self.id!r} has no column {name!r}: it has "
                f"{describe_names(self.values)}; choose the data.schema that matches "
                f"the data, or name its columns by data.columns ({name}=COLUMN)"
            )
        return self.require(name, None if value is _ABSENT else value, remedy)

    def require(self, name: str, value: Any, remedy: str = "fill it in") -> Any:
        """Return a value that the schema needs, as `get`."""
        if not is_missing(value):
            return value
        if not self._drop:
            raise self.error(
                f"{name}={show(value)} is missing: {remedy}, or leave such training "
                "rows out (data.on_missing='drop')"
            )
        return None

    def text(self, name: str, *, number: bool = False) -> str:
        """Return a text that the schema needs, as `get`; "" where it is missing."""
        value = self.get(name)
        return "" if value is None else self.as_text(value, name, number=number)

    def optional_text(self, name: str) -> str:
        """Return a text; "" where there is none."""
        value = self.values.get(name)
        return "" if is_missing(value) else self.as_text(value, name)

    def as_text(self, value: Any, name: str, *, number: bool = False) -> str:
        """Return a value that is a text, or with `number` a whole number, as text.

        Raises:
          ValueError: it is something else.
        """
        if number and isinstance(value, float) and value.is_integer():
            value = int(value) if abs(value) < _MAX_WHOLE else value
        if number and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            remedy = "write it as text, or choose another column by data.columns"
            if isinstance(value, dict | list) and name in NAMES:
                part = "MEMBER" if isinstance(value, dict) else "0"
                remedy = (
                    f"choose a part of it by data.columns={name}={name}.{part}, or "
                    f"leave it out by {name}="
                )
            raise self.error(
                f"{name}={show(value)} is {kind_of(value)}, not text: {remedy}"
            )
        return check_text(str(value), self.error, name)

    def as_list(self, value: Any, name: str) -> list[Any]:
        """Return a value that is a list, or the text of a JSON list.

        Raises:
          ValueError: it is something else.
        """
        if isinstance(value, str) and value.lstrip().startswith("["):
            where = f"{self.where}: row {self._name!r}: {name}={show(value)}"
            value = parse_json(value, where)
        if not isinstance(value, list | tuple):
            raise self.error(
                f"{name}={show(value)} is {kind_of(value)}, not a list: give a list, "
                "in a table the text of a JSON list"
                + (", or data.columns=choices=A|B|C" if name == "choices" else "")
            )
        return list(value)
