"""The shards of a teacher cache: self-describing ArrayRecord files.

The last record of a shard is its index: keys, token counts, a digest of the records,
the order of ids they are coded with and the identity of the labelling run. So a shard
can be checked before there is a manifest, and labelling that was killed continues where
it stopped.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from kdjax.runtime import files, limits, untrusted
from kdjax.teacher import byte_planes, codec
from kdjax.teacher.array_record import ArrayRecordReader, Chunks
from kdjax.teacher.byte_planes import IdCoder
from kdjax.teacher.codec import Record
from kdjax.teacher.key_index import KEY_BYTES
from kdjax.teacher.manifest import MANIFEST, Manifest, check_identity, shard_name

_ORDER_TOKENS = 4096  # the order of ids is made from so many tokens of the shard
_BATCH_VALUES = 1 << 16  # numbers that a thread encodes at a time
_CRC = struct.Struct("<I")  # crc32 of key and payload, before it, in every record
_LENGTH = struct.Struct("<I")  # bytes of the JSON part of an index
_WRITER_OPTIONS = "group_size:1,uncompressed"  # records are compressed already
_FIELDS = {
    "keys": int,
    "num_tokens": int,
    "digest": str,
    "identity": dict,
    "order": int,
}


class ShardIndex(NamedTuple):
    """Index of a shard, its last record."""

    keys: tuple[bytes, ...]
    num_tokens: int
    digest: str
    identity: dict[str, Any]
    coder: IdCoder


class DamagedShardError(ValueError):
    """Mismatch of a shard with its checksums; the message names file and record."""


def write_shard(
    folder: str | os.PathLike,
    index: int,
    num_shards: int,
    records: Iterable[tuple[bytes, Record]],
    manifest: Manifest,
    *,
    num_threads: int = 1,
) -> None:
    """Write one shard atomically: temporary file, fsync, rename.

    The same records give the same bytes, whatever the number of threads.

    Args:
      folder: the cache; made if it does not exist.
      index: of this shard, from 0.
      num_shards: of the whole cache.
      records: (16-byte key, record) pairs; consumed as a stream.
      manifest: of the cache; its `shards` are not used.
      num_threads: that encode records beside the caller's, which makes and writes them.

    Raises:
      ValueError: a record that does not fit the manifest, or a repeated key.
    """
    coder, records = _with_coder(records, manifest.vocab_size)
    keys: dict[bytes, None] = {}

    def checked() -> Iterator[tuple[bytes, Record]]:
        for key, record in records:
            check_record(key, record, manifest, seen=keys)
            keys[key] = None
            yield key, record

    def encode(batch: list[tuple[bytes, Record]]) -> list[tuple[bytes, bytes, int]]:
        return [
            (
                key,
                codec.encode(record, coder, temperatures=manifest.temperatures),
                record.num_tokens,
            )
            for key, record in batch
        ]

    with contextlib.closing(
        _map_in_order(encode, _batches(checked()), num_threads)
    ) as encoded:
        payloads = itertools.chain.from_iterable(encoded)
        _write(folder, index, num_shards, payloads, coder, manifest)


def _batches(
    records: Iterable[tuple[bytes, Record]],
) -> Iterator[list[tuple[bytes, Record]]]:
    """Group records, so that a thread has work for some milliseconds."""
    batch: list[tuple[bytes, Record]] = []
    num_values = 0
    for pair in records:
        batch.append(pair)
        num_values += pair[1].ids.size + pair[1].log_probs.size
        if num_values >= _BATCH_VALUES:
            yield batch
            batch, num_values = [], 0
    if batch:
        yield batch


def _map_in_order(
    function: Callable[[Any], Any], items: Iterator[Any], num_threads: int
) -> Generator[Any]:
    """Yield function(item) in the items' order, a few items ahead in threads."""
    with futures.ThreadPoolExecutor(num_threads, "encode") as pool:
        pending: collections.deque[futures.Future] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def copy_shard(
    source: pathlib.Path,
    folder: str | os.PathLike,
    index: int,
    num_shards: int,
    manifest: Manifest,
) -> None:
    """Write the records of the shard at `source`, byte for byte, into another cache."""
    reader, entry = open_reader(source), check_shard(source)

    def payloads() -> Iterator[tuple[bytes, bytes, int]]:
        for row, key in enumerate(entry.keys):
            payload = read_payload(reader, source, row, key=key)
            yield key, payload, codec.read_sizes(payload).num_tokens

    _write(folder, index, num_shards, payloads(), entry.coder, manifest)


def _write(
    folder: str | os.PathLike,
    index: int,
    num_shards: int,
    payloads: Iterable[tuple[bytes, bytes, int]],
    coder: IdCoder,
    manifest: Manifest,
) -> None:
    """Write records of (key, bytes, number of tokens), then the index."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_name(index, num_shards)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    keys: list[bytes] = []
    total, digest = 0, hashlib.blake2b(digest_size=16)
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    try:
        for key, payload, num_tokens in payloads:
            if len(keys) == limits.MAX_SHARD_RECORDS:
                raise ValueError(
                    f"more than {limits.MAX_SHARD_RECORDS} records of a shard: lower "
                    "cache.shard_size"
                )
            keys.append(key)
            total += num_tokens
            digest.update(key + payload)
            writer.write(_CRC.pack(_crc(key, payload)) + payload)
        payload = _pack_index(
            ShardIndex(
                tuple(keys), total, digest.hexdigest(), manifest.identity(), coder
            )
        )
        writer.write(_CRC.pack(_crc(b"", payload)) + payload)
        writer.close()
        files.sync(temporary)
        temporary.rename(path)
        files.sync(folder)
    finally:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)


def _with_coder(
    records: Iterable[tuple[bytes, Record]], vocab_size: int
) -> tuple[IdCoder, Iterator[tuple[bytes, Record]]]:
    """Build the id coder from the first tokens; return it and all records."""
    records = iter(records)
    first, num_tokens = [], 0
    for pair in records:
        first.append(pair)
        num_tokens += pair[1].num_tokens
        # A dense record is large, and has no ids but its targets.
        if num_tokens >= (64 if pair[1].kind == "dense" else _ORDER_TOKENS):
            break
    used = np.concatenate(
        [np.r_[r.target_ids, r.ids.ravel()] for _, r in first] or [[0]]
    )
    # What leaves the vocabulary is refused, by name, when its record is written.
    coder = IdCoder.from_ids(used[used < vocab_size], vocab_size)
    return coder, itertools.chain(first, records)


def complete_shards(
    folder: str | os.PathLike, manifest: Manifest | None = None
) -> set[int]:
    """Return the indices of the complete shards; every record is checked.

    Damaged shards are not in it, so that labelling writes them again. Unfinished
    ones never are: they have another name.

    Raises:
      ValueError: a complete shard was labelled with something else than `manifest`
        says, or the shards belong to caches of different numbers of shards.
    """
    complete, totals = set(), set()
    for path in sorted(pathlib.Path(folder).glob("shard-*-of-*.array_record")):
        index, total = (int(part) for part in path.stem.split("-")[1::2])
        try:
            entry = check_shard(path)
        except DamagedShardError:
            continue
        if manifest is not None:
            check_identity(path, entry.identity, manifest)
        complete.add(index)
        totals.add(total)
    if len(totals) > 1:
        raise ValueError(
            f"folder={folder!s} holds shards of caches of {sorted(totals)} shards: "
            "empty it or label into another folder"
        )
    return complete


def _pack_index(entry: ShardIndex) -> bytes:
    fields = entry._asdict() | {"keys": len(entry.keys)}
    coder = fields.pop("coder")
    header = json.dumps(fields | {"order": len(coder.order)}, sort_keys=True).encode()
    order = byte_planes.pack_integers(coder.order, num_bytes=4)
    return _LENGTH.pack(len(header)) + header + b"".join(entry.keys) + order


def read_index(
    path: pathlib.Path, reader: ArrayRecordReader | None = None
) -> ShardIndex:
    """Read the index of the shard at `path`, through `reader` if it is open."""
    reader = reader or open_reader(path)
    num_records = reader.num_records() - 1
    payload = read_payload(reader, path, num_records, key=b"")
    try:
        return _unpack_index(payload, num_records, path)
    except codec.DECODE_ERRORS as error:
        raise DamagedShardError(damage_message(path, None)) from error


def _unpack_index(payload: bytes, num_records: int, path: pathlib.Path) -> ShardIndex:
    start = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
    end = start + KEY_BYTES * num_records
    if end > len(payload):
        raise ValueError(f"{len(payload)} bytes for {num_records} keys")
    fields = untrusted.parse_json(payload[_LENGTH.size : start], str(path))
    if (
        not isinstance(fields, dict)
        or {name: type(value) for name, value in fields.items()} != _FIELDS
    ):
        raise ValueError(f"needed the fields {', '.join(_FIELDS)}")
    if fields.pop("keys") != num_records or fields["num_tokens"] < 0:
        raise ValueError(f"{num_records} records, its index says another number")
    keys = [payload[i : i + KEY_BYTES] for i in range(start, end, KEY_BYTES)]
    if len(set(keys)) != len(keys):
        raise ValueError("a key comes twice")
    num_order, vocab_size = fields.pop("order"), fields["identity"].get("vocab_size")
    if type(vocab_size) is not int or not 0 <= num_order <= vocab_size:
        raise ValueError(f"an order of {num_order} of {vocab_size} ids")
    frames = byte_planes.FrameReader(payload, end)
    order = byte_planes.unpack_integers(frames, num_order, num_bytes=4)
    frames.check_end()
    coder = IdCoder(order, vocab_size)
    return ShardIndex(keys=tuple(keys), coder=coder, **fields)


def check_shard(path: pathlib.Path) -> ShardIndex:
    """Read and check every record of a shard and return its index."""
    reader = open_reader(path)
    entry = read_index(path, reader)
    digest = hashlib.blake2b(digest_size=16)
    for row, key in enumerate(entry.keys):
        digest.update(key + read_payload(reader, path, row, key=key))
    if digest.hexdigest() != entry.digest:
        raise DamagedShardError(damage_message(path, None))
    return entry


def open_reader(path: pathlib.Path, chunks: Chunks | None = None) -> ArrayRecordReader:
    """Open a shard for random access; the reader may be shared by threads.

    Args:
      path: of the shard.
      chunks: of an earlier reader of the same file; None = read its footer.
    """
    try:
        reader = ArrayRecordReader(path, chunks)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: start labelling again, it writes it"
        ) from None
    except ValueError as error:
        raise DamagedShardError(f"{damage_message(path, None)} ({error})") from None
    if not reader.num_records():
        raise DamagedShardError(damage_message(path, None))
    return reader


def _crc(key: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(key))


def read_payload(
    reader: ArrayRecordReader, path: pathlib.Path, row: int, *, key: bytes
) -> bytes:
    """Read and check the bytes of record `row`, whose key is `key`."""
    try:
        (data,) = reader.read([row])
    except ValueError as error:
        raise DamagedShardError(damage_message(path, row)) from error
    payload = data[_CRC.size :]
    if len(data) < _CRC.size or _CRC.unpack_from(data)[0] != _crc(key, payload):
        raise DamagedShardError(damage_message(path, row))
    return payload


def damage_message(path: pathlib.Path, row: int | None) -> str:
    """Return the error message for a damaged file (`row` None) or record."""
    record = "" if row is None else f"record {row} of "
    return (
        f"{record}{path} is damaged: delete the file and {MANIFEST}, then label again; "
        "the other shards are kept"
    )


def check_record(
    key: bytes, record: Record, manifest: Manifest, *, seen: dict[bytes, None]
) -> None:
    """Raise ValueError if a record does not belong in the cache of `manifest`."""
    if len(key) != KEY_BYTES or key in seen:
        raise ValueError(
            f"key={key.hex()} must be {KEY_BYTES} bytes and come once in a shard"
        )
    if record.kind != manifest.kind:
        raise ValueError(
            f"key={key.hex()}: a record of kind {record.kind!r} in a cache of kind "
            f"{manifest.kind!r}"
        )
    expected = {"k": manifest.k, "temperatures": len(manifest.temperatures)}
    actual = {"k": manifest.k, "temperatures": record.log_z.shape[1]}
    if record.kind == "sampled":
        expected["rounds"], actual["rounds"] = manifest.num_rounds, record.ids.shape[2]
        if record.num_tokens:
            actual["k"] = int(record.counts[0, 0, 0].sum())
    else:
        actual["k"] = record.log_probs.shape[1]
    if expected != actual:
        raise ValueError(
            f"key={key.hex()}: the record has {actual}, the manifest says {expected}"
        )
