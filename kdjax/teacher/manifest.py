"""The manifest of a teacher cache: contents and provenance."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from kdjax.runtime import files, limits, untrusted

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("top_k", "sampled", "dense")
MISSING = ("tail_mass", "entropy", "target_log_probs")
_MAX_NUMBER = 2**53  # of records or tokens: what JSON numbers hold exactly


def shard_name(index: int, num_shards: int) -> str:
    """Return the file name of shard `index`, counted from 0."""
    return f"shard-{index:05d}-of-{num_shards:05d}.array_record"


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
        others = ("versions", "shards", "teacher_path", "data")
        names = [field.name for field in dataclasses.fields(self)]
        fields = {name: getattr(self, name) for name in names if name not in others}
        return json.loads(json.dumps(fields))


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Read `manifest.json`.

    Raises:
      ValueError: there is none, this version cannot read it, or it says what no
        cache can be.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not files.exists(path):
        if not pathlib.Path(folder).exists():
            raise ValueError(
                f"cache={folder!s} does not exist: give a folder with a {MANIFEST}, "
                "such as cache/train of a run"
            )
        raise ValueError(
            f"cache={folder!s} has no {MANIFEST}: labelling was not finished there; "
            "start it again, it continues where it stopped"
        )
    untrusted.check_inside(path, folder)
    fields = untrusted.read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(_damage_message(path))
    version = fields.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise ValueError(
            f"format_version={untrusted.quote(version)} of {path}: this version reads "
            f"{FORMAT_VERSION}; label again"
        )
    try:
        if fields.pop("checksum", None) != _checksum(fields):
            raise ValueError(_damage_message(path))
    except (RecursionError, UnicodeEncodeError) as error:
        raise ValueError(_damage_message(path)) from error
    try:
        return _from_fields(fields)
    except _FieldError as error:
        raise ValueError(
            f"{path}: {error}: it was not written by kdjax; label again"
        ) from None


class _FieldError(Exception):
    """A field of a manifest that no cache can have."""


def _from_fields(fields: dict[str, Any]) -> Manifest:
    """Make a manifest of JSON fields, each checked for type and range."""
    names = {field.name for field in dataclasses.fields(Manifest)}
    names |= {"num_records", "num_tokens"}
    _check_names(fields, names, "")
    for name, (is_valid, needed) in _CHECKS.items():
        if not is_valid(fields[name]):
            value = untrusted.quote(fields[name])
            raise _FieldError(f"{name}={value}, {needed} is needed")
    num_shards = len(fields["shards"])
    shards = []
    for index, entry in enumerate(fields["shards"]):
        where = f"shards[{index}]"
        if not isinstance(entry, dict):
            raise _FieldError(f"{where} is no object")
        _check_names(entry, {f.name for f in dataclasses.fields(Shard)}, f"{where}: ")
        for name, (is_valid, needed) in _SHARD_CHECKS.items():
            if not is_valid(entry[name]):
                value = untrusted.quote(entry[name])
                raise _FieldError(f"{where}: {name}={value}, {needed} is needed")
        if entry["name"] != shard_name(index, num_shards):
            raise _FieldError(
                f"{where}: name={untrusted.quote(entry['name'])}, "
                f"{shard_name(index, num_shards)!r} is needed"
            )
        shards.append(Shard(**entry))
    totals = {name: fields.pop(name) for name in ("num_records", "num_tokens")}
    sequences = {name: tuple(fields[name]) for name in ("temperatures", "missing")}
    manifest = Manifest(**fields | sequences | {"shards": tuple(shards)})
    for name, total in totals.items():
        if getattr(manifest, name) != total:
            raise _FieldError(
                f"{name}={total}, its shards have {getattr(manifest, name)}"
            )
    if manifest.kind == "dense" and manifest.k != manifest.vocab_size:
        raise _FieldError(f"k={manifest.k}, {manifest.vocab_size} of a dense cache")
    if manifest.kind == "top_k" and manifest.k > manifest.vocab_size:
        raise _FieldError(f"k={manifest.k}, at most {manifest.vocab_size} ids exist")
    if (manifest.kind == "sampled") != (manifest.num_rounds > 0):
        raise _FieldError(f"num_rounds={manifest.num_rounds} of kind {manifest.kind!r}")
    return manifest


def _check_names(fields: dict[str, Any], names: set[str], where: str) -> None:
    if missing := sorted(names - fields.keys()):
        raise _FieldError(f"{where}{missing[0]} is missing")
    if unknown := sorted(fields.keys() - names):
        raise _FieldError(f"{where}{untrusted.quote(unknown[0])} is unknown")


def _integer(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    """Return the check of an integer, and its description."""
    return (
        lambda value: type(value) is int and low <= value <= high,
        f"an integer from {low} to {high}",
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= limits.MAX_TEXT


def _digits(length: int) -> tuple[Callable[[Any], bool], str]:
    """Return the check of a number in hexadecimal digits, and its description."""
    pattern = re.compile(f"[0-9a-f]{{{length}}}")
    return (
        lambda value: _text(value) and bool(pattern.fullmatch(value)),
        f"{length} hexadecimal digits",
    )


def _are_temperatures(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= limits.MAX_TEMPERATURES
        and all(type(t) in (int, float) and 0 < t <= 1e9 for t in value)
        and len(set(value)) == len(value)
    )


def _are_missing(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name in MISSING for name in value)
        and len(set(value)) == len(value)
    )


_TEXT = (_text, f"text of at most {limits.MAX_TEXT} characters")
_NUMBER = _integer(0, _MAX_NUMBER)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "k": _integer(1, _MAX_NUMBER),
    "num_rounds": _integer(0, limits.MAX_ROUNDS),
    "vocab_size": _integer(1, 2**31 - 1),
    "temperatures": (_are_temperatures, "a list of different positive numbers"),
    **dict.fromkeys(
        (
            "tokenizer_fingerprint",
            "teacher_path",
            "teacher_fingerprint",
            "data",
            "content",
            "dtype",
        ),
        _TEXT,
    ),
    "missing": (_are_missing, f"a list of some of {', '.join(MISSING)}"),
    "shard_size": _NUMBER,
    "versions": (
        lambda value: isinstance(value, dict) and all(map(_text, value.values())),
        "an object of texts",
    ),
    "shards": (
        lambda value: isinstance(value, list) and 0 < len(value) <= limits.MAX_SHARDS,
        f"a list of 1 to {limits.MAX_SHARDS} shards",
    ),
    "num_records": _NUMBER,
    "num_tokens": _NUMBER,
}
_SHARD_CHECKS = {
    "name": _TEXT,
    "num_records": _NUMBER,
    "num_tokens": _NUMBER,
    "digest": _digits(32),
    "checksum": _digits(128),
}


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    path = pathlib.Path(folder) / MANIFEST
    fields = _fields(manifest)
    files.write_json(path, fields | {"checksum": _checksum(fields)})


def checksum(manifest: Manifest) -> str:
    """Return the checksum that a manifest is written with, 32 hexadecimal digits."""
    return _checksum(_fields(manifest))


def _fields(manifest: Manifest) -> dict[str, Any]:
    totals = {"num_records": manifest.num_records, "num_tokens": manifest.num_tokens}
    return dataclasses.asdict(manifest) | totals


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
            expected, actual = (
                untrusted.quote(repr(each)) for each in (value, identity.get(name))
            )
            raise ValueError(
                f"{name}={expected} is wanted, {path} was labelled with {actual}: "
                "label into another folder, or delete this one"
            )
