"""Killed or damaged: labelling continues to the same bytes, reading refuses."""

import json
import os
import pathlib
import signal

import numpy as np
import pytest

from kdjax.config import CacheConfig
from kdjax.data.views import Segment
from kdjax.runtime import files as files_lib
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import codec, label, shards
from kdjax.teacher.manifest import Manifest
from tests import forks

VOCAB_SIZE, K = 50, 4
CONFIG = CacheConfig(shard_size=4, batch_size=2, row_length=24, temperatures=(1.0, 2.0))
MANIFEST = Manifest(
    kind="top_k",
    k=K,
    vocab_size=VOCAB_SIZE,
    temperatures=CONFIG.temperatures,
    tokenizer_fingerprint="tokenizer",
    teacher_path="teacher",
    teacher_fingerprint="weights",
)
NUM_DAMAGES = 300


def segments():
    rng = np.random.default_rng(0)
    return [
        Segment(
            example_id=f"e{i}",
            view=0,
            prompt_ids=rng.integers(0, VOCAB_SIZE, 3).astype(np.int32),
            target_ids=rng.integers(0, VOCAB_SIZE, rng.integers(2, 9)).astype(np.int32),
            key=i.to_bytes(16, "big"),
        )
        for i in range(18)
    ]


def label_step(batch, uniforms):
    """A teacher that looks at nothing but the token: log p = log softmax(table)."""
    table_VV = 2 * np.random.default_rng(1).normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    log_p_VV = table_VV - np.log(np.exp(table_VV).sum(1, keepdims=True))
    tokens, targets = batch.tokens.ravel(), batch.targets.ravel()
    log_p_NV = log_p_VV[tokens].astype(np.float32)
    ids_NK = np.argsort(-log_p_NV, axis=1)[:, :K].astype(np.int32)
    log_z_N = np.log(np.exp(log_p_NV / 2).sum(1))
    return {
        "ids_NK": ids_NK,
        "log_probs_NK": np.take_along_axis(log_p_NV, ids_NK, 1),
        "target_log_probs_N": log_p_NV[np.arange(len(targets)), targets],
        "log_z_NS": np.stack([0 * log_z_N, log_z_N], axis=1),
        "entropy_NS": np.ones((len(targets), 2), np.float32),
    }


def fill(folder: pathlib.Path) -> None:
    """Label all of it, as `kdjax.label` does."""
    label.label(segments(), folder, MANIFEST, CONFIG, label_step)
    num_shards = len(label.shards(segments(), CONFIG.shard_size))
    cache_lib.finish(folder, MANIFEST, num_shards=num_shards)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _Clock:
    """Lists the events of labelling and kills the process before number `last`."""

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


def fill_until(folder: pathlib.Path, last: int, report) -> None:
    """In a process of its own: label until event `last`, report all of them."""
    clock = _Clock(last)
    for owner, name in (
        (codec, "encode"),  # a record
        (shards, "_pack_index"),  # all records written, not the index
        (files_lib, "sync"),  # written, not certain to be on disk; renamed, not synced
        (pathlib.Path, "rename"),  # between write and rename of a shard
        (pathlib.Path, "replace"),  # and of the manifest
        (cache_lib, "_checksum"),  # between the last shard and the manifest
    ):
        clock.watch(owner, name)
    fill(folder)
    report.put(clock.events)


@pytest.mark.parametrize("num_kills", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, monkeypatch, num_kills):
    context = forks.server("tests.teacher.test_interrupted")
    report = context.SimpleQueue()

    def start(folder, last):
        process = context.Process(target=fill_until, args=(folder, last, report))
        process.start()
        process.join()
        return process.exitcode

    assert start(tmp_path / "whole", -1) == 0
    events, whole = report.get(), contents(tmp_path / "whole")
    labelled = []
    original = label.cache.write_shard
    monkeypatch.setattr(
        label.cache,
        "write_shard",
        lambda folder, index, *rest, **keywords: (
            labelled.append(index),
            original(folder, index, *rest, **keywords),
        ),
    )
    rng = np.random.default_rng(0)
    order = rng.permutation(len(events)).tolist()
    kinds = {events[i]: i for i in order}  # one event of every kind
    others = [i for i in order if i not in kinds.values()]
    points = [*kinds.values(), *others][:num_kills]
    assert len(points) == num_kills > len(kinds)
    for last in points:
        folder = tmp_path / f"killed{last}"
        assert start(folder, last) == -signal.SIGKILL
        before = contents(folder)
        complete = {n: b for n, b in before.items() if n.endswith(".array_record")}
        labelled.clear()
        fill(folder)
        again = {cache_lib.shard_name(index, len(whole) - 2) for index in labelled}
        assert not again & complete.keys()
        assert contents(folder) == whole


def damage(folder: pathlib.Path, rng: np.random.Generator) -> str:
    """Spoil a finished cache in one of many ways; returns the file at fault."""
    names = sorted(path.name for path in folder.glob("shard-*"))
    name, other = rng.choice(names, 2, replace=False)
    kind = rng.choice(["flip", "flip", "cut", "delete", "swap", "copy", "manifest"])
    path = folder / name
    if kind == "manifest":
        path = folder / cache_lib.MANIFEST
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: rng.integers(len(data))])
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        (folder / other).rename(folder / "held")
        path.rename(folder / other)
        (folder / "held").rename(path)
    elif kind == "copy":
        path.write_bytes((folder / other).read_bytes())
    else:
        fields = json.loads(data)
        field = str(rng.choice(list(fields)))
        value = fields[field]
        if isinstance(value, list) and value:
            fields[field] = value[:-1]
        elif isinstance(value, int | float):
            fields[field] = value + 1
        else:
            fields[field] = f"{value}x"
        path.write_text(json.dumps(fields))
    return path.name.split(".")[0] if kind != "swap" else "shard-"


def test_three_hundred_damages_are_all_refused(tmp_path):
    fill(tmp_path)
    whole = contents(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(NUM_DAMAGES):
        where = damage(tmp_path, rng)
        if contents(tmp_path) == whole:
            continue
        with pytest.raises(ValueError, match=where):
            cache = cache_lib.load_cache(tmp_path)
            for key in cache:
                cache.read(key)
            raise AssertionError(f"damage {number} at {where} was not noticed")
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
    cache_lib.verify(cache_lib.load_cache(tmp_path))
