"""Advisory locks of folders: one writer at a time, on one machine or several.

A lock is a file `.lock` with its owner: host, process, command and time. It appears
with its content in one step (a hard link), and its owner touches it every few seconds,
by the clock of the file system. So it holds over NFS, too.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Protocol

from kdjax.runtime import files

LOCK = ".lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # an owner on another machine that was silent so long is dead
_GUARD_ATTEMPTS, _GUARD_SECONDS = 250, 0.02
# Of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_held: "dict[object, Checked]" = {}  # by this process


class Checked(Protocol):
    """A lock of any kind."""

    def check(self) -> None:
        """Raise ValueError if it was taken over."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    start: int  # of the process, clock ticks after boot; 0 = unknown
    machine: str  # kernel and process namespace: pids of equal ones can be compared
    command: str
    since: str  # local time
    token: str  # of this one lock

    def __str__(self) -> str:
        return f"{self.command} (host {self.host}, pid {self.pid}, since {self.since})"


class Lock:
    """The lock of a file, taken or not.

    Args:
      file: the lock; its folder is made.
      name: of what it stands for, for errors: "workdir='runs/x'".
      remedy: what else to use, for errors: "another --workdir".
    """

    def __init__(self, file: pathlib.Path, *, name: str, remedy: str) -> None:
        self._file, self._name, self._remedy = file.absolute(), name, remedy
        self._token = uuid.uuid4().hex
        self._descriptor = -1
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; one whose owner is dead is taken over.

        Raises:
          ValueError: another process holds it, which is named.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with _guard(self._file.parent):
            while not self._create():
                self._remove_dead()
        _held[self._file] = self
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, if it is still this process's own."""
        if self._pid != os.getpid() or self._released.is_set():
            return  # a fork's copy
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        _held.pop(self._file, None)
        if self.is_held():
            self._file.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def is_held(self) -> bool:
        """Return True if the file is still the one that this process made."""
        owner = _read(self._file)[0]
        return owner is not None and owner.token == self._token

    def check(self) -> None:
        """Check that the lock was not taken over.

        Raises:
          ValueError: it was, since this process stood still for too long.
        """
        if not self.is_held():
            owner = _read(self._file)[0]
            raise ValueError(
                f"{self._name} was taken over by {owner or 'another process'}: this "
                f"process stood still for more than {STALE_SECONDS:.0f} s, or its lock "
                f"{self._file} was removed; nothing more is written"
            )

    def _create(self) -> bool:
        """Make the file with its content in one step; False if there is one."""
        temporary = files.temporary(self._file)
        owner = Owner(
            host=socket.gethostname(),
            pid=self._pid,
            start=files.process_start(self._pid),
            machine=files.machine(),
            command=pathlib.Path(sys.argv[0]).stem or "python",
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=self._token,
        )
        content = json.dumps(dataclasses.asdict(owner), indent=2) + "\n"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        try:
            temporary.write_text(content)
            os.link(temporary, self._file)
            self._descriptor = os.open(self._file, os.O_RDWR)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                self._descriptor = os.open(self._file, flags, 0o644)
            except FileExistsError:
                return False
            os.write(self._descriptor, content.encode())
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a help, where file systems have it
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True

    def _remove_dead(self) -> None:
        """Remove the file if its owner is dead.

        Raises:
          ValueError: it is alive.
        """
        owner, modified = _read(self._file)
        if modified is None:  # it is gone
            return
        if not _is_dead(self._file, owner, modified):
            who = owner or f"a process that {self._file} does not name"
            raise ValueError(
                f"{self._name} is being written by {who}: wait for its end, or use "
                f"{self._remedy}"
            )
        # Whoever else came to this conclusion may have made a new one: what was moved
        # away must be what was read.
        aside = files.temporary(self._file)
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
            if _read(aside)[0] != owner:
                with contextlib.suppress(OSError):
                    os.link(aside, self._file)
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Touch the file from time to time."""
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # `check` says what is lost
                os.utime(self._descriptor)


@contextlib.contextmanager
def hold(
    folder: str | os.PathLike,
    *,
    name: str = "workdir",
    remedy: str = "another --workdir",
    file: str = LOCK,
    shown: str = "",
) -> Iterator[Lock]:
    """Hold the lock of a folder; leftovers of dead processes in it are cleared.

    Args:
      folder: made when missing.
      name: of the folder's flag or field, for errors.
      remedy: what else to use, for errors.
      file: name of the lock in the folder.
      shown: in errors, in place of name=folder.

    Raises:
      ValueError: another process holds it: host, pid and time are named.
    """
    path = pathlib.Path(folder)
    existed = path.is_dir()
    shown = shown or f"{name}={str(folder)!r}"
    lock = Lock(path / file, name=shown, remedy=remedy)
    lock.acquire()
    try:
        # Of a lock beside a folder its own alone: other temporary names are not its.
        files.clear_leftovers(path, "" if file == LOCK else file)
        yield lock
    finally:
        lock.release()
        if not existed:  # a failure leaves nothing where there was nothing
            with contextlib.suppress(OSError):
                path.rmdir()


def clear(folder: str | os.PathLike) -> None:
    """Remove the lock of a folder, and leftovers, if its owner is dead.

    For a folder that is complete, which nobody will lock again.
    """
    if (pathlib.Path(folder) / LOCK).exists():
        with contextlib.suppress(OSError, ValueError), hold(folder):
            pass


def check() -> None:
    """Check that no lock of this process was taken over.

    Raises:
      ValueError: one was.
    """
    for lock in list(_held.values()):
        lock.check()


@contextlib.contextmanager
def checked(lock: Checked) -> Iterator[None]:
    """Have `check` look at a lock of another kind, too, while the block runs."""
    _held[lock] = lock
    try:
        yield
    finally:
        del _held[lock]


def holder(folder: str | os.PathLike, file: str = LOCK) -> Owner | None:
    """Return the living owner of a folder's lock; None if there is none."""
    path = pathlib.Path(folder) / file
    owner, modified = _read(path)
    if owner is None or modified is None or _is_dead(path, owner, modified):
        return None
    return owner


def _read(file: pathlib.Path) -> tuple[Owner | None, float | None]:
    """Return the owner of a lock (None: not readable) and when it was last touched."""
    try:
        with file.open("rb") as stream:
            content = stream.read(1 << 16)
            modified = os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None, None
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):
        owner = None
    return owner, modified


def _now(folder: pathlib.Path) -> float:
    """Return the time by the clock of a folder's file system."""
    probe = files.temporary(folder / LOCK)
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # not writable
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_dead(file: pathlib.Path, owner: Owner | None, modified: float) -> bool:
    """Return True if the owner of a lock, last touched then, cannot be alive."""
    if owner is not None and owner.machine == files.machine():
        return not files.is_running(owner.pid, owner.start)
    if owner is not None and owner.machine.split()[0] == files.machine().split()[0]:
        # Another container of this machine: its pids say nothing, its flock does.
        with contextlib.suppress(OSError), file.open("rb+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return _now(file.parent) - modified > STALE_SECONDS


@contextlib.contextmanager
def _guard(folder: pathlib.Path) -> Iterator[None]:
    """Let one process of this machine at a time look at a lock and replace it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(_GUARD_ATTEMPTS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_GUARD_SECONDS)
            except OSError:  # none on this file system: `_remove_dead` looks twice
                break
            else:
                break
        yield
    finally:
        os.close(descriptor)
