"""Prepared data: segments on disk, made once and read one at a time.

A store is a folder of shards and a manifest, `manifest.json`. A shard holds the
segments of consecutive examples; it is a pure function of them, so that a store that
was killed at any point and continued has the same bytes. Shards are made by worker
processes, written atomically, and read by their columns (lengths, views, keys: mapped
into memory) and their records (a segment each: read when it is used, which leaves
resident memory as it is).

A shard is the eight bytes "KDJAXSEG", the length of the header (uint32), blake2b-128 of
the header, the header (JSON), columns, records. A record is `_HEAD`, the key, prompt,
prefix and target ids (int32), the loss mask (bits, where there is one) and the
example's id (UTF-8); its first number is the CRC-32 of the rest. All is little-endian.
"""

import bisect
import collections
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import mmap
import os
import pathlib
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8, UInt64

from kdjax.config import DataConfig
from kdjax.data import documents, selection, views
from kdjax.data.example import Example
from kdjax.data.segments import Segments
from kdjax.data.tokenizer import fingerprint
from kdjax.data.views import Segment, SegmentCounts
from kdjax.runtime import files, workers

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_CHARACTERS = 2**25  # of texts: a shard has no more, but for its last example

_MAGIC = b"KDJAXSEG"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 16
_START = len(_MAGIC) + _LENGTH.size + _DIGEST_BYTES  # of the header
# CRC-32, bytes of the id, tokens of prompt, prefix and target, view, mask, 0, weight
_HEAD = struct.Struct("<IIIIIiIId")
_KEY_BYTES = 16
_UNIT = 4  # records start at multiples of it
_MAX_OPEN = 256  # files held open at a time: a process may have 1,024
_BLOCK = 2**24  # bytes of a source file that one thread hashes
# Columns of a shard, an item per segment, and their types on disk.
_COLUMNS = {
    "keys": "V16",
    "digests": "<u8",  # of each example that was read: `selection.content_digest`
    "starts": "<u4",  # of records, in units
    "prompt_lengths": "<i4",
    "prefix_lengths": "<i4",
    "target_lengths": "<i4",
    "loss_lengths": "<i4",
    "prompt_ends": "<i4",
    "views": "<i2",
    "firsts": "u1",  # 1 = another (example, view) than the segment before it
}
# Fields of the data's config that do not change what is in a store, or are paths.
_FREE = ("prepared", "num_workers", "tokenizer")
# Those that name files, which count by their content, for each split.
SOURCES = {
    "train": ("path", "rationales", "counterfactuals", "labels"),
    "eval": ("path", "eval_path", "eval_rationales"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What decides the segments of examples."""

    split: str  # "train" or "eval"
    views: tuple[str, ...]  # names
    tokenizer: Any
    config: DataConfig

    def identity(self, source: Mapping[str, str]) -> dict[str, Any]:
        """Return all that decides the content of a store.

        The code that makes segments is part of it, and so are the libraries that
        tokenise: a store of another version is not this one.

        Args:
          source: hash of what each of `SOURCES` names, where it names something.
        """
        config = dataclasses.asdict(self.config)
        for name in _FREE:
            del config[name]
        for name in {*SOURCES["train"], *SOURCES["eval"]}:
            config[name] = bool(config[name])
        return {
            "format_version": FORMAT_VERSION,
            "split": self.split,
            "views": list(self.views),
            "tokenizer": fingerprint(self.tokenizer),
            "chat_template": self.tokenizer.chat_template,
            "source": dict(source),
            "data": config,
            "code": _code_digest(),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("tokenizers", "transformers")
            },
        }


class Chunk(NamedTuple):
    """Consecutive examples: those of a shard."""

    number: int  # of the shard, from 0
    start: int  # number of the first one
    examples: list[Example]


class SegmentedChunk(NamedTuple):
    """The segments of a chunk, and what is known of them."""

    segments: list[Segment]
    counts: SegmentCounts
    selection: selection.Selection
    digests: UInt64[np.ndarray, " n"]  # `selection.content_digest` of its examples


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Numbers of a split: how it was selected and cut."""

    num_examples: int = 0
    num_used: int = 0  # of them, those that are not left out
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    counts: SegmentCounts = dataclasses.field(default_factory=SegmentCounts)


class DamagedStoreError(ValueError):
    """Mismatch of a store with its checksums; the message names the file."""


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of an identity: 16 hexadecimal digits of its hash."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_prepared(folder: pathlib.Path) -> bool:
    """Return True if a store is finished."""
    return (folder / MANIFEST).is_file()


def chunk(examples: Iterable[Example], shard_size: int) -> Iterator[Chunk]:
    """Yield examples in chunks, by their number and the length of their texts."""
    current: list[Example] = []
    number = start = num_characters = 0
    for example in examples:
        current.append(example)
        num_characters += _num_characters(example)
        if len(current) >= shard_size or num_characters >= SHARD_CHARACTERS:
            yield Chunk(number, start, current)
            number, start = number + 1, start + len(current)
            current, num_characters = [], 0
    if current:
        yield Chunk(number, start, current)


def _num_characters(example: Example) -> int:
    num = len(example.question) + len(example.answer) + len(example.rationale)
    num += len(example.text) + sum(map(len, example.counterfactuals))
    return num + sum(len(str(message)) for message in example.messages)


def segment_chunk(
    recipe: Recipe, chunk: Chunk, *, partial: bool = False
) -> SegmentedChunk:
    """Select the examples of a chunk and tokenise them.

    Args:
      recipe: of the split.
      chunk: its examples.
      partial: the chunk is not all of the split: that nothing stays of it is no error.

    Raises:
      ValueError: an error of the data; of a partial chunk it says which examples.
    """
    config = recipe.config
    digests = selection.content_digests(chunk.examples)
    try:
        selected = selection.select(
            chunk.examples, recipe.views, recipe.split, config, partial=partial
        )
        segments, counts = documents.make_segments(
            selected.examples, recipe.views, recipe.tokenizer, config
        )
    except ValueError as error:
        if not partial:
            raise
        stop = chunk.start + len(chunk.examples)
        raise ValueError(
            f"{recipe.split} examples {chunk.start + 1} to {stop}: {error}"
        ) from error
    return SegmentedChunk(segments, counts, selected, digests)


def report_of(
    recipe: Recipe, selections: Sequence[selection.Selection], counts: SegmentCounts
) -> Report:
    """Add up the selections of the chunks of a split.

    Raises:
      ValueError: no example stays.
    """
    whole = selection.combine(selections, recipe.split, recipe.config)
    return Report(
        num_examples=whole.num_examples,
        num_used=whole.num_labelled - sum(whole.missing.values()),
        labels=whole.labels,
        notes=whole.notes,
        counts=counts,
    )


# Building


def build(
    folder: pathlib.Path,
    recipe: Recipe,
    identity: Mapping[str, Any],
    chunks: Iterable[Chunk],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    advance: Callable[[int], None] = lambda num_examples: None,
) -> int:
    """Write the shards of a store that are not there; killed anywhere, it continues.

    Args:
      folder: of the store.
      recipe: of its segments.
      identity: `recipe.identity` with the examples' source.
      chunks: of all examples; shard i is written by process i modulo their number.
      process_index: of this process.
      num_processes: that write, each on its own.
      advance: called with the number of examples of each finished shard.

    Returns:
      The number of shards of the whole store.

    Raises:
      ValueError: an error of the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, num_shards = key_of(identity), 0

    def tasks() -> Iterator[Chunk]:
        nonlocal num_shards
        for part in chunks:
            num_shards += 1
            if part.number % num_processes != process_index:
                continue
            if _is_complete(folder / shard_name(part.number), key, part):
                advance(len(part.examples))
                continue
            yield part

    num_workers = recipe.config.num_workers or workers.num_cores()
    shared = (folder, recipe, key)
    results = workers.map_tasks(_write_chunk, shared, tasks(), num_workers=num_workers)
    for num_examples in results:
        advance(num_examples)
    return num_shards


def _write_chunk(shared: tuple[pathlib.Path, Recipe, str], part: Chunk) -> int:
    """Write the shard of a chunk; return its number of examples."""
    folder, recipe, key = shared
    made = segment_chunk(recipe, part, partial=True)
    content = encode_shard(made, key, part.number)
    files.write_atomically(folder / shard_name(part.number), content)
    return len(part.examples)


def shard_name(index: int) -> str:
    """Return the file name of a shard, counted from 0."""
    return f"shard-{index:05d}.segments"


def encode_shard(made: SegmentedChunk, key: str, index: int) -> bytes:
    """Return the bytes of a shard.

    Args:
      made: its segments.
      key: of the store's identity.
      index: of the shard.
    """
    segments = made.segments
    records = io.BytesIO()
    starts, firsts, before = [], [], None
    for segment in segments:
        starts.append(records.tell() // _UNIT)
        records.write(_encode_record(segment))
        pair = (segment.example_id, segment.view)
        firsts.append(pair != before)
        before = pair
    values: dict[str, Any] = {
        "keys": np.frombuffer(b"".join(s.key for s in segments), "V16"),
        "digests": made.digests,
        "starts": starts,
        "prompt_lengths": [len(s.prompt_ids) for s in segments],
        "prefix_lengths": [len(s.prefix_ids) for s in segments],
        "target_lengths": [len(s.target_ids) for s in segments],
        "loss_lengths": [s.num_loss_tokens for s in segments],
        "prompt_ends": [
            int(s.prompt_ids[-1]) if len(s.prompt_ids) else -1 for s in segments
        ],
        "views": [s.view for s in segments],
        "firsts": firsts,
    }
    columns, layout = io.BytesIO(), {}
    for name, dtype in _COLUMNS.items():
        array = np.asarray(values[name], dtype)
        layout[name] = [columns.tell(), len(array)]
        columns.write(array.tobytes())
        columns.write(bytes(-columns.tell() % 8))
    selected = made.selection
    header = {
        "key": key,
        "index": index,
        "num_segments": len(segments),
        "num_tokens": sum(s.length + 1 for s in segments),
        "columns": layout,
        "columns_bytes": columns.tell(),
        "columns_checksum": _checksum(columns.getbuffer()),
        "records_bytes": records.tell(),
        "records_checksum": _checksum(records.getbuffer()),
        "num_examples": selected.num_examples,
        "labels": selected.labels,
        "missing": selected.missing,
        "num_labelled": selected.num_labelled,
        "counts": _counts_to_json(made.counts),
    }
    text = json.dumps(header).encode()
    text += b" " * (-(_START + len(text)) % 64)
    digest = hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
    head = _MAGIC + _LENGTH.pack(len(text)) + digest + text
    return b"".join((head, columns.getbuffer(), records.getbuffer()))


def _encode_record(segment: Segment) -> bytes:
    identifier = segment.example_id.encode()
    mask = b""
    if segment.loss_mask is not None:
        mask = np.packbits(segment.loss_mask).tobytes()
    ids = (segment.prompt_ids, segment.prefix_ids, segment.target_ids)
    head = _HEAD.pack(
        0,
        len(identifier),
        *map(len, ids),
        segment.view,
        segment.loss_mask is not None,
        0,
        segment.weight,
    )
    arrays = (np.asarray(array, "<i4").tobytes() for array in ids)
    content = b"".join((head[4:], segment.key, *arrays, mask, identifier))
    content += bytes(-len(content) % _UNIT)
    return _LENGTH.pack(zlib.crc32(content)) + content


def _decode_record(content: bytes) -> Segment:
    """Decode a record.

    Raises:
      ValueError: it is damaged.
    """
    if len(content) < _HEAD.size:
        raise ValueError("too short")
    head = _HEAD.unpack_from(content)
    crc, id_bytes, num_prompt, num_prefix, num_target, view, has_mask, _, weight = head
    if zlib.crc32(memoryview(content)[4:]) != crc:
        raise ValueError("another checksum")
    start = _HEAD.size + _KEY_BYTES
    stop = start + 4 * (num_prompt + num_prefix + num_target)
    ids = np.frombuffer(content, "<i4", (stop - start) // 4, start)
    mask = None
    if has_mask:
        bits = np.frombuffer(content, np.uint8, -(-num_target // 8), stop)
        mask = np.unpackbits(bits, count=num_target).astype(bool)
        stop += len(bits)
    return Segment(
        example_id=content[stop : stop + id_bytes].decode(),
        view=view,
        prompt_ids=ids[:num_prompt],
        target_ids=ids[num_prompt + num_prefix :],
        key=content[_HEAD.size : start],
        prefix_ids=ids[num_prompt : num_prompt + num_prefix],
        weight=weight,
        loss_mask=mask,
    )


def finish(
    folder: pathlib.Path, recipe: Recipe, identity: Mapping[str, Any], num_shards: int
) -> None:
    """Write the manifest of a store whose shards are all written.

    Raises:
      ValueError: no example stays, or a shard is missing or damaged.
    """
    key, shards, selections = key_of(identity), [], []
    counts = SegmentCounts()
    for index in range(num_shards):
        path = folder / shard_name(index)
        header, digest = _read_header(path)
        _check_header(path, header, key, index)
        shards.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "header": digest,
                "num_segments": header["num_segments"],
            }
        )
        counts = counts + _counts_from_json(header["counts"])
        selections.append(
            selection.Selection(
                examples=[],
                labels=header["labels"],
                notes=[],
                num_examples=header["num_examples"],
                num_labelled=header["num_labelled"],
                missing=header["missing"],
            )
        )
    report = report_of(recipe, selections, counts)
    fields = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "identity": identity,
        "report": {
            "num_examples": report.num_examples,
            "num_used": report.num_used,
            "labels": report.labels,
            "notes": report.notes,
            "counts": _counts_to_json(report.counts),
        },
        "shards": shards,
    }
    for leftover in folder.glob("*.tmp*"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    fields["checksum"] = _manifest_checksum(fields)
    files.write_json(folder / MANIFEST, fields)


def _counts_to_json(counts: SegmentCounts) -> dict[str, Any]:
    return {f.name: getattr(counts, f.name) for f in dataclasses.fields(counts)}


def _counts_from_json(values: dict[str, Any]) -> SegmentCounts:
    counts = SegmentCounts()
    for name, value in values.items():
        is_counter = isinstance(getattr(counts, name), collections.Counter)
        setattr(counts, name, collections.Counter(value) if is_counter else value)
    return counts


def _checksum(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _manifest_checksum(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return _checksum(text.encode())


# Reading


def _damaged(path: pathlib.Path, record: int | None = None) -> DamagedStoreError:
    where = "" if record is None else f"record {record} of "
    return DamagedStoreError(
        f"{where}{path} is damaged: delete the file and {MANIFEST} beside it, then "
        "start again; the other shards are kept"
    )


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Read the header of a shard, and its hash."""
    if not path.is_file():
        raise DamagedStoreError(
            f"{path} is missing: delete {MANIFEST} beside it, then start again, which "
            "writes it"
        )
    with path.open("rb") as file:
        start = file.read(_START)
        if len(start) < _START or not start.startswith(_MAGIC):
            raise _damaged(path)
        (length,) = _LENGTH.unpack_from(start, len(_MAGIC))
        if length > path.stat().st_size:
            raise _damaged(path)
        text = file.read(length)
    digest = hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
    if digest != start[-_DIGEST_BYTES:]:
        raise _damaged(path)
    header = json.loads(text)
    header["columns_offset"] = _START + length
    return header, digest.hex()


def _check_header(
    path: pathlib.Path, header: Mapping[str, Any], key: str, index: int
) -> None:
    """Check that a shard is of this store, at this place, and complete."""
    size = header["columns_offset"] + header["columns_bytes"] + header["records_bytes"]
    is_own = (header["key"], header["index"]) == (key, index)
    if not is_own or path.stat().st_size != size:
        raise _damaged(path)


def _is_complete(path: pathlib.Path, key: str, part: Chunk) -> bool:
    """Return True if the shard of a chunk is written, and whole."""
    if not path.is_file():
        return False
    try:
        header, _ = _read_header(path)
        _check_header(path, header, key, part.number)
        _check_content(path, header)
    except DamagedStoreError:
        return False
    return header["num_examples"] == len(part.examples)


def _check_content(path: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Check all bytes behind the header of a shard."""
    with path.open("rb") as file:
        file.seek(header["columns_offset"])
        for name in ("columns", "records"):
            content = file.read(header[f"{name}_bytes"])
            if _checksum(content) != header[f"{name}_checksum"]:
                raise _damaged(path)


class _Shard:
    """The columns of a shard, mapped into memory and checked."""

    def __init__(
        self, path: pathlib.Path, entry: Mapping[str, Any], key: str, index: int
    ) -> None:
        self.path = path
        header, digest = _read_header(path)
        if digest != entry["header"]:
            raise _damaged(path)
        _check_header(path, header, key, index)
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offset = header["columns_offset"]
        self.records_offset = offset + header["columns_bytes"]
        columns = memoryview(content)[offset : self.records_offset]
        if _checksum(columns) != header["columns_checksum"]:
            raise _damaged(path)
        self.columns = {
            name: np.frombuffer(columns, _COLUMNS[name], count, start)
            for name, (start, count) in header["columns"].items()
        }
        self.num_segments = header["num_segments"]
        self._records_bytes = header["records_bytes"]

    def location(self, record: int) -> tuple[int, int]:
        """Return offset and length of a record in the file."""
        starts = self.columns["starts"]
        start = int(starts[record]) * _UNIT
        last = record + 1 == self.num_segments
        stop = self._records_bytes if last else int(starts[record + 1]) * _UNIT
        return self.records_offset + start, stop - start


class _OpenFile:
    """A file that is open as long as it is in use, by whatever thread."""

    def __init__(self, path: pathlib.Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


class PreparedSegments(Segments):
    """The segments of a finished store; safe under threads.

    What is resident are the columns that were used; a segment is read from its file.
    """

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
        """Open a store and check everything but the records.

        Args:
          folder: of the store.
          identity: that it must have; see `Recipe.identity`.

        Raises:
          ValueError: it is damaged, or of another identity; the file is named.
        """
        self.folder = folder
        manifest = _read_manifest(folder)
        key = key_of(identity)
        if manifest["key"] != key or key_of(manifest["identity"]) != key:
            raise ValueError(
                f"{folder} holds other data ({_differences(manifest, identity)}): "
                "delete it and start again"
            )
        entries = manifest["shards"]
        _check_names(folder, entries)
        self._shards = [
            _Shard(folder / entry["name"], entry, key, index)
            for index, entry in enumerate(entries)
        ]
        ends = np.cumsum([shard.num_segments for shard in self._shards])
        self._ends = ends.tolist()
        self._files: dict[int, _OpenFile] = {}
        self._lock = threading.Lock()
        report = manifest["report"]
        counts = _counts_from_json(report["counts"])
        self.report = Report(**report | {"counts": counts})

    def __len__(self) -> int:
        """Count the segments."""
        return self._ends[-1]

    def read(self, index: int) -> Segment:
        """Read the segment at an index.

        Raises:
          ValueError: its record is damaged.
        """
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        record = index - (self._ends[number] - shard.num_segments)
        offset, length = shard.location(record)
        content = self._file(number).read(length, offset)
        try:
            return _decode_record(content)
        except ValueError:
            raise _damaged(shard.path, record) from None

    def _file(self, number: int) -> _OpenFile:
        with self._lock:
            file = self._files.pop(number, None)
            if file is None:
                if len(self._files) >= _MAX_OPEN:
                    del self._files[next(iter(self._files))]  # least lately used
                file = _OpenFile(self._shards[number].path)
            self._files[number] = file
            return file

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([shard.columns[name] for shard in self._shards])

    @property
    def views(self) -> Int[np.ndarray, " N"]:
        """Return the index of the view of each segment."""
        return self._column("views")

    @property
    def alternatives(self) -> Int32[np.ndarray, " N"]:
        """Return the number of the (example, view) pair of each segment."""
        return np.cumsum(self._column("firsts"), dtype=np.int32) - 1

    @property
    def keys(self) -> UInt8[np.ndarray, "N 16"]:
        """Return the content keys."""
        return self._column("keys").view(np.uint8).reshape(len(self), _KEY_BYTES)

    @property
    def digests(self) -> UInt64[np.ndarray, " n"]:
        """Return `selection.content_digest` of each example that was read."""
        return self._column("digests")

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the shards on disk."""
        return sum(shard.path.stat().st_size for shard in self._shards)

    def verify(self) -> None:
        """Check all bytes of all shards.

        Raises:
          ValueError: naming the damaged file.
        """
        for shard in self._shards:
            _check_content(shard.path, _read_header(shard.path)[0])


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        checksum = fields.pop("checksum")
        is_sound = checksum == _manifest_checksum(fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        is_sound = False
    if not is_sound:
        raise DamagedStoreError(
            f"{path} is damaged: delete it and start again, which keeps the shards and "
            "writes it anew"
        )
    return fields


def _check_names(folder: pathlib.Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that a store has the files of its manifest, and no more."""
    expected = {entry["name"] for entry in entries} | {MANIFEST}
    for path in sorted(folder.iterdir()):
        if path.name not in expected and ".tmp" not in path.name:
            raise DamagedStoreError(
                f"{path} does not belong to this store: move it elsewhere"
            )


def _differences(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    own = manifest["identity"]
    return ", ".join(name for name in identity if own.get(name) != identity[name])


# Identity


def digest_files(paths: Iterable[str | os.PathLike]) -> str:
    """Hash the names and the content of files, those of folders included.

    Blocks are hashed side by side: some 2 GB/s on two cores.

    Args:
      paths: files and folders; they must exist.
    """
    names: list[tuple[str, pathlib.Path]] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            names += [(p.relative_to(path).as_posix(), p) for p in inside]
        else:
            names.append((path.name, path))
    blocks = [
        (path, offset)
        for _, path in names
        for offset in range(0, max(1, path.stat().st_size), _BLOCK)
    ]
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with ThreadPoolExecutor(workers.num_cores()) as pool:
        hashes = pool.map(_digest_block, blocks)
        for name, path in names:
            digest.update(json.dumps([name, path.stat().st_size]).encode())
        for content in hashes:
            digest.update(content)
    return digest.hexdigest()


def _digest_block(block: tuple[pathlib.Path, int]) -> bytes:
    path, offset = block
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.blake2b(file.read(_BLOCK)).digest()


def digest_examples(examples: Iterable[Example]) -> str:
    """Hash the content of examples, for sources that are no files."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for example in examples:
        text = json.dumps(dataclasses.astuple(example), default=str, sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _code_digest() -> str:
    """Hash the code that makes segments of examples."""
    folder = pathlib.Path(views.__file__).parent
    return digest_files(sorted(folder.glob("*.py")))
