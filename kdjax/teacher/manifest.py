"""The manifest of a teacher cache: what it holds and what made it."""

import dataclasses
import json
import os
import pathlib
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache."""

    name: str  # file name in the cache folder
    num_records: int
    num_tokens: int  # target tokens
    checksum: str  # blake2b of the file, hex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache holds and what made it."""

    kind: str  # "top_k" or "dense"
    k: int  # pairs stored per target token; dense: vocab_size
    vocab_size: int  # ids are below it
    temperatures: tuple[float, ...]  # those with exact log_z and entropy
    tokenizer_fingerprint: str  # of the tokenizer that made the target ids
    teacher_path: str  # where the teacher was
    teacher_fingerprint: str  # of its config and weights
    data: str = ""  # the labelled examples, in words
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of libraries
    shards: tuple[Shard, ...] = ()  # filled by `finish`

    @property
    def num_records(self) -> int:
        """Records in all shards."""
        return sum(shard.num_records for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Target tokens in all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    def identity(self) -> dict[str, Any]:
        """The fields that every shard of one cache must share, as JSON values.

        A teacher that was moved is the same teacher: its fingerprint counts.
        """
        fields = dataclasses.asdict(self)
        del fields["versions"], fields["shards"], fields["teacher_path"]
        return fields | {"temperatures": list(self.temperatures)}


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ValueError: there is none, or this version cannot read it.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"cache={folder!s} has no {MANIFEST}: labelling was not finished there; "
            "start it again, it continues where it stopped"
        )
    fields = json.loads(path.read_text())
    if fields.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"format_version={fields.get('format_version')} of {path}: this version "
            f"reads {FORMAT_VERSION}; label again"
        )
    del fields["num_records"], fields["num_tokens"]
    fields["temperatures"] = tuple(fields["temperatures"])
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    return Manifest(**fields)


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write `manifest.json` atomically: temporary file, fsync, rename."""
    path = pathlib.Path(folder) / MANIFEST
    totals = {"num_records": manifest.num_records, "num_tokens": manifest.num_tokens}
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(manifest) | totals, indent=2))
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def refuse_other_identity(
    path: pathlib.Path, found: dict[str, Any], manifest: Manifest
) -> None:
    """Raise ValueError if the shard at `path` was labelled with something else."""
    for name, value in manifest.identity().items():
        if found.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is wanted, {path} was labelled with "
                f"{found.get(name)!r}: label into another folder, or delete this one"
            )


def sync(path: pathlib.Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
