"""Streaming readers of JSON lines, Parquet and ArrayRecord files.

Every item comes with its place, as text for errors.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

Path = str | os.PathLike

_BATCH = 16  # sequences read from parquet at a time
_MAX_QUOTED = 80  # characters quoted in an error


def refuse(where: str, actual: Any, needed: str) -> NoReturn:
    """Raise ValueError with a place, the value found there and the one needed."""
    text = " ".join((actual if isinstance(actual, str) else repr(actual)).split())
    if len(text) > _MAX_QUOTED:
        text = text[: _MAX_QUOTED - 3] + "..."
    raise ValueError(f"{where}: found {text}, needed {needed}")


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
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file} line {number}"
            try:
                value = json.loads(line) if line.strip() else []
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                refuse(where, str(error), "a JSON object")
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, dict):
                    refuse(where, item, "a JSON object")
                yield where, item


def column_names(file: pathlib.Path) -> set[str]:
    """Return the columns of a parquet file."""
    try:
        return set(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        refuse(str(file), str(error), "a parquet file")


def parquet_rows(
    file: pathlib.Path, types: dict[str, pa.DataType | None]
) -> Iterator[tuple[str, dict[str, pa.Scalar]]]:
    """Yield these columns of every row, cast to their types where there is one."""
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH, columns=list(types)):
            columns = [
                batch.column(name) if kind is None else batch.column(name).cast(kind)
                for name, kind in types.items()
            ]
            for values in zip(*columns, strict=True):
                yield f"{file} row {number}", dict(zip(types, values, strict=True))
                number += 1
    except (pa.ArrowException, OSError) as error:
        refuse(f"{file} rows from {number}", str(error), f"{types}")


def records(file: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yield the records of an ArrayRecord file."""
    # One after another: they are compressed in groups, which are slow to find again.
    reader = array_record_module.ArrayRecordReader(str(file))
    if not reader.ok():
        refuse(str(file), f"{file.stat().st_size} bytes", "a whole ArrayRecord file")
    for number in range(reader.num_records()):
        where = f"{file} record {number}"
        try:
            record = reader.read()
        except (RuntimeError, IndexError) as error:
            refuse(where, str(error), "a whole ArrayRecord file")
        yield where, record
