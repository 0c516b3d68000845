"""Annotations on disk: rows as they are finished, and the results made of them.

  settings.json       settings of the rows; a later start must agree
  parts/part-N.jsonl  the rows of process N, in the order in which they were finished
  rationales.jsonl    the rows that pass the filters, in the data's order;
                      counterfactuals.jsonl for wrong choices, labels.jsonl for answers
  dropped.jsonl       the other rows
  report.json         counts

A part only grows. A last line that a kill cut short is no row; it is written again.
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
    """Return the key of a row."""
    return row["id"], row.get("choice", "")


def claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Write the settings of a folder, or check that it has the same.

    Raises:
      ValueError: its rows were made with others; those that differ are named.
    """
    file = folder / "settings.json"
    if file.exists():
        before = files.read_json(
            file, remedy="remove it, if these are the settings of the rows"
        )
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
    """Read all complete rows of all parts.

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


class PartWriter:
    """Appends the rows of one process to its part; a context manager.

    Raises:
      ValueError: another process has it open.
    """

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        """Open the part and cut off an unfinished line."""
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

    def __enter__(self) -> "PartWriter":
        """Return self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Sync and close the file."""
        with contextlib.closing(self._file):
            self._file.flush()
            os.fsync(self._file.fileno())

    def append(self, row: Row) -> None:
        """Append a row; it survives if the process is killed next."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()


def write_rows(file: pathlib.Path, rows: list[Row]) -> None:
    """Write rows as jsonl."""
    _write(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(file: pathlib.Path, content: Any) -> None:
    """Write an indented JSON value."""
    _write(file, json.dumps(content, indent=2) + "\n")


def _write(file: pathlib.Path, text: str) -> None:
    """Write a text atomically; a file with this content is not touched."""
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        files.write_atomically(file, text)
