"""Data files: their format, their compression, folders and globs of them."""

import contextlib
import glob
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

# End of a file's name -> its format, a key of `readers.READERS`.
FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
    ".text": "text",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# First bytes -> compression, format, and what is known by name alone.
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FORMAT_MAGIC = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream
}
_OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"SQLite format 3": "an SQLite database",
    b"FEA1": "a Feather file of version 1",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF document",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull gets the file)",
}
_BOM = b"\xef\xbb\xbf"
_BUFFER = 2**18  # bytes that are decompressed at once
_DATA = "|".join(re.escape(e) for e in FORMATS if e not in (".txt", ".text", ".json"))
# Files of a folder that hold no rows.
_DOCUMENTS = re.compile(
    r"(readme|license|licence|notice|citation|sources|changelog)\b"
    rf"(?!.*({_DATA})({'|'.join(_COMPRESSED)})?$).*"
    r"|.*\.(md|py|ya?ml|lock|crc|sha256|rst|bak|orig|swp)|.*~"
    r"|thumbs\.db|desktop\.ini"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|features\.json",
    re.IGNORECASE,
)
# Words of a file's or folder's name -> the split that they name.
_SPLITS = {
    **dict.fromkeys(("train", "training", "trn", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "valset", "dev"), "validation"),
    **dict.fromkeys(("devset", "heldout", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "testset"), "test"),
    **dict.fromkeys(("eval", "evaluation", "evalset"), "test"),
}
# Older sets of the hub have a hash behind it.
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?(?=[^/]*$)")
# Stems as "rows (1)", "rows copy 2", "rows - Copy", "Copy of rows".
_COPY = re.compile(
    r"(?:copy of )?(?P<original>.+?)(?:(?: -)? copy(?: \d+)?)?(?: ?\(\d{1,2}\))?",
    re.IGNORECASE | re.DOTALL,
)


class DataFile(NamedTuple):
    """A file of rows."""

    path: str
    format: str  # a key of `readers.READERS`
    compression: str  # "gzip", "zstd" or ""


def inspect(path: str, fallback: str = "") -> DataFile:
    """Return a file's format, by its first bytes where they tell, else by its name.

    Args:
      path: of the file.
      fallback: format of a name that tells none; "json" is that of .txt files too.

    Raises:
      ValueError: it cannot be read, or its format is not known.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    compression_by_name = _COMPRESSED.get(suffixes[-1], "") if suffixes else ""
    with readable(path):
        with open(path, "rb") as file:
            head = file.read(16)
        compression = _match(_COMPRESSION_MAGIC, head)
        if compression_by_name and head and not compression:
            raise ValueError(
                f"{path}: its name ends in {suffixes[-1]!r}, but it is not compressed "
                f"by {compression_by_name}: rename it, or compress it again"
            )
        if compression:
            with open_binary(DataFile(path, "", compression)) as stream:
                head = stream.read(4096)
        else:
            with open(path, "rb") as file:
                head = file.read(4096)
    if other := _match(_OTHER_MAGIC, head):
        raise ValueError(
            f"{path} is {other}, which is not read: give one of {list(FORMATS)}, also "
            "compressed (.gz, .zst)"
        )
    suffix = next((s for s in reversed(suffixes) if s not in _COMPRESSED), "")
    format_ = _match(_FORMAT_MAGIC, head) or FORMATS.get(suffix, "")
    if format_ in ("parquet", "arrow") and not _match(_FORMAT_MAGIC, head):
        what = "is empty" if not head else f"begins with {head[:8]!r}"
        raise ValueError(
            f"{path} {what}: it is no file of the kind its name ends in ({suffix}): "
            "write it again, or rename it"
        )
    start = head.removeprefix(_BOM).lstrip()[:1]
    if fallback == "json" and format_ in ("", "text"):
        format_ = "json"
    elif not format_:
        format_ = "json" if start in (b"{", b"[") else fallback
    if not format_:
        raise ValueError(
            f"{path}: its format is not seen from its name: rename it to one of "
            f"{list(FORMATS)}, also compressed (.gz, .zst)"
        )
    return DataFile(path, format_, compression)


def _match(magic: dict[bytes, str], head: bytes) -> str:
    return next((name for start, name in magic.items() if head.startswith(start)), "")


@contextlib.contextmanager
def open_binary(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed."""
    if file.compression:
        with (
            pa.input_stream(file.path, compression=file.compression) as source,
            io.BufferedReader(source, _BUFFER) as stream,
        ):
            yield stream
    else:
        with open(file.path, "rb") as stream:
            yield stream


def find_files(path: str) -> list[str]:
    """Return the files of a path: itself, those of a glob or of a folder, sorted.

    A folder's are those below it, without hidden ones, those whose name begins with
    "_", documents such as README.md, and copies such as rows.jsonl~.

    Raises:
      ValueError: there is none, or one in a folder that may be something else; a shard
        is missing, or two files seem to hold the same rows.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = _files_below(path)
        if not files:
            raise ValueError(f"path={path!r} is a folder without data files: give one")
        return files
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    files = [
        file
        for file in sorted(set(glob.glob(path, recursive=True)))
        if not (os.path.isdir(file) or _is_hidden(os.path.basename(file)))
    ]
    if not files:
        raise ValueError(f"path={path!r} matches no file: check the pattern")
    _check_copies(files)
    if "-of-" not in os.path.basename(path):  # which names those that are wanted
        _check_shards(files)
    return files


def _files_below(folder: str) -> list[str]:
    files: list[str] = []
    visited = set()  # links may lead back
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.path.realpath(parent)
        folders[:] = (
            [] if place in visited else [n for n in folders if not _is_hidden(n)]
        )
        if place in visited:
            continue
        visited.add(place)
        files += [
            os.path.join(parent, name)
            for name in names
            if not _is_hidden(name) and not _DOCUMENTS.fullmatch(name)
        ]
    for file in files:
        suffix = Path(file).suffix.lower()
        if suffix and suffix not in (*FORMATS, *_COMPRESSED):
            raise ValueError(
                f"{file}: its format is not seen from its name: take it out of the "
                f"folder, or give a glob such as {folder}/*.jsonl"
            )
    files.sort()
    _check_copies(files)
    _check_shards(files)
    return files


def _check_copies(paths: list[str]) -> None:
    """Raise ValueError for two files that seem to hold the same rows, by their names.

    They are of other formats or compressions, or one is the other's copy.
    """
    by_name: dict[str, str] = {}
    for path in paths:
        first = by_name.setdefault(_without_format(path), path)
        if first != path:
            raise _copy_error(first, path)
    for name, path in by_name.items():
        parent, stem = os.path.split(name)
        match = _COPY.fullmatch(stem)
        original = os.path.join(parent, match["original"]) if match else name
        if original != name and original in by_name:
            raise _copy_error(by_name[original], path)


def _without_format(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    if suffix.lower() in _COMPRESSED:
        stem, suffix = os.path.splitext(stem)
    return stem if suffix.lower() in FORMATS else stem + suffix


def _copy_error(first: str, second: str) -> ValueError:
    return ValueError(
        f"{first!r} and {second!r} seem to hold the same rows, by their names: take "
        "one of them out of the folder, rename it, or give a file or a glob without it"
    )


def _check_shards(paths: list[str]) -> None:
    """Raise ValueError for shards of a whole that is not there."""
    wholes: dict[tuple[str, str], dict[int, set[int]]] = {}
    for path in paths:
        if match := _SHARD.search(path):
            totals = wholes.setdefault((path[: match.start()], path[match.end() :]), {})
            totals.setdefault(int(match[2]), set()).add(int(match[1]))
    for (start, end), totals in wholes.items():
        for total, numbers in totals.items():
            first = int(total in numbers)  # some count from 1
            for number in range(first, first + total):
                name = f"{start}-{number:05}-of-{total:05}"
                # One that is there may be left out by a glob.
                if number not in numbers and not glob.glob(f"{glob.escape(name)}*"):
                    raise ValueError(
                        f"{name + end!r} is missing, of {total} shards: get it, or, if "
                        f"the others are all, rename them without '-of-{total:05}'"
                    )
        if len(totals) > 1:
            names = " and of ".join(map(str, sorted(totals)))
            raise ValueError(
                f"the files {start + '-*' + end!r} are shards of {names}: keep "
                "those of one, or rename the others"
            )


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"path={error.filename!r} cannot be read ({error.strerror}): allow it, or give "
        "a glob of other files"
    ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def files_by_split(folder: str) -> dict[str, list[str]]:
    """Return the files of a folder by the split that they are named after.

    A file is named after a split if a word of its name, or else of its folder's, is
    "train" (trn), "validation" (valid, val, dev, held out) or "test" (tst, eval).

    Returns:
      {} for a folder whose files all name the same split, or none but "train": all its
      rows are of one.

    Raises:
      ValueError: some of the files name a split, and others none, or several.
    """
    files = _files_below(folder)
    names = {file: _splits_named(os.path.relpath(file, folder)) for file in files}
    different = set(names.values())
    if len(different) < 2 or frozenset().union(*different) <= {"train"}:
        return {}
    splits: dict[str, list[str]] = {}
    for file, named in names.items():
        if len(named) != 1:
            number = "several" if named else "none"
            raise ValueError(
                f"path={folder!r} has files that are named after splits, and {file!r}, "
                f"whose name tells {number}: give a file or a glob as data.path and "
                "data.eval_path"
            )
        splits.setdefault("".join(named), []).append(file)
    return splits


def canonical_split(name: str) -> str:
    """Return a split's name as `files_by_split` has it: "dev" is "validation"."""
    return _SPLITS.get(name, name)


def _splits_named(path: str) -> frozenset[str]:
    for part in reversed(Path(path).parts):
        if splits := {_SPLITS[word] for word in _words(part) if word in _SPLITS}:
            return frozenset(splits)
    return frozenset()


def _words(name: str) -> list[str]:
    """Return the words of a name such as "trainSet_1", also without a look at case."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    text = re.sub(r"\b(held|hold) out\b", "heldout", " ".join(words).lower())
    return text.split() + re.findall("[a-z]+", name.lower())


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what the system or a decompressor says into one line with the path."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        if reason := getattr(error, "strerror", None):
            raise ValueError(
                f"path={path!r} cannot be read ({reason}): give a file"
            ) from error
        raise ValueError(
            f"{path}:1 cannot be read ({str(error).splitlines()[0]}): the file is "
            "damaged or cut off; write it again"
        ) from error
