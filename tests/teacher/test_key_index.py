"""The index of a cache: every key at its place, and never a stale one."""

import os

import numpy as np
import pytest

from kdjax.teacher import cache as cache_lib
from kdjax.teacher import key_index
from kdjax.teacher.key_index import KeyIndex
from tests.teacher.test_cache import MANIFEST, K, _pairs, _write_cache

CHECKSUM = "ab" * 16


def random_keys(rng, counts):
    return [rng.integers(0, 256, (n, 16)).astype(np.uint8) for n in counts]


def test_every_key_has_its_place(tmp_path):
    rng = np.random.default_rng(0)
    keys = random_keys(rng, [100, 0, 37, 1])
    keys[2][:20, :8] = 7  # equal first halves
    keys[2][5] = keys[0][3]  # comes twice: the first place counts
    expected = {}
    for shard, of_shard in enumerate(keys):
        for row, key in enumerate(of_shard):
            expected.setdefault(key.tobytes(), (shard, row))
    index = KeyIndex.from_keys(keys)
    path = tmp_path / "index"
    key_index.write(path, index, checksum=CHECKSUM, shard_bytes=[1, 2, 3, 4])
    stored, shard_bytes = key_index.read(
        path, checksum=CHECKSUM, num_shards=4, num_records=138
    )
    assert shard_bytes.tolist() == [1, 2, 3, 4] and len(stored) == 138
    others = rng.integers(0, 256, (50, 16)).astype(np.uint8)
    others[:5, :8] = 7
    for each in (index, stored):
        assert {key: each.locate(key) for key in expected} == expected
        assert all(each.locate(key.tobytes()) is None for key in others)
        assert each.contains(np.concatenate(keys)).all()
        assert not each.contains(others).any()
        assert each.locate(b"short") is None
        assert each.contains(np.zeros((0, 16), np.uint8)).shape == (0,)


def test_an_index_without_keys():
    index = KeyIndex.from_keys([])
    assert index.locate(bytes(16)) is None
    assert index.contains(np.zeros((2, 16), np.uint8)).tolist() == [False, False]


@pytest.mark.parametrize(
    "change", ["flip", "cut", "manifest", "shards", "pipe", "gone"]
)
def test_an_index_that_does_not_fit_is_no_index(tmp_path, change):
    path = tmp_path / "index"
    index = KeyIndex.from_keys(random_keys(np.random.default_rng(0), [5, 6]))
    key_index.write(path, index, checksum=CHECKSUM, shard_bytes=[1, 2])
    data = bytearray(path.read_bytes())
    if change == "flip":
        data[100] ^= 1
    path.write_bytes(data[: len(data) - (change == "cut")])
    if change in ("pipe", "gone"):
        path.unlink()
    if change == "pipe":
        os.mkfifo(path)
    checksum = "00" * 16 if change == "manifest" else CHECKSUM
    num_shards = 3 if change == "shards" else 2
    arguments = {"checksum": checksum, "num_shards": num_shards, "num_records": 11}
    assert key_index.read(path, **arguments) is None


def test_a_cache_without_its_index_makes_it_again(tmp_path, monkeypatch):
    pairs = _write_cache(tmp_path)
    path = tmp_path / cache_lib.INDEX
    original = path.read_bytes()
    for content in (None, b"", original[:-1], original[::-1]):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        cache = cache_lib.load_cache(tmp_path)
        assert cache.has(pairs[7][0]) and path.read_bytes() == original
        assert cache.read(pairs[7][0]).num_tokens == pairs[7][1].num_tokens
    path.unlink()
    monkeypatch.setattr(key_index.files, "write_atomically", _refuse)
    cache = cache_lib.load_cache(tmp_path)
    assert [cache.has(key) for key, _ in pairs] == [True] * len(pairs)
    assert not path.exists()


def _refuse(*_):
    raise PermissionError("read-only")


def test_contains_answers_for_many_keys(tmp_path):
    pairs = _write_cache(tmp_path)
    keys = np.stack([np.frombuffer(key, np.uint8) for key, _ in pairs])
    cache = cache_lib.load_cache(tmp_path)
    both = np.concatenate([keys, keys ^ 1])
    assert cache.contains(both).tolist() == [True] * len(pairs) + [False] * len(pairs)


def test_a_cache_of_other_shards_does_not_take_an_old_index(tmp_path):
    _write_cache(tmp_path)
    old = (tmp_path / cache_lib.INDEX).read_bytes()
    other = _pairs(99)
    cache_lib.write_shard(tmp_path, 1, 3, iter(other), MANIFEST)
    cache_lib.finish(tmp_path, MANIFEST, num_shards=3)
    (tmp_path / cache_lib.INDEX).write_bytes(old)
    cache = cache_lib.load_cache(tmp_path)
    assert all(cache.has(key) for key, _ in other)
    assert cache.read(other[0][0]).ids.shape[1] == K


def test_a_shard_that_was_cut_is_named_when_the_cache_is_opened(tmp_path):
    pairs = _write_cache(tmp_path)
    path = tmp_path / cache_lib.shard_name(2, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(cache_lib.DamagedShardError, match="shard-00002-of-00003"):
        cache_lib.load_cache(tmp_path).has(pairs[0][0])
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00002-of-00003.* is missing"):
        cache_lib.load_cache(tmp_path).has(pairs[0][0])
