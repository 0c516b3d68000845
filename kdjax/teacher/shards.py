"""The shards of a teacher cache: ArrayRecord files that can be judged by themselves.

The last record of a shard is its index: keys, token counts, a digest of the records
and what the shard was labelled with. So a shard is known to be whole or not before
there is a manifest, and labelling that was killed continues where it stopped.
"""

import hashlib
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from array_record.python import array_record_module

from kdjax.teacher import codec
from kdjax.teacher.codec import Record
from kdjax.teacher.manifest import MANIFEST, Manifest, refuse_other_identity, sync

KEY_BYTES = 16
_CRC = struct.Struct("<I")  # crc32 of the payload, before it, in every record
_LENGTH = struct.Struct("<I")  # bytes of the JSON part of an index
_WRITER_OPTIONS = "group_size:1,uncompressed"  # records are compressed already
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access
_READER_BUFFER = 1 << 16  # bytes, for each open shard


class Index(NamedTuple):
    """The last record of a shard."""

    keys: tuple[bytes, ...]
    num_tokens: int
    digest: str
    identity: dict[str, Any]


class DamagedShardError(ValueError):
    """A shard does not hold what was written; the message names file and record."""


def shard_name(index: int, num_shards: int) -> str:
    """Return the file name of shard `index`, counted from 0."""
    return f"shard-{index:05d}-of-{num_shards:05d}.array_record"


def write_shard(
    folder: str | os.PathLike,
    index: int,
    num_shards: int,
    records: Iterable[tuple[bytes, Record]],
    manifest: Manifest,
) -> None:
    """Write one shard whole: temporary file, fsync, rename.

    The same records give the same bytes.

    Args:
        folder: the cache; made if it does not exist.
        index: of this shard, from 0.
        num_shards: of the whole cache.
        records: (16-byte key, record) pairs; consumed as a stream.
        manifest: of the cache; its `shards` are not used.

    Raises:
        ValueError: a record that does not fit the manifest, or a repeated key.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_name(index, num_shards)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    keys: dict[bytes, None] = {}
    num_tokens, digest = 0, hashlib.blake2b(digest_size=16)
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    try:
        for key, record in records:
            check_record(key, record, manifest, known=keys)
            keys[key] = None
            num_tokens += len(record.log_probs)
            payload = codec.encode(record, vocab_size=manifest.vocab_size)
            digest.update(key + payload)
            writer.write(_CRC.pack(zlib.crc32(payload)) + payload)
        entry = Index(tuple(keys), num_tokens, digest.hexdigest(), manifest.identity())
        payload = _pack_index(entry)
        writer.write(_CRC.pack(zlib.crc32(payload)) + payload)
        writer.close()
        sync(temporary)
        temporary.rename(path)
        sync(folder)
    finally:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)


def complete_shards(
    folder: str | os.PathLike, manifest: Manifest | None = None
) -> set[int]:
    """Return the indices of the shards that are whole; every record is checked.

    Damaged shards are not in it, so that labelling writes them again. Unfinished
    ones never are: they have another name.

    Raises:
        ValueError: a whole shard was labelled with something else than `manifest`
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
            refuse_other_identity(path, entry.identity, manifest)
        complete.add(index)
        totals.add(total)
    if len(totals) > 1:
        raise ValueError(
            f"folder={folder!s} holds shards of caches of {sorted(totals)} shards: "
            "empty it or label into another folder"
        )
    return complete


def _pack_index(entry: Index) -> bytes:
    header = json.dumps(entry._asdict() | {"keys": len(entry.keys)}, sort_keys=True)
    return _LENGTH.pack(len(header)) + header.encode() + b"".join(entry.keys)


def read_index(path: pathlib.Path, reader: Any | None = None) -> Index:
    """Return the index of the shard at `path`, opened here or before."""
    reader = reader or open_reader(path)
    payload = read_payload(reader, path, reader.num_records() - 1)
    start = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
    entry = json.loads(payload[_LENGTH.size : start])
    keys = tuple(
        payload[offset : offset + KEY_BYTES]
        for offset in range(start, len(payload), KEY_BYTES)
    )
    if not len(keys) == entry["keys"] == reader.num_records() - 1:
        raise DamagedShardError(damage(path, None))
    return Index(**entry | {"keys": keys})


def check_shard(path: pathlib.Path) -> Index:
    """Return the index after reading every record of the shard."""
    reader = open_reader(path)
    entry = read_index(path, reader)
    digest = hashlib.blake2b(digest_size=16)
    for row, key in enumerate(entry.keys):
        digest.update(key + read_payload(reader, path, row))
    if digest.hexdigest() != entry.digest:
        raise DamagedShardError(damage(path, None))
    return entry


def open_reader(path: pathlib.Path) -> Any:
    """Open a shard for random access; the reader may be shared by threads."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: start labelling again, it writes it")
    try:
        reader = array_record_module.ArrayRecordReader(
            str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
        )
        if reader.ok() and reader.num_records():
            return reader
    except (RuntimeError, ValueError) as error:
        raise DamagedShardError(damage(path, None)) from error
    raise DamagedShardError(damage(path, None))


def read_payload(reader: Any, path: pathlib.Path, row: int) -> bytes:
    """Return the bytes of record `row`, checked."""
    try:
        (data,) = reader.read([row])
    except (RuntimeError, ValueError, IndexError) as error:
        raise DamagedShardError(damage(path, row)) from error
    payload = data[_CRC.size :]
    if _CRC.unpack_from(data)[0] != zlib.crc32(payload):
        raise DamagedShardError(damage(path, row))
    return payload


def damage(path: pathlib.Path, row: int | None) -> str:
    """Return the message of a damaged file (`row` None) or record."""
    where = "" if row is None else f"record {row} of "
    return (
        f"{where}{path} is damaged: delete the file and {MANIFEST}, then label again; "
        "the other shards are kept"
    )


def check_record(
    key: bytes, record: Record, manifest: Manifest, *, known: dict[bytes, None]
) -> None:
    """Raise ValueError if a record does not belong in the cache of `manifest`."""
    if len(key) != KEY_BYTES or key in known:
        raise ValueError(
            f"key={key.hex()} must be {KEY_BYTES} bytes and come once in a shard"
        )
    dense = manifest.kind == "dense"
    wanted = (manifest.k, len(manifest.temperatures), dense)
    found = (record.log_probs.shape[1], record.log_z.shape[1], record.ids is None)
    if wanted != found:
        raise ValueError(
            f"key={key.hex()}: (k, number of temperatures, dense) is {found} in the "
            f"record and {wanted} in the manifest"
        )
