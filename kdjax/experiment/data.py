"""Examples of a Config, as text and as tokens."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from kdjax.config import Config
from kdjax.data import chat_template, selection, sources, views
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
    eos_ids: tuple[int, ...] = ()  # of tokens that end a text: `stop_ids`


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
    student = config.student.path if config.student.init == "folder" else ""
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
        views.check_unknown(counts, tokenizer, config.data)
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
        eos_ids=stop_ids(config, tokenizer, (config.teacher.path, student)),
    )


def stop_ids(config: Config, tokenizer: Any, paths: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of all tokens that end a text, ascending.

    These are the tokenizer's end of sequence, those that the models' folders name, and
    where there are chats the token that ends their turns.

    Args:
      config: the run.
      tokenizer: of the texts.
      paths: folders or hub names of models; "" = none.
    """
    ids = {tokenizer.eos_token_id}
    for path in filter(None, paths):
        ids.update(hf.eos_ids(path))
    if uses_chat_template(config):
        ids.add(chat_template.load(tokenizer, config.data).turn_end_id)
    return tuple(sorted(ids - {None}))


def uses_chat_template(config: Config) -> bool:
    """Return True if prompts go through the tokenizer's chat template."""
    return config.data.chat_template or config.method.name == "chat"
