"""Selection of training examples, their answers and their weights.

A teacher's answers may stand in for the gold ones (`data.labels`); examples without
what the method needs may be left out (`data.on_missing`).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt64

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.example import Example, wrong_choices

# Fields that files are joined to -> fields of the data's config that name the files.
_JOINED = {"rationale": "rationales", "counterfactuals": "counterfactuals"}
_KINDS = {"train": "training", "eval": "held-out"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The examples of a split that are used."""

    examples: list[Example]
    labels: dict[str, Any]  # the report of `apply_label_policy`
    notes: list[str]  # counts of changed and dropped examples, as sentences
    num_examples: int  # in all
    num_labelled: int  # of them that `apply_label_policy` has kept
    missing: dict[str, int]  # number dropped by missing field


def select(
    examples: Sequence[Example],
    views: Sequence[str],
    split: str,
    config: DataConfig,
    *,
    partial: bool = False,
) -> Selection:
    """Select the examples of a split that are used, of those from `load_examples`.

    Args:
      examples: of the split.
      views: of the split.
      split: "train" or "eval".
      config: of the data.
      partial: these are not all examples of the split, see `combine`: it is no error
        if none of them stays.

    Raises:
      ValueError: as `apply_label_policy` and `drop_incomplete`.
    """
    selected = list(examples)
    labels: dict[str, Any] = {}
    if split == "train":
        selected, labels = apply_label_policy(examples, config, partial=True)
    num_labelled = len(selected)
    selected, missing = drop_incomplete(selected, views, split, config, partial=True)
    result = Selection(
        examples=selected,
        labels=labels,
        notes=[],
        num_examples=len(examples),
        num_labelled=num_labelled,
        missing=missing,
    )
    return result if partial else combine([result], split, config)


def combine(
    selections: Sequence[Selection], split: str, config: DataConfig
) -> Selection:
    """Return the selection of all examples of a split from those of parts of them.

    Raises:
      ValueError: none would stay.
    """
    labels: dict[str, Any] = {}
    for part in selections:
        for name, value in part.labels.items():
            labels[name] = labels.get(name, 0) + value
    num = sum(part.num_labelled for part in selections)
    missing: dict[str, int] = {}
    for part in selections:
        for name, count in part.missing.items():
            missing[name] = missing.get(name, 0) + count
    if labels:
        num_answered = labels["examples"] - labels["without"]
        labels["accuracy"] = (num_answered - labels["wrong"]) / max(1, num_answered)
        _check_labelled(num, labels["examples"], config)
    _check_complete(missing, num, split)
    return Selection(
        examples=[example for part in selections for example in part.examples],
        labels=labels,
        notes=_notes(labels, missing, num, split, config),
        num_examples=sum(part.num_examples for part in selections),
        num_labelled=num,
        missing=missing,
    )


def _check_labelled(num: int, num_examples: int, config: DataConfig) -> None:
    """Raise ValueError if no example has an answer to train on."""
    if not num:
        raise ValueError(
            f"data.wrong_labels={config.wrong_labels!r} leaves none of {num_examples} "
            f"training examples: all answers of labels={config.labels!r} are wrong"
        )


def _check_complete(missing: dict[str, int], num: int, split: str) -> None:
    """Raise ValueError if all examples are dropped."""
    if missing and num == sum(missing.values()):
        raise ValueError(
            f"data.on_missing='drop' leaves none of {num} {_KINDS[split]} examples: "
            f"they have no {' or no '.join(missing)}"
        )


def _notes(
    labels: dict[str, Any],
    missing: dict[str, int],
    num: int,
    split: str,
    config: DataConfig,
) -> list[str]:
    notes = []
    if labels:
        fate = {"keep": "kept", "drop": "left out", "weight": "weighed"}[
            config.wrong_labels
        ]
        notes.append(
            f"labels: {labels['accuracy']:.2%} of the teacher's answers to "
            f"{labels['examples']} training examples are right; {labels['wrong']} "
            f"wrong {fate} (data.wrong_labels={config.wrong_labels}), "
            f"{labels['without']} examples without an answer left out"
        )
    notes += [
        f"{split}: {count} of {num} examples left out, without {name} "
        f"(data.on_missing={config.on_missing})"
        for name, count in missing.items()
    ]
    return notes


def replace_label(example: Example, answer: str, path: str) -> Example:
    """Replace the data's answer, which becomes `gold`, by a teacher's.

    A row's own rationale explains the gold answer: it goes where the teacher's is
    another, and so does a counterfactual for what is now the answer.

    Args:
      example: with a gold answer.
      answer: the text of a choice where there are choices; "" where the teacher has
        none.
      path: the file it is from, for errors.

    Raises:
      ValueError: an answer that is no choice, or an example without a question.
    """
    if not example.answer:
        raise ValueError(
            f"labels={path!r}: example {example.name} has no answer to replace: "
            "use data with questions, or labels=''"
        )
    if not example.choices:
        answer = answer.strip()
    elif answer and answer not in example.choices:
        raise ValueError(
            f"labels={path!r}: id {example.id!r} has {answer!r}, which is no "
            f"choice of {list(example.choices)}: give the text of one, or ''"
        )
    other = replace(example, answer=answer, gold=example.answer)
    if answer == example.answer:
        return other
    counterfactuals = _reorder_counterfactuals(example, other)
    return replace(other, rationale="", counterfactuals=counterfactuals)


def _reorder_counterfactuals(example: Example, other: Example) -> tuple[str, ...]:
    """Reorder the counterfactuals of an example for another answer."""
    if not example.counterfactuals:
        return ()
    pairs = zip(wrong_choices(example), example.counterfactuals, strict=True)
    texts = dict(reversed(list(pairs)))  # the first of choices that read alike
    return tuple(texts.pop(choice, "") for choice in wrong_choices(other))


def apply_label_policy(
    examples: Sequence[Example], config: DataConfig, *, partial: bool = False
) -> tuple[list[Example], dict[str, Any]]:
    """Keep, drop or weigh examples by whether a teacher's answer is right.

    Wrong ones are kept, left out or weighed by `wrong_label_weight`, as
    `config.wrong_labels` says; those without an answer are an error or left out
    (`config.on_missing`).

    Args:
      examples: of the training split.
      config: of the data.
      partial: as in `select`.

    Returns:
      The examples, and a report: "examples" in all, those "without" an answer, those
      with a "wrong" one, those "dropped" for it; "accuracy", right / answered. Without
      `config.labels` the same examples and {}.

    Raises:
      ValueError: examples without an answer that are not left out, or none would stay.
    """
    if not config.labels:
        return list(examples), {}
    unanswered = [example.id for example in examples if not example.answer]
    if unanswered and config.on_missing == "error":
        raise ValueError(
            f"labels={config.labels!r} has no answer for {len(unanswered)} of "
            f"{len(examples)} training examples (first: "
            f"{', '.join(map(repr, unanswered[:3]))}): give theirs, or leave them out "
            "(data.on_missing='drop')"
        )
    selected = []
    num_wrong = 0
    for example in examples:
        is_wrong = bool(example.answer) and example.answer != example.gold
        num_wrong += is_wrong
        if is_wrong and config.wrong_labels == "weight":
            example = replace(example, weight=config.wrong_label_weight)
        if example.answer and not (is_wrong and config.wrong_labels == "drop"):
            selected.append(example)
    if not partial:
        _check_labelled(len(selected), len(examples), config)
    num_answered = len(examples) - len(unanswered)
    return selected, {
        "examples": len(examples),
        "without": len(unanswered),
        "wrong": num_wrong,
        "dropped": num_wrong if config.wrong_labels == "drop" else 0,
        "accuracy": (num_answered - num_wrong) / max(1, num_answered),
    }


def drop_incomplete(
    examples: Sequence[Example],
    views: Sequence[str],
    split: str,
    config: DataConfig,
    *,
    partial: bool = False,
) -> tuple[list[Example], dict[str, int]]:
    """Drop the examples without what some view needs.

    With `on_missing="drop"` a training example without it is left out whole, in all
    views. A held-out one is only where its row has nothing to measure, neither text nor
    question or answer: what is measured does not hang on rationales.

    Args:
      examples: from `load_examples`.
      views: of the split.
      split: "train" or "eval".
      config: its `on_missing`.
      partial: as in `select`.

    Returns:
      The other examples, and the number dropped by missing field ("rationale", "text").

    Raises:
      ValueError: examples lack something and are not left out, or none would stay.
    """
    selected: list[Example] = []
    ids_missing: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        needs = ((templates.missing_field(example, view), view) for view in views)
        if key := next((key for key in needs if key[0]), None):
            ids_missing.setdefault(key, []).append(example.name)
        else:
            selected.append(example)
    counts: dict[str, int] = {}
    for (name, view), ids in ids_missing.items():
        is_joined = name in _JOINED
        if config.on_missing == "error" or (split != "train" and is_joined):
            raise ValueError(_missing_message(name, view, ids, len(examples), split))
        counts[name] = counts.get(name, 0) + len(ids)
    if not partial:
        _check_complete(counts, len(examples), split)
    return selected, counts


def _missing_message(name: str, view: str, ids: list[str], num: int, split: str) -> str:
    remedy = "give the data theirs (data.schema and data.columns say where it is)"
    drop = "leave them out (data.on_missing='drop'), "
    if name in _JOINED:
        field = _JOINED[name]
        if split != "train":
            field = "eval_rationales" if name == "rationale" else field
            drop = ""
        remedy = f"give the data theirs (data.{field})"
    return (
        f"{len(ids)} of {num} {_KINDS[split]} examples have no {name}, which view "
        f"{view!r} needs (first: {', '.join(ids[:3])}): {remedy}, {drop}or use a "
        "method without that view"
    )


def content_digest(example: Example) -> int:
    """Compute 64 bits of a hash of what an example asks, without its answer.

    Of a chat these are its messages up to the last one of the assistant.
    """
    messages = example.messages
    roles = [message["role"] for message in messages]
    if "assistant" in roles:
        messages = messages[: len(roles) - 1 - roles[::-1].index("assistant")]
    content = [example.question, example.choices, example.text, messages]
    text = json.dumps(content, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def content_digests(examples: Iterable[Example]) -> UInt64[np.ndarray, " N"]:
    """Compute `content_digest` of each example."""
    return np.fromiter(map(content_digest, examples), np.uint64)


def describe_overlap(
    digests: UInt64[np.ndarray, " N"], evaluation: Iterable[Example]
) -> str:
    """Return a warning about held-out examples that are training examples too.

    They are compared by content: question and choices, text, or the messages before the
    last one of the assistant.

    Args:
      digests: `content_digests` of the training examples.
      evaluation: the held-out examples.

    Returns:
      The warning, with the number and the first ids; "" without any.
    """
    digests = np.sort(digests)
    names: list[str] = []
    num = num_same = 0
    for example in evaluation:
        num += 1
        if not (example.question or example.text or example.messages):
            continue
        digest = np.uint64(content_digest(example))
        index = int(np.searchsorted(digests, digest))
        if index < len(digests) and digests[index] == digest:
            num_same += 1
            if len(names) < 3:
                names.append(example.name)
    if not num_same:
        return ""
    return (
        f"warning: {num_same} of {num} held-out examples are training examples too, by "
        f"content (first: {', '.join(names)}): what is measured on them is memory"
    )
