"""Prepared stores: equal to memory, killed or damaged, and never of other data."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest

from kdjax.config import Config, DataConfig, KinshipConfig, MethodConfig
from kdjax.data import kinship, loader, prepared
from kdjax.data.tokenizer import make_word_tokenizer
from kdjax.experiment import data as data_lib
from kdjax.experiment.data import load_data
from kdjax.runtime import files as files_lib
from tests import forks

NUM_EXAMPLES, SHARD_SIZE = 40, 9
VIEWS = ("label", "rationale")


def examples(num=NUM_EXAMPLES):
    return kinship.generate(KinshipConfig(), num_examples=num, seed=0, split="train")


def recipe(**changes):
    config = DataConfig(num_workers=1, shard_size=SHARD_SIZE, **changes)
    return prepared.Recipe(
        split="train", views=VIEWS, tokenizer=make_word_tokenizer(), config=config
    )


def build(folder: pathlib.Path, *, num_processes=1, **changes) -> dict:
    """Prepare all of it, as `load_data` does."""
    made = recipe(**changes)
    identity = made.identity({"path": "digest"})
    for index in range(num_processes):
        num_shards = prepared.build(
            folder,
            made,
            identity,
            prepared.chunk(iter(examples()), SHARD_SIZE),
            process_index=index,
            num_processes=num_processes,
        )
    prepared.finish(folder, made, identity, num_shards)
    return identity


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(segments, others):
    for segment, other in zip(segments, others, strict=True):
        for field in dataclasses.fields(segment):
            values = getattr(segment, field.name), getattr(other, field.name)
            if isinstance(values[0], np.ndarray):
                np.testing.assert_array_equal(*values)
            else:
                assert values[0] == values[1], field.name


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "train"
    return folder, build(folder)


@pytest.fixture(scope="module")
def in_memory():
    whole = prepared.Chunk(0, 0, list(examples()))
    return prepared.segment_chunk(recipe(), whole).segments


def test_segments_and_columns_are_those_in_memory(store, in_memory):
    segments = prepared.PreparedSegments(*store)
    assert_same(segments, in_memory)
    assert segments[-1].key == in_memory[-1].key
    assert [s.key for s in segments[3:20:4]] == [s.key for s in in_memory[3:20:4]]
    with pytest.raises(IndexError):
        segments[len(segments)]
    wrapped = loader.as_segments(in_memory)
    for name in (
        "views",
        "prompt_lengths",
        "prefix_lengths",
        "target_lengths",
        "loss_lengths",
        "prompt_ends",
        "alternatives",
        "keys",
    ):
        np.testing.assert_array_equal(getattr(segments, name), getattr(wrapped, name))
    segments.verify()
    assert segments.report.num_examples == NUM_EXAMPLES


def test_masks_prefixes_weights_and_ids_survive(in_memory):
    """What kinship's views have none of."""
    rng = np.random.default_rng(0)
    odd = [
        dataclasses.replace(
            segment,
            example_id=f"é{i // 3}\n",
            prefix_ids=rng.integers(0, 2**31 - 1, i % 4).astype(np.int32),
            prompt_ids=segment.prompt_ids[: i % 5 and None],
            weight=0.1 * i,
            loss_mask=None if i % 3 else rng.random(len(segment.target_ids)) < 0.5,
        )
        for i, segment in enumerate(in_memory[:30])
    ]
    for segment in odd:
        again = prepared._decode_record(prepared._encode_record(segment))
        assert_same([segment], [again])


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("form", [{}, {"encoder_length": 96, "start_id": 1}])
def test_batches_are_those_in_memory(store, in_memory, window, form):
    plans = [
        loader.BatchPlan(s, batch_size=4, row_length=96, seed=1, window=window, **form)
        for s in (in_memory, prepared.PreparedSegments(*store))
    ]
    for step in range(12):
        batches = [loader.make_batch(plan, step, terms=()) for plan in plans]
        for name in ("tokens", "targets", "positions", "segments", "view"):
            np.testing.assert_array_equal(*(getattr(b, name) for b in batches))


def test_hosts_write_the_same_store_together(store, tmp_path):
    build(tmp_path, num_processes=3)
    assert contents(tmp_path) == contents(store[0])


def test_what_is_complete_is_not_made_again(store, tmp_path, monkeypatch):
    shutil.copytree(store[0], tmp_path / "store")
    (tmp_path / "store" / prepared.MANIFEST).unlink()
    (tmp_path / "store" / prepared.shard_name(2)).write_bytes(b"damaged")
    made = []
    original = prepared._write_chunk
    monkeypatch.setattr(
        prepared,
        "_write_chunk",
        lambda shared, part: (made.append(part.number), original(shared, part))[1],
    )
    build(tmp_path / "store")
    assert made == [2]
    assert contents(tmp_path / "store") == contents(store[0])


class _Clock:
    """Lists the events of preparing and kills the process before number `last`."""

    def __init__(self, last: int) -> None:
        self.events, self.last = [], last

    def watch(self, owner, name):
        original = getattr(owner, name)

        def counted(*arguments, **keywords):
            if len(self.events) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.events.append(name)
            return original(*arguments, **keywords)

        setattr(owner, name, counted)


def build_until(folder: pathlib.Path, last: int, report) -> None:
    """In a process of its own: prepare until event `last`, report all of them."""
    clock = _Clock(last)
    for owner, name in (
        (prepared, "encode_shard"),
        (pathlib.Path, "write_bytes"),  # nothing written
        (files_lib, "sync"),  # written, not certain to be on disk; renamed, not synced
        (pathlib.Path, "replace"),  # between write and rename
        (prepared, "_read_header"),  # between the last shard and the manifest
        (prepared, "_manifest_checksum"),
    ):
        clock.watch(owner, name)
    build(folder)
    report.put(clock.events)


@pytest.mark.parametrize("num_kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_bytes(store, tmp_path, num_kills):
    context = forks.server("tests.data.test_prepared")
    report = context.SimpleQueue()

    def start(folder, last):
        process = context.Process(target=build_until, args=(folder, last, report))
        process.start()
        process.join()
        return process.exitcode

    assert start(tmp_path / "whole", -1) == 0
    events = report.get()
    assert contents(tmp_path / "whole") == contents(store[0])
    assert len(events) >= 30
    points = {event: index for index, event in enumerate(events)}.values()
    rng = np.random.default_rng(0)
    others = [i for i in rng.permutation(len(events)).tolist() if i not in points]
    for last in [*points, *others][:num_kills]:
        folder = tmp_path / f"killed{last}"
        assert start(folder, last) == -signal.SIGKILL
        build(folder)
        assert contents(folder) == contents(store[0])


def damage(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Damage one file of a store in one of several ways; return it."""
    rng = np.random.default_rng(number)
    shards = sorted(folder.glob("shard-*"))
    path = folder / prepared.MANIFEST if number % 7 == 6 else shards[rng.integers(4)]
    content = bytearray(path.read_bytes())
    kind = number % 5
    if kind <= 1:  # a bit, anywhere
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif kind == 2:
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == 3:
        path.write_bytes(content + bytes(int(rng.integers(1, 100))))
    elif path.name == prepared.MANIFEST:
        path = folder / f"shard-{rng.integers(5, 99):05d}.segments"
        path.write_bytes(content)  # one too many
    elif rng.random() < 0.5:
        path.unlink()
    else:
        other = shards[(shards.index(path) + 1) % 4]
        path.write_bytes(other.read_bytes())  # another shard in its place
    return path


@pytest.mark.parametrize("number", range(100))
def test_damage_is_refused_in_one_line_that_names_the_file(store, tmp_path, number):
    folder = tmp_path / "store"
    shutil.copytree(store[0], folder)
    path = damage(folder, number)
    with pytest.raises(ValueError) as error:
        for segment in prepared.PreparedSegments(folder, store[1]):
            assert segment
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    if number % 10 == 0:  # the remedy
        path.unlink(missing_ok=True)
        (folder / prepared.MANIFEST).unlink(missing_ok=True)
        build(folder)
        assert contents(folder) == contents(store[0])


def test_records_are_checked_by_verify_too(store, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(store[0], folder)
    path = folder / prepared.shard_name(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    segments = prepared.PreparedSegments(folder, store[1])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        segments.verify()


def test_other_data_are_refused(store):
    with pytest.raises(ValueError, match="holds other data \\(data\\): delete it"):
        prepared.PreparedSegments(
            store[0], recipe(max_prompt=99).identity({"path": "digest"})
        )


# Through `load_data`


def write_rows(path: pathlib.Path, num=30, changed=None):
    rows = [
        {"id": f"r{i}", "question": f"How is {i} related", "answer": "mother"}
        for i in range(num)
    ]
    if changed is not None:
        rows[changed]["answer"] = "father"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def words(tmp_path):
    tokenizer = make_word_tokenizer([str(number) for number in range(30)])
    tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def make_config(folder, words, **changes):
    fields = {
        "path": str(folder / "rows.jsonl"),
        "num_eval": 5,
        "tokenizer": str(words),
        "shard_size": 8,
        "num_workers": 1,
        "prepared": str(folder / "prepared"),
    }
    data = DataConfig(**fields | changes)
    return Config(
        data=data,
        method=MethodConfig(name="finetune", hard_weight=1.0, soft_weight=0.0),
    )


def names(folder):
    return sorted(p.name.split("-")[0] for p in (folder / "prepared").glob("*"))


def test_large_splits_are_prepared_once(tmp_path, words, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    config = make_config(tmp_path, words)
    memory = load_data(make_config(tmp_path, words, shard_size=1000))
    assert not (tmp_path / "prepared").exists()
    made = load_data(config)
    assert_same(made.train, memory.train)
    assert names(tmp_path) == ["train"]  # the 5 held-out rows stay in memory
    assert isinstance(made.evaluation, list)
    # Opened again, nothing is read from the source, wherever it was moved.
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "moved" / "rows.jsonl")
    moved = dataclasses.replace(
        config.data, path=str(tmp_path / "moved" / "rows.jsonl")
    )
    config = dataclasses.replace(config, data=moved)
    monkeypatch.setattr(data_lib.prepared, "segment_chunk", None)
    again = load_data(config, splits=("train",))
    assert_same(again.train, memory.train)


def test_a_changed_file_never_gives_stale_tokens(tmp_path, words):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows)
    before = os.stat(rows)
    config = make_config(tmp_path, words)
    first = load_data(config, splits=("train",))
    write_rows(rows, changed=3)  # as long as it was, and of the same time
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(rows).st_size == before.st_size
    second = load_data(config, splits=("train",))
    differ = [
        i
        for i, (a, b) in enumerate(zip(first.train, second.train, strict=True))
        if a.key != b.key
    ]
    assert differ == [3]
    assert names(tmp_path) == ["train", "train"]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_prompt": 99},
        {"prompt_suffix": False},
        {"num_train": 20},
        {"shard_size": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_another_store(tmp_path, words, changes):
    write_rows(tmp_path / "rows.jsonl")
    load_data(make_config(tmp_path, words), splits=("train",))
    load_data(make_config(tmp_path, words, **changes), splits=("train",))
    assert names(tmp_path) == ["train", "train"]


def test_an_error_of_the_data_names_where_and_writes_no_manifest(tmp_path, words):
    write_rows(tmp_path / "rows.jsonl")
    config = make_config(tmp_path, words, max_prompt=1)
    with pytest.raises(ValueError, match=r"train examples 1 to 8: example 'r0'"):
        load_data(config, splits=("train",))
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))


def test_a_split_of_which_some_parts_keep_nothing(tmp_path, words):
    rows = [
        {"id": f"r{i}", "question": "How", "answer": "" if i < 10 else "mother"}
        for i in range(30)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    memory = make_config(tmp_path, words, shard_size=99, on_missing="drop")
    config = make_config(tmp_path, words, on_missing="drop")
    loaded = [load_data(c, splits=("train",)).train for c in (memory, config)]
    assert len(loaded[0]) == 15
    assert_same(*loaded)
