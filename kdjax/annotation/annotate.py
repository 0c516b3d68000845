"""A teacher writes rationales: from examples to a folder of annotations.

Work (`asking`) is answered in batches by a local model and in threads by a server.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from kdjax.annotation import backends, prompts, store
from kdjax.annotation.prompts import PromptFiles
from kdjax.annotation.quality import Gates
from kdjax.annotation.requests import Item, Work, make_items
from kdjax.annotation.store import Key, Row
from kdjax.config import AnnotateConfig, Config
from kdjax.data import selection, sources
from kdjax.data.example import Example
from kdjax.experiment.teacher import teacher_folder
from kdjax.models import hf
from kdjax.parallel import distributed
from kdjax.runtime.console import progress


def annotate(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Writes what is missing of the annotations of a config; the report of all.

    Several processes share the examples by a hash of their ids; the first one merges
    what all have written.

    Raises:
      ValueError: data without what the method needs, a folder of other settings, or
        what keeps the backend from answering.
    """
    asked = config.annotate
    files = prompts.load(asked.prompts)
    examples = _examples(config)
    items = make_items(examples, asked)
    path = _model_path(config, workdir)
    settings = _settings(config, files, path)
    folder = folder_of(config, workdir)
    store.claim(folder, settings)
    with store.Part(folder, jax.process_index()) as part:
        done, spent = _done(folder, items, files, asked)
        mine = [item for item in items if _owner(item) == jax.process_index()]
        todo = [item for item in mine if item.key not in done]
        with progress(
            len(mine),
            f"annotate {asked.split}",
            start=len(mine) - len(todo),
            is_main=distributed.is_main(),
        ) as advance:

            def write(work: Work) -> None:
                part.append(work.row(settings))
                advance()

            if todo and asked.backend == "server":
                _in_threads(config, todo, files, write, spent)
            elif todo:
                _in_batches(config, path, mine, done, files, write)
    distributed.barrier("annotate")
    report = {}
    if distributed.is_main():
        report = _merge(folder, items, examples, files, asked)
    distributed.barrier("merge annotations")
    return report


def folder_of(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """Where the annotations are."""
    asked = config.annotate
    default = workdir / "annotations" / f"{asked.split}-{asked.method}"
    return pathlib.Path(asked.path or default)


def result_name(asked: AnnotateConfig) -> str:
    """The file of kept rows: what `data.rationales` and the like take."""
    names = {"counterfactual": "counterfactuals.jsonl", "answer": "labels.jsonl"}
    return names.get(asked.method, "rationales.jsonl")


def _in_batches(
    config: Config,
    path: str,
    mine: Sequence[Item],
    done: Collection[Key],
    files: PromptFiles,
    write: Callable[[Work], None],
) -> None:
    """A local model answers items of like length together, the longest first.

    Those of an example stay together: their prompts begin alike. Batches are those of a
    start from nothing, so that a killed run goes on with the same ones.
    """
    model = backends.Local(config, path)

    def length(item: Item) -> int:
        return len(item.example.question) + sum(map(len, item.example.choices))

    ordered = sorted(mine, key=length, reverse=True)
    for start in range(0, len(ordered), model.batch_size):
        batch = ordered[start : start + model.batch_size]
        if all(item.key in done for item in batch):
            continue
        works = [Work(item, files, config.annotate) for item in batch]
        while requests := [work.request for work in works if work.request]:
            for work, completion in zip(works, model(requests), strict=True):
                work.take(completion)
        for work in works:
            if work.item.key not in done:
                write(work)


def _in_threads(
    config: Config,
    todo: Sequence[Item],
    files: PromptFiles,
    write: Callable[[Work], None],
    spent: int,
) -> None:
    """A server answers several items at a time; each is written when it is finished.

    After an error nothing more is asked for, but what is finished is still written.
    """
    server = backends.Server(config.annotate, spent=spent)

    def finish(item: Item) -> Work:
        try:
            work = Work(item, files, config.annotate)
            while work.request:
                work.take(server(work.request))
        except Exception:
            server.stop()  # before this thread takes another item
            raise
        return work

    pool = concurrent.futures.ThreadPoolExecutor(config.annotate.concurrency)
    failure: Exception | None = None
    try:
        futures = [pool.submit(finish, item) for item in todo]
        for future in concurrent.futures.as_completed(futures):
            try:
                write(future.result())
            except backends.Stopped:
                continue
            except Exception as error:
                failure = failure or error
                server.stop()  # where it was the writing that failed
    finally:
        server.stop()
        pool.shutdown(cancel_futures=True)
        server.close()
    if failure:
        raise failure


def _done(
    folder: pathlib.Path,
    items: Sequence[Item],
    files: PromptFiles,
    asked: AnnotateConfig,
) -> tuple[set[Key], int]:
    """Keys of the rows that are there, and the tokens that all rows took.

    Raises:
      ValueError: a row whose example reads otherwise now.
    """
    by_key = {item.key: item for item in items}
    done, spent = set(), 0
    for row in store.read(folder):
        key = store.key_of(row)
        spent += (row["prompt_tokens"] or 0) + (row["new_tokens"] or 0)
        if key not in by_key:
            continue
        if row["prompt_hash"] != Work(by_key[key], files, asked).prompt_hash:
            raise ValueError(
                f"annotate.path={str(folder)!r} has a row of id {key[0]!r} for another "
                "prompt: the data has changed; use another annotate.path"
            )
        done.add(key)
    return done, spent


def _merge(
    folder: pathlib.Path,
    items: Sequence[Item],
    examples: Sequence[Example],
    files: PromptFiles,
    asked: AnnotateConfig,
) -> dict[str, Any]:
    """Writes the rows that are kept, those that are not, and the report."""
    found: dict[Key, Row] = {}
    for row in store.read(folder):
        found.setdefault(store.key_of(row), row)
    missing = [item.key for item in items if item.key not in found]
    if missing:
        raise ValueError(
            f"annotate.path={str(folder)!r} lacks {len(missing)} rows (first: "
            f"{missing[0]}): all processes need the same folder; start again"
        )
    shown = (*files.demonstrations, *files.critiques, *files.revisions)
    gates = Gates(
        [*(example.question for example in examples), *(r["question"] for r in shown)]
    )
    kept: list[Row] = []
    dropped: list[Row] = []
    gate_counts = dict.fromkeys(gates.names, 0)
    for item in items:
        row = found[item.key]
        row["gates"] = gates(row, item.example, row.get("answer", item.answer))
        for gate in row["gates"]:
            gate_counts[gate] += 1
        (dropped if set(row["gates"]) & set(asked.drop) else kept).append(row)
    store.write_rows(folder / result_name(asked), kept)
    store.write_rows(folder / "dropped.jsonl", dropped)
    rows = [*kept, *dropped]
    report = {
        "file": str(folder / result_name(asked)),
        "method": asked.method,
        "split": asked.split,
        "examples": len(examples),
        "examples_without": len(examples) - len({row["id"] for row in kept}),
        "rows": len(rows),
        "kept": len(kept),
        "dropped": len(dropped),
        "drop": list(asked.drop),
        "gates": gate_counts,
        "finish_reasons": dict(
            sorted(collections.Counter(row["finish_reason"] for row in rows).items())
        ),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "new_tokens": sum(row["new_tokens"] or 0 for row in rows),
    }
    if asked.method == "answer":
        answers = [(found[item.key]["answer"], item.answer) for item in items]
        told = [answer == gold for answer, gold in answers if answer]
        report |= {"answered": len(told), "accuracy": sum(told) / max(1, len(told))}
    store.write_json(folder / "report.json", report)
    return report


def _examples(config: Config) -> list[Example]:
    """The examples to annotate, without what would be joined to them.

    With a teacher's labels rationales explain its answers.
    """
    data = dataclasses.replace(
        config.data, rationales="", eval_rationales="", counterfactuals=""
    )
    if config.annotate.method == "answer" or config.annotate.split == "eval":
        data = dataclasses.replace(data, labels="")
    split = config.annotate.split
    examples = sources.load_examples(data, split, seed=data.kinship.seed)
    return selection.apply_label_policy(examples, data)[0]


def _model_path(config: Config, workdir: pathlib.Path) -> str:
    """The folder or hub name of the model, or the server's name for it."""
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
    """Whatever decides what is written, but for the examples."""
    asked = config.annotate
    names = (
        *("method", "quality", "num_demonstrations", "contrast", "contrast_weight"),
        *("max_new_tokens", "temperature", "top_p", "stop", "seed", "backend"),
    )
    settings = {name: getattr(asked, name) for name in names}
    settings["stop"] = list(asked.stop)
    settings["prompts"] = files.digest
    if asked.backend == "server":
        return settings | {"model": asked.model}
    return settings | {
        "model": asked.model or config.teacher.path or "teacher",
        "fingerprint": hf.fingerprint(path),
        "chat_template": config.data.chat_template,
        "dtype": config.train.dtype,
    }


def _owner(item: Item) -> int:
    """The process that writes an item's row."""
    found = hashlib.blake2b(item.example.id.encode(), digest_size=8).digest()
    return int.from_bytes(found) % jax.process_count()
