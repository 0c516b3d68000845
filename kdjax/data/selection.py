"""Which examples are used: those that have what the method needs."""

from collections.abc import Sequence
from dataclasses import dataclass

from kdjax.config import DataConfig
from kdjax.data import templates
from kdjax.data.example import Example

# What is joined to examples, and the fields of the data's config that name its file.
_JOINED = {"rationale": "rationales", "counterfactuals": "counterfactuals"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The examples of a split that are used."""

    examples: list[Example]
    notes: list[str]  # what became of the others, in words


def select(
    examples: Sequence[Example], views: Sequence[str], split: str, config: DataConfig
) -> Selection:
    """What is learnt from, or held out, of the examples from `load_examples`.

    Raises:
      ValueError: as `complete`.
    """
    kept, without = complete(examples, views, split, config)
    notes = [
        f"{split}: {lacking} of {len(examples)} examples left out, without {part} "
        f"(data.on_missing={config.on_missing})"
        for part, lacking in without.items()
    ]
    return Selection(examples=kept, notes=notes)


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
