"""Caches that somebody made to hurt: refused in one line that names the file."""

import dataclasses
import hashlib
import json
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module

from kdjax.runtime import limits
from kdjax.teacher import byte_planes, codec
from kdjax.teacher import cache as cache_lib
from kdjax.teacher import manifest as manifest_lib
from kdjax.teacher.byte_planes import IdCoder
from tests.teacher.test_cache import (
    DENSE,
    MANIFEST,
    TEMPERATURES,
    VOCAB_SIZE,
    K,
    _pairs,
    _write_cache,
    make_record,
)

SHARD = "shard-00000-of-00001.array_record"
KEY = b"k" * 16


def read_all(folder):
    cache = cache_lib.load_cache(folder)
    for key in cache:
        cache.read(key)
    cache_lib.verify(cache)


def assert_refused(folder, name, match="."):
    """One line that names the file; neither a hang nor a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match) as error:
        read_all(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and name in text, text
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB"  # 1 GiB


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    _write_cache(folder)
    return folder


def copy_of(sound, folder):
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


def rewrite(folder, change):
    """Change the fields of a manifest; its checksum is right again."""
    path = folder / manifest_lib.MANIFEST
    fields = json.loads(path.read_text())
    del fields["checksum"]
    change(fields)
    fields["checksum"] = manifest_lib._checksum(fields)
    path.write_text(json.dumps(fields))


def set_shard(name, value):
    return lambda fields: fields["shards"][1].__setitem__(name, value)


DEEP = "[" * 900 + "]" * 900
FIELDS = [
    *(field.name for field in dataclasses.fields(manifest_lib.Manifest)),
    "num_records",
    "num_tokens",
]
SHARD_FIELDS = [field.name for field in dataclasses.fields(manifest_lib.Shard)]
WRONG = (
    None,
    True,
    -1,
    2**70,
    1.5,
    1e308,
    [],
    {},
    [[]],
    {"a": {}},
    "\ud800",
    "x" * 2**21,
)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_manifest_is_there_and_typed(sound, tmp_path, name):
    texts = ("tokenizer_fingerprint", "teacher_path", "teacher_fingerprint")
    texts += ("data", "content", "dtype")
    harmless = {"versions": ({},), "missing": ([],)}.get(name, ())
    copy_of(sound, tmp_path)
    rewrite(tmp_path, lambda fields: fields.pop(name))
    assert_refused(tmp_path, "manifest.json", name)
    for value in WRONG:
        if value in harmless and type(value) in map(type, harmless):
            continue
        if name in texts and isinstance(value, str) and len(value) == 1:
            continue  # other text, which no shard was labelled with
        copy_of(sound, tmp_path)
        rewrite(tmp_path, lambda fields, value=value: fields.__setitem__(name, value))
        assert_refused(tmp_path, "manifest.json", name)


@pytest.mark.parametrize("name", SHARD_FIELDS)
def test_every_field_of_a_shard_is_there_and_typed(sound, tmp_path, name):
    copy_of(sound, tmp_path)
    rewrite(tmp_path, lambda fields: fields["shards"][1].pop(name))
    assert_refused(tmp_path, "manifest.json", name)
    for value in WRONG:
        copy_of(sound, tmp_path)
        rewrite(tmp_path, set_shard(name, value))
        assert_refused(tmp_path, "manifest.json", name)


@pytest.mark.parametrize(
    "change",
    [
        set_shard("name", "../../x"),
        set_shard("name", "/etc/passwd"),
        set_shard("name", "sub/shard-00001-of-00003.array_record"),
        set_shard("name", "shard-00000-of-00003.array_record"),
        set_shard("name", "shard-00001-of-00003.array_record\n"),
        set_shard("extra", 1),
        set_shard("num_records", 6),
        set_shard("num_tokens", 0),
        set_shard("digest", "0" * 31),
        lambda fields: fields["shards"].clear(),
        lambda fields: fields["shards"].append(fields["shards"][0]),
        lambda fields: fields["shards"].insert(1, fields["shards"][0]),
        lambda fields: fields["shards"].reverse(),
        lambda fields: fields["shards"].__setitem__(0, "shard"),
        lambda fields: fields["shards"].__setitem__(0, None),
        lambda fields: fields.__setitem__("extra", 1),
        lambda fields: fields.__setitem__("temperatures", [1.0, 1.0]),
        lambda fields: fields.__setitem__("temperatures", [0.0]),
        lambda fields: fields.__setitem__("temperatures", [1.0] * 1000),
        lambda fields: fields.__setitem__("temperatures", ["1.0"]),
        lambda fields: fields.__setitem__("missing", ["entropy", "entropy"]),
        lambda fields: fields.__setitem__("missing", ["everything"]),
        lambda fields: fields.__setitem__("kind", "whole"),
        lambda fields: fields.__setitem__("k", VOCAB_SIZE + 1),
        lambda fields: fields.update(kind="dense"),
        lambda fields: fields.update(kind="sampled"),
        lambda fields: fields.update(num_rounds=1),
        lambda fields: fields.__setitem__("num_records", 14),
        lambda fields: fields.__setitem__("versions", {"jax": 1}),
    ],
    ids=range(29),
)
def test_what_no_cache_can_be_is_refused(sound, tmp_path, change):
    copy_of(sound, tmp_path)
    rewrite(tmp_path, change)
    assert_refused(tmp_path, "manifest.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 3_000_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        DEEP.encode(),
        b'{"format_version": 2, "k": ' + b"9" * 5_000 + b"}",
        b'{"format_version": NaN}',
        b'{"format_version": 2, "k": Infinity}',
        b'{"format_version": 2, "format_version": 2}',
        b'{"format_version": 2, "a": {"b": 1, "b": 2}}',
        b'{"format_version": [2]}',
        b'{"format_version": true}',
        b'{"format_version": 2, "\\ud800": 1}',
        b'{"format_version": "2\\n\\u001b[31m"}',
        b" " * (limits.MAX_JSON_BYTES + 1),
    ],
    ids=lambda content: content[:30].decode(errors="replace"),
)
def test_what_is_no_manifest_is_refused(sound, tmp_path, content):
    copy_of(sound, tmp_path)
    (tmp_path / manifest_lib.MANIFEST).write_bytes(content)
    assert_refused(tmp_path, "manifest.json")


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "device", "outside", "loop", "gone"]
)
@pytest.mark.parametrize("name", ["shard-00001-of-00003.array_record", "manifest.json"])
def test_what_is_no_plain_file_of_the_folder_is_refused(
    sound, tmp_path, name, kind, indexed
):
    folder = tmp_path / "cache"
    folder.mkdir()
    copy_of(sound, folder)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if not indexed:
        (folder / cache_lib.INDEX).unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "outside":
        (tmp_path / "out").write_bytes(content)
        path.symlink_to(tmp_path / "out")
    elif kind == "loop":
        path.symlink_to(path)
    assert_refused(folder, name)


def write_shard(path, payloads, manifest, *, keys=None, change=None, index=None):
    """Write a shard of any payloads, with checksums that are right."""
    keys = [bytes([i + 1] * 16) for i in range(len(payloads))] if keys is None else keys
    writer = array_record_module.ArrayRecordWriter(
        str(path), "group_size:1,uncompressed"
    )

    def write(key, payload):
        crc = zlib.crc32(payload, zlib.crc32(key))
        writer.write(struct.pack("<I", crc) + payload)

    digest = hashlib.blake2b(digest_size=16)
    for key, payload in zip(keys, payloads, strict=True):
        write(key, payload)
        digest.update(key + payload)
    fields = {
        "keys": len(keys),
        "num_tokens": 3 * len(keys),
        "digest": digest.hexdigest(),
        "identity": manifest.identity(),
        "order": 3,
    }
    order = byte_planes.pack_integers(np.arange(3, dtype=np.uint32), num_bytes=4)
    if change:
        fields, order = change(fields, order)
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    if index is None:
        index = struct.pack("<I", len(header)) + header + b"".join(keys) + order
    write(b"", index)
    writer.close()
    return digest.hexdigest()


def write_cache(folder, payloads, manifest=MANIFEST, **changes):
    """Write a cache of one shard of any payloads, all checksums right."""
    digest = write_shard(folder / SHARD, payloads, manifest, **changes)
    shard = cache_lib.Shard(
        name=SHARD,
        num_records=len(payloads),
        num_tokens=3 * len(payloads),
        digest=digest,
        checksum=hashlib.blake2b((folder / SHARD).read_bytes()).hexdigest(),
    )
    manifest_lib.write_manifest(
        folder, dataclasses.replace(manifest, shards=(shard,), versions={"a": "1"})
    )


CODER = IdCoder(np.arange(3), VOCAB_SIZE)


def payload(manifest=MANIFEST, **changes):
    k = None if manifest.kind == "dense" else K
    record = make_record(np.random.default_rng(0), 3, k=k)._replace(**changes)
    return codec.encode(record, CODER, temperatures=TEMPERATURES)


def with_frame(data, number, frame):
    """Replace frame `number` of an encoded record."""
    at, frames = 12, []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        frames.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    frames[number] = frame
    packed = b"".join(struct.pack("<I", len(each)) + each for each in frames)
    return data[:12] + packed


def frame_of(size):
    """A frame of `size` zeros, which it says."""
    zeros = bytes(2**20)
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    pieces = [compressor.compress(zeros) for _ in range(size // len(zeros))]
    return b"".join([*pieces, compressor.flush()])


def declares(size):
    """An empty frame that says it has `size` bytes."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


BOMB = frame_of(2**30)


def header(num_tokens, num_pairs, num_temperatures=2, num_rounds=0):
    sizes = (num_tokens, num_pairs, num_temperatures, num_rounds)
    return struct.pack("<IIHH", *sizes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 11,
        header(3, K),
        header(2**20, 2**16) + payload()[12:],
        header(2**32 - 1, 2**32 - 1) + payload()[12:],
        header(2**32 - 1, 0) + payload()[12:],
        header(2**31, K) + payload()[12:],
        header(3, 2**32 - 1) + payload()[12:],
        header(3, K, 2**16 - 1) + payload()[12:],
        header(3, K, 2, 2**16 - 1) + payload()[12:],
        header(3, K, 2, 1) + payload()[12:],
        header(3, K, 0) + payload()[12:],
        header(3, K + 1) + payload()[12:],
        header(2, K) + payload()[12:],
        header(4, K) + payload()[12:],
        with_frame(payload(), 0, BOMB),
        with_frame(payload(), 4, BOMB),
        with_frame(payload(), 3, BOMB),
        with_frame(payload(), 0, declares(2**32)),
        with_frame(payload(), 0, declares(2**40)),
        with_frame(payload(), 0, declares(2**64 - 1)),
        with_frame(payload(), 0, declares(3 * K)),
        with_frame(payload(), 3, declares(2**40)),
        with_frame(payload(), 0, b""),
        with_frame(payload(), 0, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"),
        payload() + b"x",
        payload()[:-1],
        payload()[:12] + struct.pack("<I", 2**32 - 1) + payload()[16:],
    ],
    ids=range(28),
)
def test_records_that_lie_about_their_size_are_refused(tmp_path, data):
    write_cache(tmp_path, [payload(), data])
    assert_refused(tmp_path, SHARD, "record 1 of ")


def test_a_sound_cache_of_this_writer_is_read(tmp_path):
    write_cache(tmp_path, [payload(), payload()])
    read_all(tmp_path)
    dense = dataclasses.replace(DENSE, temperatures=TEMPERATURES)
    (tmp_path / "dense").mkdir()
    write_cache(tmp_path / "dense", [payload(DENSE)], dense)
    read_all(tmp_path / "dense")


def scalars(**changes):
    """A record with other numbers in its last planes, which `encode` would refuse."""
    record = make_record(np.random.default_rng(0), 3)
    for name, value in changes.items():
        getattr(record, name).flat[1] = value
    original, codec.validate = codec.validate, lambda *_, **__: None
    try:
        return codec.encode(record, CODER, temperatures=TEMPERATURES)
    finally:
        codec.validate = original


@pytest.mark.parametrize(
    "data",
    [
        scalars(entropy=np.nan),
        scalars(entropy=np.inf),
        scalars(target_log_probs=np.nan),
        scalars(target_log_probs=np.inf),
        scalars(log_z=np.nan),
    ],
    ids=range(5),
)
def test_numbers_that_are_none_are_refused(tmp_path, data):
    write_cache(tmp_path, [payload(), data])
    assert_refused(tmp_path, SHARD, "record 1 of ")


def fields_with(**changes):
    return lambda fields, order: (fields | changes, order)


def without(name):
    def change(fields, order):
        del fields[name]
        return fields, order

    return change


ORDER_FRAME = byte_planes.pack_integers(np.full(3, 2**31, np.uint32), num_bytes=4)


@pytest.mark.parametrize(
    "change",
    [
        fields_with(keys=2**40),
        fields_with(keys=1),
        fields_with(keys=-1),
        fields_with(keys="2"),
        fields_with(keys=True),
        fields_with(num_tokens=-1),
        fields_with(num_tokens=[]),
        fields_with(order=2**40),
        fields_with(order=2),
        fields_with(order=-1),
        fields_with(order=VOCAB_SIZE),
        fields_with(digest=7),
        fields_with(digest="0" * 32),
        fields_with(identity=[]),
        fields_with(identity={}),
        fields_with(identity={"vocab_size": 2**62}),
        fields_with(extra=1),
        without("keys"),
        without("order"),
        without("identity"),
        lambda fields, order: (fields, ORDER_FRAME),
        lambda fields, order: (fields, order[:-1]),
        lambda fields, order: (fields, order + b"x"),
        lambda fields, order: (fields, struct.pack("<I", len(BOMB)) + BOMB + order),
        lambda fields, order: (b"[" * 500_000, order),
        lambda fields, order: (b"NaN", order),
        lambda fields, order: (b"{}", order),
        lambda fields, order: (b"", order),
    ],
    ids=range(28),
)
def test_indices_that_lie_are_refused(tmp_path, change):
    write_cache(tmp_path, [payload(), payload()], change=change)
    assert_refused(tmp_path, SHARD)


@pytest.mark.parametrize("index", [b"", b"\xff" * 4, b"\xff" * 400, b"\0" * 400])
def test_what_is_no_index_is_refused(tmp_path, index):
    write_cache(tmp_path, [payload(), payload()], index=index)
    assert_refused(tmp_path, SHARD)


def test_a_key_that_comes_twice_in_a_shard_is_refused(tmp_path):
    write_cache(tmp_path, [payload(), payload()], keys=[KEY, KEY])
    assert_refused(tmp_path, SHARD)


def test_a_record_of_another_size_is_not_written_either(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PAIRS", 20)
    with pytest.raises(ValueError, match=r"at most 20 are stored of one: lower data"):
        payload()


def test_a_shard_of_too_many_records_is_neither_written_nor_read(tmp_path, monkeypatch):
    _write_cache(tmp_path)
    monkeypatch.setattr(limits, "MAX_SHARD_RECORDS", 3)
    with pytest.raises(ValueError, match=r"more than 3 records of a shard: lower"):
        cache_lib.write_shard(tmp_path / "b", 0, 1, iter(_pairs(0)), MANIFEST)
    (tmp_path / cache_lib.INDEX).unlink()
    assert_refused(tmp_path, "shard-00000-of-00003", "3 records of a file are read")


def test_a_compressed_shard_is_refused_before_it_is_inflated(sound, tmp_path):
    """ArrayRecord's own compression: another way to a bomb, which we never write."""
    copy_of(sound, tmp_path)
    path = tmp_path / "shard-00001-of-00003.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:1")
    for _ in range(6):
        writer.write(bytes(2**28))
    writer.close()
    (tmp_path / cache_lib.INDEX).unlink()
    checksum = hashlib.blake2b(path.read_bytes()).hexdigest()
    rewrite(tmp_path, set_shard("checksum", checksum))
    assert_refused(tmp_path, path.name)


def test_places_out_of_the_cache_are_refused(tmp_path):
    """An index whose checksum is right, of places that do not exist."""
    pairs = _write_cache(tmp_path)
    cache = cache_lib.load_cache(tmp_path)
    index = cache._index
    for name, value in (("_shard", 3), ("_shard", 2**31), ("_row", 5), ("_row", 2**31)):
        original = getattr(index, name)
        setattr(index, name, np.full_like(original, value))
        with pytest.raises(
            ValueError, match=r"index.bin is damaged|record \d+ of"
        ) as e:
            cache.read(pairs[0][0])
        assert "\n" not in str(e.value)
        setattr(index, name, original)


def test_labelling_does_not_wait_for_a_pipe(tmp_path):
    path = tmp_path / cache_lib.shard_name(0, 2)
    os.mkfifo(path)
    assert cache_lib.complete_shards(tmp_path, MANIFEST) == set()
    cache_lib.write_shard(tmp_path, 0, 2, _pairs(0), MANIFEST)
    assert cache_lib.complete_shards(tmp_path, MANIFEST) == {0}


def test_a_folder_that_may_not_be_read_is_not_an_unfinished_cache(
    tmp_path, monkeypatch
):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(PermissionError, match=r"denied: .*manifest\.json"):
        manifest_lib.read_manifest(tmp_path)
