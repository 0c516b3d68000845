"""Examples of a Config, as text and as tokens."""

import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.config import Config, DataConfig
from kdjax.data import chat_template, prepared, selection, sources, views
from kdjax.data import files as data_files
from kdjax.data import tokenizer as tokenizers
from kdjax.data.example import Example
from kdjax.data.mixture import MixtureSegments
from kdjax.data.splits import is_hub_name
from kdjax.data.views import Segment
from kdjax.experiment import fingerprint, methods, mixture
from kdjax.models import hf
from kdjax.parallel import distributed
from kdjax.runtime import files
from kdjax.runtime.console import progress


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Examples of a run, as text and as tokens."""

    tokenizer: Any
    views: tuple[str, ...]
    eval_views: tuple[str, ...]  # the first of `views`: `evaluation` has these
    train: Sequence[Segment]  # in memory, or read from a prepared store
    evaluation: Sequence[Segment]
    eval_examples: list[Example]
    labels: dict[str, Any]  # of a teacher's answers: `selection.apply_label_policy`
    # split -> examples "read", those "used", and their "segments"
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    # (name of a source, its data) of a mixture, whose views have their own names
    parts: tuple[tuple[str, "Data"], ...] = ()
    eos_ids: tuple[int, ...] = ()  # of tokens that end a text: `stop_ids`
    max_id: int = -1  # largest id in the segments


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


def load_data(
    config: Config,
    workdir: pathlib.Path | None = None,
    *,
    splits: tuple[str, ...] = ("train", "eval"),
    force: bool = False,
) -> Data:
    """Read the examples and make their segments; every data error surfaces here.

    A split of more than one shard (`data.shard_size`) is prepared on disk, unless it
    is, and read from there.

    Args:
      config: of the run.
      workdir: of the run, None = runs/<config.name>; prepared data are in its folder
        "prepared" unless `data.prepared` names another.
      splits: those that are read.
      force: small splits are prepared as well.

    Raises:
      ValueError: an error of the data.
    """
    if mixture.is_mixture(config):
        return _load_mixture(config, workdir, splits=splits, force=force)
    data = _load_source(config, workdir, splits=splits, force=force)
    _agree(config, data)
    return data


def _agree(config: Config, data: Data) -> None:
    """Check that all processes have read the same data.

    Raises:
      ValueError: they have not.
    """
    if not distributed.is_several():
        return
    paths = {"student.path": config.student.path, "teacher.path": config.teacher.path}
    digests = {
        "tokenizer": tokenizers.fingerprint(data.tokenizer)[:16],
        "training data": fingerprint.of_segments(data.train),
        "held-out data": fingerprint.of_segments(data.evaluation),
    }
    # Of a model of the hub, the folder has the name of its revision.
    revisions = {
        f"revision of {name}": pathlib.Path(hf.resolve(path)).name
        for name, path in paths.items()
        if is_hub_name(path)
    }
    distributed.agree("data", digests | revisions)


def _load_source(
    config: Config,
    workdir: pathlib.Path | None,
    *,
    splits: tuple[str, ...],
    force: bool,
) -> Data:
    """Load the data of one source."""
    tokenizer = load_tokenizer(config)
    student = config.student.path if config.student.init == "folder" else ""
    used = tokenizer_path(config)
    for name, path in (
        ("teacher.path", config.teacher.path),
        ("student.path", student),
    ):
        if path and path != used:
            tokenizers.check_same_tokens(tokenizer, hf.resolve(path), name)
    names = {
        "train": methods.views(config.method),
        "eval": methods.held_out_views(config.method),
    }
    max_id = -1
    segments: dict[str, Sequence[Segment]] = {"train": [], "eval": []}
    digests: dict[str, np.ndarray] = {}
    labels: dict[str, Any] = {}
    split_counts: dict[str, dict[str, int]] = {}
    eval_examples: list[Example] = []
    for split in splits:
        recipe = prepared.Recipe(
            split=split, views=names[split], tokenizer=tokenizer, config=config.data
        )
        if split == "eval":
            eval_examples = sources.load_examples(
                config.data, split, seed=config.data.kinship.seed
            )
        segments[split], report, digests[split] = _load_split(
            recipe, _folder(config, workdir), eval_examples, force=force
        )
        labels |= report.labels
        split_counts[split] = {
            "read": report.num_examples,
            "used": report.num_used,
            "segments": len(segments[split]),
        }
        for note in report.notes:
            print(note, file=sys.stderr)
        counts = report.counts
        views.check_unknown(counts, tokenizer, config.data)
        max_id = max(max_id, counts.max_id)
        if counts.without_turn:
            print(
                f"{split}: {counts.without_turn} chats left out, without a turn to "
                f"learn (data.on_missing={config.data.on_missing})",
                file=sys.stderr,
            )
        if counts.truncated or counts.dropped:
            print(
                f"{split}: {counts.truncated} segments truncated, {counts.dropped} "
                f"dropped, {counts.segments} kept (data.on_long={config.data.on_long})",
                file=sys.stderr,
            )
    if len(digests) == 2 and not config.data.is_built_in:
        overlap = selection.describe_overlap(digests["train"], eval_examples)
        if overlap:
            print(overlap, file=sys.stderr)
    return Data(
        tokenizer=tokenizer,
        views=names["train"],
        eval_views=names["eval"],
        train=segments["train"],
        evaluation=segments["eval"],
        eval_examples=eval_examples,
        labels=labels,
        counts=split_counts,
        eos_ids=stop_ids(config, tokenizer, (config.teacher.path, student)),
        max_id=max_id,
    )


def _load_mixture(
    config: Config,
    workdir: pathlib.Path | None,
    *,
    splits: tuple[str, ...],
    force: bool,
) -> Data:
    """Load each source of a mixture, and join their segments."""
    sources, loaded = mixture.sources(config), []
    for source in sources:
        try:
            data = load_data(source.config, workdir, splits=splits, force=force)
        except ValueError as error:
            raise ValueError(f"mixture source {source.name!r}: {error}") from error
        loaded.append(data)
    numbers = mixture.view_numbers(config)
    names = [source.name for source in sources]

    def join(parts: list[Sequence[Segment]]) -> Sequence[Segment]:
        if not any(len(part) for part in parts):
            return []
        weights = config.mixture.weights
        return MixtureSegments(parts, names=names, weights=weights, views=numbers)

    return Data(
        tokenizer=loaded[0].tokenizer,
        views=mixture.views(config),
        eval_views=mixture.held_out_views(config),
        train=join([data.train for data in loaded]),
        evaluation=join([data.evaluation for data in loaded]),
        eval_examples=[e for data in loaded for e in data.eval_examples],
        labels={},
        counts={
            split: {
                name: sum(data.counts[split][name] for data in loaded)
                for name in ("read", "used", "segments")
            }
            for split in splits
        },
        parts=tuple(zip(names, loaded, strict=True)),
        eos_ids=tuple(sorted({i for data in loaded for i in data.eos_ids})),
    )


def _folder(config: Config, workdir: pathlib.Path | None) -> pathlib.Path:
    """Return the folder of the prepared stores."""
    workdir = pathlib.Path(f"runs/{config.name}") if workdir is None else workdir
    return pathlib.Path(config.data.prepared or workdir / "prepared")


def _load_split(
    recipe: prepared.Recipe,
    folder: pathlib.Path,
    examples: list[Example],
    *,
    force: bool,
) -> tuple[Sequence[Segment], prepared.Report, np.ndarray]:
    """Return the segments of a split, its report and the digests of its examples.

    Args:
      recipe: of the split.
      folder: of the prepared stores.
      examples: of the split, if they are read already.
      force: a small split is prepared as well.
    """
    config, split = recipe.config, recipe.split
    identity = store = None
    if not config.is_built_in and (force or any(folder.glob(f"{split}-*"))):
        identity = recipe.identity(_source(config, split))
        store = folder / f"{split}-{prepared.key_of(identity)}"

    def look() -> dict[str, str]:
        is_there = store is not None and prepared.is_prepared(store)
        manifest = fingerprint.of_path(str(store / prepared.MANIFEST)) if store else ""
        return {f"prepared data {store or split}": manifest if is_there else "none"}

    distributed.agree_on_files(f"prepared data of {split}", look)
    if store is not None and prepared.is_prepared(store):
        assert identity is not None
        return _open(store, identity)
    stream: Iterable[Example] = examples or sources.iter_examples(
        config, split, seed=config.kinship.seed
    )
    if config.is_built_in:
        whole = prepared.Chunk(0, 0, list(stream))
        return _in_memory(recipe, whole)
    chunks = prepared.chunk(stream, config.shard_size)
    first, second = next(chunks, None), next(chunks, None)
    if first is None:
        raise ValueError(f"data.path={config.path!r}: the split {split!r} has no rows")
    if second is None and not force:
        return _in_memory(recipe, first)
    if identity is None:
        identity = recipe.identity(_source(config, split))
    store = folder / f"{split}-{prepared.key_of(identity)}"
    first_chunks = [first] if second is None else [first, second]
    _prepare(store, recipe, identity, itertools.chain(first_chunks, chunks))
    return _open(store, identity)


def _in_memory(
    recipe: prepared.Recipe, whole: prepared.Chunk
) -> tuple[list[Segment], prepared.Report, np.ndarray]:
    made = prepared.segment_chunk(recipe, whole)
    report = prepared.report_of(recipe, [made.selection], made.counts)
    return made.segments, report, made.digests


def _open(
    store: pathlib.Path, identity: dict[str, Any]
) -> tuple[Sequence[Segment], prepared.Report, np.ndarray]:
    segments = prepared.PreparedSegments(store, identity)
    return segments, segments.report, segments.digests


def _prepare(
    store: pathlib.Path,
    recipe: prepared.Recipe,
    identity: dict[str, Any],
    chunks: Iterable[prepared.Chunk],
) -> None:
    """Write a store; each process writes its own shards."""
    # Every process looks before any of them finishes it. There is no lock: whoever else
    # prepares the same store writes the same bytes, each shard in one step.
    if distributed.is_main():
        store.mkdir(parents=True, exist_ok=True)
        files.clear_leftovers(store)
    distributed.barrier(f"look at {store.name}")
    with progress(
        None, f"prepare {recipe.split}", is_main=distributed.is_main()
    ) as advance:
        num_shards = prepared.build(
            store,
            recipe,
            identity,
            chunks,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
            advance=advance,
        )
    distributed.barrier(f"prepare {store.name}")
    if distributed.is_main():
        prepared.finish(store, recipe, identity, num_shards)
    distributed.barrier(f"finish {store.name}")


def _source(config: DataConfig, split: str) -> dict[str, str]:
    """Hash what the data are made of: files by their bytes, other sets by their rows.

    So data that were changed are never taken for those that were prepared, whatever
    their time stamps say.
    """
    digests = {}
    for name in prepared.SOURCES[split]:
        path = getattr(config, name)
        if not path or (name == "path" and split == "eval" and config.eval_path):
            continue
        if is_hub_name(path):
            examples = sources.iter_examples(config, split, seed=config.kinship.seed)
            digests[name] = prepared.digest_examples(examples)
        else:
            paths = [path] if os.path.exists(path) else data_files.find_files(path)
            digests[name] = prepared.digest_files(paths)
    return digests


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
    sources = mixture.sources(config)
    names = [source.config.method.name for source in sources] or [config.method.name]
    return config.data.chat_template or "chat" in names
