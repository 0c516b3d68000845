"""Reads of files that others wrote: plain files of bounded size, strict JSON.

A folder from a stranger may hold a pipe that never answers, a device without an end or
a link to another folder. Nothing here waits, and what is read is bounded by `limits`.
"""

import io
import json
import os
import pathlib
import re
import stat
from typing import Any, NoReturn

from kdjax.runtime import limits

_MAX_QUOTED = 80  # characters quoted in an error


def open_plain(path: str | os.PathLike) -> io.FileIO:
    """Open a plain file for reading, unbuffered, without waiting for anything.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is a folder, a pipe, a device or a socket, or a loop of links.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may move it
            raise ValueError(f"{path!s} is no plain file: put one in its place")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        file = open(os.open(path, flags), "rb", buffering=0)  # noqa: SIM115 - returned
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise ValueError(f"{path!s} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path!s} is no plain file: put one in its place")
    return file


def check_inside(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Raise ValueError if `path` leads out of `folder`, by its name or by links."""
    inner, outer = (pathlib.Path(os.path.realpath(p)) for p in (path, folder))
    if not inner.is_relative_to(outer):
        raise ValueError(
            f"{path!s} leads out of {folder!s}: put the file itself into the folder"
        )


def read_bytes(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """Read a whole plain file.

    Raises:
      ValueError: it is larger than `max_bytes`, or as `open_plain`.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, max_bytes) + 1) if size <= max_bytes else b""
        while size <= max_bytes and len(data) < size:
            if not (more := file.read(size - len(data))):
                break
            data += more
    if size > max_bytes:
        raise ValueError(f"{path!s} has {size} bytes, at most {max_bytes} are read")
    return data


def read_json(
    path: str | os.PathLike, *, max_bytes: int = limits.MAX_JSON_BYTES
) -> Any:
    """Read a JSON file, as `parse_json` does."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), str(path))


def parse_json(data: bytes, where: str, *, constants: bool = False) -> Any:
    """Parse a JSON document strictly.

    Args:
      data: UTF-8.
      where: its place, for errors.
      constants: NaN and the infinities, which Python's own writer makes, are read too.

    Raises:
      ValueError: in one line that names `where`: no JSON, a name that comes twice in
        an object, NaN, a number of thousands of digits, nesting of hundreds of levels,
        or more than `limits` allow.
    """
    containers = data.count(b"{") + data.count(b"[")
    if len(data) > limits.MAX_JSON_BYTES or containers > limits.MAX_JSON_CONTAINERS:
        raise ValueError(
            f"{where}: {len(data)} bytes of JSON with {containers} brackets, at most "
            f"{limits.MAX_JSON_BYTES} and {limits.MAX_JSON_CONTAINERS} are read"
        )
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=None if constants else _refuse_constant,
        )
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # not UTF-8 either
        reason = quote(str(error))
    raise ValueError(f"{where} is no valid JSON: {reason}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{quote(twice)} comes twice in an object")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def quote(value: Any) -> str:
    """Return a value as short text on one line, without control characters."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\uffff]", " ", text).split())
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
