"""A teacher cache of many records: opening, memory, random reads; labelling's rate.

    python benchmarks/cache_scale.py write FOLDER [--records=1000000] [--shard_size=0]
    python benchmarks/cache_scale.py read FOLDER [--reads=20000]
    python benchmarks/cache_scale.py label FOLDER [--threads=1,2]

`write` makes a cache of short random records (8 target tokens, 8 pairs), `read` opens
it and reads records in random order. `label` labels 300,000 target tokens (K = 64) by a
teacher that takes no time, with numbers of encoding threads in turn. Numbers are those
of this process on all cores that it may use.
"""

import dataclasses
import hashlib
import json
import pathlib
import resource
import shutil
import time

import numpy as np
from absl import app, flags

from kdjax.config import CacheConfig
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import label, synthetic

_RECORDS = flags.DEFINE_integer("records", 1_000_000, "Records.", lower_bound=1)
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 0, "Records per shard; 0 = by bytes.")
_READS = flags.DEFINE_integer("reads", 20_000, "Random reads.", lower_bound=1)
_THREADS = flags.DEFINE_list("threads", ["1", "2"], "Encoding threads.")
_TOKENS, _K, _VOCAB_SIZE = 8, 8, 49152
_LABELLED = 300_000  # target tokens
_POOL = 512  # distinct records


def _manifest(*, k: int, shard_size: int = 0) -> cache_lib.Manifest:
    return cache_lib.Manifest(
        kind="top_k",
        k=k,
        vocab_size=_VOCAB_SIZE,
        temperatures=(1.0, 2.0),
        tokenizer_fingerprint="synthetic",
        teacher_path="synthetic",
        teacher_fingerprint="synthetic",
        shard_size=shard_size,
    )


def write(folder: pathlib.Path) -> dict[str, float]:
    """Write a cache of random keys, whose records come from a small pool."""
    size = _SHARD_SIZE.value or max(512, _RECORDS.value // 64)
    manifest = _manifest(k=_K, shard_size=size)
    segments = synthetic.make_segments(
        _POOL, row_length=_TOKENS, vocab_size=_VOCAB_SIZE, seed=0
    )
    rng = np.random.default_rng(0)
    pool = [synthetic._record(rng, s.target_ids, manifest) for s in segments]
    num_shards = -(-_RECORDS.value // size)
    start = time.perf_counter()
    for index in range(num_shards):
        rows = range(index * size, min((index + 1) * size, _RECORDS.value))
        records = ((_key(row), pool[row % _POOL]) for row in rows)
        cache_lib.write_shard(folder, index, num_shards, records, manifest)
    finished = time.perf_counter()
    cache_lib.finish(folder, manifest, num_shards=num_shards)
    return {
        "records": _RECORDS.value,
        "shards": num_shards,
        "write_seconds": finished - start,
        "finish_seconds": time.perf_counter() - finished,
    }


def _key(row: int) -> bytes:
    return hashlib.blake2b(row.to_bytes(8, "little"), digest_size=16).digest()


def _resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def read(folder: pathlib.Path) -> dict[str, float]:
    """Open a cache, look up its first record, and read others in random order."""
    before, start = _resident(), time.perf_counter()
    cache = cache_lib.load_cache(folder)
    assert cache.has(_key(0))
    opened = time.perf_counter() - start
    row = {"records": cache.num_records, "shards": len(cache.manifest.shards)}
    row |= {"open_seconds": opened, "open_mib": _resident() - before}
    rows = np.random.default_rng(1).integers(0, cache.num_records, _READS.value)
    keys = [_key(int(row)) for row in rows]
    for name in ("first", "second"):
        start = time.perf_counter()
        for key in keys:
            cache.read(key)
        row[f"reads_per_second_{name}"] = len(keys) / (time.perf_counter() - start)
    row["read_mib"] = _resident() - before
    if hasattr(cache, "contains"):
        several = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        many = np.tile(several, (-(-1_000_000 // len(keys)), 1))[:1_000_000]
        start = time.perf_counter()
        assert cache.contains(many).all()
        row["contains_million_seconds"] = time.perf_counter() - start
    return row


def label_fast(folder: pathlib.Path) -> list[dict[str, float]]:
    """Label by a teacher that answers at once, from rows made before."""
    config = CacheConfig(batch_size=8, row_length=512)
    manifest = _manifest(k=64)
    segments = synthetic.make_segments(
        _LABELLED // 121, row_length=121, vocab_size=_VOCAB_SIZE, seed=0
    )
    num = config.batch_size * config.row_length
    rng = np.random.default_rng(0)
    ids = rng.integers(0, _VOCAB_SIZE, num).astype(np.int32)
    record = synthetic._record(rng, ids, manifest)
    computed = {
        "ids_NK": record.ids,
        "log_probs_NK": record.log_probs,
        "target_log_probs_N": record.target_log_probs,
        "log_z_NS": record.log_z,
        "entropy_NS": record.entropy,
    }
    rows = []
    for num_threads in map(int, _THREADS.value):
        shutil.rmtree(folder, ignore_errors=True)
        settings = dataclasses.replace(config, num_threads=num_threads)
        start, cpu = time.perf_counter(), time.process_time()
        label.label(segments, folder, manifest, settings, lambda *_: computed)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(segment.target_ids) for segment in segments)
        rows.append(
            {
                "threads": num_threads,
                "tokens_per_second": num_tokens / seconds,
                "cpu_seconds": time.process_time() - cpu,
                "digest": _digest(folder),
            }
        )
    return rows


def _digest(folder: pathlib.Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main(argv: list[str]) -> None:
    """Run one of the three."""
    action = {"write": write, "read": read, "label": label_fast}[argv[1]]
    print(json.dumps(action(pathlib.Path(argv[2]))))


if __name__ == "__main__":
    app.run(main)
