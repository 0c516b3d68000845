"""Answers on disk: an SQLite file that is only appended to.

An answer is a row; a later one of the same page counts instead of it. Triggers refuse
changes, and deletion but by withdrawal. The file is in WAL mode with synchronous=FULL:
what was acknowledged survives the death of the process and a power cut.
"""

import contextlib
import dataclasses
import json
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

ANSWERS = "answers.sqlite3"
PANEL = ("PROLIFIC_PID", "STUDY_ID", "SESSION_ID")
_BUSY_SECONDS = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS participants (
  id TEXT PRIMARY KEY, token TEXT UNIQUE NOT NULL, number INTEGER NOT NULL,
  started REAL NOT NULL, seen REAL NOT NULL, finished REAL, failed INTEGER,
  code TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS panel (
  participant TEXT PRIMARY KEY REFERENCES participants(id),
  pid TEXT UNIQUE NOT NULL, study TEXT NOT NULL, session TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  participant TEXT NOT NULL REFERENCES participants(id),
  page INTEGER NOT NULL, fields TEXT NOT NULL, complete INTEGER NOT NULL,
  seconds REAL NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS answers_of ON answers (participant, page, id);
CREATE TABLE IF NOT EXISTS withdrawals (at REAL NOT NULL, last_page INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS withdrawing (participant TEXT PRIMARY KEY);
CREATE TRIGGER IF NOT EXISTS append_only BEFORE UPDATE ON answers
  BEGIN SELECT RAISE(ABORT, 'answers are only appended'); END;
CREATE TRIGGER IF NOT EXISTS keep BEFORE DELETE ON answers
  WHEN OLD.participant NOT IN (SELECT participant FROM withdrawing)
  BEGIN SELECT RAISE(ABORT, 'answers are deleted by withdrawal alone'); END;
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Participant:
    """A person who takes part; nothing here is known from elsewhere."""

    id: str
    number: int  # whose pages it sees
    started: float  # seconds since 1970
    finished: float | None
    failed: int | None  # attention checks, once finished
    code: str  # proves that it finished


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What counts of the answers to a page."""

    version: int  # of the latest row
    fields: dict[str, int]
    complete: bool
    seconds: float  # on the page, all visits together that ended with an answer


class StorageError(Exception):
    """An answer was not stored; all earlier ones are safe."""

    def __init__(self, error: sqlite3.Error) -> None:
        super().__init__(str(error))
        text = str(error).lower()
        self.is_full = "full" in text or "disk i/o" in text


class Answers:
    """The file of a study's answers.

    Args:
      file: made when missing.
    """

    def __init__(self, file: pathlib.Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._local = threading.local()
        self._writer = self._connect()
        self._writer.executescript(_SCHEMA)

    def join(
        self,
        participant: str,
        token: str,
        code: str,
        *,
        num_places: int,
        idle_seconds: float,
        exclude_failed: int,
        panel: Sequence[str] = (),
    ) -> Participant | None:
        """Add a person at the first free place; one who is there stays.

        Places of people who failed the checks, or stopped long ago, are free again.

        Args:
          participant: new id.
          token: hash of what the person's cookie holds.
          code: for the end.
          num_places: people whom the study wants.
          idle_seconds: without an answer, after which a place is free.
          exclude_failed: failed checks from which on it is.
          panel: PROLIFIC_PID, STUDY_ID, SESSION_ID; () = none.

        Returns:
          The person; None if there is no place.

        Raises:
          StorageError: the person was not stored.
          PanelError: the panel's person takes part already.
        """
        now = time.time()
        with self._transaction() as connection:
            if known := self._participant(connection, "id = ?", participant):
                return known
            if (
                panel
                and connection.execute(
                    "SELECT 1 FROM panel WHERE pid = ?", panel[:1]
                ).fetchone()
            ):
                raise PanelError
            rows = connection.execute(
                "SELECT DISTINCT number FROM participants WHERE"
                " (finished IS NOT NULL AND failed < ?)"
                " OR (finished IS NULL AND seen > ?)",
                (exclude_failed, now - idle_seconds),
            )
            taken = {number for (number,) in rows}
            free = (n for n in range(num_places) if n not in taken)
            number = next(free, None)
            if number is None:
                return None
            connection.execute(
                "INSERT INTO participants VALUES (?, ?, ?, ?, ?, NULL, NULL, ?)",
                (participant, token, number, now, now, code),
            )
            if panel:
                connection.execute(
                    "INSERT INTO panel VALUES (?, ?, ?, ?)", (participant, *panel)
                )
            return self._participant(connection, "id = ?", participant)

    def find(self, token: str) -> Participant | None:
        """Return the person with a token's hash."""
        return self._participant(self._reader(), "token = ?", token)

    def find_panel(self, panel: Sequence[str]) -> Participant | None:
        """Return the person with all three numbers of a panel."""
        return self._participant(
            self._reader(),
            "id = (SELECT participant FROM panel"
            " WHERE pid = ? AND study = ? AND session = ?)",
            *panel,
        )

    def replace_token(self, participant: str, token: str) -> None:
        """Give a person another token; the former one is no longer valid."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE participants SET token = ? WHERE id = ?", (token, participant)
            )

    def latest(self, participant: str) -> dict[int, Answer]:
        """Return what counts of a person's answers, by page."""
        rows = self._reader().execute(
            "SELECT page, id, fields, complete, seconds FROM answers"
            " WHERE participant = ? ORDER BY id",
            (participant,),
        )
        pages: dict[int, Answer] = {}
        for page, version, fields, complete, seconds in rows:
            before = pages[page].seconds if page in pages else 0.0
            pages[page] = Answer(
                version=version,
                fields=json.loads(fields),
                complete=bool(complete),
                seconds=before + seconds,
            )
        return pages

    def append(
        self,
        participant: str,
        page: int,
        fields: Mapping[str, int],
        *,
        version: int,
        complete: bool,
        seconds: float,
    ) -> bool:
        """Store an answer; on return it is on disk.

        Args:
          participant: id.
          page: index.
          fields: of the form.
          version: of the answer that the person saw; 0 = none.
          complete: all that is needed is there.
          seconds: since the page was shown.

        Returns:
          False, and nothing is stored, if there is another one since `version`, or the
          person has finished or is gone. The same answer again is stored once.

        Raises:
          StorageError: it was not stored.
        """
        text = json.dumps(dict(sorted(fields.items())))
        with self._transaction() as connection:
            person = self._participant(connection, "id = ?", participant)
            if person is None or person.finished is not None:
                return False
            row = connection.execute(
                "SELECT id, fields, complete FROM answers"
                " WHERE participant = ? AND page = ? ORDER BY id DESC LIMIT 1",
                (participant, page),
            ).fetchone()
            if row is not None and row[1] == text and row[2] == complete:
                return True
            if version != (row[0] if row else 0):
                return False
            now = time.time()
            connection.execute(
                "INSERT INTO answers (participant, page, fields, complete, seconds, at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (participant, page, text, complete, seconds, now),
            )
            connection.execute(
                "UPDATE participants SET seen = ? WHERE id = ?", (now, participant)
            )
        return True

    def finish(self, participant: str, *, failed: int) -> None:
        """Note that a person has finished, with the number of failed checks."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE participants SET finished = ?, failed = ?"
                " WHERE id = ? AND finished IS NULL",
                (time.time(), failed, participant),
            )

    def withdraw(self, participant: str) -> None:
        """Delete a person and all of its answers, from the disk too."""
        with self._transaction() as connection:
            connection.execute("INSERT INTO withdrawing VALUES (?)", (participant,))
            (last,) = connection.execute(
                "SELECT coalesce(max(page), -1) FROM answers WHERE participant = ?",
                (participant,),
            ).fetchone()
            for table in ("answers", "panel", "withdrawing"):
                connection.execute(
                    f"DELETE FROM {table} WHERE participant = ?", (participant,)
                )
            connection.execute("DELETE FROM participants WHERE id = ?", (participant,))
            connection.execute(
                "INSERT INTO withdrawals VALUES (?, ?)", (time.time(), last)
            )
        with self._lock, contextlib.suppress(sqlite3.Error):
            # Pages are zeroed (secure_delete); the log still has the old ones.
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def participants(self) -> list[Participant]:
        """Return all people, in the order in which they started."""
        rows = self._reader().execute(
            f"SELECT {_COLUMNS} FROM participants ORDER BY started, id"
        )
        return [_participant(row) for row in rows]

    def num_withdrawn(self) -> int:
        """Return how many people have withdrawn."""
        return self._reader().execute("SELECT count(*) FROM withdrawals").fetchone()[0]

    def panel(self) -> list[tuple[str, ...]]:
        """Return the panel's numbers of all people, sorted, with end and code."""
        rows = self._reader().execute(
            "SELECT pid, study, session, finished, code FROM panel"
            " JOIN participants ON participants.id = participant ORDER BY pid"
        )
        return [
            (pid, study, session, str(int(finished is not None)), code)
            for pid, study, session, finished, code in rows
        ]

    def seen(self, participant: str) -> float:
        """Return when a person last answered, seconds since 1970."""
        row = (
            self._reader()
            .execute("SELECT seen FROM participants WHERE id = ?", (participant,))
            .fetchone()
        )
        return row[0] if row else 0.0

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; connections of other threads close with them."""
        with self._lock:
            self._writer.close()

    def _participant(
        self, connection: sqlite3.Connection, where: str, *values: str
    ) -> Participant | None:
        row = connection.execute(
            f"SELECT {_COLUMNS} FROM participants WHERE {where}", values
        ).fetchone()
        return _participant(row) if row else None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the one writer; what is written is on disk at the end, or not at all."""
        with self._lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise StorageError(error) from error
                raise

    def _reader(self) -> sqlite3.Connection:
        """Return this thread's connection, which waits for no writer."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect()
        return self._local.connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._file,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


class PanelError(Exception):
    """A person of the panel takes part already, in another session."""


_COLUMNS = "id, number, started, finished, failed, code"


def _participant(row: Sequence) -> Participant:
    identity, number, started, finished, failed, code = row
    return Participant(
        id=identity,
        number=number,
        started=started,
        finished=finished,
        failed=failed,
        code=code,
    )
