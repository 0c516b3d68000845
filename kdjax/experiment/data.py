"""Examples of a Config, as text and as tokens."""

import dataclasses
import sys
from typing import Any

from kdjax.config import Config
from kdjax.data import selection, sources, views
from kdjax.data import tokenizer as tokenizers
from kdjax.data.views import Segment
from kdjax.experiment import methods
from kdjax.models import hf


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples of a run, as text and as tokens."""

    tokenizer: Any
    views: tuple[str, ...]
    eval_views: tuple[str, ...]  # the first of `views`: `evaluation` has these
    train: list[Segment]
    evaluation: list[Segment]
    eval_examples: list[sources.Example]
    labels: dict[str, Any]  # of a teacher's answers: `selection.apply_label_policy`


def load_tokenizer(config: Config) -> Any:
    """Load the tokenizer: of the data, teacher or student, or the built-in one."""
    if path := tokenizer_path(config):
        return tokenizers.load(hf.resolve(path))
    prefixes = dataclasses.astuple(config.data.prefixes)
    return tokenizers.make_word_tokenizer(" ".join(prefixes).split())


def tokenizer_path(config: Config) -> str:
    """Return the folder or hub name of the tokenizer; "" = the built-in one."""
    student = config.student.path if config.student.init == "folder" else ""
    built_in = config.data.is_built_in
    paths = (config.data.tokenizer, config.teacher.path, "" if built_in else student)
    return next(filter(None, paths), "")


def load_data(config: Config, *, splits: tuple[str, ...] = ("train", "eval")) -> Data:
    """Read the examples and make their segments; every data error surfaces here."""
    tokenizer = load_tokenizer(config)
    names = {
        "train": methods.views(config.method),
        "eval": methods.held_out_views(config.method),
    }
    examples = {
        split: sources.load_examples(config.data, split, seed=config.data.kinship.seed)
        for split in splits
    }
    if len(examples) == 2 and not config.data.is_built_in:
        overlap = selection.describe_overlap(examples["train"], examples["eval"])
        if overlap:
            print(overlap, file=sys.stderr)
    segments: dict[str, list[Segment]] = {}
    labels: dict[str, Any] = {}
    for split, read in examples.items():
        selected = selection.select(read, names[split], split, config.data)
        labels |= selected.labels
        for note in selected.notes:
            print(note, file=sys.stderr)
        segments[split], counts = views.make_segments(
            selected.examples, names[split], tokenizer, config.data
        )
        if counts.truncated or counts.dropped:
            print(
                f"{split}: {counts.truncated} segments truncated, {counts.dropped} "
                f"dropped, {counts.segments} kept (data.on_long={config.data.on_long})",
                file=sys.stderr,
            )
    return Data(
        tokenizer=tokenizer,
        views=names["train"],
        eval_views=names["eval"],
        train=segments.get("train", []),
        evaluation=segments.get("eval", []),
        eval_examples=examples.get("eval", []),
        labels=labels,
    )
