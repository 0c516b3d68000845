"""Streaming readers of data files: a row at a time, with its file and number."""

import codecs
import contextlib
import csv
import itertools
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdjax.data import files
from kdjax.data.files import DataFile

_BATCH = 512  # rows of a column format that are converted at once
_CHUNK = 2**20  # characters of a JSON array that are read at once
_MAX_FIELD = 2**31 - 1  # characters of a CSV cell
_SLACK = 64  # characters before a chunk's end in which JSON may just be incomplete
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_MARK = "\ufeff"  # of byte order

Values = Mapping[str, Any]
# Takes a value and its place, for errors.
Decoder = Callable[[Any, str], Any]


_PADDED = ("parquet", "arrow")  # formats whose objects have all members of all rows


class Row(NamedTuple):
    """A row of a file."""

    file: str
    number: int  # its line, or its index from 1 in files without lines
    values: Values
    is_padded: bool = False  # its objects have a null for each member of others

    @property
    def where(self) -> str:
        """File and number, for errors."""
        return f"{self.file}:{self.number}"


class ClassName(str):
    """The name of a class that the data stores as an index."""

    __slots__ = ("class_index", "names")
    class_index: int
    names: tuple[str, ...]

    def __new__(cls, index: int, names: tuple[str, ...]) -> "ClassName":
        """Name a class by its index."""
        self = super().__new__(cls, names[index])
        self.class_index, self.names = index, names
        return self


class Unreadable:
    """A value of a column that Python cannot hold: an error for who reads it."""

    def __init__(self, kind: pa.DataType, error: Exception) -> None:
        """Keep what is known of the value."""
        self._kind = kind
        self.reason = _first_line(error)

    def __repr__(self) -> str:
        return f"<{self._kind}>"


def iter_rows(paths: Sequence[str], fallback: str = "") -> Iterator[Row]:
    """Yield the rows of files, one after another.

    Args:
      paths: of the files, in order.
      fallback: as in `files.inspect`.

    Raises:
      ValueError: file, line and what is wrong there.
    """
    for path in paths:
        file = files.inspect(path, fallback)
        number = 0
        try:
            for number, values in READERS[file.format](file):
                yield Row(path, number, values, file.format in _PADDED)
        except DAMAGES as error:
            raise describe_damage(f"{path}:{number + 1}", error) from error


# What libraries raise for the content of a file.
DAMAGES = (UnicodeDecodeError, OSError, EOFError, pa.ArrowException)


def describe_damage(where: str, error: Exception) -> ValueError:
    """Make an error of what a library says of a file's content."""
    if isinstance(error, UnicodeDecodeError):
        return ValueError(
            f"{where} holds bytes that are not UTF-8 ({error.reason}): write the file "
            "again as UTF-8"
        )
    return ValueError(
        f"{where} cannot be read ({_first_line(error)}): the file is damaged or cut "
        "off; write it again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers from 1; they keep their ends.

    Byte order marks before them, which stay where files are joined, are left out.
    """
    with files.open_binary(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                _check_encoding(file.path, line)
            if b"\0" in line:
                raise ValueError(
                    f"{file.path}:{number} holds NUL bytes, which are no text: the "
                    "file is damaged, or joined with UTF-16; write it again as UTF-8"
                )
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(file.path, number, line, error) from None
            yield number, text.lstrip(_MARK)


def _check_encoding(path: str, start: bytes) -> None:
    """Raise ValueError for a file that begins as UTF-16 or UTF-32."""
    marks = {
        codecs.BOM_UTF32_LE: "UTF-32",
        codecs.BOM_UTF32_BE: "UTF-32",
        codecs.BOM_UTF16_LE: "UTF-16",
        codecs.BOM_UTF16_BE: "UTF-16",
    }
    name = next((name for mark, name in marks.items() if start.startswith(mark)), "")
    if not name and b"\0" in start[:64]:
        head = start[:64]
        zeros = [index % 2 for index, byte in enumerate(head) if not byte]
        name = "UTF-16 without a mark"
        if len(set(zeros)) > 1 or 3 * len(zeros) < len(head):
            raise ValueError(
                f"{path}:1 is not UTF-8, it holds bytes that are no text: is the file "
                "compressed, or of another format than its name tells?"
            )
    if name:
        raise ValueError(
            f"{path}:1 is not UTF-8, it looks like {name}: convert the file, for "
            f"example by iconv -f {name.split()[0]} -t UTF-8"
        )


def _not_utf8(
    path: str, number: int, line: bytes, error: UnicodeDecodeError
) -> ValueError:
    """Describe a line that is not UTF-8, and how it reads in the next likely one."""
    rest = line[error.start : error.start + 12]
    try:
        reading = f"as Windows-1252 (Latin-1) it reads {rest.decode('cp1252')!r}"
    except UnicodeDecodeError:
        reading = "nor Windows-1252 (Latin-1)"
    return ValueError(
        f"{path}:{number} is not UTF-8 (byte 0x{rest[0]:02x} at {error.start}); "
        f"{reading}: convert the file from its encoding, for example by "
        "iconv -f CP1252 -t UTF-8"
    )


def _read_text(file: DataFile) -> Iterator[tuple[int, Values]]:
    """Yield blocks of lines between empty ones."""
    block: list[str] = []
    first = 1
    for number, line in itertools.chain(_lines(file), [(0, "")]):
        if line.strip():
            first = first if block else number
            block.append(line.replace("\r\n", "\n"))
        elif block:
            yield first, {"text": "".join(block).strip("\n")}
            block = []


_SPACE = re.compile(rf"[ \t\n\r{_MARK}]*")


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, whose keys must differ."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateKeyError(f"has the key {twice!r} twice: keep one of them")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON value.

    Args:
      text: the value.
      where: stands before errors, as "rows.jsonl:3".

    Raises:
      ValueError: not JSON, a key that occurs twice, or what Python cannot hold.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(where, error) from None


def read_json(path: str) -> Any:
    """Read a file of one JSON value.

    Raises:
      ValueError: as `parse_json`, or it cannot be read, or is not UTF-8.
    """
    lines = _lines(files.inspect(path))
    return parse_json("".join(line for _, line in lines), path)


def _json_error(where: str, error: Exception) -> ValueError:
    if isinstance(error, RecursionError):
        return ValueError(f"{where} is nested too deeply: flatten it")
    if isinstance(error, _DuplicateKeyError):
        return ValueError(f"{where} {error}")
    if "digits" in str(error):
        return ValueError(
            f"{where} has a number of more than 4,300 digits: write it as text"
        )
    return ValueError(f"{where} is not JSON: {error}")


def _read_json(file: DataFile) -> Iterator[tuple[int, Values]]:
    """Yield the objects of an array, or of lines."""
    if _first_character(file) == "[":
        yield from _read_json_array(file)
        return
    rows = _read_json_lines(file)
    start = list(itertools.islice(rows, 1))
    if start and _holds_rows(start[0][1]):
        start += itertools.islice(rows, 1)
        if len(start) == 1:
            raise ValueError(
                f"{file.path}:{start[0][0]} is one object, not rows: give a list of "
                "rows, or one per line (pandas: to_json(orient='records', lines=True))"
            )
    yield from start
    yield from rows


# Members of an object that may hold all rows, and of a row that asks something.
_TABLES = {"data", "rows", "examples", "records", "items"}
_ASKING = {"question", "prompt", "instruction", "text"}


def _holds_rows(value: Values) -> bool:
    """Return True for an object that looks as if it holds rows, or columns."""
    members = list(value.values())
    if members and all(isinstance(member, dict) for member in members):
        keys = {tuple(member) for member in members}  # pandas: by index, by column
        return _are_indices(value) or (len(keys) == 1 and _are_indices(*keys))
    lists = {name: m for name, m in value.items() if isinstance(m, list)}
    objects = {
        name: rows
        for name, rows in lists.items()
        if rows and all(isinstance(row, dict) for row in rows)
    }
    if any(_is_turn(row) for rows in objects.values() for row in rows):
        return False
    names = {files.canonical_split(name.lower()) for name in objects}
    if names & {*_TABLES, "train", "validation", "test"} and not _ASKING & set(value):
        return True
    lengths = {len(member) for member in lists.values()}
    return {"columns", "data"} <= set(lists) or (
        len(lists) == len(value) and len(lengths) == 1 and max(lengths) > 1
    )


def _are_indices(names: Iterable[str]) -> bool:
    names = list(names)
    return bool(names) and all(map(str.isdecimal, names))


def _is_turn(value: Values) -> bool:
    return "role" in value or {"from", "value"} <= set(value)


def _read_json_lines(file: DataFile) -> Iterator[tuple[int, Values]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            row = parse_json(line, where)
        except ValueError as error:
            if line.strip() in ("{", "}"):
                raise ValueError(
                    f"{error} (an object over several lines? Give one per line, or a "
                    "list of them)"
                ) from None
            raise
        yield number, _check_object(row, where)


def _check_object(row: Any, where: str) -> Values:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is not a JSON object but {kind_of(row)}: give rows as "
            '{"column": value}'
        )
    return row


def _first_character(file: DataFile) -> str:
    with files.open_binary(file) as stream:
        start = stream.read(4096).decode(errors="ignore")
    return start.lstrip(" \t\n\r" + _MARK)[:1]


def _read_json_array(file: DataFile) -> Iterator[tuple[int, Values]]:
    """Yield the elements of an array, a chunk of the file being held at a time."""
    with files.open_binary(file) as stream:
        text = _Text(_chunks(file.path, stream))
        text.take("[")
        number = 0
        while not text.take("]"):
            where = f"{file.path}:{number + 1}"
            if number and not text.take(","):
                problem = "the last one"
                if text.peek():
                    problem = f"followed by {text.rest(20)!r}"
                raise ValueError(
                    f"{file.path}:{number} is {problem}: elements of a JSON array "
                    "stand between commas and end with ']'; is the file cut off?"
                )
            if text.peek() in ("", "]"):
                raise ValueError(
                    f"{where} is missing after a comma: the file is cut off, or has "
                    "a comma too many"
                )
            value = text.decode(where)
            number += 1
            yield number, _check_object(value, where)
        if text.peek():
            raise ValueError(
                f"{file.path}:{number + 1} comes after the end of the JSON array: "
                f"{text.rest(20)!r}; give one array"
            )


class _Text:
    """A JSON text that is read in chunks."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """Return the next character that is no white space; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, character: str) -> bool:
        """Go beyond the next character if it is this one."""
        is_next = self.peek() == character
        self._at += is_next
        return is_next

    def rest(self, length: int) -> str:
        """Return some characters from here on."""
        return self._text[self._at : self._at + length]

    def decode(self, where: str) -> Any:
        """Return the value that begins here, and go beyond it."""
        num_chunks = 1
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # Only a number may go on, which is refused as no object anyway.
                self._at = end
                return value
            except json.JSONDecodeError as error:
                incomplete = error.msg.startswith("Unterminated")
                incomplete |= error.pos > len(self._text) - _SLACK
                if not incomplete or not self._read(num_chunks):
                    raise _json_error(where, error) from None
            except (ValueError, RecursionError) as error:
                raise _json_error(where, error) from None
            num_chunks *= 2  # so that a large element is not parsed too often

    def _read(self, num_chunks: int = 1) -> bool:
        """Read on; False at the end."""
        pieces = list(itertools.islice(self._chunks, num_chunks))
        self._text = "".join([self._text[self._at :], *pieces])
        self._at = 0
        return bool(pieces)


def _chunks(path: str, stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    first = True
    while data := stream.read(_CHUNK):
        if first:
            _check_encoding(path, data)
            first = False
        yield decoder.decode(data)
    decoder.decode(b"", final=True)


# Cells as pandas and spreadsheets write a value that is missing.
_NOTHING = {"", "NaN", "nan", "null", "NULL", "<NA>", "#N/A"}
_CELL_ERRORS = {"#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!"}


def _read_csv(file: DataFile, delimiter: str = ",") -> Iterator[tuple[int, Values]]:
    """Yield the rows below a header as texts; a cell of `_NOTHING` is None."""
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.reader(
        (line for _, line in _lines(file)), delimiter=delimiter, strict=True
    )
    header: list[str] = []
    number = 1
    try:
        for cells in reader:
            where = f"{file.path}:{number}"
            if not header and any(cells):
                header = _check_header(cells, where, delimiter)
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where} has {len(cells)} cells for {len(header)} columns "
                        f"{header}: quote cells that hold a {delimiter!r}"
                    )
                if cells == header:
                    raise ValueError(
                        f"{where} has the header again: remove it where files were "
                        "joined"
                    )
                pairs = [p for p in zip(header, cells, strict=True) if p[0]]
                for name, cell in pairs:
                    if cell in _CELL_ERRORS:
                        raise ValueError(
                            f"{where}: {name}={cell!r} is an error of a spreadsheet: "
                            "correct the cell there, or empty it"
                        )
                yield number, {k: None if v in _NOTHING else v for k, v in pairs}
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file.path}:{number} is not CSV ({error}): check its quotes and "
            "its line ends"
        ) from None


def _check_header(header: list[str], where: str, delimiter: str) -> list[str]:
    """Check the names of the columns; the first may be an index without one."""
    if re.fullmatch(r"sep=.?", line := delimiter.join(header), re.IGNORECASE):
        raise ValueError(
            f"{where} is {line!r}, which tells a spreadsheet what separates cells: "
            "remove the line"
        )
    for other in (";", "\t", "|", ","):
        if len(header) == 1 and other in header[0]:
            raise ValueError(
                f"{where}: the columns seem to be separated by {other!r}, not "
                f"{delimiter!r}: use commas (.csv) or tabs (.tsv)"
            )
    if "" in header[1:] or len(set(header)) < len(header):
        raise ValueError(
            f"{where}: the header {header} has a name twice, or none: give each "
            "column one"
        )
    return header


def _read_tsv(file: DataFile) -> Iterator[tuple[int, Values]]:
    return _read_csv(file, "\t")


def _read_parquet(file: DataFile) -> Iterator[tuple[int, Values]]:
    with (
        _seekable(file) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as table,
    ):
        batches = table.iter_batches(batch_size=_BATCH)
        yield from _iter_file(batches, table.schema_arrow, file.path)


def _read_arrow(file: DataFile) -> Iterator[tuple[int, Values]]:
    with _seekable(file) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(source)
            batches = iter(reader)
        yield from _iter_file(batches, reader.schema, file.path)
        if not is_file:
            _check_end(source, file.path)


def _check_end(source: Any, path: str) -> None:
    """Raise ValueError unless a stream, which is read, ends with the file."""
    end = source.tell()
    if end < source.size():
        raise ValueError(
            f"{path} goes on after the end of its Arrow stream: give files that were "
            "joined one by one"
        )
    if source.read_at(len(_END), end - len(_END)) != _END:
        raise ValueError(
            f"{path} has no mark at the end of its Arrow stream, it is cut off: write "
            "it again, and close the writer"
        )


def _iter_file(
    batches: Iterable[Any], schema: pa.Schema, path: str
) -> Iterator[tuple[int, Values]]:
    return iter_batches(batches, schema, path, _metadata_decoder(schema, path))


@contextlib.contextmanager
def _seekable(file: DataFile) -> Iterator[Any]:
    """Open a file of columns: mapped, or decompressed as a whole."""
    if not file.compression:
        with pa.memory_map(file.path) as source:
            yield source
    else:
        with files.open_binary(file) as stream:
            yield pa.BufferReader(stream.read())


def iter_batches(
    batches: Iterable[Any], schema: pa.Schema, path: str, decode: Decoder | None
) -> Iterator[tuple[int, Values]]:
    """Yield the rows of Arrow batches or tables with their numbers from 1.

    Args:
      batches: of the rows.
      schema: of all batches.
      path: of the file or set, for errors.
      decode: of `class_decoder`, applied to each row.
    """
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(
            f"{path}: two columns of {schema.names} have the same name: rename one"
        )
    number = 0
    for batch in batches:
        for start in range(0, len(batch), _BATCH):
            part = batch.slice(start, _BATCH)
            # Offsets of a damaged file would be followed out of its memory.
            part.validate(full=True)
            for row in _to_rows(part):
                number += 1
                yield number, decode(row, f"{path}:{number}:") if decode else row


# What pyarrow raises for a date after 9999, an unknown time zone, a name twice.
_NOT_PYTHON = (ValueError, ArithmeticError, LookupError, NotImplementedError)


def _to_rows(part: Any) -> list[dict[str, Any]]:
    """Convert a batch or table, with what Python cannot hold as `Unreadable`."""
    try:
        return part.to_pylist()
    except _NOT_PYTHON:
        columns = [map(_as_python, column) for column in part.columns]
        rows = zip(*columns, strict=True)
        return [dict(zip(part.schema.names, row, strict=True)) for row in rows]


def _as_python(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except _NOT_PYTHON as error:
        return Unreadable(scalar.type, error)


def _metadata_decoder(schema: pa.Schema, path: str) -> Decoder | None:
    """Return the decoder of the classes in a file's metadata of Hugging Face."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        info = _as_object(parse_json(text.decode(), "it")).get("info", {})
        features = _as_object(info).get("features")
        return None if features is None else class_decoder(_as_object(features))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its metadata 'huggingface' cannot be read ({error}): write the "
            "file again, or without it"
        ) from None


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{reprlib.repr(value)} is {kind_of(value)}, and should be an object"
        )
    return value


def class_decoder(feature: Any) -> Decoder | None:
    """Return what replaces class indices in a value by `ClassName`s.

    An index below 0, which stands for a missing label, becomes None. One without a
    name is a ValueError.

    Args:
      feature: of Hugging Face data sets, as JSON.

    Returns:
      A function of the value and its place; None if there are no classes in it.

    Raises:
      ValueError: it is no such feature.
    """
    if isinstance(feature, list) and len(feature) == 1:
        return _list_decoder(feature[0])
    if not isinstance(feature, dict):
        raise ValueError(f"the feature {reprlib.repr(feature)} is {kind_of(feature)}")
    kind = feature.get("_type")
    if kind == "ClassLabel":
        names = _parse_names(feature.get("names"))
        return lambda value, where: _class_name(value, names, where)
    if isinstance(kind, str):
        return _list_decoder(feature["feature"]) if "feature" in feature else None
    return _object_decoder(feature, class_decoder)


def _parse_names(names: Any) -> tuple[str, ...]:
    texts = tuple(map(str, names)) if isinstance(names, list) else ()
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str | int) for name in names)
        or len(set(texts)) < len(texts)
    ):
        raise ValueError(
            f"the class names {reprlib.repr(names)} are no list of different texts"
        )
    return texts


def _list_decoder(feature: Any) -> Decoder | None:
    """Return the decoder of a sequence; one of objects may be stored as lists."""
    decode = class_decoder(feature)
    if decode is None:
        return None
    decode_lists = None
    if isinstance(feature, dict) and not isinstance(feature.get("_type"), str):
        decode_lists = _object_decoder(feature, _list_decoder)

    def decode_list(value: Any, where: str) -> Any:
        if isinstance(value, dict) and decode_lists:
            return decode_lists(value, where)
        if value is not None and not isinstance(value, list):
            raise _other_kind(value, where, "a list")
        return value and [decode(item, where) for item in value]

    return decode_list


def _object_decoder(
    features: Mapping[str, Any], make: Callable[[Any], Decoder | None]
) -> Decoder | None:
    """Return the decoder of an object, whose members' decoders `make` makes."""
    decoders = {name: d for name, f in features.items() if (d := make(f))}
    if not decoders:
        return None

    def decode_object(value: Any, where: str) -> Any:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise _other_kind(value, where, "an object")
        return {
            name: decoders[name](v, f"{where} {name}") if name in decoders else v
            for name, v in value.items()
        }

    return decode_object


def _class_name(value: Any, names: tuple[str, ...], where: str) -> Any:
    if value is None or (isinstance(value, str) and value in names):
        return value
    is_index = isinstance(value, int) and not isinstance(value, bool)
    if not is_index or value >= len(names):
        raise ValueError(
            f"{where}={reprlib.repr(value)} is no index of the {len(names)} classes "
            f"{reprlib.repr(list(names))}: correct it, or the names of the classes"
        )
    return ClassName(value, names) if value >= 0 else None


def _other_kind(value: Any, where: str, expected: str) -> ValueError:
    return ValueError(
        f"{where}={reprlib.repr(value)} is {kind_of(value)}, not {expected} as its "
        "features say: write the data again"
    )


def kind_of(value: Any) -> str:
    """Return the kind of a value in words, for errors."""
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({value.reason})"
    kinds = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(value).__name__)
    return kinds.get(type(value), name)


READERS: dict[str, Callable[[DataFile], Iterator[tuple[int, Values]]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
