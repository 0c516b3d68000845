"""The manifest of a teacher cache: contents and provenance."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from kdjax.runtime import files

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MISSING = ("tail_mass", "entropy", "target_log_probs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One ArrayRecord file of a cache."""

    name: str  # file name in the cache folder
    num_records: int
    num_tokens: int  # target tokens
    digest: str  # blake2b of its keys and records, as its own index says, hex
    checksum: str  # blake2b of the file, hex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and provenance of a cache."""

    kind: str  # "top_k", "sampled" or "dense"
    k: int  # pairs per target token; dense: vocab_size; sampled: draws per round
    num_rounds: int = 0  # sampled: independent rounds of draws
    vocab_size: int  # ids are below it
    temperatures: tuple[float, ...]  # those with exact log_z and entropy
    tokenizer_fingerprint: str  # of the tokenizer that made the target ids
    teacher_path: str  # where the teacher was
    teacher_fingerprint: str  # of its config and weights
    missing: tuple[str, ...] = ()  # of MISSING: fields that the origin did not give
    data: str = ""  # the labelled examples, in words
    content: str = ""  # digest of their keys, in order
    dtype: str = "float32"  # in which the teacher computed
    shard_size: int = 0  # records of a shard when labelled; 0 = put together otherwise
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
        """Return the fields that all shards of a cache must share, as JSON values.

        Teachers and data that were moved are the same: fingerprint and content count.
        """
        fields = dataclasses.asdict(self)
        for name in ("versions", "shards", "teacher_path", "data"):
            del fields[name]
        return json.loads(json.dumps(fields))


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
    try:
        fields = json.loads(path.read_text())
        version = fields.get("format_version")
    except (ValueError, AttributeError) as error:
        raise ValueError(_damage_message(path)) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version={version} of {path}: this version reads "
            f"{FORMAT_VERSION}; label again"
        )
    if fields.pop("checksum", None) != _checksum(fields):
        raise ValueError(_damage_message(path))
    del fields["num_records"], fields["num_tokens"]
    for name in ("temperatures", "missing"):
        fields[name] = tuple(fields[name])
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    return Manifest(**fields)


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    path = pathlib.Path(folder) / MANIFEST
    totals = {"num_records": manifest.num_records, "num_tokens": manifest.num_tokens}
    fields = dataclasses.asdict(manifest) | totals
    files.write_json(path, fields | {"checksum": _checksum(fields)})


def _checksum(fields: dict[str, Any]) -> str:
    """Return the blake2b of the other fields, as JSON without spaces, keys sorted."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _damage_message(path: pathlib.Path) -> str:
    return (
        f"{path} was damaged or edited: delete it and start labelling again, which "
        "keeps the shards and writes it anew"
    )


def check_identity(
    path: pathlib.Path, identity: dict[str, Any], manifest: Manifest
) -> None:
    """Raise ValueError if the shard at `path` was labelled with something else."""
    for name, value in manifest.identity().items():
        if identity.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is wanted, {path} was labelled with "
                f"{identity.get(name)!r}: label into another folder, or delete this one"
            )
