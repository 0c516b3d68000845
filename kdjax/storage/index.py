"""The index of a mirrored folder: which objects are its files."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from kdjax.runtime import untrusted
from kdjax.storage.store import Store

FOLDER = ".kdjax"  # of the objects that are no files of the mirrored folder
INDEX = f"{FOLDER}/index.json"
_NEXT = f"{FOLDER}/next"  # new content of files, until the index names it
_VERSION = 1
_CHECKSUM = re.compile("[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of the folder."""

    num_bytes: int
    checksum: str  # XXH3, 128 bits, hex
    is_next: bool = False  # its content is still in the object of `next_name`


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """The files of a folder at one moment, and objects that are none of them."""

    generation: str = ""  # another one at every moment; "" = there is no index
    files: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    garbage: frozenset[str] = frozenset()  # may exist, and are to be removed


def next_name(path: str) -> str:
    """Return the object of a file's new content."""
    return f"{_NEXT}/{path}"


def object_name(path: str, entry: Entry) -> str:
    """Return the object that has a file's content."""
    return next_name(path) if entry.is_next else path


def write(store: Store, index: Index) -> None:
    """Replace the index of a folder, in one step."""
    value = {
        "version": _VERSION,
        "generation": index.generation,
        "files": {
            path: [entry.num_bytes, entry.checksum, entry.is_next]
            for path, entry in sorted(index.files.items())
        },
        "garbage": sorted(index.garbage),
    }
    store.write(INDEX, json.dumps(value).encode())


def read(store: Store) -> Index:
    """Read the index of a folder; one without a generation if there is none.

    Raises:
      ValueError: it is none that kdjax writes.
    """
    data = store.read(INDEX)
    if data is None:
        return Index()
    where = f"{store.url}/{INDEX}"
    value = untrusted.parse_json(data, where)
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{where} is none that this version of kdjax writes "
            f"({untrusted.quote(str(error))}): use the version that wrote it, or "
            "another address"
        ) from None


def _parse(value: Any) -> Index:
    if value["version"] != _VERSION or not isinstance(value["generation"], str):
        raise ValueError(f"version {value['version']}")
    entries = {}
    for path, (num_bytes, checksum, is_next) in value["files"].items():
        _check_path(path)
        if type(num_bytes) is not int or type(is_next) is not bool or num_bytes < 0:
            raise ValueError(f"entry of {path}")
        if not _CHECKSUM.fullmatch(checksum):
            raise ValueError(f"checksum of {path}")
        entries[path] = Entry(num_bytes=num_bytes, checksum=checksum, is_next=is_next)
    for name in value["garbage"]:
        _check_path(name)
    return Index(
        generation=value["generation"],
        files=entries,
        garbage=frozenset(value["garbage"]),
    )


def _check_path(path: str) -> None:
    """Check that a path leads nowhere but into the folder."""
    if (
        "\\" in path
        or "\0" in path
        or any(p in ("", ".", "..") for p in path.split("/"))
    ):
        raise ValueError(f"path {path!r}")
