"""Tables of ratings: kdjax's own, and those of others' studies.

Shapes: N ratings, C constructs.
"""

import csv
import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from kdjax.analysis.study_means import QUALITY
from kdjax.survey.config import CONSTRUCTS

_MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "--", ".", "?", "missing"}
# Names under which others' tables have a column, in lower case, letters alone.
_USUAL_NAMES = {
    "participant": (
        "participant participantid pid prolificpid prolificid rater raterid worker "
        "workerid annotator annotatorid subject subjectid respondent user userid"
    ),
    # kdjax's own `item` is an explanation: its question is what items have in common
    "item": "question questionid qid item itemid id exampleid",
    "condition": "condition method student model system treatment approach",
    "length": (
        "length numwords words wordcount explanationlength rationalelength numtokens"
    ),
    "order": "order position",
    "seconds": "seconds duration time",
    "attention_failed": "attentionfailed failedattention",
    "finished": "finished completed",
    "right": "right correct iscorrect",
    "predicted": "predicted simulated",
}
_NUMBERS = ("length", "order", "seconds", "attention_failed", "right", "predicted")
_REQUIRED = ("condition",)
_MEASURES = (
    "las",
    "mentions",
    "gold_mentions",
    "distractor_mentions",
    "perturbed",
    "confidence",
)
_WORDS = {
    "strongly disagree": 1.0,
    "disagree": 2.0,
    "neutral": 3.0,
    "neither agree nor disagree": 3.0,
    "agree": 4.0,
    "strongly agree": 5.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings of explanations, a row each."""

    participants: tuple[str, ...]
    items: tuple[str, ...]
    conditions: tuple[str, ...]
    constructs: tuple[str, ...]
    values_NC: np.ndarray  # NaN: missing
    numbers: Mapping[str, np.ndarray]  # other columns, NaN: missing
    texts: Mapping[str, tuple[str, ...]]  # columns of words: finished
    statements: tuple[str, ...] = ()  # what the table lacks, and how it was read

    def __len__(self) -> int:
        return len(self.conditions)

    @property
    def explanations(self) -> tuple[tuple[str, str], ...]:
        """Return what is rated: a condition's explanation of an item."""
        return tuple(zip(self.items, self.conditions, strict=True))

    @property
    def levels(self) -> tuple[str, ...]:
        """Return the conditions in order."""
        return tuple(sorted(set(self.conditions)))

    @property
    def outcomes(self) -> dict[str, np.ndarray]:
        """Return the constructs, and their mean where none of them is missing."""
        columns = dict(zip(self.constructs, self.values_NC.T, strict=True))
        if len(self.constructs) > 1 and QUALITY not in columns:
            columns[QUALITY] = self.values_NC.mean(1)
        return columns

    def select(self, rows: np.ndarray) -> "Ratings":
        """Return the rows of a mask."""
        places = np.flatnonzero(rows).tolist()

        def take(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[place] for place in places)

        return dataclasses.replace(
            self,
            participants=take(self.participants),
            items=take(self.items),
            conditions=take(self.conditions),
            values_NC=self.values_NC[places],
            numbers={k: v[places] for k, v in self.numbers.items()},
            texts={k: take(v) for k, v in self.texts.items()},
        )


def parse_columns(text: str) -> dict[str, str]:
    """Parse "participant=rater,constructs=a+b" into kdjax's name -> column.

    Raises:
      ValueError: a part is no name=column, or the name is unknown.
    """
    known = (*_USUAL_NAMES, "constructs", "measures")
    mapping = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or name not in known:
            raise ValueError(
                f"columns={part!r}: write name=column with a name of {list(known)}"
            )
        mapping[name] = column
    return mapping


def read(file: pathlib.Path, columns: Mapping[str, str] | None = None) -> Ratings:
    """Read a table of ratings, one per row.

    Args:
      file: csv with a header; comma, semicolon or tab, UTF-8 or Latin-1.
      columns: kdjax's name -> the file's column; `constructs` and `measures` are
        several, joined by "+". What is not named is looked for by usual names.

    Raises:
      ValueError: a column is missing, or a cell is no number.
    """
    header, rows = _table(file)
    names, statements = _names(file, header, columns or {})
    constructs = _several(header, (columns or {}).get("constructs", ""), CONSTRUCTS)
    if not constructs:
        raise ValueError(
            f"constructs: {file} has none of {list(CONSTRUCTS)}: name its columns, "
            f"--columns=constructs=a+b, out of {header}"
        )
    measures = _several(header, (columns or {}).get("measures", ""), _MEASURES)
    cells = {c: [row[place] for row in rows] for place, c in enumerate(header)}

    def labels(name: str, alone: str) -> tuple[str, ...]:
        if name in names:
            return tuple(cell.strip() for cell in cells[names[name]])
        statements.append(f"the table has no column of {alone}")
        return tuple(str(place) for place in range(len(rows)))

    conditions = labels("condition", "conditions")
    numbers = {
        name: _numbers(column, cells[column], file, words=name == "length")
        for name, column in names.items()
        if name in _NUMBERS
    }
    numbers |= {m: _numbers(m, cells[m], file) for m in measures}
    table = Ratings(
        participants=labels("participant", "participants: each rating is a person"),
        items=labels("item", "items: each rating is of its own"),
        conditions=conditions,
        constructs=tuple(constructs),
        values_NC=np.stack([_numbers(c, cells[c], file) for c in constructs], 1),
        numbers=numbers,
        texts={n: tuple(cells[c]) for n, c in names.items() if n == "finished"},
        statements=tuple(statements),
    )
    blank = np.array([value.lower() in _MISSING for value in conditions], bool)
    if blank.any():
        table = table.select(~blank)
        words = f"{int(blank.sum())} rows without a condition are left out"
        table = dataclasses.replace(table, statements=(*table.statements, words))
    if not len(table):
        raise ValueError(f"ratings={file} has no rating: give a table with rows")
    return table


def _table(file: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    if not file.is_file():
        raise ValueError(f"ratings={file} is not there: name a csv file")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if not lines:
        raise ValueError(f"ratings={file} is empty: give a table with a header")
    header = [cell.strip() for cell in lines[0]]
    for place, row in enumerate(lines[1:], start=2):
        if len(row) > len(header):
            raise ValueError(
                f"{file}, row {place}: {len(row)} cells under {len(header)} names: "
                "quote cells that hold the delimiter"
            )
    short = [row + [""] * (len(header) - len(row)) for row in lines[1:]]
    return header, short


def _names(
    file: pathlib.Path, header: Sequence[str], columns: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return kdjax's name -> column of the file, and what was guessed."""
    names, statements = {}, []
    plain = {re.sub("[^a-z]", "", column.lower()): column for column in header}
    for name, usual in _USUAL_NAMES.items():
        if name in columns:
            column = next((c for c in header if c == columns[name]), None)
            column = column or plain.get(re.sub("[^a-z]", "", columns[name].lower()))
            if column is None:
                raise ValueError(
                    f"columns={name}={columns[name]}: {file} has no such column: use "
                    f"one of {list(header)}"
                )
        else:
            column = next(
                (plain[word] for word in usual.split() if word in plain), None
            )
            if column is not None and column != name and column in columns.values():
                column = None
            if column is not None and column != name:
                statements.append(f"{name} is read from the column {column}")
        if column is not None:
            names[name] = column
        elif name in _REQUIRED:
            raise ValueError(
                f"columns: {file} has no {name}: name its column, "
                f"--columns={name}=COLUMN, one of {list(header)}"
            )
    return names, statements


def _several(header: Sequence[str], text: str, defaults: Sequence[str]) -> list[str]:
    """Return columns joined by "+", or those of the defaults that are there."""
    plain = {column.lower(): column for column in header}
    if not text:
        return [plain[name] for name in defaults if name in plain]
    columns = []
    for part in filter(None, (part.strip() for part in text.split("+"))):
        if part not in header and part.lower() not in plain:
            raise ValueError(
                f"columns={part}: there is no such column: use some of {list(header)}"
            )
        columns.append(part if part in header else plain[part.lower()])
    return columns


def _numbers(
    column: str, cells: Sequence[str], file: pathlib.Path, *, words: bool = False
) -> np.ndarray:
    """Return numbers; NaN where a cell says that it is missing.

    Args:
      column: their name.
      cells: their texts: 4, "4,5", "4 - agree", "agree", "true".
      file: that they are from.
      words: cells that are no numbers are texts, whose words are counted.
    """
    values = [_number(cell) for cell in cells]
    wrong = [place for place, value in enumerate(values) if value is None]
    if wrong and words:
        return np.array([float(len(cell.split())) for cell in cells])
    if wrong:
        raise ValueError(
            f"{file}, rating {wrong[0] + 1}: {column}={cells[wrong[0]]!r} is no "
            "number: correct it, or leave the cell empty"
        )
    return np.array(values, float)


def _number(cell: str) -> float | None:
    """Return the number of a cell, NaN for a missing one; None where it has none."""
    text = " ".join(cell.lower().split())
    if text in _MISSING:
        return math.nan
    if text in _WORDS:
        return _WORDS[text]
    if text in ("true", "yes", "false", "no"):
        return float(text in ("true", "yes"))
    match = re.fullmatch(
        r"\(?([-+]?\d+(?:[.,]\d+)?(?:e[-+]?\d+)?)\)?(?:\s*[-:=.)]?\s*[a-z ]*)", text
    )
    return float(match[1].replace(",", ".")) if match else None


def exclusions(ratings: Ratings, *, min_seconds: float = 0.0) -> dict[str, np.ndarray]:
    """Return reason -> rows that it excludes: all of a participant.

    Args:
      ratings: all. Who has a non-zero `attention_failed` failed the checks; who has an
        empty `finished` did not finish.
      min_seconds: median seconds per rating below which a person is too fast.
    """
    people = np.array(ratings.participants)
    reasons = {}
    if "attention_failed" in ratings.numbers:
        failed = np.nan_to_num(ratings.numbers["attention_failed"]) > 0
        reasons["attention checks failed"] = np.isin(people, people[failed])
    if min_seconds > 0 and "seconds" in ratings.numbers:
        seconds = ratings.numbers["seconds"]
        fast = []
        for person in np.unique(people):
            known = seconds[(people == person) & np.isfinite(seconds)]
            if len(known) and np.median(known) < min_seconds:
                fast.append(person)
        reasons["too fast"] = np.isin(people, fast)
    if "finished" in ratings.texts:
        cells = [cell.strip().lower() for cell in ratings.texts["finished"]]
        done = np.array([cell not in _MISSING | {"0", "false", "no"} for cell in cells])
        reasons["not finished"] = ~np.isin(people, people[done])
    return reasons
