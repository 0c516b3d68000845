"""attempts.jsonl: a line when an attempt starts, and one when it has ended, and why."""

import errno
import json
import os
import pathlib
import socket
import time
from typing import Any

ATTEMPTS = "attempts.jsonl"


class Attempts:
    """The file of a working directory; lines that a full disk refuses are kept.

    Args:
      file: made when missing; an attempt in it that has not ended was lost with its
        supervisor, which is noted.
    """

    def __init__(self, file: pathlib.Path) -> None:
        self._file = file
        self._pending: list[str] = []
        rows = _read(file)
        numbers = [row.get("attempt", 0) for row in rows]
        self.number = max((n for n in numbers if isinstance(n, int)), default=0)
        if rows and rows[-1].get("event") == "started":
            last = rows[-1]
            self._append(
                {
                    "event": "ended",
                    "attempt": self.number,
                    "outcome": "lost",
                    "cause": f"the supervisor (host {last.get('host')}, pid "
                    f"{last.get('pid')}) was killed, or its machine lost",
                }
            )

    def started(self, **fields: Any) -> None:
        """Note the start of the next attempt."""
        self.number += 1
        host = {"host": socket.gethostname(), "pid": os.getpid()}
        self._append({"event": "started", "attempt": self.number} | host | fields)

    def ended(self, **fields: Any) -> None:
        """Note the end of the attempt that was started last."""
        self._append({"event": "ended", "attempt": self.number} | fields)

    def flush(self) -> None:
        """Write what could not be written before, if that works now."""
        while self._pending:
            try:
                _append(self._file, self._pending[0].encode())
            except OSError:
                return
            del self._pending[0]

    def _append(self, row: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        self._pending.append(json.dumps({"time": f"{now}Z"} | row) + "\n")
        self.flush()


def _append(file: pathlib.Path, line: bytes) -> None:
    """Append a line, or nothing: Python's own buffer would try again at close.

    Raises:
      OSError: there is no room for all of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        start = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)
            raise
    finally:
        os.close(descriptor)


def _read(file: pathlib.Path) -> list[dict[str, Any]]:
    """Read the lines that are complete."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a crash
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
