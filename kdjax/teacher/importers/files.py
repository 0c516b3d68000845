"""Streaming readers of JSON lines, Parquet and ArrayRecord files.

Every item comes with its place, as text for errors.
"""

import io
import itertools
import os
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from kdjax.runtime import limits, untrusted
from kdjax.teacher.array_record import ArrayRecordReader

Path = str | os.PathLike

_BATCH = 16  # sequences read from parquet at a time
# What pyarrow raises on files that it did not write.
_PARQUET_ERRORS = (
    pa.ArrowException,
    AttributeError,
    KeyError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
)
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_short = reprlib.Repr()
_short.maxlist = _short.maxdict = _short.maxtuple = 20
_short.maxstring = _short.maxother = _short.maxlong = 200


def refuse(where: str, actual: Any, needed: str) -> NoReturn:
    """Raise ValueError with a place, the value found there and the one needed."""
    text = actual[:1000] if isinstance(actual, str) else _short.repr(actual)
    raise ValueError(f"{where}: found {untrusted.quote(text)}, needed {needed}")


def files(path: Path, *suffixes: str) -> list[pathlib.Path]:
    """Return the file itself, or those of a folder by name."""
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    paths = sorted(p for p in path.glob("*") if p.suffix in suffixes)
    if not paths:
        refuse(str(path), "no file", f"one, or a folder of {' or '.join(suffixes)}")
    return paths


def json_objects(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of every line, or those of its list one by one."""
    with io.BufferedReader(untrusted.open_plain(file)) as lines:
        for number in itertools.count(1):
            where = f"{file} line {number}"
            line = lines.readline(limits.MAX_JSON_BYTES + 1)
            if not line:
                return
            try:  # Python writes infinities, which are checked where they are used
                empty = not line.strip()
                value = (
                    [] if empty else untrusted.parse_json(line, where, constants=True)
                )
            except ValueError as error:
                reason = str(error).removeprefix(f"{where} is no valid JSON: ")
                refuse(where, reason.removeprefix(f"{where}: "), "a JSON object")
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, dict):
                    refuse(where, item, "a JSON object")
                yield where, item


def column_names(file: pathlib.Path) -> set[str]:
    """Return the columns of a parquet file."""
    untrusted.open_plain(file).close()
    try:
        names = pq.read_schema(file).names
    except _PARQUET_ERRORS as error:
        refuse(str(file), str(error), "a parquet file")
    if len(set(names)) != len(names):
        refuse(str(file), f"columns {', '.join(sorted(names))}", "each name once")
    return set(names)


def parquet_rows(
    file: pathlib.Path, types: dict[str, pa.DataType | None]
) -> Iterator[tuple[str, dict[str, pa.Scalar]]]:
    """Yield these columns of every row, cast to their types where there is one."""
    number, batches = 0, _batches(file, types)
    while True:
        try:
            columns = next(batches, None)
        except _PARQUET_ERRORS as error:
            refuse(f"{file} rows from {number}", str(error), f"{types}")
        if columns is None:
            return
        for values in zip(*columns, strict=True):
            yield f"{file} row {number}", dict(zip(types, values, strict=True))
            number += 1


def _batches(
    file: pathlib.Path, types: dict[str, pa.DataType | None]
) -> Iterator[list[pa.Array]]:
    """Yield these columns of some rows at a time, cast and checked."""
    parquet = pq.ParquetFile(file)
    metadata, stored = parquet.metadata, file.stat().st_size
    # Not of its columns: pyarrow ends the process where their statistics are damaged.
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > limits.MAX_PARQUET_RATIO * stored + 2**20:
            raise ValueError(f"{size} bytes of a row group in a file of {stored}")
    for batch in parquet.iter_batches(_BATCH, columns=list(types)):
        columns = [
            batch.column(name) if kind is None else batch.column(name).cast(kind)
            for name, kind in types.items()
        ]
        for column in columns:
            column.validate(full=True)
        yield columns


def records(file: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yield the records of an ArrayRecord file."""
    number, chunks = 0, _chunks(file)
    while True:
        where = f"{file} record {number}"
        try:
            records = next(chunks, None)
        except (RuntimeError, IndexError, ValueError) as error:
            where = where if number else str(file)
            refuse(where, str(error), "a whole ArrayRecord file")
        if records is None:
            return
        for record in records:
            yield f"{file} record {number}", record
            number += 1


def _chunks(file: pathlib.Path) -> Iterator[list[bytes]]:
    """Yield the records of every chunk, whose sizes and then hashes were checked.

    Our reader believes no size, and theirs compares the hashes of what is whole.
    """
    start, theirs = 0, None
    for records in ArrayRecordReader(file).iter_chunks():
        if theirs is None:
            theirs = array_record_module.ArrayRecordReader(str(file), _READER_OPTIONS)
        rows = range(start, start + len(records))
        if not theirs.ok() or theirs.read(rows) != records:
            raise ValueError("its hashes do not fit")
        yield records
        start = rows.stop
