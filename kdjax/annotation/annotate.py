"""Annotation of examples by a prompted teacher, into a folder of rows.

A local model completes requests in batches, a server from threads.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from kdjax.annotation import backends, prompts, store
from kdjax.annotation.prompts import PromptFiles
from kdjax.annotation.quality import QualityFilters
from kdjax.annotation.requests import (
    COUNTERFACTUAL_METHODS,
    Completion,
    Item,
    Work,
    make_items,
)
from kdjax.annotation.store import Key, Row
from kdjax.config import AnnotateConfig, Config, DataConfig
from kdjax.data import selection, sources
from kdjax.data.example import Example
from kdjax.experiment import workdir as workdir_lib
from kdjax.experiment.teacher import teacher_folder
from kdjax.models import hf
from kdjax.parallel import distributed
from kdjax.runtime.console import progress

# Rows of slots that requests fill together, where finished ones make room.
_BATCHES_TOGETHER = 16

NO_THINK = "no_think"  # a row without the reasoning that data.think="require" needs


def annotate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Write the missing annotations of a config, and return the report of all.

    Several processes share the examples by a hash of their ids; the first one merges
    what all have written.

    Raises:
      ValueError: data without what the method needs, a folder of other settings, or
        a backend that fails.
    """
    options = config.annotate
    files = prompts.load(options.prompts)
    examples = _examples(config)
    items = make_items(examples, options)
    path = _model_path(config, workdir)
    settings = _settings(config, files, path)
    folder = output_folder(config, workdir)
    with workdir_lib.hold(folder, name="annotate.path", remedy="another annotate.path"):
        return _annotate(config, folder, settings, items, examples, files, path)


def _annotate(
    config: Config,
    folder: pathlib.Path,
    settings: Row,
    items: Sequence[Item],
    examples: Sequence[Example],
    files: PromptFiles,
    path: str,
) -> dict[str, Any]:
    """Annotate into a folder that is this run's own."""
    options = config.annotate
    store.claim(folder, settings)
    with store.PartWriter(folder, jax.process_index()) as part:
        done, spent = _finished(folder, items, files, options)
        own_items = [item for item in items if _process_of(item) == jax.process_index()]
        remaining = [item for item in own_items if item.key not in done]
        with progress(
            len(own_items),
            f"annotate {options.split}",
            start=len(own_items) - len(remaining),
            is_main=distributed.is_main(),
        ) as advance:

            def write(work: Work) -> None:
                part.append(work.row(settings))
                advance()

            if remaining and options.backend == "server":
                _annotate_by_server(config, remaining, files, write, spent)
            elif remaining:
                _annotate_locally(config, path, own_items, done, files, write)
    distributed.barrier("annotate")
    report = {}
    if distributed.is_main():
        report = _write_results(folder, items, examples, files, options)
    distributed.barrier("merge annotations")
    return report


def output_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of the annotations."""
    options = config.annotate
    default = workdir / "annotations" / f"{options.split}-{options.method}"
    return pathlib.Path(options.path or default)


def result_file(options: AnnotateConfig) -> str:
    """Return the file name of the result, which `data.rationales` and the like take."""
    if options.method in COUNTERFACTUAL_METHODS:
        return "counterfactuals.jsonl"
    return "labels.jsonl" if options.method == "answer" else "rationales.jsonl"


def _annotate_locally(
    config: Config,
    path: str,
    own_items: Sequence[Item],
    done: Collection[Key],
    files: PromptFiles,
    write: Callable[[Work], None],
) -> None:
    """Complete items of like length together with a local model, the longest first.

    Items of an example stay together: their prompts share a prefix. Where a batch ends
    with its slowest row, batches are those of an uninterrupted run, so that a killed
    one goes on with the same.
    """
    model = backends.Local(config, path)
    for item in own_items:
        if item.key not in done:
            model.check(Work(item, files, config.annotate))

    def length(item: Item) -> int:
        return len(item.example.question) + sum(map(len, item.example.choices))

    ordered = sorted(own_items, key=length, reverse=True)

    def write_new(work: Work) -> None:
        if work.item.key not in done:
            write(work)

    size = model.batch_size
    if model.is_continuous:
        ordered = [item for item in ordered if item.key not in done]
        size *= _BATCHES_TOGETHER
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        if all(item.key in done for item in batch):
            continue
        policy = config.data.think
        works = [
            Work(item, files, config.annotate, think_policy=policy) for item in batch
        ]
        while pending := [work for work in works if work.request]:
            _complete_step(model, pending, write_new)


def _complete_step(
    model: backends.Local, works: Sequence[Work], write: Callable[[Work], None]
) -> None:
    """Complete the next request of each item, and write those that end with it."""

    def finish(index: int, completion: Completion) -> None:
        work = works[index]
        work.take(completion)
        if work.request is None:
            write(work)

    model([work.request for work in works if work.request], finish)


def _annotate_by_server(
    config: Config,
    remaining: Sequence[Item],
    files: PromptFiles,
    write: Callable[[Work], None],
    spent: int,
) -> None:
    """Complete several items at a time by a server, and write each when finished.

    After an error no further request is made, but finished items are still written.
    """
    server = backends.Server(config.annotate, spent=spent)

    def finish(item: Item) -> Work:
        try:
            policy = config.data.think
            work = Work(item, files, config.annotate, think_policy=policy)
            while work.request:
                work.take(server(work.request))
        except Exception:
            server.stop()  # before this thread takes another item
            raise
        return work

    pool = concurrent.futures.ThreadPoolExecutor(config.annotate.concurrency)
    failure: Exception | None = None
    try:
        futures = [pool.submit(finish, item) for item in remaining]
        for future in concurrent.futures.as_completed(futures):
            try:
                write(future.result())
            except backends.Stopped:
                continue
            except Exception as error:
                failure = failure or error
                server.stop()  # where it was the writing that failed
    except BaseException:  # Ctrl-C
        server.abort()
        raise
    finally:
        server.stop()
        pool.shutdown(cancel_futures=True)
        server.close()
    if failure:
        raise failure


def _finished(
    folder: pathlib.Path,
    items: Sequence[Item],
    files: PromptFiles,
    options: AnnotateConfig,
) -> tuple[set[Key], int]:
    """Return the keys of the finished rows, and the tokens that all rows used.

    Raises:
      ValueError: a row whose example has changed.
    """
    by_key = {item.key: item for item in items}
    done, spent = set(), 0
    for row in store.read(folder):
        key = store.key_of(row)
        spent += (row["prompt_tokens"] or 0) + (row["new_tokens"] or 0)
        if key not in by_key:
            continue
        if row["prompt_hash"] != Work(by_key[key], files, options).prompt_hash:
            raise ValueError(
                f"annotate.path={str(folder)!r} has a row of id {key[0]!r} for another "
                "prompt: the data has changed; use another annotate.path"
            )
        done.add(key)
    return done, spent


def _write_results(
    folder: pathlib.Path,
    items: Sequence[Item],
    examples: Sequence[Example],
    files: PromptFiles,
    options: AnnotateConfig,
) -> dict[str, Any]:
    """Filter the rows, write both sorts, and return the report."""
    rows_by_key: dict[Key, Row] = {}
    for row in store.read(folder):
        rows_by_key.setdefault(store.key_of(row), row)
    missing = [item.key for item in items if item.key not in rows_by_key]
    if missing:
        raise ValueError(
            f"annotate.path={str(folder)!r} lacks {len(missing)} rows (first: "
            f"{missing[0]}): all processes need the same folder; start again"
        )
    shown = (*files.demonstrations, *files.critiques, *files.revisions)
    filters = QualityFilters(
        [*(example.question for example in examples), *(r["question"] for r in shown)]
    )
    passed: list[Row] = []
    dropped: list[Row] = []
    failures = dict.fromkeys(filters.names, 0)
    for item in items:
        row = rows_by_key[item.key]
        row["gates"] = filters(row, item.example, row.get("answer", item.answer))
        if row.get("think") is False:  # data.think="require"
            row["gates"].append(NO_THINK)
        for name in row["gates"]:
            failures[name] = failures.get(name, 0) + 1
        drop = {*options.drop, NO_THINK}
        (dropped if set(row["gates"]) & drop else passed).append(row)
    store.write_rows(folder / result_file(options), passed)
    store.write_rows(folder / "dropped.jsonl", dropped)
    rows = [*passed, *dropped]
    report = {
        "file": str(folder / result_file(options)),
        "method": options.method,
        "split": options.split,
        "examples": len(examples),
        "examples_without": len(examples) - len({row["id"] for row in passed}),
        "rows": len(rows),
        "kept": len(passed),
        "dropped": len(dropped),
        "drop": list(options.drop),
        "gates": failures,
        "finish_reasons": dict(
            sorted(collections.Counter(row["finish_reason"] for row in rows).items())
        ),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "new_tokens": sum(row["new_tokens"] or 0 for row in rows),
    }
    if options.method == "answer":
        answers = [(rows_by_key[item.key]["answer"], item.answer) for item in items]
        matches = [answer == gold for answer, gold in answers if answer]
        accuracy = sum(matches) / max(1, len(matches))
        report |= {"answered": len(matches), "accuracy": accuracy}
    store.write_json(folder / "report.json", report)
    return report


def _examples(config: Config) -> list[Example]:
    """Load the examples to annotate, without rationales that would be joined to them.

    With a teacher's labels rationales explain its answers.
    """
    data = dataclasses.replace(
        config.data, rationales="", eval_rationales="", counterfactuals=""
    )
    if config.annotate.method == "answer" or config.annotate.split == "eval":
        data = dataclasses.replace(data, labels="")
    split = config.annotate.split
    examples = sources.load_examples(data, split, seed=data.kinship.seed)
    examples, _ = selection.apply_label_policy(examples, data)
    if data.on_missing == "drop":
        examples, _ = selection.drop_incomplete(examples, ("label",), split, data)
    return examples


def _model_path(config: Config, workdir: pathlib.Path) -> str:
    """Return the folder or hub name of the model, or the server's name for it."""
    if config.annotate.model:
        return config.annotate.model
    path = teacher_folder(config, workdir)
    if not (config.teacher.path or pathlib.Path(path).is_dir()):
        raise ValueError(
            f"annotate.model='', teacher.path='' and {path} does not exist: give "
            "--config.annotate.model or --config.teacher.path, or run kdjax.train, "
            "which trains a teacher first"
        )
    return path


def _settings(config: Config, files: PromptFiles, path: str) -> Row:
    """Return the settings that decide the rows, beside the examples."""
    options = config.annotate
    names = (
        *("method", "quality", "num_demonstrations", "num_critiques", "conclude"),
        *("contrast", "contrast_weight", "contrast_stop"),
        *("max_new_tokens", "max_draft_tokens", "max_critique_tokens"),
        *("max_revision_tokens", "temperature", "top_p", "stop", "seed", "backend"),
    )
    settings = {name: getattr(options, name) for name in names}
    settings["stop"] = list(options.stop)
    settings["prompts"] = files.digest
    data, default = config.data, DataConfig()
    changed = {
        name: getattr(data, name)
        for name in ("template_kwargs", "template_date", "parse_special")
        if getattr(data, name) != getattr(default, name)
    }
    if data.chat_template and changed:
        settings["template"] = json.loads(json.dumps(changed))
    if config.data.think != "keep":
        settings["think"] = config.data.think
    if options.backend == "server":
        return settings | {"model": options.model}
    if options.cache_dtype != "compute":
        settings["cache_dtype"] = options.cache_dtype
    return settings | {
        "model": options.model or config.teacher.path or "teacher",
        "fingerprint": hf.fingerprint(path),
        "chat_template": config.data.chat_template,
        "dtype": config.train.dtype,
    }


def _process_of(item: Item) -> int:
    """Return the number of the process that writes an item's row."""
    digest = hashlib.blake2b(item.example.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % jax.process_count()
