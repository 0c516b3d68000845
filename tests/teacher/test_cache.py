"""The teacher cache: what is read is what was written, or a clear refusal."""

import dataclasses
import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kdjax.config import CacheConfig
from kdjax.data.views import Segment
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import codec, label, shards
from kdjax.teacher.byte_planes import IdCoder

VOCAB_SIZE, K = 300, 8
TEMPERATURES = (1.0, 2.0)
MANIFEST = cache_lib.Manifest(
    kind="top_k",
    k=K,
    vocab_size=VOCAB_SIZE,
    temperatures=TEMPERATURES,
    tokenizer_fingerprint="tokenizer",
    teacher_path="teacher",
    teacher_fingerprint="weights",
)
DENSE = dataclasses.replace(MANIFEST, kind="dense", k=VOCAB_SIZE)


def make_record(rng, num_tokens, *, vocab_size=VOCAB_SIZE, k=K, scale=3.0):
    """A record of random softmax rows; k=None gives the dense one."""
    logits_TV = scale * rng.normal(size=(num_tokens, vocab_size))
    log_probs_TV = logits_TV - _log_sum_exp(logits_TV)[:, None]
    log_z_TS = np.stack([_log_sum_exp(log_probs_TV / t) for t in TEMPERATURES], axis=1)
    entropy_TS = np.stack(
        [
            -(np.exp(log_p) * log_p).sum(axis=1)
            for log_p in (
                log_probs_TV / t - log_z_TS[:, [s]] for s, t in enumerate(TEMPERATURES)
            )
        ],
        axis=1,
    )
    ids_TK = np.argsort(-log_probs_TV, axis=1)[:, :k].astype(np.int32)
    stored = log_probs_TV if k is None else np.take_along_axis(log_probs_TV, ids_TK, 1)
    return cache_lib.Record(
        ids=np.zeros((num_tokens, 0), np.int32) if k is None else ids_TK,
        kind="dense" if k is None else "top_k",
        log_probs=stored.astype(np.float32),
        target_ids=np.zeros(num_tokens, np.int32),
        target_log_probs=log_probs_TV[:, 0].astype(np.float32),
        log_z=log_z_TS.astype(np.float32),
        entropy=entropy_TS.astype(np.float32),
    )


def _log_sum_exp(x):
    return np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1)


def _pairs(seed, *, num_records=5, k=K):
    rng = np.random.default_rng(seed)
    return [
        (rng.bytes(16), make_record(rng, rng.integers(1, 20), k=k))
        for _ in range(num_records)
    ]


def _write_cache(folder, manifest=MANIFEST, *, num_shards=3):
    k = None if manifest.kind == "dense" else K
    pairs = [_pairs(seed, k=k) for seed in range(num_shards)]
    for index, shard in enumerate(pairs):
        cache_lib.write_shard(folder, index, num_shards, iter(shard), manifest)
    cache_lib.finish(folder, manifest, num_shards=num_shards)
    return [pair for shard in pairs for pair in shard]


def _round_trip(record, *, vocab_size=VOCAB_SIZE):
    coder = IdCoder.from_ids(record.target_ids, vocab_size)
    return codec.decode(
        codec.encode(record, coder, temperatures=TEMPERATURES),
        coder,
        kind=record.kind,
        temperatures=TEMPERATURES,
    )


def _kl(record, decoded, temperature_index):
    """KL in nats of k+1 events, original to decoded, at one temperature."""
    temperature = TEMPERATURES[temperature_index]
    p_TK, q_TK = (
        np.exp(
            r.log_probs.astype(np.float64) / temperature
            - r.log_z[:, [temperature_index]]
        )
        for r in (record, decoded)
    )
    p_tail_T, q_tail_T = 1 - p_TK.sum(axis=1), 1 - q_TK.sum(axis=1)
    tail_T = p_tail_T * np.log(p_tail_T / q_tail_T)
    return (p_TK * np.log(p_TK / q_TK)).sum(axis=1) + tail_T


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_the_rounding_costs_less_than_the_limit(scale):
    rng = np.random.default_rng(0)
    record = make_record(rng, 64, vocab_size=4096, k=64, scale=scale)
    decoded = _round_trip(record, vocab_size=4096)
    np.testing.assert_array_equal(decoded.ids, record.ids)
    assert decoded.ids.dtype == np.int32 and decoded.log_probs.dtype == np.float32
    for index in range(len(TEMPERATURES)):
        kl_T = _kl(record, decoded, index)
        assert kl_T.min() > -1e-7 and kl_T.mean() < 1e-4


def test_the_tail_mass_survives_the_rounding():
    # Two near-equal leaders and a tail of one in a million: rounding alone would lose
    # the tail, or multiply it.
    log_probs_TK = np.log([[0.6, 0.4 - 1e-6 - 1e-5, 1e-5]]).astype(np.float32)
    record = make_record(np.random.default_rng(0), 1)._replace(
        ids=np.array([[5, 2, 9]], np.int32), log_probs=log_probs_TK
    )
    decoded = _round_trip(record)
    tail = 1 - np.exp(decoded.log_probs.astype(np.float64)).sum()
    assert tail == pytest.approx(1e-6, abs=2e-7)


def test_the_tail_mass_is_exact_at_every_declared_temperature():
    record = make_record(np.random.default_rng(1), 200, scale=6.0)
    decoded = _round_trip(record)
    for column, temperature in enumerate(TEMPERATURES):
        tails = [
            1
            - np.exp(np.float64(r.log_probs) / temperature - r.log_z[:, [column]]).sum(
                1
            )
            for r in (record, decoded)
        ]
        np.testing.assert_allclose(*tails, atol=5e-6)


def test_per_token_numbers_are_close_and_order_is_kept():
    record = make_record(np.random.default_rng(1), 33)
    decoded = _round_trip(record)
    for name in ("target_log_probs", "entropy"):
        found, wanted = getattr(decoded, name), getattr(record, name)
        np.testing.assert_allclose(found, wanted, rtol=2.0**-16)
    np.testing.assert_allclose(decoded.log_z, record.log_z, atol=5e-3)
    assert (decoded.log_z[:, 0] == 0).all()
    np.testing.assert_array_equal(decoded.target_ids, record.target_ids)
    assert (np.diff(decoded.log_probs, axis=1) <= 0).all()


def test_dense_is_exact_even_with_zeros():
    record = make_record(np.random.default_rng(2), 4, k=None)
    record.log_probs[:, 7] = -np.inf
    decoded = _round_trip(record)
    assert decoded.ids.size == 0
    np.testing.assert_array_equal(decoded.log_probs, record.log_probs)


def test_unused_slots_come_back():
    record = make_record(np.random.default_rng(3), 3)
    record.ids[1, 5:], record.log_probs[1, 5:] = -1, -np.inf
    decoded = _round_trip(record)
    np.testing.assert_array_equal(decoded.ids, record.ids)
    assert np.isneginf(decoded.log_probs[1, 5:]).all()
    assert np.isfinite(decoded.log_probs[1, :5]).all()


def test_extreme_log_probs_stay_finite():
    record = make_record(np.random.default_rng(3), 1)
    record.log_probs[0] = [0, -1e-30, -50, -200, -3e4, -1e8, -1e30, -3e38]
    decoded = _round_trip(record)
    np.testing.assert_allclose(decoded.log_probs, record.log_probs, rtol=1.2e-2, atol=1)


@pytest.mark.parametrize("vocab_size", [256, 257, 65536, 65537, 2**20, 6_000_000])
def test_the_last_id_of_any_vocabulary(vocab_size):
    record = make_record(np.random.default_rng(4), 2)
    record.ids[0, 0] = vocab_size - 1
    record.ids[1:] %= 256
    record.ids[0, 1:] %= 256
    decoded = _round_trip(record, vocab_size=vocab_size)
    np.testing.assert_array_equal(decoded.ids, record.ids)


def test_a_vocabulary_beyond_the_format_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=16777216 .*exceeds"):
        IdCoder(np.zeros(0, np.int32), 2**24)


def test_no_target_token_at_all():
    record = make_record(np.random.default_rng(5), 0)
    assert _round_trip(record).log_probs.shape == (0, K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.log_probs.__setitem__((0, 0), np.nan), "NaN"),
        (lambda r: r.entropy.__setitem__((0, 0), np.nan), "NaN"),
        (lambda r: r.ids.__setitem__((0, 0), VOCAB_SIZE), "leave the vocabulary"),
        (lambda r: r.log_probs.__setitem__(0, -np.inf), "no finite log-probability"),
    ],
)
def test_encode_refuses(change, message):
    record = make_record(np.random.default_rng(6), 2)
    change(record)
    with pytest.raises(ValueError, match=message):
        codec.encode(
            record,
            IdCoder.from_ids(record.target_ids, VOCAB_SIZE),
            temperatures=TEMPERATURES,
        )


def test_random_pairs_take_less_than_three_bytes():
    rng = np.random.default_rng(0)
    num_bytes = num_pairs = 0
    for _ in range(4):
        record = make_record(rng, 64, vocab_size=49152, k=64, scale=2.5)
        num_bytes += len(
            codec.encode(
                record, IdCoder.from_ids(record.ids, 49152), temperatures=TEMPERATURES
            )
        )
        num_pairs += record.ids.size
    assert num_bytes / num_pairs < 2.8  # 2.0 of them are ids that cannot be compressed


@pytest.mark.parametrize("manifest", [MANIFEST, DENSE], ids=["top_k", "dense"])
def test_write_finish_open_read(tmp_path, manifest):
    pairs = _write_cache(tmp_path, manifest)
    cache = cache_lib.load_cache(
        tmp_path,
        tokenizer_fingerprint="tokenizer",
        vocab_size=VOCAB_SIZE,
        kind=manifest.kind,
        k=K,
        temperatures=(2.0,),
    )
    assert cache.temperatures == TEMPERATURES and cache.kind == manifest.kind
    assert cache.num_records == 15 and list(cache) == [key for key, _ in pairs]
    assert cache.num_tokens == sum(len(record.log_probs) for _, record in pairs)
    for key, record in reversed(pairs):
        assert cache.has(key)
        found = cache.read(key)
        for a, b in zip(found, _round_trip(record), strict=True):
            np.testing.assert_equal(a, b)
    assert not cache.has(b"x" * 16)
    with pytest.raises(ValueError, match="not in the cache"):
        cache.read(b"x" * 16)
    found = cache_lib.verify(cache)
    nll = -np.concatenate([record.target_log_probs for _, record in pairs]).mean()
    assert found.pop("teacher_nll") == pytest.approx(nll, rel=1e-5)
    assert found == {"shards": 3, "records": 15, "tokens": cache.num_tokens}


def test_threads_read_the_same(tmp_path):
    pairs = _write_cache(tmp_path) * 20
    cache = cache_lib.load_cache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(cache.read, [key for key, _ in pairs]))
    for (_, record), got in zip(pairs, found, strict=True):
        np.testing.assert_array_equal(got.ids, record.ids)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"tokenizer_fingerprint": "other"}, "tokenizer_fingerprint='other'.*'token"),
        ({"vocab_size": 301}, "vocab_size=301 .*300"),
        ({"kind": "dense"}, "kind='dense' .*'top_k'"),
        ({"k": 16}, "k=16 .*has 8"),
        ({"temperatures": (1.0, 4.0)}, r"temperature=4.0 .*\(1.0, 2.0\)"),
    ],
)
def test_open_cache_names_what_differs(tmp_path, wanted, message):
    _write_cache(tmp_path, num_shards=1)
    with pytest.raises(ValueError, match=message):
        cache_lib.load_cache(tmp_path, **wanted)


def test_an_unfinished_or_newer_cache_is_refused(tmp_path):
    cache_lib.write_shard(tmp_path, 0, 2, _pairs(0), MANIFEST)
    with pytest.raises(ValueError, match="not finished"):
        cache_lib.load_cache(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001-of-00002.* missing"):
        cache_lib.finish(tmp_path, MANIFEST, num_shards=2)
    cache_lib.write_shard(tmp_path, 1, 2, _pairs(1), MANIFEST)
    cache_lib.finish(tmp_path, MANIFEST, num_shards=2)
    path = tmp_path / cache_lib.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99"):
        cache_lib.load_cache(tmp_path)


def test_shards_of_another_teacher_are_refused(tmp_path):
    cache_lib.write_shard(tmp_path, 0, 1, _pairs(0), MANIFEST)
    other = dataclasses.replace(MANIFEST, teacher_fingerprint="other")
    for call in (
        lambda: cache_lib.complete_shards(tmp_path, other),
        lambda: cache_lib.finish(tmp_path, other, num_shards=1),
    ):
        with pytest.raises(ValueError, match="teacher_fingerprint='other'"):
            call()


def test_another_size_of_shards_is_refused(tmp_path):
    cache_lib.write_shard(tmp_path, 0, 1, _pairs(0), MANIFEST)
    other = dataclasses.replace(MANIFEST, shard_size=7)
    with pytest.raises(ValueError, match="shard_size=7 is wanted"):
        cache_lib.complete_shards(tmp_path, other)


def test_many_shards_are_read_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_lib, "_MAX_OPEN", 2)
    pairs = _write_cache(tmp_path, num_shards=5)
    cache = cache_lib.load_cache(tmp_path)
    for key, record in pairs + pairs[::-1]:
        np.testing.assert_array_equal(cache.read(key).ids, record.ids)
    assert len(cache._readers) == 2


def test_shards_of_two_sizes_are_refused(tmp_path):
    cache_lib.write_shard(tmp_path, 0, 2, _pairs(0), MANIFEST)
    cache_lib.write_shard(tmp_path, 0, 3, _pairs(0), MANIFEST)
    with pytest.raises(ValueError, match=r"caches of \[2, 3\] shards"):
        cache_lib.complete_shards(tmp_path, MANIFEST)


def test_a_record_must_fit_the_manifest(tmp_path):
    (key, record), *_ = _pairs(0)
    for pairs, message in (
        ([(key, record), (key, record)], "come once"),
        ([(b"short", record)], "16 bytes"),
        ([(key, record._replace(kind="dense"))], "a record of kind 'dense' in a cache"),
    ):
        with pytest.raises(ValueError, match=message):
            cache_lib.write_shard(tmp_path, 0, 1, pairs, MANIFEST)
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left


def _die_while_writing(folder, pairs):
    def stream():
        yield from pairs[:3]
        os.kill(os.getpid(), signal.SIGKILL)

    cache_lib.write_shard(folder, 1, 3, stream(), MANIFEST)


def test_killed_and_continued_gives_identical_files(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _write_cache(whole)
    cache_lib.write_shard(broken, 0, 3, _pairs(0), MANIFEST)
    process = multiprocessing.get_context("spawn").Process(
        target=_die_while_writing, args=(broken, _pairs(1))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert cache_lib.complete_shards(broken, MANIFEST) == {0}
    for index in (2, 1):
        cache_lib.write_shard(broken, index, 3, _pairs(index), MANIFEST)
    cache_lib.finish(broken, MANIFEST, num_shards=3)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_damage_anywhere_is_found(tmp_path):
    _write_cache(tmp_path)
    path = tmp_path / cache_lib.shard_name(1, 3)
    original = path.read_bytes()
    for position in range(0, len(original), len(original) // 60):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(cache_lib.DamagedShardError, match="shard-00001-of-00003"):
            cache_lib.verify(cache_lib.load_cache(tmp_path))
    for length in (0, 10, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        assert cache_lib.complete_shards(tmp_path, MANIFEST) == {0, 2}
    path.write_bytes(original)
    assert cache_lib.complete_shards(tmp_path, MANIFEST) == {0, 1, 2}


def test_a_damaged_record_is_named_when_it_is_read(tmp_path):
    pairs = _write_cache(tmp_path, num_shards=1)
    path = tmp_path / cache_lib.shard_name(0, 1)
    (payload,) = shards.open_reader(path).read([2])
    data = bytearray(path.read_bytes())
    data[data.index(payload) + 20] ^= 1
    path.write_bytes(data)
    cache = cache_lib.load_cache(tmp_path)
    with pytest.raises(cache_lib.DamagedShardError, match=r"record 2 of .*shard-00000"):
        cache.read(pairs[1][0])


@pytest.mark.parametrize("manifest", [MANIFEST, DENSE], ids=["top_k", "dense"])
def test_the_bytes_do_not_depend_on_the_threads(tmp_path, monkeypatch, manifest):
    monkeypatch.setattr(shards, "_BATCH_VALUES", 300)
    pairs = _pairs(7, num_records=60, k=None if manifest.kind == "dense" else K)
    contents = []
    for num_threads in (1, 2, 5):
        folder = tmp_path / str(num_threads)
        cache_lib.write_shard(
            folder, 0, 1, iter(pairs), manifest, num_threads=num_threads
        )
        contents.append((folder / cache_lib.shard_name(0, 1)).read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_an_error_of_a_thread_is_the_writers(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BATCH_VALUES", 1)
    pairs = _pairs(7, num_records=30)
    pairs[20][1].entropy[0, 0] = np.nan
    with pytest.raises(ValueError, match="holds NaN"):
        cache_lib.write_shard(tmp_path, 0, 1, iter(pairs), MANIFEST, num_threads=3)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_sized_by_bytes():
    def of(num, length, **changes):
        empty = np.zeros(length, np.int32)
        segments = [
            Segment(
                example_id="",
                view=0,
                prompt_ids=empty[:1],
                target_ids=empty,
                key=i.to_bytes(16, "big"),
            )
            for i in range(num)
        ]
        manifest = dataclasses.replace(MANIFEST, k=64, vocab_size=49152)
        manifest = dataclasses.replace(manifest, **changes.pop("manifest", {}))
        return label.records_per_shard(segments, manifest, CacheConfig(**changes))

    assert of(7_000, 121) == 512  # whole shards of a few MiB: at least 512 records
    assert of(64_000, 121) == 1000  # at least 64 shards
    size = of(200_000, 121)
    assert size * 121 * 127 / 2**20 == pytest.approx(32, rel=0.02)
    assert of(200_000, 121, shard_mib=8) == pytest.approx(size / 4, abs=1)
    dense = {"kind": "dense", "k": 49152}
    assert of(600, 121, manifest=dense) == 1  # 23 MB each
    assert of(600, 121, shard_size=77) == 77
