"""Atomic, durable writes of small files."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def write_atomically(file: str | os.PathLike, content: str | bytes) -> None:
    """Replace the content of a file: after a crash it has the old one or the new one.

    A temporary file beside it is written and fsynced, renamed, and the folder fsynced,
    so that what has returned survives a power cut.

    Args:
      file: path to write; its folders are made.
      content: text is encoded as UTF-8.
    """
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Write an indented JSON value atomically; NaN and infinities become null.

    JSON has no word for them: `NaN`, which Python writes by default, is refused by
    most readers.

    Args:
      file: path to write; its folders are made.
      value: mappings, sequences, text and numbers.
    """
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    write_atomically(file, text + "\n")


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sync(path: str | os.PathLike) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
