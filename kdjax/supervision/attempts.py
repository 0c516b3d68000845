"""attempts.jsonl: a line when an attempt starts, and one when it has ended, and why."""

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
                self._file.parent.mkdir(parents=True, exist_ok=True)
                start = self._file.stat().st_size if self._file.exists() else 0
                with self._file.open("ab") as stream:
                    try:
                        stream.write(self._pending[0].encode())
                        stream.flush()
                        os.fsync(stream.fileno())
                    except OSError:
                        os.truncate(self._file, start)
                        raise
            except OSError:
                return
            del self._pending[0]

    def _append(self, row: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        self._pending.append(json.dumps({"time": f"{now}Z"} | row) + "\n")
        self.flush()


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
