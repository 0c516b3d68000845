"""Examples from files, data sets and the built-in task."""

import collections
import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.config import DataConfig
from kdjax.data import files, kinship, readers, selection, splits
from kdjax.data.columns import check_text, describe_names, id_text, is_missing, show
from kdjax.data.example import Example, contradicts, wrong_choices
from kdjax.data.readers import Row, kind_of
from kdjax.data.schemas import Schema
from kdjax.data.text import CONCLUSION, states_answer

logger = logging.getLogger(__name__)

_Numbered = tuple[int, Row]


def load_examples(config: DataConfig, split: str, *, seed: int) -> list[Example]:
    """Return the examples of `iter_examples` as a list."""
    return list(iter_examples(config, split, seed=seed))


def iter_examples(config: DataConfig, split: str, *, seed: int) -> Iterator[Example]:
    """Yield the examples of one split, in the source's own order.

    Train and held-out rows are never the same ones: they come from `eval_path`, or
    from `eval_split` of `path`; a source without splits, and without `eval_path`, holds
    out its last `num_eval` rows. Rows without an id get "<split>-<row number>", the
    number, from 0, in the files that they are read from, before any is held out.

    With `holdout_seed` the rows that are held out are drawn: `num_eval` of them or,
    where held-out rows come from elsewhere, all but `num_train`; the others follow in
    the order that they are drawn in, as `datasets.Dataset.train_test_split` has them.

    Rows are read one at a time: what is held are the last `num_eval` rows, where they
    are held out, 8 bytes per id, and the files that are joined by ids.

    Args:
      config: of the data. `num_train` / `num_eval` keep the first rows (0 = all). With
        `labels` training answers are a teacher's, "" where it has none: `gold` tells.
      split: "train" or "eval".
      seed: for the generated source only.

    Yields:
      Examples with unique ids.

    Raises:
      ValueError: a file, split, column or answer that is missing or contradictory.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: use 'train' or 'eval'")
    num = config.num_train if split == "train" else config.num_eval
    if config.is_built_in:
        if num <= 0:
            raise ValueError(
                f"num_{split}={num}: source='kinship' generates its examples: "
                "say how many, > 0; for other data give data.path"
            )
        yield from kinship.generate(
            config.kinship, num_examples=num, seed=seed, split=split
        )
        return
    examples = _convert(config, split, num)
    if split == "train" and config.labels:
        examples = _replace_labels(examples, config.labels)
    path = config.rationales if split == "train" else config.eval_rationales
    if path:
        examples = _join_rationales(examples, path, config.rationale_end)
    if split == "train" and config.counterfactuals:
        examples = _join_counterfactuals(examples, config.counterfactuals)
    yield from examples


def describe(config: DataConfig, split: str) -> str:
    """Return what a split is read from, as which schema, in a few words."""
    if config.is_built_in:
        return "the built-in task kinship"
    _, row = next(_read_rows(config, train=split == "train"))
    return f"{row.file}, {Schema(config).describe(row)}"


def _convert(config: DataConfig, split: str, num: int) -> Iterator[Example]:
    """Yield the first `num` rows as examples, whose ids are checked; 0 = all."""
    ids = array("Q")
    rows = _read_rows(config, train=split == "train")
    for example in _examples(config, split, rows, num):
        ids.append(_digest(example.id))
        yield example
    if num > len(ids):
        raise ValueError(f"num_{split}={num}: the source has {len(ids)} rows")
    sorted_N = np.sort(np.asarray(ids, np.uint64))
    if (sorted_N[1:] == sorted_N[:-1]).any():
        rows = _read_rows(config, train=split == "train")
        _raise_duplicate(_examples(config, split, rows, num))


def _examples(
    config: DataConfig, split: str, rows: Iterator[_Numbered], num: int
) -> Iterator[Example]:
    schema = Schema(config)
    for number, row in itertools.islice(rows, num or None):
        yield schema.example(row, f"{split}-{number}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _raise_duplicate(examples: Iterator[Example]) -> None:
    """Raise ValueError for the first id that occurs twice, naming both rows."""
    origins: dict[str, str] = {}
    for example in examples:
        if example.id in origins:
            raise ValueError(
                f"{example.origin}: id {example.id!r} occurs twice: ids must be unique "
                f"(first: {origins[example.id]})"
            )
        origins[example.id] = example.origin


def _read_rows(config: DataConfig, *, train: bool) -> Iterator[_Numbered]:
    """Yield the rows of a split, each with its number in the source."""
    path = config.path if train else config.eval_path or config.path
    if not path:
        raise ValueError(f"path='': source={config.source!r} needs a file or folder")
    rows_by_split = splits.open_splits(path, config.source)
    if "" not in rows_by_split:
        yield from enumerate(_split_rows(config, path, rows_by_split, train=train))
        return
    rows = enumerate(rows_by_split[""]())
    first = next(rows, None)
    if first is None:
        raise ValueError(f"path={path!r} has no rows")
    numbered: Iterator[_Numbered] = itertools.chain([first], rows)
    if config.eval_path:
        if Path(config.eval_path).resolve() == Path(config.path).resolve():
            raise ValueError(
                f"eval_path={config.eval_path!r} is the training file: give another "
                "file, or eval_path='' with num_eval > 0 to hold out its last rows"
            )
        if train and config.holdout_seed >= 0:
            numbered = _draw(numbered, config, train=True)
        yield from numbered
        return
    if config.holdout_seed >= 0:
        yield from _draw(numbered, config, train=train)
    else:
        yield from _hold_out(numbered, config.num_eval, train=train)


def _draw(
    rows: Iterator[_Numbered], config: DataConfig, *, train: bool
) -> Iterator[_Numbered]:
    """Yield the training rows that a seed draws, or the held-out ones; holds all."""
    table = list(rows)
    num_eval = config.num_eval
    if config.eval_path:
        num_eval = len(table) - config.num_train
        if not 0 < num_eval < len(table):
            raise ValueError(
                f"num_train={config.num_train}: with holdout_seed="
                f"{config.holdout_seed} and eval_path, num_train of {len(table)} rows "
                f"are drawn: use 1 to {len(table) - 1}, or holdout_seed=-1"
            )
    _check_holdout(num_eval, len(table), train=train)
    order = np.random.default_rng(config.holdout_seed).permutation(len(table))
    for index in order[num_eval:] if train else order[:num_eval]:
        yield table[index]


def _split_rows(
    config: DataConfig, path: str, rows_by_split: splits.Splits, *, train: bool
) -> Iterator[Row]:
    """Yield the rows of the training or the held-out split."""
    same_path = config.eval_path in ("", config.path)
    requested = (config.train_split, config.eval_split)
    names = [n if n in rows_by_split else files.canonical_split(n) for n in requested]
    if same_path and names[0] == names[1]:
        raise ValueError(
            f"eval_split={config.eval_split!r} is the train split too: name "
            "another split, or give eval_path"
        )
    name = names[0 if train else 1]
    if name not in rows_by_split:
        field = "train_split" if train else "eval_split"
        raise ValueError(
            f"split {getattr(config, field)!r} is not in {path!r}: it has "
            f"{list(rows_by_split)}; name one of them by data.{field}"
        )
    rows = rows_by_split[name]()
    first = next(rows, None)
    if first is None:
        raise ValueError(f"split {name!r} of path={path!r} has no rows")
    yield first
    yield from rows


def _hold_out(
    rows: Iterator[_Numbered], num_eval: int, *, train: bool
) -> Iterator[_Numbered]:
    """Yield all but the last `num_eval` rows, or these; they alone are held."""
    last: collections.deque[_Numbered] = collections.deque()
    num_rows = 0
    for row in rows:
        num_rows += 1
        last.append(row)
        if len(last) > num_eval:
            oldest = last.popleft()
            if train:
                yield oldest
    _check_holdout(num_eval, num_rows, train=train)
    if not train:
        yield from last


def _check_holdout(num_eval: int, num_rows: int, *, train: bool) -> None:
    if num_eval >= num_rows or (num_eval == 0 and not train):
        raise ValueError(
            f"num_eval={num_eval}: without eval_path the last num_eval of "
            f"{num_rows} rows are held out: use 1 to {num_rows - 1}, or an eval_path"
        )


class _JoinCheck:
    """Counts what was joined; nothing at all is an error."""

    def __init__(self, field: str, path: str) -> None:
        self._field, self._path = field, path
        self._first_id = ""
        self.examples = self.joined = 0

    def add(self, example: Example, *, joined: bool) -> None:
        """Count an example, and whether it got something."""
        self._first_id = self._first_id or example.id
        self.examples += 1
        self.joined += joined

    def finish(self) -> None:
        """Raise ValueError if no example got anything."""
        if self.joined == 0:
            raise ValueError(
                f"{self._field}={self._path!r} has no id of the examples (first: "
                f"{self._first_id!r})"
            )


def _replace_labels(examples: Iterator[Example], path: str) -> Iterator[Example]:
    """Replace answers by a teacher's, those of a file of {id, answer}."""
    answers = _read_texts("labels", path, ("id",), "answer", numbers=True)
    check = _JoinCheck("labels", path)
    for example in examples:
        answer = answers.get((example.id,), "")
        if isinstance(answer, int) and example.choices:
            raise ValueError(
                f"labels={path!r}: id {example.id!r} has the number {answer}, which "
                f"may be an index or a text of {list(example.choices)}: give the text"
            )
        relabelled = selection.replace_label(example, str(answer), path)
        check.add(example, joined=bool(relabelled.answer))
        yield relabelled
    check.finish()


def _join_rationales(
    examples: Iterator[Example], path: str, end: str
) -> Iterator[Example]:
    """Replace rationales by those of a file of {id, text}, cut before `end`.

    Logs how many examples have none, how many are cut, and how many say which is the
    answer, or conclude with another choice's letter than the answer's (all are kept).
    """
    texts = _read_texts("rationales", path, ("id",))
    if end == "auto":
        end = CONCLUSION if all(CONCLUSION in text for text in texts.values()) else ""
    if end:
        num_cut = sum(end in text for text in texts.values())
        texts = {key: text.partition(end)[0].strip() for key, text in texts.items()}
        logger.warning(
            "%s: %d of %d rationales are cut before %r; %d say which is the answer all "
            "the same (data.rationale_end)",
            path,
            num_cut,
            len(texts),
            end,
            sum(map(states_answer, texts.values())),
        )
    check, num_contradicting = _JoinCheck("rationales", path), 0
    for example in examples:
        joined = replace(example, rationale=texts.get((example.id,), ""))
        check.add(joined, joined=bool(joined.rationale))
        num_contradicting += contradicts(joined)
        yield joined
    check.finish()
    logger.info(
        "%s: %d of %d examples have a rationale; %d conclude with another choice than "
        "the answer (kept)",
        path,
        check.joined,
        check.examples,
        num_contradicting,
    )


def _join_counterfactuals(examples: Iterator[Example], path: str) -> Iterator[Example]:
    """Replace counterfactuals by those of a file of {id, choice, text}.

    `choice` is the text of a wrong choice. Logs how many wrong choices have one.
    """
    texts = _read_texts("counterfactuals", path, ("id", "choice"))
    by_id: dict[str, dict[str, str]] = {}
    for (name, choice), text in texts.items():
        by_id.setdefault(name, {})[choice] = text
    check, num_texts = _JoinCheck("counterfactuals", path), 0
    for example in examples:
        by_choice = by_id.get(example.id, {})
        if example.gold not in ("", example.answer):
            by_choice.pop(example.answer, None)  # now the answer
        for choice in by_choice:
            if choice not in example.choices or choice == example.answer:
                kind = "the answer" if choice == example.answer else "no choice"
                raise ValueError(
                    f"counterfactuals={path!r}: id {example.id!r} has one for "
                    f"{choice!r}, which is {kind} of {list(example.choices)}: give the "
                    "text of a wrong choice"
                )
        # A choice that reads like an earlier one is not repeated.
        wrong = wrong_choices(example) if by_choice else ()
        rationales = tuple(by_choice.pop(choice, "") for choice in wrong)
        check.add(example, joined=any(rationales))
        num_texts += sum(map(bool, rationales))
        yield replace(example, counterfactuals=rationales)
    check.finish()
    logger.info(
        "%s: %d of %d examples have counterfactuals, %d in all",
        path,
        check.joined,
        check.examples,
        num_texts,
    )


def _read_texts(
    field: str,
    path: str,
    names: tuple[str, ...],
    column: str = "text",
    *,
    numbers: bool = False,
) -> dict[tuple[str, ...], Any]:
    """Read a column of a file by other columns, which are unique; "" = no value.

    The values are texts, or with `numbers` also integers.
    """
    columns = (*names, column)
    texts: dict[tuple[str, ...], Any] = {}
    for row in readers.iter_rows(files.find_files(path), "json"):
        if any(name not in row.values for name in columns):
            raise ValueError(
                f"{field}={path!r}: a row ({row.where}) has columns "
                f"{describe_names(row.values)}: use {', '.join(columns)}"
            )
        key = tuple(_joining_text(field, row, name) for name in names)
        if key in texts:
            where = ", ".join(f"{n} {k!r}" for n, k in zip(names, key, strict=True))
            raise ValueError(f"{field}={path!r}: {where} occurs twice ({row.where})")
        texts[key] = _joined_value(field, row, column, numbers=numbers)
    return texts


def _joining_text(field: str, row: Row, name: str) -> str:
    """Return a value that rows are joined by, as text."""

    def error(problem: str) -> ValueError:
        return ValueError(f"{field}: {row.where}: {problem}")

    value = row.values[name]
    if name == "choice" and not isinstance(value, str) and not is_missing(value):
        raise error(f"{name}={show(value)} is {kind_of(value)}: give the choice's text")
    text = id_text(value, error, name)
    if not text:
        raise error(f"{name}={show(row.values[name])} is missing: give each row one")
    return text


def _joined_value(field: str, row: Row, column: str, *, numbers: bool) -> Any:
    value: Any = row.values[column]
    if is_missing(value):
        return ""
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"{field}: {row.where}: {column}={show(value)} is {kind_of(value)}, not "
            "text: write it as text"
        )
    return check_text(value, lambda p: ValueError(f"{field}: {row.where}: {p}"), column)
