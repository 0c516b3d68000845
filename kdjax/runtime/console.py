"""Console output: tables of results and the progress of long work."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.markup
import rich.progress
import rich.table
import rich.text

_SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal to draw a bar on


@functools.cache
def _console(*, stderr: bool = False) -> rich.console.Console:
    """Return the one console of a stream, made at its first use.

    Later than at import: forked processes may have redirected the stream by then.
    """
    return rich.console.Console(stderr=stderr)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table; columns in order of first appearance, "" where there is none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Brackets in names are no markup.
    table = rich.table.Table(title=rich.markup.escape(title))
    for name in columns:
        numeric = all(isinstance(row.get(name, 0), int | float) for row in rows)
        table.add_column(
            rich.markup.escape(name), justify="right" if numeric else "left"
        )
    for row in rows:
        cells = (_cell(row.get(name, "")) for name in columns)
        table.add_row(*map(rich.markup.escape, cells))
    _console().print(table)


def has_colors() -> bool:
    """Return True if stdout is a terminal that shows colours."""
    return _console().is_terminal and not _console().no_color


def print_pieces(pieces: Sequence[tuple[str, str]]) -> None:
    """Print (text, style) one after another, and a line end."""
    _console().print(rich.text.Text.assemble(*pieces), soft_wrap=True)


@contextlib.contextmanager
def progress(
    total: int | None, description: str, *, start: int = 0, is_main: bool = True
) -> Iterator[Callable[..., None]]:
    """Show progress: a bar on a terminal, else a line every few seconds on stderr.

    Yields `advance(amount=1, note="")`, to call when work is done; with an amount of 0
    it shows a note alone.

    Args:
      total: amount of work, any unit; None = not known.
      description: what is being done, one or two words.
      start: work that was done before.
      is_main: False shows nothing.
    """
    if not is_main:
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            console=_console(stderr=True),
        ) as bar:
            task = bar.add_task(description, total=total, completed=start, note="")

            def advance(amount: int = 1, note: str = "") -> None:
                fields: dict[str, Any] = {"note": note} if note else {}
                bar.update(task, advance=amount, **fields)

            yield advance
    else:
        yield _ProgressLines(total, description, start)


class _ProgressLines:
    """Progress as plain lines, for logs."""

    def __init__(self, total: int | None, description: str, start: int) -> None:
        self._total, self._description = total, description
        self._start = self._done = start
        self._start_time = time.monotonic()
        self._last_line_time = -math.inf

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` as done; print a line if the last one is old.

        What comes with an amount of 0 is news, and always printed.
        """
        self._done += amount
        if not amount:
            if note:
                print(f"{self._description}: {note}", file=sys.stderr, flush=True)
            return
        now = time.monotonic()
        age = now - self._last_line_time
        is_last = self._total is not None and self._done >= self._total
        if age < _SECONDS_BETWEEN_LINES and not is_last:
            return
        self._last_line_time = now
        seconds_per_unit = (now - self._start_time) / max(self._done - self._start, 1)
        if self._total is None:
            rate = 1 / max(seconds_per_unit, 1e-9)
            line = f"{self._description} {self._done}  {rate:.0f} per s  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)
            return
        line = (
            f"{self._description} {self._done}/{self._total}  "
            f"{seconds_per_unit * (self._total - self._done):.0f} s left  {note}"
        )
        print(line.rstrip(), file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
