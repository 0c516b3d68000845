"""How far a run has come and when it last gave a sign of life, read from its files."""

import collections
import contextlib
import json
import math
import os
import pathlib
import re
import statistics
import time
from collections.abc import Iterator

from kdjax.runtime.metrics_writer import METRICS

_OWN_FILES = re.compile(r"attempts(-\d+)?\.jsonl|\..*lock")  # no progress of the run
_TAIL_BYTES = 1 << 16  # of metrics.jsonl: more than a row has
_NUM_INTERVALS = 100  # the last ones, whose median counts
_LEAST_INTERVALS = 3
_LONGEST_FACTOR = 3.0
_DEPTH = 3  # folders below the working directory that are looked at
_SCAN_SECONDS = 5.0  # between two looks at all files


class Progress:
    """The files of a run, read again and again; nothing is written.

    A sign of life is a row of metrics.jsonl, another file that is new or has grown, or
    output.

    Args:
      workdir: of the run; it need not exist.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir = workdir
        self._files: dict[str, tuple[int, int]] = {}  # path -> size, time
        self._metrics: dict[pathlib.Path, tuple[int, int]] = {}
        self._rows: dict[pathlib.Path, int] = {}  # metrics.jsonl -> its newest step
        self._intervals: collections.deque[float] = collections.deque(
            maxlen=_NUM_INTERVALS
        )
        self._longest = 0.0  # seconds between two signs of life once there are rows
        self._last_row: float | None = None
        self._next_scan = 0.0
        self._life = time.monotonic()
        self.first_step = self.step

    @property
    def step(self) -> int:
        """Return the newest step of metrics.jsonl; 0 if there is none."""
        self._read_metrics()
        return self._rows.get(self._workdir / METRICS, 0)

    @property
    def saved_step(self) -> int:
        """Return the step of the newest complete checkpoint; 0 if there is none."""
        return _saved_step(self._workdir)

    def durable(self) -> tuple[int, ...]:
        """Return what a new attempt would go on from; compared with an earlier one.

        Steps of the teacher and of the student that are saved, the bytes of the
        teacher, caches, prepared data and annotations, and the number of summaries.
        """
        names = ("teacher", "cache", "prepared", "annotations")
        sizes = [_num_bytes(self._workdir / name) for name in names]
        summaries = sum(1 for _ in self._workdir.glob("summary.json"))
        teacher = _saved_step(self._workdir / "teacher_run")
        return (teacher, *sizes, self.saved_step, summaries)

    def start(self) -> None:
        """Begin to watch an attempt: what is there is no sign of its life."""
        self._intervals.clear()
        self._last_row = None
        self._read_metrics()
        self._files = dict(self._scan())
        self.first_step = self.saved_step
        self._next_scan = 0.0
        self._life = time.monotonic()

    def poll(self, now: float, output_time: float) -> None:
        """Look for signs of life.

        Args:
          now: time.monotonic().
          output_time: when the gang last wrote something, by the same clock.
        """
        alive, life, has_rows = output_time > self._life, output_time, self._last_row
        if self._read_metrics():
            if self._last_row is not None:
                self._intervals.append(now - self._last_row)
            self._last_row, alive, life = now, True, now
        if now >= self._next_scan:
            self._next_scan = now + _SCAN_SECONDS
            files = dict(self._scan())
            if files != self._files:
                self._files, alive, life = files, True, now
        if alive:
            if has_rows is not None:  # what comes before compiles
                self._longest = max(self._longest, life - self._life)
            self._life = max(self._life, life)

    def age(self, now: float) -> float:
        """Return the seconds since the last sign of life."""
        return now - self._life

    def forgive(self, seconds: float) -> None:
        """Leave a time out of account, in which this process itself stood still."""
        self._life += seconds
        if self._last_row is not None:
            self._last_row += seconds

    def limit(self, *, medians: float, least: float, quiet: float) -> float:
        """Return the age, seconds, at which the gang counts as hung.

        max(least, medians x the median time between rows of metrics.jsonl, 3 x the
        longest silence so far) once there are rows of this attempt, else `quiet`.
        """
        if len(self._intervals) < _LEAST_INTERVALS:
            return max(quiet, least) if quiet else math.inf
        median = statistics.median(self._intervals)
        return max(least, medians * median, _LONGEST_FACTOR * self._longest)

    @property
    def median(self) -> float:
        """Return the median seconds between rows of this attempt; nan without any."""
        return statistics.median(self._intervals) if self._intervals else math.nan

    def _read_metrics(self) -> bool:
        """Read the newest rows; True if there is a new one."""
        new = False
        for folder in (self._workdir, self._workdir / "teacher_run"):
            file = folder / METRICS
            try:
                stat = file.stat()
            except OSError:
                continue
            if self._metrics.get(file) == (stat.st_size, stat.st_mtime_ns):
                continue
            self._metrics[file] = stat.st_size, stat.st_mtime_ns
            step = _last_step(file, stat.st_size)
            new |= step > self._rows.get(file, 0)
            self._rows[file] = step
        return new

    def _scan(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the files below the working directory with their sizes and times."""
        folders = [(str(self._workdir), _DEPTH)]
        while folders:
            folder, depth = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError:  # not there yet, or removed meanwhile
                continue
            for entry in entries:
                try:
                    if _OWN_FILES.fullmatch(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if depth > 1:
                            folders.append((entry.path, depth - 1))
                        continue
                    stat = entry.stat()
                except OSError:
                    continue
                yield entry.path, (stat.st_size, stat.st_mtime_ns)


def _last_step(file: pathlib.Path, size: int) -> int:
    """Return the step of the last complete row of a metrics.jsonl; 0 without one."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read(_TAIL_BYTES).split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _saved_step(workdir: pathlib.Path) -> int:
    try:
        names = [path.name for path in (workdir / "checkpoints").iterdir()]
    except OSError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _num_bytes(folder: pathlib.Path) -> int:
    """Add up a folder's files; what is not complete has a hidden name."""
    total = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                with contextlib.suppress(OSError):
                    total += os.path.getsize(os.path.join(parent, name))
    return total
