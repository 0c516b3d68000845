"""Which training examples are learnt from, with which answer, and how much.

A teacher's answers may stand in for the gold ones (`data.labels`); examples without
what the method needs may be left out (`data.on_missing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.example import Example, wrong_choices

# What is joined to examples, and the fields of the data's config that name its file.
_JOINED = {"rationale": "rationales", "counterfactuals": "counterfactuals"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The examples of a split that are used."""

    examples: list[Example]
    labels: dict[str, Any]  # the report of `trusted`
    notes: list[str]  # what became of the others, in words


def select(
    examples: Sequence[Example], views: Sequence[str], split: str, config: DataConfig
) -> Selection:
    """What is learnt from, or held out, of the examples from `load_examples`.

    Raises:
      ValueError: as `trusted` and `complete`.
    """
    kept = list(examples)
    labels: dict[str, Any] = {}
    if split == "train":
        kept, labels = trusted(examples, config)
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
    num = len(kept)
    kept, without = complete(kept, views, split, config)
    notes += [
        f"{split}: {lacking} of {num} examples left out, without {part} "
        f"(data.on_missing={config.on_missing})"
        for part, lacking in without.items()
    ]
    return Selection(examples=kept, labels=labels, notes=notes)


def relabelled(
    examples: Sequence[Example], answers: Mapping[tuple[str, ...], Any], path: str
) -> list[Example]:
    """Puts a teacher's answers in place of the data's, which become `gold`.

    A row's own rationale explains the gold answer: it goes where the teacher's is
    another, and so does a counterfactual for what is now the answer.

    Args:
      examples: with gold answers.
      answers: (id,) -> answer, the text of a choice where there are choices; "" or
        nothing where the teacher has none.
      path: the file they are from, for errors.

    Raises:
      ValueError: an answer that is no choice, or an example without a question.
    """
    found = []
    for example in examples:
        if not example.answer:
            raise ValueError(
                f"labels={path!r}: example {example.id!r} has no answer to replace: "
                "use data with questions, or labels=''"
            )
        told = answers.get((example.id,))
        answer = "" if told is None else str(told)
        if not example.choices:
            answer = answer.strip()
        elif answer and answer not in example.choices:
            raise ValueError(
                f"labels={path!r}: id {example.id!r} has {answer!r}, which is no "
                f"choice of {list(example.choices)}: give the text of one, or ''"
            )
        other = replace(example, answer=answer, gold=example.answer)
        if answer != example.answer:
            other = replace(other, rationale="", counterfactuals=_moved(example, other))
        found.append(other)
    return found


def _moved(example: Example, other: Example) -> tuple[str, ...]:
    """The counterfactuals of an example in the order of another answer's choices."""
    if not example.counterfactuals:
        return ()
    pairs = zip(wrong_choices(example), example.counterfactuals, strict=True)
    texts = dict(reversed(list(pairs)))  # the first of choices that read alike
    return tuple(texts.pop(choice, "") for choice in wrong_choices(other))


def trusted(
    examples: Sequence[Example], config: DataConfig
) -> tuple[list[Example], dict[str, Any]]:
    """What is trained on of examples with a teacher's answers, and how right these are.

    Wrong ones are kept, left out or weighed by `wrong_label_weight`, as
    `config.wrong_labels` says; those without an answer are an error or left out
    (`config.on_missing`).

    Returns:
      The examples, and a report: "examples" in all, those "without" an answer, those
      with a "wrong" one, those "dropped" for it; "accuracy", right / answered. Without
      `config.labels` the same examples and {}.

    Raises:
      ValueError: examples without an answer that are not left out, or none would stay.
    """
    if not config.labels:
        return list(examples), {}
    silent = [example.id for example in examples if not example.answer]
    if silent and config.on_missing == "error":
        raise ValueError(
            f"labels={config.labels!r} has no answer for {len(silent)} of "
            f"{len(examples)} training examples (first: "
            f"{', '.join(map(repr, silent[:3]))}): give theirs, or leave them out "
            "(data.on_missing='drop')"
        )
    kept = []
    num_wrong = 0
    for example in examples:
        is_wrong = bool(example.answer) and example.answer != example.gold
        num_wrong += is_wrong
        if is_wrong and config.wrong_labels == "weight":
            example = replace(example, weight=config.wrong_label_weight)
        if example.answer and not (is_wrong and config.wrong_labels == "drop"):
            kept.append(example)
    if not kept:
        raise ValueError(
            f"data.wrong_labels={config.wrong_labels!r} leaves none of {len(examples)} "
            f"training examples: all answers of labels={config.labels!r} are wrong"
        )
    num_answered = len(examples) - len(silent)
    return kept, {
        "examples": len(examples),
        "without": len(silent),
        "wrong": num_wrong,
        "dropped": num_wrong if config.wrong_labels == "drop" else 0,
        "accuracy": (num_answered - num_wrong) / num_answered,
    }


def complete(
    examples: Sequence[Example], views: Sequence[str], split: str, config: DataConfig
) -> tuple[list[Example], dict[str, int]]:
    """The examples that have the explanations that every view needs.

    With `on_missing="drop"` a training example without them is left out whole, in all
    views. Held-out ones never are: what is measured does not hang on it.

    Args:
      examples: from `load_examples`.
      views: of the split.
      split: "train" or "eval".
      config: its `on_missing`.

    Returns:
      The examples that stay, and how many lack what ("rationale", "counterfactuals").

    Raises:
      ValueError: examples lack something and are not left out, or none would stay.
    """
    kept: list[Example] = []
    without: dict[tuple[str, str], list[str]] = {}
    for example in examples:
        found = ((templates.lacking(example, view), view) for view in views)
        if key := next((key for key in found if key[0] in _JOINED), None):
            without.setdefault(key, []).append(example.id)
        else:
            kept.append(example)
    counts: dict[str, int] = {}
    for (part, view), ids in without.items():
        if split != "train" or config.on_missing == "error":
            raise ValueError(_missing(part, view, ids, len(examples), split))
        counts[part] = counts.get(part, 0) + len(ids)
    if counts and not kept:
        raise ValueError(
            f"data.on_missing='drop' leaves none of {len(examples)} training examples: "
            f"they have no {' or no '.join(counts)}"
        )
    return kept, counts


def _missing(part: str, view: str, ids: list[str], num: int, split: str) -> str:
    field, name, drop = _JOINED[part], "held-out", ""
    if split == "train":
        name, drop = "training", "leave them out (data.on_missing='drop'), "
    elif part == "rationale":
        field = "eval_rationales"
    return (
        f"{len(ids)} of {num} {name} examples have no {part}, which view {view!r} "
        f"needs (first: {', '.join(map(repr, ids[:3]))}): give the data theirs "
        f"(data.{field}), {drop}or use a method without that view"
    )
