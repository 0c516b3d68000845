"""Examples from files, data sets and the built-in task."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdjax.config import DataConfig
from kdjax.data import kinship, selection
from kdjax.data.example import Example, contradicts, wrong_choices

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def load_examples(config: DataConfig, split: str, *, seed: int) -> list[Example]:
    """Read the examples of one split, in the source's own order.

    Train and held-out rows are never the same ones: they come from `eval_path`, or
    from `eval_split` of `path`; a jsonl or text source without `eval_path` holds out
    its last `num_eval` rows. Rows without an id get "<split>-<row number>".

    Args:
      config: of the data. `num_train` / `num_eval` keep the first rows (0 = all). With
        `labels` training answers are a teacher's, "" where it has none: `gold` tells.
      split: "train" or "eval".
      seed: for the generated source only.

    Returns:
      Examples with unique ids.

    Raises:
      ValueError: a file, split, column or answer that is missing or contradictory.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split={split!r}: use 'train' or 'eval'")
    train = split == "train"
    num = config.num_train if train else config.num_eval
    if config.source == "kinship":
        if num <= 0:
            raise ValueError(
                f"num_{split}={num}: source='kinship' generates its examples: "
                "say how many, > 0"
            )
        return kinship.generate(
            config.kinship, num_examples=num, seed=seed, split=split
        )
    rows = _read_rows(config, train=train)
    if num > len(rows):
        raise ValueError(f"num_{split}={num}: the source has {len(rows)} rows")
    convert = _schema(config)
    examples = [
        convert(row, f"{split}-{index}")
        for index, row in enumerate(rows[: num or len(rows)])
    ]
    _check_ids(examples)
    if train and config.labels:
        answers = _read_texts("labels", config.labels, ("id",), "answer")
        examples = selection.replace_labels(examples, answers, config.labels)
        answered = sum(bool(example.answer) for example in examples)
        _check_joined("labels", config.labels, answered, examples)
    path = config.rationales if train else config.eval_rationales
    if path:
        examples = _join_rationales(examples, path)
    if train and config.counterfactuals:
        examples = _join_counterfactuals(examples, config.counterfactuals)
    return examples


def _read_rows(config: DataConfig, *, train: bool) -> list[Row]:
    path = config.path if train else config.eval_path or config.path
    if not path:
        raise ValueError(f"path='': source={config.source!r} needs a file or folder")
    if config.source in ("datasets", "tfds"):
        same_path = config.eval_path in ("", config.path)
        if same_path and config.train_split == config.eval_split:
            raise ValueError(
                f"eval_split={config.eval_split!r} is the train split too: name "
                "another split, or give eval_path"
            )
        read = _read_datasets if config.source == "datasets" else _read_tfds
        return read(path, config.train_split if train else config.eval_split)
    readers: dict[str, Callable[[str], list[Row]]] = {
        "jsonl": _read_jsonl,
        "text": _read_text,
    }
    if config.source not in readers:
        raise ValueError(
            f"source={config.source!r}: use 'kinship', 'jsonl', 'datasets', 'tfds' "
            "or 'text'"
        )
    rows = readers[config.source](path)
    if not rows:
        raise ValueError(f"path={path!r} has no rows")
    if config.eval_path:
        if Path(config.eval_path).resolve() == Path(config.path).resolve():
            raise ValueError(
                f"eval_path={config.eval_path!r} is the training file: give another "
                "file, or eval_path='' with num_eval > 0 to hold out its last rows"
            )
        return rows
    if config.num_eval >= len(rows) or (config.num_eval == 0 and not train):
        raise ValueError(
            f"num_eval={config.num_eval}: without eval_path the last num_eval of "
            f"{len(rows)} rows are held out: use 1 to {len(rows) - 1}, or an eval_path"
        )
    cut = len(rows) - config.num_eval
    return rows[:cut] if train else rows[cut:]


def _lines(path: str | Path) -> Iterable[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise ValueError(
            f"path={str(path)!r} cannot be read ({error.strerror}): give a file"
        ) from error


def _read_jsonl(path: str | Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows


def _read_text(path: str) -> list[Row]:
    """Read documents: objects with a "text" (.jsonl), or blocks of lines."""
    if path.endswith(".jsonl"):
        return _read_jsonl(path)
    blocks = re.split(r"\n\s*\n", "".join(_lines(path)))
    return [{"text": block.strip("\n")} for block in blocks if block.strip()]


def _read_datasets(path: str, split: str) -> list[Row]:
    """Read a `save_to_disk` folder, a folder of files, or a hub "name[:config]"."""
    import datasets

    folder = Path(path)
    if (folder / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(path)
    elif (folder / "state.json").exists():
        raise ValueError(
            f"path={path!r} holds one split without a name: save a DatasetDict with "
            f"the split {split!r}"
        )
    else:
        name, _, subset = (path, "", "") if folder.exists() else path.partition(":")
        try:
            splits = datasets.load_dataset(name, subset or None)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"path={path!r} is no saved data set, and load_dataset failed: {error}"
            ) from error
    if split not in splits:
        raise ValueError(f"split {split!r} is not in {path!r}: it has {list(splits)}")
    return list(splits[split])


def _read_tfds(path: str, split: str) -> list[Row]:
    """Read a prepared array_record data set, by the folder of its name or version.

    Random access through `data_source`: TensorFlow is not needed.
    """
    import tensorflow_datasets as tfds

    folder = Path(path)
    if (folder / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(str(folder))
    elif folder.is_dir():
        builder = tfds.builder(folder.name, data_dir=str(folder.parent))
    else:
        raise ValueError(
            f"path={path!r} is no folder: prepare the data set with "
            "file_format='array_record' and give its folder"
        )
    if split not in builder.info.splits:
        raise ValueError(
            f"split {split!r} is not in {path!r}: it has {list(builder.info.splits)}"
        )
    return [_to_python(row) for row in builder.as_data_source(split=split)]


def _to_python(value: Any) -> Any:
    """Convert NumPy scalars and arrays to Python values, bytes to text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _to_python(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_python(inner) for inner in value]
    return value


def _schema(config: DataConfig) -> Callable[[Row, str], Example]:
    if config.source == "text":
        return lambda row, default: Example(
            id=_id(row, default), text=_column(row, "text", default)
        )
    schemas = {"plain": _plain, "commonsense_qa": _commonsense_qa, "gsm8k": _gsm8k}
    if config.schema not in schemas:
        raise ValueError(f"schema={config.schema!r}: use one of {tuple(schemas)}")
    return schemas[config.schema]


def _id(row: Row, default: str) -> str:
    return str(row.get("id") or default)


def _column(row: Row, name: str, default: str) -> Any:
    value = row.get(name)
    if value is None:
        raise ValueError(
            f"row {_id(row, default)!r} has no column {name!r}: it has {sorted(row)}; "
            "choose the data.schema that matches the data"
        )
    return value


def _plain(row: Row, default: str) -> Example:
    if row.get("text") is not None and row.get("question") is None:
        return Example(id=_id(row, default), text=row["text"])
    choices = tuple(row.get("choices") or ())
    answer = str(_column(row, "answer", default))
    if choices and answer not in choices:
        raise ValueError(
            f"row {_id(row, default)!r}: answer={answer!r} is none of its choices "
            f"{list(choices)}: give the text of the right one"
        )
    counterfactuals = tuple(text or "" for text in row.get("counterfactuals") or ())
    if counterfactuals and len(counterfactuals) != len(choices) - 1:
        raise ValueError(
            f"row {_id(row, default)!r} has {len(counterfactuals)} counterfactuals for "
            f"{len(choices)} choices: give one per choice other than the answer"
        )
    return Example(
        id=_id(row, default),
        question=_column(row, "question", default),
        choices=choices,
        answer=answer,
        rationale=row.get("rationale") or "",
        counterfactuals=counterfactuals,
    )


def _commonsense_qa(row: Row, default: str) -> Example:
    """Convert a row with columns question, choices {label, text}, answerKey."""
    choices = _column(row, "choices", default)
    key = _column(row, "answerKey", default)
    labels, texts = list(choices["label"]), tuple(choices["text"])
    if key not in labels:
        raise ValueError(
            f"row {_id(row, default)!r}: answerKey={key!r} is none of {labels}: use a "
            "split with answers"
        )
    return Example(
        id=_id(row, default),
        question=_column(row, "question", default),
        choices=texts,
        answer=texts[labels.index(key)],
    )


def _gsm8k(row: Row, default: str) -> Example:
    """Convert a row with columns question and answer: rationale, "####", result."""
    rationale, mark, answer = _column(row, "answer", default).rpartition("####")
    if not mark:
        raise ValueError(f"row {_id(row, default)!r}: no '####' in its answer")
    return Example(
        id=_id(row, default),
        question=_column(row, "question", default),
        answer=answer.strip(),
        rationale=rationale.rstrip(),
    )


def _check_ids(examples: list[Example]) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise ValueError(f"id {example.id!r} occurs twice: ids must be unique")
        seen.add(example.id)


def _join_rationales(examples: list[Example], path: str) -> list[Example]:
    """Replace rationales by those of a jsonl file of {id, text}, unchanged.

    Logs how many examples have none, and how many rationales conclude with another
    choice's letter than the answer's (they are kept).
    """
    texts = _read_texts("rationales", path, ("id",))
    joined = [
        replace(example, rationale=texts.get((example.id,), "")) for example in examples
    ]
    num_joined = sum(bool(example.rationale) for example in joined)
    _check_joined("rationales", path, num_joined, examples)
    logger.info(
        "%s: %d of %d examples have a rationale; %d conclude with another choice than "
        "the answer (kept)",
        path,
        num_joined,
        len(joined),
        sum(contradicts(example) for example in joined),
    )
    return joined


def _join_counterfactuals(examples: list[Example], path: str) -> list[Example]:
    """Replace counterfactuals by those of a jsonl file of {id, choice, text}.

    `choice` is the text of a wrong choice. Logs how many wrong choices have one.
    """
    texts = _read_texts("counterfactuals", path, ("id", "choice"))
    by_id: dict[str, dict[str, str]] = {}
    for (name, choice), text in texts.items():
        by_id.setdefault(name, {})[choice] = text
    joined = []
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
        joined.append(replace(example, counterfactuals=rationales))
    num_joined = sum(any(example.counterfactuals) for example in joined)
    _check_joined("counterfactuals", path, num_joined, examples)
    logger.info(
        "%s: %d of %d examples have counterfactuals, %d in all",
        path,
        num_joined,
        len(joined),
        sum(bool(text) for e in joined for text in e.counterfactuals),
    )
    return joined


def _read_texts(
    field: str, path: str, names: tuple[str, ...], column: str = "text"
) -> dict[tuple[str, ...], Any]:
    """Read a column of a jsonl file, by other columns, which are unique."""
    columns = (*names, column)
    texts: dict[tuple[str, ...], Any] = {}
    for row in _read_jsonl(path):
        if any(name not in row for name in columns):
            raise ValueError(
                f"{field}={path!r}: a row has columns {sorted(row)}: use "
                f"{', '.join(columns)}"
            )
        key = tuple(str(row[name]) for name in names)
        if key in texts:
            where = ", ".join(f"{n} {k!r}" for n, k in zip(names, key, strict=True))
            raise ValueError(f"{field}={path!r}: {where} occurs twice")
        texts[key] = row[column]
    return texts


def _check_joined(
    field: str, path: str, num_joined: int, examples: list[Example]
) -> None:
    if num_joined == 0:
        raise ValueError(
            f"{field}={path!r} has no id of the examples (first: {examples[0].id!r})"
        )
