"""Annotations on disk: what is written row by row, and what is made of it at the end.

  settings.json       what the rows were made with; another start must agree
  parts/part-N.jsonl  the rows of process N, in the order in which they were finished
  rationales.jsonl    the rows that are kept, in the data's order; counterfactuals.jsonl
                      where they are those of wrong choices
  dropped.jsonl       those that are not
  report.json         counts

A part only grows. A last line that a kill cut short is no row: whoever owns its example
writes it again.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from kdjax.parallel import distributed
from kdjax.runtime import files

Key = tuple[str, str]  # id, and the choice that is explained if there are several
Row = dict[str, Any]


def key_of(row: Row) -> Key:
    """The key of a row."""
    return row["id"], row.get("choice", "")


def claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes a folder that of these settings, or checks that it is.

    Raises:
      ValueError: its rows were made with others; those that differ are named.
    """
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [
            f"{name}: {before.get(name)!r} -> {settings.get(name)!r}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"annotate.path={str(folder)!r} holds annotations of other settings "
                f"({'; '.join(changed)}): use another annotate.path, or remove it"
            )
    distributed.barrier("claim annotations")
    if distributed.is_main() and not file.exists():
        write_json(file, settings)


def read(folder: pathlib.Path) -> Iterator[Row]:
    """All whole rows of all parts.

    Raises:
      ValueError: a line, other than a part's last one, that is not a row.
    """
    for file in sorted((folder / "parts").glob("part-*.jsonl")):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{file}:{number} is not JSON ({error}): remove the line; its "
                        "row is made again"
                    ) from error


class Part:
    """The rows that one process appends; a context manager.

    Raises:
      ValueError: another process has it open.
    """

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        """Opens the part and cuts off an unfinished line."""
        path = folder / "parts" / f"part-{number:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{path} is being written by another process: wait for its end"
            ) from None
        self._file.seek(0)
        length = sum(len(line) for line in self._file if line.endswith(b"\n"))
        if length < self._file.tell():
            self._file.truncate(length)

    def __enter__(self) -> "Part":
        """Returns self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes."""
        with contextlib.closing(self._file):
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, row: Row) -> None:
        """Writes a row; it is there even if the process is killed next."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()


def write_rows(file: pathlib.Path, rows: list[Row]) -> None:
    """Rows as jsonl."""
    _write(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(file: pathlib.Path, content: Any) -> None:
    """One indented JSON value."""
    _write(file, json.dumps(content, indent=2) + "\n")


def _write(file: pathlib.Path, text: str) -> None:
    """Write a text atomically; a file with that content is left untouched."""
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        files.write_atomically(file, text)
